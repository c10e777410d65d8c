"""The suffixes of a group's documents in order: where any run of tokens occurs, found by binary search.

    rows.npy       (rows,) uint32, or int64 where a group has more rows than that counts: where each suffix begins
    lengths.npy    (rows,) uint8, how many tokens each of these suffixes has, in the same order; 255 means 255 or more

A suffix ends with its document (law 3), and an end comes before any token. Suffixes of equal tokens come in the order
of their rows. So the order of two suffixes depends on their own documents only: taking a document out of a group takes
its entries out of these files, and changes no other but for the numbering of rows. Tokens are those of
:mod:`datastore.keys`; they are not stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydivsufsort import divsufsort

from datastore.keys import KeyGroup
from datastore.shard import Shard
from silo.errors import UsageError
from silo.files import write_array

FILES = ("rows.npy", "lengths.npy")
LONG = 255
"""Lengths from here on are stored as this one, and looked up where it matters."""
APART = 64
"""Suffixes from one in memory to the next, by which searches begin: an eighth of a byte for each token."""
_MARK = 3
"""Units of the sorted text that stand for the end of a document: a zero, and the document's number."""


def write_suffixes(directory: Path, shards: Sequence[Shard]) -> None:
    """Write the suffixes of the documents of some shards, in order, into a directory that has none."""
    tokens = np.concatenate([shard.tokens for shard in shards])
    sizes = [row.end - row.begin for shard in shards for row in shard.rows]
    begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    for name, array in zip(FILES, suffix_arrays(tokens, begins), strict=True):
        write_array(directory / name, array)


