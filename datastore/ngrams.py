"""The ∞-gram over all groups of a store (Liu 2024): what followed the longest suffix of a context that occurs at all.

Every context of a sequence is matched in one pass over arrays. Where a run of tokens stands in the order of a group's
suffixes is searched once for each place that a run can start at, since a context's longest suffix is a beginning of
what starts there: with reach(j) the end of the longest run from j that occurs with a token after it, the longest
suffix of the context that ends at i starts at the first j with reach(j) ≥ i. Counts are sums over the groups'
documents, so that the result is the same however documents are spread over shards and groups.

Shorter suffixes of the same contexts are counted when they are asked for, equal ones once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from datastore.keys import KeyGroup
from datastore.suffixes import Found, Query, Suffixes
from silo.errors import UsageError
from silo.retrieval import NextTokens, Origins, SourceDocument, Spread

FAR = 64
"""Runs as long as this are compared to their ends only from every so many places on. Between two places that reach
equally far, or runs that occur equally often, all others do too; so text that is in the store already, whole, takes no
time quadratic in its length."""


OCCURRENCES_AT_ONCE = 1 << 24
"""What comes after suffixes is listed for so many occurrences at a time, which bounds the memory of the lists."""


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
        self._documents: dict[int, SourceDocument] = {}

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
        return Matches(self.suffixes(), sequences)

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`silo.retrieval.Origins.documents`."""
        if index not in self._documents:  # which are asked for again and again
            row = self._whole[int(index) >> 32].keys.document(int(index) & 0xFFFFFFFF)
            self._documents[int(index)] = row.described()
        return self._documents[int(index)]


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


