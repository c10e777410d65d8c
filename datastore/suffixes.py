"""Where any run of tokens occurs in a group's documents: binary search in the order of their suffixes
(:mod:`datastore.suffix_arrays`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from datastore import matching
from datastore.group_texts import GroupTexts
from datastore.suffix_arrays import FILES
from silo.errors import UsageError
from silo.files import load_array

APART = 64
"""Suffixes from one in memory to the next, by which searches begin: an eighth of a byte for each token."""


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

    def __init__(self, texts: GroupTexts, rows: np.ndarray, lengths: np.ndarray) -> None:
        """``rows`` and ``lengths`` are what the files hold, or the same entries of both."""
        self.texts = texts
        self._rows, self._lengths = _read_only(rows), _read_only(lengths)
        self._begins, self._tokens = _read_only(texts.begins), _read_only(texts.tokens)
        self._arrays = self._rows, self._lengths, self._begins, self._tokens

    @classmethod
    def open(cls, texts: GroupTexts, directory: Path) -> Suffixes:
        """Map what :func:`datastore.suffix_arrays.write_suffixes` wrote for the same documents."""
        rows, lengths = (np.asarray(load_array(directory / name, mapped=True)) for name in FILES)
        return cls(texts, rows, lengths)

    def only(self, selected: np.ndarray) -> Suffixes:
        """The suffixes of some documents; ``selected`` is (documents,) bool."""
        of_row = np.repeat(selected, np.diff(self._begins))
        kept = of_row[self._rows]
        return Suffixes(self.texts, self._rows[kept], self._lengths[kept])

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, query: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Found:
        """Find strings of a query, (tokens,) int64, given by (n,) where each starts and how many tokens it has.

        Raises:
            UsageError: it has a token that a store of this type of tokens cannot hold.
        """
        most = np.iinfo(self._tokens.dtype).max
        if query.min(initial=0) < 0 or query.max(initial=0) > most:
            wrong = query[(query < 0) | (query > most)][0]
            raise UsageError(f"token {wrong} is not of the store's vocabulary; use the tokenizer of its model")
        if not len(self):
            return Found(*(np.zeros_like(starts) for _ in range(4)))
        heads = self._heads_of(query, starts, lengths)
        order = np.argsort(heads)  # so that one search is near to the one before
        low, high = np.zeros_like(starts), np.zeros_like(starts)
        low[order] = np.maximum(APART * (np.searchsorted(self._heads, heads[order]) - 1), -1)
        high[order] = np.minimum(APART * np.searchsorted(self._heads, heads[order], side="right"), len(self))
        return self.find_between(query, starts, lengths, low, high)

    def find_between(
        self, query: np.ndarray, starts: np.ndarray, lengths: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> Found:
        """Find strings between a suffix that comes before each and one that does not, or -1 and the number of
        suffixes."""
        low, high = low.copy(), high.copy()
        found = Found(high, *(np.zeros_like(high) for _ in range(3)))
        into = (low, high, found.left, found.right, found.followed)
        matching.find_between(*self._arrays, query, starts, lengths, *into)
        return found

    def _heads_of(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The first eight bytes of some strings of the group or of a query, as numbers in the strings' order: (n,)
        uint64."""
        found = np.empty(len(starts), dtype=np.uint64)
        matching.heads(tokens, starts, lengths, 8 * self._tokens.itemsize, found)
        return found

    @cached_property
    def _heads(self) -> np.ndarray:
        """Those of every suffix of so many.

        A search begins in them: they lie close together, while a suffix's own tokens lie anywhere.
        """
        return self._heads_of(self._tokens, self._rows[::APART].astype(np.int64), self._lengths[::APART])

    def width(
        self,
        query: np.ndarray,
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
        matching.width(*self._arrays, query, firsts, steps, limits, starts, lengths, found)
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
