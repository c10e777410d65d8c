"""The ∞-gram over all groups of a store (Liu 2024): what followed the longest suffix of a context that occurs at all.

Every context of a sequence is matched in one pass over arrays. Where a run of tokens stands in the order of a group's
suffixes is searched once for each place that a run can start at, since a context's longest suffix is a beginning of
what starts there: with reach(j) the end of the longest run from j that occurs with a token after it, the longest
suffix of the context that ends at i starts at the first j with reach(j) ≥ i. Counts are sums over the groups'
documents, so that the result is the same however documents are spread over shards and groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from datastore.keys import KeyGroup
from datastore.suffixes import Found, Query, Suffixes
from silo.errors import UsageError
from silo.retrieval import NextTokens, Origins, SourceDocument

FAR = 64
"""Runs as long as this are compared to their ends only from every so many places on. Between two places that reach
equally far, or runs that occur equally often, all others do too; so text that is in the store already, whole, takes no
time quadratic in its length."""


class NgramIndex:
    """A searchable view of the suffixes of some groups."""

    def __init__(self, groups: Sequence[Suffixes], selected: Sequence[np.ndarray | None] | None = None) -> None:
        """Look at some groups' documents.

        Args:
            groups: of one store.
            selected: for each of :attr:`groups`, which documents count, (documents,) bool; None for all.
        """
        order = sorted(range(len(groups)), key=lambda number: groups[number].keys.first_row)
        self._whole = [groups[number] for number in order]
        self._selected = [selected[number] if selected else None for number in order]
        self._some: dict[int, Suffixes] = {}

    @property
    def groups(self) -> list[KeyGroup]:
        """The groups' documents, in the order in which :meth:`select` takes what is said of them."""
        return [suffixes.keys for suffixes in self._whole]

    def select(self, selected: Sequence[np.ndarray | None]) -> NgramIndex:
        """The same groups where only some documents count, also for the longest match; made when it is first asked.

        Args:
            selected: for each of :attr:`groups`, which documents count, (documents,) bool; None for all.
        """
        if len(selected) != len(self._whole):
            raise UsageError(f"{len(selected)} selections for {len(self._whole)} groups; give one for each")
        return NgramIndex(self._whole, selected)

    def suffixes(self) -> list[Suffixes]:
        """What is searched."""
        for number, (suffixes, selected) in enumerate(zip(self._whole, self._selected, strict=True)):
            if number not in self._some:
                everything = selected is None or bool(np.all(selected))
                self._some[number] = suffixes if everything else suffixes.only(np.asarray(selected))
        return [self._some[number] for number in range(len(self._whole))]

    def match(self, sequences: Sequence[np.ndarray]) -> Matches:
        """Match every context of sequences of (T,) tokens, T of each as it likes."""
        return Matches.make(self.suffixes(), sequences)

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`silo.retrieval.Origins.documents`."""
        return self._whole[int(index) >> 32].keys.document(int(index) & 0xFFFFFFFF).described()


@dataclass(frozen=True)
class Spans:
    """Where contexts' longest suffixes were found with a token after them; arrays of shape (m,), sorted by context."""

    groups: np.ndarray
    contexts: np.ndarray
    firsts: np.ndarray
    """The first suffix in the order of its group."""
    counts: np.ndarray
    """How many there are in a row."""


