"""What a datastore gives to the model, in plain arrays, so that mixing knows nothing of how it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

PROBES = 4
"""Inverted lists read a query. Four of 1,024 took a third of the time of sixteen, over 4.2 million keys, and the
mixture with the ∞-gram was worse by 0.4 %."""

Metric = Literal["l2", "inner_product"]
"""What is near to a query q: keys k whose squared Euclidean distance ‖q‖² − 2⟨q, k⟩ + ‖k‖² is small, or whose inner
product is large. Of the latter the distance is the same with a constant in place of ‖k‖², so that both have one unit;
softmax(−d / τ) does not see the constant. It may be below zero."""


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """Who stands behind a piece of retrieved text."""

    id: str
    owner: str
    license: str
    source: str
    title: str

    def __hash__(self) -> int:
        """By the id alone, which tells documents apart: sums over documents hash each many times."""
        return hash(self.id)


class Neighbours(Protocol):
    """The k nearest keys of n queries, nearest first; where fewer were found, the rest has infinite distance."""

    @property
    def distances(self) -> np.ndarray:
        """(n, k) float32, squared (see :data:`Metric`)."""
        ...

    @property
    def values(self) -> np.ndarray:
        """(n, k) int64: the token that followed each key; 0 where nothing was found."""
        ...

    @property
    def documents(self) -> np.ndarray:
        """(n, k) int64: index of each key's document, for :meth:`NeighbourSource.document`; -1 where nothing was
        found."""
        ...

    @property
    def positions(self) -> np.ndarray:
        """(n, k) int64: where in its document each value stands; 0 where nothing was found."""
        ...

    def part(self, begin: int, end: int) -> Neighbours:
        """Those of some successive queries."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """A run of tokens of one document."""

    document: SourceDocument
    start: int
    tokens: np.ndarray
    score: float
    """The BM25 score against the query that found it."""


class NeighbourSource(Protocol):
    """Finds keys near to a query (kNN-LM)."""

    def search(self, keys: np.ndarray, k: int) -> Neighbours:
        """The ``k`` nearest of (n, d) float32 queries."""
        ...

    def follow(
        self, keys: np.ndarray, tokens: np.ndarray, k: int, *, turns: np.ndarray, pointers: int, wanted: np.ndarray
    ) -> Neighbours:
        """The same where queries with a turn (n,) above 0 follow the one before, whose turn is lower by one: they take
        the keys that come next to its neighbours, unless there are fewer than ``pointers`` of them.

        ``tokens`` (n,) are what the text has at these positions, of which the last is not looked at; queries that are
        not ``wanted``, (n,) bool, have no neighbours.
        """
        ...

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`Neighbours.documents`."""
        ...


class BlockSource(Protocol):
    """Finds blocks of text that share rare words with a query (retrieve-in-context)."""

    def search(
        self, queries: Sequence[str], k: int, *, tokens: int = ..., exclude: str | None = None
    ) -> list[list[Block]]:
        """The ``k`` best blocks for each query, best first; fewer where fewer share a word with it.

        A block goes ``tokens`` tokens far, where its document does; blocks of the document ``exclude`` are passed over.
        """
        ...


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The tokens that follow some contexts, and how often."""

    begins: np.ndarray
    """(n + 1,) int64: those of context i are ``tokens[begins[i] : begins[i + 1]]``."""
    tokens: np.ndarray
    """(m,) int64, ascending within a context."""
    counts: np.ndarray
    """(m,) int64."""


@dataclass(frozen=True, slots=True)
class Origins:
    """The documents in which some contexts are followed by a token, and how often."""

    begins: np.ndarray
    """(n + 1,) int64: those of context i are ``documents[begins[i] : begins[i + 1]]``."""
    documents: np.ndarray
    """(m,) int64: indexes for :meth:`NgramSource.document`, in an order that depends on the documents alone."""
    counts: np.ndarray
    """(m,) int64."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The documents in which a suffix of one context occurs with a token after it."""

    documents: np.ndarray
    """(d,) int64: indexes for :meth:`NgramSource.document`, ascending."""
    counts: np.ndarray
    """(d,) int64: how often in each."""
    only: np.ndarray
    """(d,) int64: how many of the tokens that come after it come in this document alone."""


class NgramCounts(Protocol):
    """Of n contexts a suffix each, and what came after it."""

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of the suffix."""
        ...

    @property
    def counts(self) -> np.ndarray:
        """(n,) int64: how often it occurs with a token after it; 0 where it is not looked at."""
        ...

    @property
    def hits(self) -> np.ndarray:
        """(n,) int64: how often the token after it is the one that the sequence goes on with; 0 at its end."""
        ...

    def kinds(self, contexts: np.ndarray) -> np.ndarray:
        """(m,) int64: how many different tokens come after the suffixes of some contexts, given by their numbers."""
        ...

    def following(self, contexts: np.ndarray) -> NextTokens:
        """All tokens that come after the suffixes of some contexts, given by their (m,) numbers."""
        ...

    def occurrences(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """How often (m,) tokens come after the suffixes of (m,) contexts: (m,) int64."""
        ...

    def origins(self, contexts: np.ndarray, tokens: np.ndarray) -> Origins:
        """The documents behind the counts of (m,) tokens after (m,) contexts."""
        ...

    def spread(self, context: int) -> Spread:
        """The documents behind the count of one context."""
        ...


class NgramMatches(NgramCounts, Protocol):
    """For every context of some sequences, its longest suffix that some document has with a token after it.

    The contexts of a sequence of T tokens are its first 0, 1, … T tokens. The arrays hold those of all sequences, one
    sequence after the other. A suffix of no tokens is one of which not even the last token is known; that occurs
    wherever any token does.
    """

    @property
    def begins(self) -> np.ndarray:
        """(sequences + 1,) int64: context ``tokens[:i]`` of sequence s is number ``begins[s] + i``."""
        ...

    @property
    def single(self) -> np.ndarray:
        """(n,) int64: the token that comes after every occurrence of the suffix, or -1 if there are several."""
        ...

    def shorter(self, length: int) -> NgramCounts:
        """The same contexts' suffixes of so many tokens, 1 or more; counts are 0 where the longest is no longer."""
        ...


class NgramSource(Protocol):
    """Finds what came after the same words (∞-gram)."""

    def match(self, sequences: Sequence[np.ndarray]) -> NgramMatches:
        """Match every context of sequences of (T,) tokens."""
        ...

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`Origins.documents`."""
        ...
