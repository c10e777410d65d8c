"""The ∞-gram over all groups of a store (Liu 2024): what followed the longest suffix of a context that occurs at all.

Every context of a sequence is matched in one pass over arrays (:mod:`datastore.runs`). Counts are sums over the groups'
documents, so that the result is the same however documents are spread over shards and groups. Shorter suffixes of the
same contexts are counted when they are asked for, equal ones once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from datastore import kinds
from datastore.group_texts import GroupTexts
from datastore.runs import FAR, Search, Spans
from datastore.suffixes import Suffixes
from silo.errors import UsageError
from silo.retrieval import NextTokens, Origins, SourceDocument, Spread

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
        order = sorted(range(len(groups)), key=lambda number: groups[number].texts.first_row)
        self._whole = [groups[number] for number in order]
        self._selected = [selected[number] if selected else None for number in order]
        self._some: dict[int, Suffixes] = {}
        self._documents: dict[int, SourceDocument] = {}
        self._kinds = kinds.Kinds()

    @property
    def groups(self) -> list[GroupTexts]:
        """The groups' documents, in the order in which :meth:`select` takes what is said of them."""
        return [suffixes.texts for suffixes in self._whole]

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
        return Matches(self.suffixes(), sequences, self._kinds)

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`silo.retrieval.Origins.documents`."""
        if index not in self._documents:  # which are asked for again and again
            row = self._whole[int(index) >> 32].texts.document(int(index) & 0xFFFFFFFF)
            self._documents[int(index)] = row.described()
        return self._documents[int(index)]


class Counts:
    """What :class:`silo.retrieval.NgramCounts` asks for."""

    def __init__(
        self,
        groups: list[Suffixes],
        remembered: kinds.Kinds,
        spans: Spans,
        suffixes: np.ndarray,
        lengths: np.ndarray,
        hits: np.ndarray,
    ) -> None:
        """Say what was found.

        Args:
            groups: that were searched.
            remembered: of these groups.
            spans: of m suffixes.
            suffixes: (n,) which of them each context has; -1 for none.
            lengths: (n,) tokens of each context's.
            hits: (n,) as :attr:`silo.retrieval.NgramCounts.hits`.
        """
        self._groups, self._remembered = groups, remembered
        self._spans, self._suffixes = spans, suffixes
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
        short = (self._depths[one] > 0) & (self._depths[one] <= kinds.TOKENS)
        found = np.zeros(len(one), dtype=np.int64)
        found[~short] = self._count_kinds(one[~short])
        found[short] = self._remembered.of(
            self._names(one[short]), lambda which: self._count_kinds(one[np.flatnonzero(short)[which]])
        )
        self._kinds[unknown] = found[of]
        return np.where(asked >= 0, self._kinds[asked], 0) if len(self._kinds) else np.zeros_like(asked)

    def _count_kinds(self, suffixes: np.ndarray) -> np.ndarray:
        """How many different tokens come after (m,) suffixes."""
        found = [np.diff(self._following(some).begins) for some in _split(suffixes, self._counts[suffixes])]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _names(self, suffixes: np.ndarray) -> np.ndarray:
        """What (m,) suffixes of one or two tokens are remembered by."""
        tokens = np.zeros((2, len(suffixes)), dtype=np.int64)
        for group, asked, spans in self._by_group(suffixes):
            for at in range(2):
                tokens[at, asked] = self._groups[group].tokens(self._spans.firsts[spans], np.full_like(spans, at))
        return kinds.name(tokens[0], np.where(self._depths[suffixes] > 1, tokens[1], -1))

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
            firsts, counts = self._spans.firsts[spans], self._spans.counts[spans]
            runs = self._groups[group].runs(firsts, counts, self._depths[self._spans.suffixes[spans]])
            runs[0] = asked[runs[0]]
            found.append(runs)
        asked, tokens, counts = np.concatenate(found, axis=1)
        order = np.argsort((asked << 32) | tokens)  # tokens are uint32 at the widest
        asked, tokens, counts = asked[order], tokens[order], counts[order]
        first = _first_of_each(asked, tokens)
        begins = np.searchsorted(asked[first], np.arange(len(suffixes) + 1))
        return NextTokens(begins, tokens[first], _sums(counts, first))

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
            hashes.append(suffixes.texts.ids[documents])
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

    def __init__(self, groups: list[Suffixes], sequences: Sequence[np.ndarray], remembered: kinds.Kinds) -> None:
        """Match sequences against the suffixes of some groups, of which something may be remembered."""
        sizes = np.asarray([len(tokens) + 1 for tokens in sequences], dtype=np.int64)
        self.begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        # Each sequence is followed by a token that no run reaches, so that its contexts and its places are as many.
        tokens = np.concatenate([np.zeros(0, np.int64), *(each for one in sequences for each in (one, [0]))])
        self._search = Search(groups, tokens, np.repeat(self.begins[1:] - 1, sizes))
        starts = np.searchsorted(self._search.reach, np.arange(len(tokens)))
        lengths = np.arange(len(starts)) - starts
        hits, spans = self._search.count(starts, lengths)
        super().__init__(groups, remembered, spans, np.arange(len(starts)), lengths, hits)
        self._shorter: dict[int, Counts] = {}

    def shorter(self, length: int) -> Counts:
        """The same contexts' suffixes of so many tokens; looked up when they are first asked for.

        Raises:
            UsageError: they have as many as :data:`datastore.runs.FAR`, up to which every run is compared, or none.
        """
        if not 0 < length < FAR:
            raise UsageError(f"suffixes of {length} tokens; expected 1 to {FAR - 1}")
        if length not in self._shorter:
            contexts = np.flatnonzero(self.lengths > length)
            which, hits, spans = self._search.count_grams(contexts, length)
            suffixes, all_hits = np.full(len(self.lengths), -1, dtype=np.int64), np.zeros_like(self.lengths)
            suffixes[contexts], all_hits[contexts] = which, hits
            lengths = np.full_like(self.lengths, length)
            self._shorter[length] = Counts(self._groups, self._remembered, spans, suffixes, lengths, all_hits)
        return self._shorter[length]


def _split(suffixes: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Suffixes (m,) in parts that occur about :data:`OCCURRENCES_AT_ONCE` times together."""
    cuts = np.flatnonzero(np.diff(np.cumsum(counts) // OCCURRENCES_AT_ONCE)) + 1
    return np.split(suffixes, cuts) if len(suffixes) else []


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