@dataclass(frozen=True)
class Matches:
    """What :class:`silo.retrieval.NgramMatches` asks for."""

    begins: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    hits: np.ndarray
    _suffixes: list[Suffixes]
    _spans: Spans

    @classmethod
    def make(cls, suffixes: list[Suffixes], sequences: Sequence[np.ndarray]) -> Matches:
        """Match sequences against the suffixes of some groups."""
        sizes = np.asarray([len(tokens) + 1 for tokens in sequences], dtype=np.int64)
        begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        # Each sequence is followed by a token that no run reaches, so that its contexts and its places are as many.
        query = Query(np.concatenate([np.zeros(0, np.int64), *(each for one in sequences for each in (one, [0]))]))
        ends = np.repeat(begins[1:] - 1, sizes)
        search = _Search(suffixes, query, ends)
        starts = np.searchsorted(search.reach, np.arange(len(ends)))
        lengths = np.arange(len(ends)) - starts
        counts, hits, spans = search.count(starts, lengths)
        return cls(begins, lengths, counts, hits, suffixes, spans)

    @cached_property
    def single(self) -> np.ndarray:
        """(n,) int64: the token that comes after every occurrence of a context's suffix, or -1 if there are several."""
        lowest = np.full(len(self.lengths), np.iinfo(np.int64).max)
        highest = np.full(len(self.lengths), -1, dtype=np.int64)
        for number, suffixes in enumerate(self._suffixes):
            own = self._spans.groups == number
            contexts, firsts, counts = (
                of[own] for of in (self._spans.contexts, self._spans.firsts, self._spans.counts)
            )
            # A span is in the order of its next tokens, and a group has one span of a context at most.
            depths = self.lengths[contexts]
            lowest[contexts] = np.minimum(lowest[contexts], suffixes.tokens(firsts, depths))
            highest[contexts] = np.maximum(highest[contexts], suffixes.tokens(firsts + counts - 1, depths))
        return np.where(lowest == highest, highest, -1)

    def following(self, contexts: np.ndarray) -> NextTokens:
        """All tokens that come after the longest suffixes of some contexts, given by their (m,) numbers."""
        found = [np.zeros((3, 0), dtype=np.int64)]
        for group, asked, spans in self._by_group(contexts):
            found.append(self._runs(group, asked, spans))
        asked, tokens, counts = np.concatenate(found, axis=1)
        order = np.lexsort((tokens, asked))
        asked, tokens, counts = asked[order], tokens[order], counts[order]
        first = _first_of_each(asked, tokens)
        begins = np.searchsorted(asked[first], np.arange(len(contexts) + 1))
        return NextTokens(begins, tokens[first], _sums(counts, first))

    def _runs(self, group: int, asked: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Runs of one next token in spans of a group: rows (which was asked, token, count).

        A span is in the order of its next tokens. It is halved until both ends have the same, so that a span of many
        suffixes and few tokens takes few steps.
        """
        suffixes = self._suffixes[group]
        depths = self.lengths[self._spans.contexts[spans]]
        low = self._spans.firsts[spans]
        high = low + self._spans.counts[spans] - 1
        done = [np.zeros((3, 0), dtype=np.int64)]
        while len(low):
            token = suffixes.tokens(low, depths)
            same = token == suffixes.tokens(high, depths)
            done.append(np.stack([asked[same], token[same], high[same] - low[same] + 1]))
            asked, depths, low, high = (array[~same] for array in (asked, depths, low, high))
            middle = (low + high) >> 1
            asked, depths = np.concatenate([asked, asked]), np.concatenate([depths, depths])
            low, high = np.concatenate([low, middle + 1]), np.concatenate([middle, high])
        return np.concatenate(done, axis=1)

    def origins(self, contexts: np.ndarray, tokens: np.ndarray) -> Origins:
        """The documents behind the counts of (m,) tokens after (m,) contexts."""
        found = [np.zeros((2, 0), dtype=np.int64)]
        hashes = [np.zeros(0, dtype=np.uint64)]
        for group, asked, spans in self._by_group(contexts):
            suffixes = self._suffixes[group]
            depths, low = self.lengths[self._spans.contexts[spans]], self._spans.firsts[spans]
            high = low + self._spans.counts[spans]
            wanted = np.asarray(tokens, dtype=np.int64)[asked]
            first = _first_reaching(suffixes, low, high, depths, wanted)
            sizes = _first_reaching(suffixes, first, high, depths, wanted + 1) - first
            documents = suffixes.documents(_ranges(first, sizes))
            found.append(np.stack([np.repeat(asked, sizes), documents + (group << 32)]))
            hashes.append(suffixes.keys.ids[documents])
        asked, documents = np.concatenate(found, axis=1)
        order = np.lexsort((documents, np.concatenate(hashes), asked))
        asked, documents = asked[order], documents[order]
        first = _first_of_each(asked, documents)
        begins = np.searchsorted(asked[first], np.arange(len(contexts) + 1))
        return Origins(begins, documents[first], _sums(np.ones_like(asked), first))

    def _by_group(self, contexts: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """The spans of some contexts by group: (group, which context was asked for, number of the span)."""
        low = np.searchsorted(self._spans.contexts, contexts)
        sizes = np.searchsorted(self._spans.contexts, contexts, side="right") - low
        spans, asked = _ranges(low, sizes), np.repeat(np.arange(len(contexts)), sizes)
        of = self._spans.groups[spans]
        return [(int(group), asked[of == group], spans[of == group]) for group in np.unique(of)]


class _Search:
    """One search of some sequences in some groups."""

    def __init__(self, suffixes: list[Suffixes], query: Query, ends: np.ndarray) -> None:
        """``ends`` is (n,): where the sequence of each place of the query ends."""
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
        before, after = _around(marks)
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

    def count(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, Spans]:
        """Count the longest suffixes of all contexts, given by where they start and their lengths; each (n,).

        Returns:
            How often each occurs with a token after it; how often with the one that its sequence goes on with; where.
        """
        runs_on = np.zeros(len(starts), dtype=bool)
        runs_on[:-1] = starts[1:] == starts[:-1]
        # With its next token, a context's suffix is the next context's, unless that starts elsewhere: then all of its
        # occurrences with this token end their documents.
        ending = np.flatnonzero(~runs_on)
        marks = (lengths <= FAR) | (lengths % FAR == 0) | ~runs_on
        marks[1:] |= ~runs_on[:-1]
        counts, hits, spans = np.zeros_like(starts), np.zeros_like(starts), [np.zeros((4, 0), dtype=np.int64)]
        for group in range(len(self._suffixes)):
            first, full = self._extents(group, starts, lengths, marks)
            ended = self._suffixes[group].exact(first, full, lengths)
            count = full - ended
            counts += count
            hits[:-1] += np.where(runs_on[:-1], full[1:], 0)
            hits[ending] += self._extents(group, starts[ending], lengths[ending] + 1)[1]
            some = np.flatnonzero(count)
            spans.append(np.stack([np.full_like(some, group), some, (first + ended)[some], count[some]]))
        groups, of, firsts, sizes = np.concatenate(spans, axis=1)
        order = np.argsort(of, kind="stable")
        return counts, hits, Spans(groups[order], of[order], firsts[order], sizes[order])

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
        before, after = _around(marks)
        same = ~marks & (full[before] == full[after])
        first[same], full[same] = first[before[same]], full[before[same]]
        look(np.flatnonzero(~marks & ~same))
        return first, full


def _around(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest marked member at or before each of (n,), and at or after; the first and the last are marked."""
    numbers = np.arange(len(marks))
    before = np.maximum.accumulate(np.where(marks, numbers, 0))
    after = np.minimum.accumulate(np.where(marks, numbers, len(marks) - 1)[::-1])[::-1]
    return before, after


def _first_reaching(
    suffixes: Suffixes, low: np.ndarray, high: np.ndarray, depths: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """The first suffix of each span [low, high) whose token at a depth is not below a given one; arrays (n,)."""
    low, high = low.copy(), high.copy()
    active = np.flatnonzero(low < high)
    while len(active):
        middle = (low[active] + high[active]) >> 1
        below = suffixes.tokens(middle, depths[active]) < tokens[active]
        low[active] = np.where(below, middle + 1, low[active])
        high[active] = np.where(below, high[active], middle)
        active = active[low[active] < high[active]]
    return low


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers of ranges, given by where each begins and its size, one range after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - ends + sizes, sizes)


def _first_of_each(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where each run of equal pairs begins; both (n,)."""
    changed = np.ones(len(one), dtype=bool)
    changed[1:] = (one[1:] != one[:-1]) | (other[1:] != other[:-1])
    return np.flatnonzero(changed)


def _sums(counts: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Sums of (n,) counts from each of some places to the next."""
    return np.add.reduceat(counts, firsts) if len(firsts) else np.zeros(0, dtype=np.int64)
