"""How the nearest neighbours are looked up (kNN-LM), and where their search is spared: adaptive retrieval.

Most of what a search costs is spent on tokens that it does not change: those of which the model is sure, and those that
the ∞-gram has read word for word (He 2021). Both are known before the search. A position that is spared for that has no
neighbours, and the mixture gives their weight to the model; so weights should be fitted with the searches spared that
are spared later.

Elsewhere the last neighbours know the next ones: where the text goes on as a neighbour's document does, that document's
next key is near, too (RetoMaton, Alon 2022).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, get_args

import numpy as np

from silo.errors import UsageError
from silo.readings import ModelReading, NeighbourReading, NgramReading
from silo.retrieval import PROBES, Metric, Neighbours, NeighbourSource


@dataclass(frozen=True)
class Asked:
    """Successive positions of one text whose neighbours are asked for."""

    keys: np.ndarray
    """(n, d) float32."""
    tokens: np.ndarray
    """(n,) what the text has there; the last is not looked at."""
    lm: Callable[[], ModelReading]
    """What the model says: made when it is asked for, since it is as wide as the vocabulary."""
    ngram: NgramReading | None


@dataclass(frozen=True)
class Spare:
    """Which searches are spared."""

    sure: float = math.inf
    """Those where the model's highest probability is at least this: no neighbours there."""
    suffix: float = math.inf
    """Those where the context's last tokens, at least so many, are in the store and one token follows them always: no
    neighbours there."""
    steps: int = 0
    """Queries in a row that are answered by following the neighbours of the last search. Where a text is read token by
    token, each is searched for."""
    pointers: int = 16
    """There is a search all the same where fewer neighbours can be followed."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.pointers < 1:
            raise UsageError(f"{self.steps} steps with {self.pointers} pointers; expected 0 or more, and at least 1")

    @property
    def asks_the_model(self) -> bool:
        """Whether what the model says decides about a search."""
        return self.sure < math.inf

    def neighbours(self, source: NeighbourSource, pieces: Sequence[Asked], k: int) -> Neighbours:
        """The neighbours of all positions of some pieces, end to end. None is followed from one piece to the next."""
        keys = np.concatenate([piece.keys for piece in pieces])
        where = np.concatenate([self.wanted(piece) for piece in pieces])
        if not self.steps:
            return Scattered(source.search(keys[where], k), where)
        tokens = np.concatenate([piece.tokens for piece in pieces])
        turns = np.concatenate([np.arange(len(piece.keys)) % (self.steps + 1) for piece in pieces])
        return source.follow(keys, tokens, k, turns=turns, pointers=self.pointers, wanted=where)

    def wanted(self, piece: Asked) -> np.ndarray:
        """(n,) bool: where there are to be neighbours."""
        spared = np.zeros(len(piece.keys), dtype=bool)
        if self.asks_the_model:
            spared |= piece.lm().top.exp().numpy() >= self.sure
        if piece.ngram is not None:
            matches, at = piece.ngram.matches, piece.ngram.contexts
            spared |= (matches.lengths[at] >= self.suffix) & (matches.single[at] >= 0)
        return ~spared


@dataclass(frozen=True)
class Nearest:
    """How neighbours are looked up."""

    k: int = 256
    """How many."""
    probes: int = PROBES
    """Inverted lists that are read a query, of each group of shards."""
    metric: Metric = "l2"
    """What is near, as :data:`silo.retrieval.Metric` says."""
    spare: Spare | None = None
    """Which searches are spared, if any."""

    def __post_init__(self) -> None:
        if not all(isinstance(each, Integral) and each >= 1 for each in (self.k, self.probes)):
            raise UsageError(f"{self.k} neighbours of {self.probes} lists; expected at least 1 of each")
        if self.metric not in get_args(Metric):
            raise UsageError(f"nearness by {self.metric!r}; expected one of {', '.join(get_args(Metric))}")

    def to_json(self) -> dict[str, Any]:
        """As a file of a gate holds it. What is never spared is left out: JSON knows no infinity."""
        out = asdict(self)
        if self.spare is not None:
            out["spare"] = {name: value for name, value in out["spare"].items() if value != math.inf}
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Nearest:
        """Read what :meth:`to_json` wrote. Raises TypeError if it is not that, UsageError if it has wrong values."""
        spare = value.get("spare")
        return cls(**{**value, "spare": None if spare is None else Spare(**spare)})


USUAL = Nearest()
"""How they are looked up if nothing else is said."""


def read_neighbours(source: NeighbourSource, pieces: Sequence[Asked], nearest: Nearest) -> list[NeighbourReading]:
    """What the neighbours of some pieces say, all looked up together, which is quicker than one by one."""
    if nearest.spare is not None:
        found = nearest.spare.neighbours(source, pieces, nearest.k)
    else:
        found = source.search(np.concatenate([piece.keys for piece in pieces]), nearest.k)
    ends = np.cumsum([len(piece.keys) for piece in pieces]).tolist()
    cuts = itertools.pairwise([0, *ends])
    return [NeighbourReading(found.part(begin, end), source) for begin, end in cuts]


@dataclass(frozen=True)
class Scattered:
    """The neighbours of some of n positions, spread out; the others have none. A :class:`silo.retrieval.Neighbours`."""

    found: Neighbours
    where: np.ndarray
    """(n,) bool: the positions that have them."""

    @cached_property
    def distances(self) -> np.ndarray:
        """(n, k) float32."""
        return self._spread(self.found.distances, np.inf)

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

    def part(self, begin: int, end: int) -> Scattered:
        """Those of some successive positions."""
        first, last = (int(self.where[:at].sum()) for at in (begin, end))
        return Scattered(self.found.part(first, last), self.where[begin:end])
