"""How well each method has foretold a text so far: evidence that tells a gate what kind of text it is reading.

How sure a model is says little of how right it is on text unlike any that it was taught. A gate that knows entropy and
distances alone, and learns from permissive text, trusts the model too much on restricted text. What each method gave to
the tokens just before is known for every text, and says so (measured: RESULTS.md, the reference experiment).
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from silo.mixture import Parts
    from silo.readings import Evidence

WINDOW = 256
"""Tokens before a position that are looked at."""
FLOOR = 1e-4
"""A probability below it counts as this much."""
KEPT = 16 * WINDOW
"""Tokens that are remembered, since a text may be cut and read on."""
KNOWN = "lm_known"
"""Evidence: the logarithm of 1 + how many tokens were looked at."""


class Past:
    """What the methods gave to the last tokens of one text, which is read in order."""

    def __init__(self) -> None:
        self.end: int | None = None
        """The position that is to be read next; None before any."""
        self._given: dict[str, np.ndarray] = {}
        self._last: Parts | None = None

    def copy(self) -> Past:
        """The same, for a text that goes on in another way."""
        return copy(self)  # nothing is changed in place

    def cut(self, end: int) -> Past:
        """The same as if position ``end`` had still to be read."""
        if self.end is None or end >= self.end:
            return self.copy()
        shorter, surplus = Past(), self.end - (self._last is not None) - end
        if surplus <= 0 or surplus < len(next(iter(self._given.values()), ())):
            shorter.end = end
            shorter._given = {name: given[: len(given) - max(0, surplus)] for name, given in self._given.items()}
        return shorter

    def join(self, parts: Parts, tokens: np.ndarray) -> Parts:
        """The parts that come next, with this evidence.

        Args:
            parts: where they do not begin where the last ones ended, all before is forgotten.
            tokens: of the text, from position 0 on; that at the parts' last position need not be there yet.
        """
        if self.end != parts.begin:
            self._given, self._last = {}, None
        if self._last is not None:
            self._add(self._last, tokens, self._last.end - 1)
        count = len(next(iter(self._given.values()), ()))
        self._add(parts, tokens[: parts.end], parts.begin)
        self._last = parts if len(tokens) < parts.end else None
        self.end = parts.end
        joined = replace(parts, past=self._evidence(count, parts.end - parts.begin))
        self._given = {name: given[-KEPT:] for name, given in self._given.items()}
        return joined

    def _add(self, parts: Parts, tokens: np.ndarray, begin: int) -> None:
        """What is given to the tokens at the parts' positions from ``begin`` on, as far as they are there."""
        nothing, known = np.zeros(0), tokens[parts.begin : parts.end]
        own = np.zeros(parts.end - parts.begin, dtype=np.int64)
        own[: len(known)] = known
        more = parts.given(torch.from_numpy(own)) if len(known) else {}
        given = {}
        for name in ("lm", *parts.readings):
            there = more[name].clamp_min(FLOOR).log().numpy()[begin - parts.begin : len(known)] if more else nothing
            given[name] = np.concatenate([self._given.get(name, nothing), there])
        self._given = given

    def _evidence(self, count: int, positions: int) -> Evidence:
        """The means before so many positions, of which the first has ``count`` tokens before it."""
        stop = count + np.arange(positions)
        start = np.maximum(0, stop - WINDOW)
        found = {KNOWN: torch.from_numpy(np.log1p(stop - start).astype(np.float64))}
        for name, given in self._given.items():
            sums = np.concatenate([[0.0], np.cumsum(given)])
            found[f"{name}_past"] = torch.from_numpy((sums[stop] - sums[start]) / np.maximum(1, stop - start))
        return found
