"""Where any run of tokens occurs in a group's documents: binary search in the order of their suffixes
(:mod:`datastore.suffix_arrays`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from datastore import matching
from datastore.keys import KeyGroup
from datastore.suffix_arrays import FILES
from silo.errors import UsageError

APART = 64
"""Suffixes from one in memory to the next, by which searches begin: an eighth of a byte for each token."""


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
        self._rows, self._lengths = _read_only(rows), _read_only(lengths)
        self._begins, self._tokens = _read_only(keys.begins), _read_only(keys.tokens)
        self._arrays = self._rows, self._lengths, self._begins, self._tokens
        self._bits = 8 * self._tokens.itemsize
        short = 64 // self._bits - len(self._tokens)
        padded = np.concatenate([self._tokens, np.zeros(short, self._tokens.dtype)]) if short > 0 else self._tokens
        self._windows = _windows(padded)

    @classmethod
    def open(cls, keys: KeyGroup, directory: Path) -> Suffixes:
        """Map what :func:`datastore.suffix_arrays.write_suffixes` wrote for the same documents as the keys'."""
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
        """Find strings between a suffix that comes before each and one that does not, or -1 and the number of
        suffixes."""
        low, high = low.copy(), high.copy()
        found = Found(high, *(np.zeros_like(high) for _ in range(3)))
        into = (low, high, found.left, found.right, found.followed)
        matching.find_between(*self._arrays, query.tokens, starts, lengths, *into)
        return found

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
        found = np.empty_like(firsts)
        matching.width(*self._arrays, query.tokens, firsts, steps, limits, starts, lengths, found)
        return found

    def exact(self, firsts: np.ndarray, limits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How many suffixes in a row, from given ones up and up to ``limits``, have given lengths; each (n,)."""
        found = np.empty_like(firsts)
        matching.exact(*self._arrays[:3], firsts, limits, lengths, found)
        return found

    def runs(self, firsts: np.ndarray, counts: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """Runs of one next token in spans, given by (n,) where each begins, how many suffixes it has and how far from
        their beginnings their next tokens are: rows (which span, token, how many)."""
        return matching.runs(self._rows, self._tokens, firsts, counts, depths)

    def tokens(self, places: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """The tokens of suffixes at ``depths`` from their beginnings; anything where a suffix has none there."""
        rows = self._rows[places].astype(np.int64) + depths
        return self._tokens[np.minimum(rows, len(self._tokens) - 1)].astype(np.int64)

    def documents(self, places: np.ndarray) -> np.ndarray:
        """The numbers, in the group, of the documents that suffixes are of."""
        return np.searchsorted(self._begins, self._rows[places].astype(np.int64), side="right") - 1


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view of an array that is like one that is mapped, so that loops are compiled once for both."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _windows(tokens: np.ndarray) -> np.ndarray:
    """Eight bytes from each token on, as they lie in memory: (n - k + 1,) for k tokens of eight bytes."""
    count = len(tokens) - 8 // tokens.itemsize + 1
    # As eight opaque bytes and not as a number, which NumPy gathers at half the speed where it is not aligned.
    return np.ndarray((count,), dtype="V8", buffer=tokens.view(np.uint8).data, strides=(tokens.itemsize,))
