"""Adaptive retrieval: where the search for neighbours is spared (He 2021).

Most of what a search costs is spent on tokens that it does not change: those of which the model is sure, and those that
the ∞-gram has read word for word. Both are known before the search. A position that is not searched has no neighbours,
and the mixture gives their weight to the model; so weights should be fitted with the searches spared that are spared
later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from silo.readings import ModelReading, NgramReading
from silo.retrieval import Neighbours


@dataclass(frozen=True)
class Spare:
    """Which searches are spared."""

    sure: float = math.inf
    """Those where the model's highest probability is at least this."""
    suffix: float = math.inf
    """Those where the context's last tokens, at least so many, are in the store and one token follows them always."""

    def searched(self, lm: ModelReading, ngram: NgramReading | None) -> np.ndarray:
        """(n,) bool: where there is to be a search."""
        spared = lm.top.exp().numpy() >= self.sure
        if ngram is not None:
            matches, at = ngram.matches, ngram.contexts
            spared |= (matches.lengths[at] >= self.suffix) & (matches.single[at] >= 0)
        return ~spared


@dataclass(frozen=True)
class Scattered:
    """The neighbours of some of n positions, spread out; the others have none. A :class:`silo.retrieval.Neighbours`."""

    found: Neighbours
    where: np.ndarray
    """(n,) bool: the positions that have them."""

    @cached_property
    def squared_l2(self) -> np.ndarray:
        """(n, k) float32."""
        return self._spread(self.found.squared_l2, np.inf)

    @cached_property
    def values(self) -> np.ndarray:
        """(n, k) int64."""
        return self._spread(self.found.values, 0)

    @cached_property
    def documents(self) -> np.ndarray:
        """(n, k) int64."""
        return self._spread(self.found.documents, -1)

    @cached_property
    def positions(self) -> np.ndarray:
        """(n, k) int64."""
        return self._spread(self.found.positions, 0)

    def _spread(self, rows: np.ndarray, nothing: float) -> np.ndarray:
        out = np.full((len(self.where), rows.shape[1]), nothing, dtype=rows.dtype)
        out[self.where] = rows
        return out
