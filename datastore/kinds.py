"""How many different tokens come after short suffixes, remembered.

A text comes back to the same words, and so does the next one: of suffixes of one and two tokens most have been asked
for before. These are what occurs most often, so that counting what comes after them is most of what an ∞-gram costs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TOKENS = 2
"""Suffixes of at most so many tokens are remembered."""
MOST = 1 << 20
"""So many of them at most, in 16 bytes each."""


class Kinds:
    """What was counted once for an index, whose documents never change."""

    def __init__(self) -> None:
        """Know nothing."""
        self._known = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)

    def of(self, names: np.ndarray, count: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """How many tokens come after some suffixes.

        Args:
            names: (m,) uint64, no two equal; see :func:`name`.
            count: counts for those of the numbers (k,) that are not known.

        Returns:
            (m,) int64.
        """
        known, kinds = self._known  # one read, so that threads may ask at once
        places = np.searchsorted(known, names)
        there = places < len(known)
        there[there] = known[places[there]] == names[there]
        found = np.zeros(len(names), dtype=np.int64)
        found[there] = kinds[places[there]]
        unknown = np.flatnonzero(~there)
        if len(unknown):
            found[unknown] = count(unknown)
            kept = unknown[: max(0, MOST - len(known))]
            order = kept[np.argsort(names[kept])]
            at = np.searchsorted(known, names[order])
            self._known = np.insert(known, at, names[order]), np.insert(kinds, at, found[order])
        return found


def name(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What suffixes of one or two tokens are remembered by: (m,) uint64.

    Args:
        first: (m,) int64, below 2³².
        second: (m,) int64; -1 where there is none.
    """
    return (first.astype(np.uint64) << np.uint64(32)) | (second + 1).astype(np.uint64)
