"""Where the runs of some sequences' tokens stand in the order of a store's suffixes.

A run is searched for once for each place that it can start at, in every group, since a context's longest suffix is a
beginning of what starts there: with reach(j) the end of the longest run from j that occurs with a token after it, the
longest suffix of the context that ends at i starts at the first j with reach(j) ≥ i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datastore.suffixes import Found, Suffixes

FAR = 64
"""Runs as long as this are compared to their ends only from every so many places on. Between two places that reach
equally far, or runs that occur equally often, all others do too; so text that is in the store already, whole, takes no
time quadratic in its length."""


@dataclass(frozen=True)
class Spans:
    """Where m suffixes were found with a token after them; arrays of shape (spans,), sorted by suffix."""

    groups: np.ndarray
    suffixes: np.ndarray
    """Which of the m."""
    firsts: np.ndarray
    """The first in the order of its group."""
    counts: np.ndarray
    """How many there are in a row."""


class Search:
    """One search of some sequences in some groups."""

    def __init__(self, suffixes: list[Suffixes], query: np.ndarray, ends: np.ndarray) -> None:
        """``query`` is (n,) int64, the tokens of all sequences; ``ends`` (n,), where the sequence of each ends."""
        self._suffixes, self._query, self._ends = suffixes, query, ends
        places = np.arange(len(ends))
        self._found = [each.find(query, places, np.minimum(ends - places, FAR)) for each in suffixes]
        self.reach = places + self._farthest(self._found, places)
        """(n,) how far the longest run from each place reaches that occurs with a token after it."""
        self._reach_beyond(np.flatnonzero(self._longest(self._found, places) == FAR))

    def _reach_beyond(self, far: np.ndarray) -> None:
        """Follow to their ends the runs from ``far`` on, which were followed for :data:`FAR` tokens."""
        apart = np.diff(far, prepend=-2, append=len(self._ends) + 2) != 1
        marks = (far % FAR == 0) | apart[1:] | apart[:-1]
        self._follow(far[marks])
        before, after = around(marks)
        same = self.reach[far[before]] == self.reach[far[after]]
        self.reach[far[same]] = self.reach[far[before[same]]]
        self._follow(far[~same & ~marks])

    def _follow(self, places: np.ndarray) -> None:
        for suffixes, found in zip(self._suffixes, self._found, strict=True):
            here = places[np.maximum(found.left, found.right)[places] == FAR]
            low, rows = self._rows(suffixes, found, here, np.full_like(here, FAR))
            length = self._ends[here] - here
            again = suffixes.find_between(self._query, here, length, low - 1, low + rows)
            for name in ("places", "left", "right", "followed"):
                getattr(found, name)[here] = getattr(again, name)
        self.reach[places] = places + self._farthest(self._found, places)

    def _rows(
        self, suffixes: Suffixes, found: Found, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first of a group's suffixes that begins with each of some runs, and how many do; each (n,)."""
        place = found.places[starts]
        # Up from where the run from there stands, and down from the suffix before.
        which = np.concatenate([np.arange(len(starts))] * 2)
        down = which < 0
        down[len(starts) :] = True
        common = np.concatenate([found.right[starts], found.left[starts]])
        room = np.concatenate([len(suffixes) - place, place])
        some = np.flatnonzero((common >= lengths[which]) & (room > 0) & (lengths[which] > 0))
        which, down, room = which[some], down[some], room[some]
        width = suffixes.width(self._query, place[which] - down, 1 - 2 * down, room, starts[which], lengths[which])
        first, rows = place.copy(), np.zeros_like(place)
        first[which[down]] -= width[down]
        rows += np.bincount(which, weights=width, minlength=len(rows)).astype(np.int64)
        everything = lengths == 0
        first[everything], rows[everything] = 0, len(suffixes)
        return first, rows

    @staticmethod
    def _farthest(found: list[Found], places: np.ndarray) -> np.ndarray:
        return np.max([np.zeros_like(places), *(each.followed[places] for each in found)], axis=0)

    @staticmethod
    def _longest(found: list[Found], places: np.ndarray) -> np.ndarray:
        both = [np.maximum(each.left, each.right)[places] for each in found]
        return np.max([np.zeros_like(places), *both], axis=0)

    def count(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, Spans]:
        """Count the longest suffixes of all contexts, given by where they start and their lengths; each (n,).

        Returns:
            How often each occurs with the token that its sequence goes on with; where it does with any.
        """
        runs_on = np.zeros(len(starts), dtype=bool)
        runs_on[:-1] = starts[1:] == starts[:-1]
        # With its next token, a context's suffix is the next context's, unless that starts elsewhere: then all of its
        # occurrences with this token end their documents.
        ending = np.flatnonzero(~runs_on)
        marks = (lengths <= FAR) | (lengths % FAR == 0) | ~runs_on
        marks[1:] |= ~runs_on[:-1]
        hits, spans = np.zeros_like(starts), []
        for group in range(len(self._suffixes)):
            first, full = self._extents(group, starts, lengths, marks)
            spans.append(self._followed(group, first, full, lengths))
            hits[:-1] += np.where(runs_on[:-1], full[1:], 0)
            hits[ending] += self._extents(group, starts[ending], lengths[ending] + 1)[1]
        return hits, joined(spans)

    def count_grams(self, contexts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, Spans]:
        """Count the suffixes of one length of some contexts (m,), of which each occurs; equal ones once.

        Returns:
            Which of the suffixes each context has; how often it occurs with the token that its sequence goes on with;
            where each suffix does with any.
        """
        starts = contexts - length
        going_on = np.flatnonzero(contexts < self._ends[contexts])
        one, of = self._distinct(starts, length)
        longer, of_longer = self._distinct(starts[going_on], length + 1)
        counts, spans = np.zeros_like(longer), []
        for group in range(len(self._suffixes)):
            lengths = np.full_like(one, length)
            spans.append(self._followed(group, *self._extents(group, one, lengths), lengths))
            counts += self._extents(group, longer, np.full_like(longer, length + 1))[1]
        hits = np.zeros_like(contexts)
        hits[going_on] = counts[of_longer]
        return of, hits, joined(spans)

    def _distinct(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each of the different runs of a length begins first, and which of these the run from each start is."""
        names, first = np.zeros_like(starts), np.zeros_like(starts)
        for at in range(length):
            tokens = self._query[starts + at]
            names = names * (int(tokens.max(initial=0)) + 1) + tokens
            _, first, names = np.unique(names, return_index=True, return_inverse=True)
        return starts[first], names

    def _followed(
        self, group: int, first: np.ndarray, full: np.ndarray, lengths: np.ndarray
    ) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Of runs that so many of a group's suffixes begin with, those with a token after them: (group, which, the
        first, how many)."""
        ended = self._suffixes[group].exact(first, full, lengths)
        some = np.flatnonzero(full > ended)
        return group, some, (first + ended)[some], (full - ended)[some]

    def _extents(
        self, group: int, starts: np.ndarray, lengths: np.ndarray, marks: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first suffix of a group that begins with each of some runs, and how many do; each (n,).

        Where ``marks`` are given, runs between two that occur equally often are not looked for: what a run from one
        place adds to a shorter one from there takes nothing away.
        """
        first, full = np.zeros_like(starts), np.zeros_like(starts)
        suffixes, found = self._suffixes[group], self._found[group]

        def look(which: np.ndarray) -> None:
            first[which], full[which] = self._rows(suffixes, found, starts[which], lengths[which])

        if marks is None:
            look(np.arange(len(starts)))
            return first, full
        look(np.flatnonzero(marks))
        before, after = around(marks)
        same = ~marks & (full[before] == full[after])
        first[same], full[same] = first[before[same]], full[before[same]]
        look(np.flatnonzero(~marks & ~same))
        return first, full


def joined(found: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Spans:
    """The spans of all groups, sorted by suffix."""
    none = np.zeros((4, 0), dtype=np.int64)
    parts = [np.stack([np.full_like(which, group), which, *rest]) for group, which, *rest in found]
    spans = np.concatenate([none, *parts], axis=1)
    return Spans(*spans[:, np.argsort(spans[1], kind="stable")])


def around(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest marked member at or before each of (n,), and at or after; the first and the last are marked."""
    numbers = np.arange(len(marks))
    before = np.maximum.accumulate(np.where(marks, numbers, 0))
    after = np.minimum.accumulate(np.where(marks, numbers, len(marks) - 1)[::-1])[::-1]
    return before, after