class Counts:
    """What :class:`silo.retrieval.NgramCounts` asks for."""

    def __init__(
        self, groups: list[Suffixes], spans: Spans, suffixes: np.ndarray, lengths: np.ndarray, hits: np.ndarray
    ) -> None:
        """Say what was found.

        Args:
            groups: that were searched.
            spans: of m suffixes.
            suffixes: (n,) which of them each context has; -1 for none.
            lengths: (n,) tokens of each context's.
            hits: (n,) as :attr:`silo.retrieval.NgramCounts.hits`.
        """
        self._groups, self._spans, self._suffixes = groups, spans, suffixes
        self.lengths, self.hits = lengths, hits
        number = int(suffixes.max(initial=-1)) + 1
        self._counts = np.bincount(spans.suffixes, weights=spans.counts, minlength=number).astype(np.int64)
        self._depths = np.zeros(number, dtype=np.int64)
        self._depths[suffixes[suffixes >= 0]] = lengths[suffixes >= 0]
        self._kinds = np.where(self._counts == 1, 1, 0)  # of those that occur more often when they are asked for
        self._spreads: dict[int, Spread] = {}
        self.counts = np.where(suffixes >= 0, self._counts[suffixes], 0) if number else np.zeros_like(lengths)

    def kinds(self, contexts: np.ndarray) -> np.ndarray:
        """(m,) int64: how many different tokens come after some contexts' suffixes."""
        asked = self._suffixes[contexts]
        unknown = np.unique(asked[asked >= 0])
        unknown = unknown[(self._counts[unknown] > 1) & (self._kinds[unknown] == 0)]
        one, of = self._distinct(unknown)
        found = [np.diff(self._following(some).begins) for some in _split(one, self._counts[one])]
        self._kinds[unknown] = np.concatenate([np.zeros(0, np.int64), *found])[of]
        return np.where(asked >= 0, self._kinds[asked], 0) if len(self._kinds) else np.zeros_like(asked)

    def _distinct(self, suffixes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of (m,) suffixes that occur, each of which may be had by several contexts, one for all that are equal; and
        which of these each is."""
        span = np.searchsorted(self._spans.suffixes, suffixes)
        place = np.stack([self._spans.groups[span], self._spans.firsts[span], self._depths[suffixes]])
        order = np.lexsort(place)
        changed = np.any(np.diff(place[:, order], axis=1) != 0, axis=0)
        of = np.empty(len(order), dtype=np.int64)
        of[order] = np.cumsum(np.concatenate([np.zeros(min(1, len(order)), dtype=np.int64), changed]))
        return suffixes[order[np.concatenate([np.ones(min(1, len(order)), dtype=bool), changed])]], of

    @cached_property
    def single(self) -> np.ndarray:
        """(n,) int64: the token that comes after every occurrence of a context's suffix, or -1 if there are several."""
        lowest = np.full(len(self._counts), np.iinfo(np.int64).max)
        highest = np.full(len(self._counts), -1, dtype=np.int64)
        for number, group in enumerate(self._groups):
            own = self._spans.groups == number
            of, firsts, counts = (each[own] for each in (self._spans.suffixes, self._spans.firsts, self._spans.counts))
            # A span is in the order of its next tokens, and a group has one span of a suffix at most.
            depths = self._depths[of]
            lowest[of] = np.minimum(lowest[of], group.tokens(firsts, depths))
            highest[of] = np.maximum(highest[of], group.tokens(firsts + counts - 1, depths))
        one = np.append(np.where(lowest == highest, highest, -1), -1)
        return one[self._suffixes]

    def following(self, contexts: np.ndarray) -> NextTokens:
        """All tokens that come after the suffixes of some contexts, given by their (m,) numbers."""
        return self._following(self._suffixes[contexts])

    def _following(self, suffixes: np.ndarray) -> NextTokens:
        """The same of (m,) suffixes."""
        found = [np.zeros((3, 0), dtype=np.int64)]
        for group, asked, spans in self._by_group(suffixes):
            found.append(self._runs(group, asked, spans))
        asked, tokens, counts = np.concatenate(found, axis=1)
        order = np.argsort((asked << 32) | tokens)  # tokens are uint32 at the widest
        asked, tokens, counts = asked[order], tokens[order], counts[order]
        first = _first_of_each(asked, tokens)
        begins = np.searchsorted(asked[first], np.arange(len(suffixes) + 1))
        return NextTokens(begins, tokens[first], _sums(counts, first))

    def _runs(self, group: int, asked: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Runs of one next token in spans of a group: rows (which was asked, token, count).

        A span is in the order of its next tokens. It is halved until both ends have the same, so that a span of many
        suffixes and few tokens takes few steps.
        """
        suffixes = self._groups[group]
        depths = self._depths[self._spans.suffixes[spans]]
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

    def occurrences(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """How often (m,) tokens come after the suffixes of (m,) contexts."""
        found = np.zeros(len(contexts), dtype=np.int64)
        for _, asked, _, sizes in self._with_token(contexts, tokens):
            found += np.bincount(asked, weights=sizes, minlength=len(found)).astype(np.int64)
        return found

    def origins(self, contexts: np.ndarray, tokens: np.ndarray) -> Origins:
        """The documents behind the counts of (m,) tokens after (m,) contexts."""
        found = [np.zeros((2, 0), dtype=np.int64)]
        hashes = [np.zeros(0, dtype=np.uint64)]
        for group, asked, first, sizes in self._with_token(contexts, tokens):
            suffixes = self._groups[group]
            documents = suffixes.documents(_ranges(first, sizes))
            found.append(np.stack([np.repeat(asked, sizes), documents + (group << 32)]))
            hashes.append(suffixes.keys.ids[documents])
        asked, documents = np.concatenate(found, axis=1)
        order = np.lexsort((documents, np.concatenate(hashes), asked))
        asked, documents = asked[order], documents[order]
        first = _first_of_each(asked, documents)
        begins = np.searchsorted(asked[first], np.arange(len(contexts) + 1))
        return Origins(begins, documents[first], _sums(np.ones_like(asked), first))

    def _with_token(
        self, contexts: np.ndarray, tokens: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Where (m,) tokens come after (m,) contexts, by group: (group, which was asked, first suffix, how many)."""
        for group, asked, spans in self._by_group(self._suffixes[contexts]):
            suffixes = self._groups[group]
            depths, low = self._depths[self._spans.suffixes[spans]], self._spans.firsts[spans]
            high = low + self._spans.counts[spans]
            wanted = np.asarray(tokens, dtype=np.int64)[asked]
            first = _first_reaching(suffixes, low, high, depths, wanted)
            yield group, asked, first, _first_reaching(suffixes, first, high, depths, wanted + 1) - first

    def spread(self, context: int) -> Spread:
        """The documents in which one context's suffix occurs; kept, since texts come back to the same words."""
        suffix = int(self._suffixes[context])
        if suffix not in self._spreads:
            self._spreads[suffix] = self._spread(context)
        return self._spreads[suffix]

    def _spread(self, context: int) -> Spread:
        found = [np.zeros((2, 0), dtype=np.int64)]
        for group, _, spans in self._by_group(self._suffixes[context : context + 1]):
            places = _ranges(self._spans.firsts[spans], self._spans.counts[spans])
            depths = np.full_like(places, self.lengths[context])
            suffixes = self._groups[group]
            found.append(np.stack([suffixes.documents(places) + (group << 32), suffixes.tokens(places, depths)]))
        documents, tokens = np.concatenate(found, axis=1)
        names, of, counts = np.unique(documents, return_inverse=True, return_counts=True)
        pairs = np.unique((tokens << 32) | of)  # tokens are uint32 at the widest
        _, which, times = np.unique(pairs >> 32, return_inverse=True, return_counts=True)
        alone = pairs[times[which] == 1] & 0xFFFFFFFF
        return Spread(names, counts, np.bincount(alone, minlength=len(names)))

    def _by_group(self, suffixes: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """The spans of (m,) suffixes by group: (group, which of the m, number of the span)."""
        low = np.searchsorted(self._spans.suffixes, suffixes)
        sizes = np.searchsorted(self._spans.suffixes, suffixes, side="right") - low
        spans, asked = _ranges(low, sizes), np.repeat(np.arange(len(suffixes)), sizes)
        of = self._spans.groups[spans]
        return [(int(group), asked[of == group], spans[of == group]) for group in np.unique(of)]


class Matches(Counts):
    """What :class:`silo.retrieval.NgramMatches` asks for."""

    def __init__(self, groups: list[Suffixes], sequences: Sequence[np.ndarray]) -> None:
        """Match sequences against the suffixes of some groups."""
        sizes = np.asarray([len(tokens) + 1 for tokens in sequences], dtype=np.int64)
        self.begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        # Each sequence is followed by a token that no run reaches, so that its contexts and its places are as many.
        query = Query(np.concatenate([np.zeros(0, np.int64), *(each for one in sequences for each in (one, [0]))]))
        self._search = _Search(groups, query, np.repeat(self.begins[1:] - 1, sizes))
        starts = np.searchsorted(self._search.reach, np.arange(len(query.tokens)))
        lengths = np.arange(len(starts)) - starts
        hits, spans = self._search.count(starts, lengths)
        super().__init__(groups, spans, np.arange(len(starts)), lengths, hits)
        self._shorter: dict[int, Counts] = {}

    def shorter(self, length: int) -> Counts:
        """The same contexts' suffixes of so many tokens; looked up when they are first asked for."""
        if length not in self._shorter:
            contexts = np.flatnonzero(self.lengths > length)
            which, hits, spans = self._search.count_grams(contexts, length)
            suffixes, all_hits = np.full(len(self.lengths), -1, dtype=np.int64), np.zeros_like(self.lengths)
            suffixes[contexts], all_hits[contexts] = which, hits
            lengths = np.full_like(self.lengths, length)
            self._shorter[length] = Counts(self._groups, spans, suffixes, lengths, all_hits)
        return self._shorter[length]


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
        return hits, _joined(spans)

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
        return of, hits, _joined(spans)

    def _distinct(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each of the different runs of a length begins first, and which of these the run from each start is."""
        names, first = np.zeros_like(starts), np.zeros_like(starts)
        for at in range(length):
            tokens = self._query.tokens[starts + at]
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
        before, after = _around(marks)
        same = ~marks & (full[before] == full[after])
        first[same], full[same] = first[before[same]], full[before[same]]
        look(np.flatnonzero(~marks & ~same))
        return first, full


def _joined(found: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Spans:
    """The spans of all groups, sorted by suffix."""
    none = np.zeros((4, 0), dtype=np.int64)
    parts = [np.stack([np.full_like(which, group), which, *rest]) for group, which, *rest in found]
    spans = np.concatenate([none, *parts], axis=1)
    return Spans(*spans[:, np.argsort(spans[1], kind="stable")])


def _split(suffixes: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Suffixes (m,) in parts that occur about :data:`OCCURRENCES_AT_ONCE` times together."""
    cuts = np.flatnonzero(np.diff(np.cumsum(counts) // OCCURRENCES_AT_ONCE)) + 1
    return np.split(suffixes, cuts) if len(suffixes) else []


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