def suffix_arrays(tokens: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the suffixes of some documents in order.

    Args:
        tokens: (rows,) uint16 or uint32, the documents end to end.
        begins: (documents + 1,) int64, where each document begins.

    Returns:
        What the files hold: where each suffix begins, and its length; (rows,) each.
    """
    left = np.minimum(np.repeat(begins[1:], np.diff(begins)) - np.arange(len(tokens)), LONG).astype(np.uint8)
    rows = _sorted_rows(tokens, begins)
    return rows, left[rows]


def _sorted_rows(tokens: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Where each suffix begins, in the order of the suffixes."""
    rows = len(tokens)
    counted = np.uint32 if rows <= 1 << 32 else np.int64
    if not rows:
        return np.zeros(0, dtype=counted)
    tokens = tokens.astype(np.int64)
    if tokens.max() >= 0xFFFF:  # The library sorts bytes: most groups use few enough tokens of a large vocabulary.
        tokens = np.unique(tokens, return_inverse=True)[1]
    unit = ">u2" if tokens.max() < 0xFFFF else ">u4"
    documents = np.arange(len(begins) - 1)
    places = np.arange(rows) + np.repeat(documents * _MARK, np.diff(begins))
    text = np.zeros(rows + _MARK * len(documents), dtype=unit)
    text[places] = tokens + 1
    # No two documents' ends are equal, so that no comparison goes beyond the end of a document.
    ends = begins[1:] + documents * _MARK
    text[ends + 1], text[ends + 2] = documents >> 16, documents & 0xFFFF
    row_at = np.full(len(text), -1, dtype=np.int64)
    row_at[places] = np.arange(rows)
    order = divsufsort(text.view(np.uint8))
    size = text.itemsize
    found = row_at[order[order & (size - 1) == 0] // size]
    return found[found >= 0].astype(counted)


class Query:
    """Tokens to look for, as :class:`Suffixes` compares them."""

    def __init__(self, tokens: np.ndarray) -> None:
        """``tokens`` are (n,) int64."""
        self.tokens = tokens
        self._packed: dict[np.dtype, np.ndarray] = {}

    def packed(self, dtype: np.dtype) -> np.ndarray:
        """(n,) uint64: the tokens from each place on, as many as eight bytes hold, the first in the lowest bits.

        Raises :class:`UsageError` at a token that a store of this type of tokens cannot hold.
        """
        if dtype not in self._packed:
            most = np.iinfo(dtype).max
            if self.tokens.min(initial=0) < 0 or self.tokens.max(initial=0) > most:
                wrong = self.tokens[(self.tokens < 0) | (self.tokens > most)][0]
                raise UsageError(f"token {wrong} is not of the store's vocabulary; use the tokenizer of its model")
            padded = np.concatenate([self.tokens, np.zeros(8, dtype=np.int64)]).astype(dtype)
            self._packed[dtype] = _windows(padded)[: len(self.tokens)].view("<u8")
        return self._packed[dtype]


@dataclass(frozen=True)
class Found:
    """Where some strings of a query stand in the order of a group's suffixes; arrays of shape (n,)."""

    places: np.ndarray
    """The first suffix that neither comes before the string nor equals it."""
    left: np.ndarray
    """How many tokens the suffix before it has in common with the string."""
    right: np.ndarray
    """How many it has itself in common with the string."""
    followed: np.ndarray
    """The longest beginning of the string that occurs with any token after it."""


class Suffixes:
    """The suffixes of a group, or of some of its documents, in order."""

    def __init__(self, keys: KeyGroup, rows: np.ndarray, lengths: np.ndarray) -> None:
        """``rows`` and ``lengths`` are what the files hold, or the same entries of both."""
        self.keys = keys
        self._rows, self._lengths = rows, lengths
        self._begins = np.asarray(keys.begins)
        self._tokens = np.asarray(keys.tokens)
        self._bits = 8 * self._tokens.itemsize
        short = 64 // self._bits - len(self._tokens)
        padded = np.concatenate([self._tokens, np.zeros(short, self._tokens.dtype)]) if short > 0 else self._tokens
        self._windows = _windows(padded)

    @classmethod
    def open(cls, keys: KeyGroup, directory: Path) -> Suffixes:
        """Map what :func:`write_suffixes` wrote for the same documents as the keys'."""
        rows, lengths = (np.asarray(np.load(directory / name, mmap_mode="r")) for name in FILES)
        return cls(keys, rows, lengths)

    def only(self, selected: np.ndarray) -> Suffixes:
        """The suffixes of some documents; ``selected`` is (documents,) bool."""
        of_row = np.repeat(selected, np.diff(self._begins))
        kept = of_row[self._rows]
        return Suffixes(self.keys, self._rows[kept], self._lengths[kept])

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, query: Query, starts: np.ndarray, lengths: np.ndarray) -> Found:
        """Find strings of a query, given by (n,) where each starts and how many tokens it has."""
        if not len(self):
            return Found(*(np.zeros_like(starts) for _ in range(4)))
        packed = query.packed(self._tokens.dtype)
        keys = self._ordered(packed[starts], lengths)
        order = np.argsort(keys)  # so that one search is near to the one before
        low, high = np.zeros_like(starts), np.zeros_like(starts)
        low[order] = np.maximum(APART * (np.searchsorted(self._heads, keys[order]) - 1), -1)
        high[order] = np.minimum(APART * np.searchsorted(self._heads, keys[order], side="right"), len(self))
        return self.find_between(query, starts, lengths, low, high)

    def find_between(
        self, query: Query, starts: np.ndarray, lengths: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> Found:
        """Find strings between a suffix that comes before each and one that does not, or -1 and the number of suffixes.

        A binary search (Manber and Myers 1993): what a string has in common with both ends of the range that is left,
        it has in common with all between them, so it is compared from there on only.
        """
        packed = query.packed(self._tokens.dtype)
        left, right = np.zeros_like(low), np.zeros_like(low)
        active = np.flatnonzero(high - low > 1)
        while len(active):
            from_, to, start, length = low[active], high[active], starts[active], lengths[active]
            middle = (from_ + to) >> 1
            held = self.lengths(middle, length + 1)
            known = np.minimum(left[active], right[active])
            common = self._common(packed, middle, start, np.minimum(length, held), known)
            # One that equals the string comes before it, so that those that go on from it are the string's neighbours.
            ours = query.tokens[np.minimum(start + common, len(query.tokens) - 1)]
            before = (held <= common) | ((common < length) & (self.tokens(middle, common) < ours))
            low[active], high[active] = np.where(before, middle, from_), np.where(before, to, middle)
            left[active] = np.where(before, common, left[active])
            right[active] = np.where(before, right[active], common)
            active = active[np.flatnonzero(high[active] - low[active] > 1)]
        followed = np.zeros_like(low)
        for places, in_common in ((low, left), (high, right)):
            there = np.flatnonzero((places >= 0) & (places < len(self)))
            at, length = places[there], lengths[there]
            held = self.lengths(at, length + 1)
            common = self._common(packed, at, starts[there], np.minimum(length, held), in_common[there])
            in_common[there] = common
            followed[there] = np.maximum(followed[there], np.minimum(common, held - 1))
        return Found(high, left, right, followed)

    def _common(
        self, packed: np.ndarray, places: np.ndarray, starts: np.ndarray, limits: np.ndarray, known: np.ndarray
    ) -> np.ndarray:
        """How many tokens suffixes have in common with strings, of which ``known`` are, up to limits; each (n,)."""
        rows, width = self._rows[places], 64 // self._bits
        common, active = known.copy(), np.arange(len(known))
        while len(active):
            done = common[active]
            difference = self._packed(rows[active] + done) ^ packed[starts[active] + done]
            below = (difference - np.uint64(1)) & ~difference  # ones below the lowest bit that differs
            equal = np.bitwise_count(below) // self._bits
            limit = limits[active]
            common[active] = np.minimum(done + equal, limit)
            active = active[(equal == width) & (done + width < limit)]
        return common

    def _packed(self, rows: np.ndarray) -> np.ndarray:
        """The tokens from some rows on, as many as eight bytes hold, the first in the lowest bits; zeros at the end."""
        last = len(self._windows) - 1
        windows = self._windows[np.minimum(rows, last)].view("<u8")
        beyond = np.flatnonzero(rows > last)
        if len(beyond):
            windows[beyond] >>= (self._bits * (rows[beyond] - last)).astype(np.uint64)
        return windows

    def _ordered(self, packed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Packed tokens as numbers that have the order of the strings; tokens beyond a string's length are zeros."""
        width = 64 // self._bits
        masks = np.asarray([(1 << 64) - (1 << (64 - self._bits * held)) for held in range(width + 1)], dtype=np.uint64)
        tokens = packed.view(self._tokens.dtype).reshape(-1, width)
        first_highest = np.ascontiguousarray(tokens[:, ::-1]).view("<u8").ravel()
        return first_highest & masks[np.minimum(lengths, width)]

    @cached_property
    def _heads(self) -> np.ndarray:
        """The first eight bytes of every suffix of so many, as numbers in the order of the suffixes.

        A search begins in them: they lie close together, while a suffix's own tokens lie anywhere.
        """
        rows = self._rows[::APART].astype(np.int64)
        return self._ordered(self._packed(rows), self._lengths[::APART])

    def width(
        self,
        query: Query,
        firsts: np.ndarray,
        steps: np.ndarray,
        limits: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> np.ndarray:
        """How many suffixes in a row, from given ones on, begin with given strings, as the first of each row does.

        Args:
            query: what the strings are of.
            firsts: (n,) the suffix that each row begins with.
            steps: (n,) 1 to go up the order, -1 to go down.
            limits: (n,) how many suffixes each row could have at the most, at least 1.
            starts: (n,) where each string starts.
            lengths: (n,) how many tokens it has.
        """
        packed = query.packed(self._tokens.dtype)

        def begins_with(which: np.ndarray, offsets: np.ndarray) -> np.ndarray:
            of = lengths[which]
            places = firsts[which] + steps[which] * offsets
            limits = np.minimum(of, self.lengths(places, of))
            return self._common(packed, places, starts[which], limits, np.zeros_like(of)) == of

        return _row_lengths(limits, begins_with)

    def exact(self, firsts: np.ndarray, limits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How many suffixes in a row, from given ones up and up to ``limits``, have given lengths; each (n,)."""
        found = np.zeros_like(firsts)
        some = np.flatnonzero(limits > 0)
        some = some[self.lengths(firsts[some], lengths[some] + 1) == lengths[some]]

        def as_long(which: np.ndarray, offsets: np.ndarray) -> np.ndarray:
            of = lengths[some[which]]
            return self.lengths(firsts[some[which]] + offsets, of + 1) == of

        found[some] = _row_lengths(limits[some], as_long)
        return found

    def lengths(self, places: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """How many tokens suffixes have. A number above ``needed`` may be given too small, but not below ``needed``."""
        found = self._lengths[places].astype(np.int64)
        if needed.max(initial=0) > LONG:
            unsure = np.flatnonzero((found == LONG) & (needed > LONG))
            rows = self._rows[places[unsure]].astype(np.int64)
            found[unsure] = self._begins[np.searchsorted(self._begins, rows, side="right")] - rows
        return found

    def tokens(self, places: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """The tokens of suffixes at ``depths`` from their beginnings; anything where a suffix has none there."""
        rows = self._rows[places].astype(np.int64) + depths
        return self._tokens[np.minimum(rows, len(self._tokens) - 1)].astype(np.int64)

    def documents(self, places: np.ndarray) -> np.ndarray:
        """The numbers, in the group, of the documents that suffixes are of."""
        return np.searchsorted(self._begins, self._rows[places].astype(np.int64), side="right") - 1


def _row_lengths(limits: np.ndarray, holds: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """How many members of each of n rows have a property that the first has, and none has after one that lacks it.

    Doubles its steps until it meets one that lacks it, since most rows are short.

    Args:
        limits: (n,) how many members each row has, at least 1.
        holds: tells of the rows ``which`` (m,) whether their members of the numbers (m,) have it.
    """
    have, lack = np.zeros_like(limits), limits.copy()
    active = np.flatnonzero(lack - have > 1)
    while len(active):
        yes, no = have[active], lack[active]
        middle = np.minimum(2 * yes + 1, (yes + no) >> 1)
        held = holds(active, middle)
        have[active], lack[active] = np.where(held, middle, yes), np.where(held, no, middle)
        active = active[lack[active] - have[active] > 1]
    return have + 1


def _windows(tokens: np.ndarray) -> np.ndarray:
    """Eight bytes from each token on, as they lie in memory: (n - k + 1,) for k tokens of eight bytes."""
    count = len(tokens) - 8 // tokens.itemsize + 1
    # As eight opaque bytes and not as a number, which NumPy gathers at half the speed where it is not aligned.
    return np.ndarray((count,), dtype="V8", buffer=tokens.view(np.uint8).data, strides=(tokens.itemsize,))
