"""What a datastore gives to the model, in plain arrays, so that mixing knows nothing of how it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """Who stands behind a piece of retrieved text."""

    id: str
    owner: str
    license: str
    source: str
    title: str


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest keys of n queries, nearest first; where fewer were found, the rest has infinite distance."""

    squared_l2: np.ndarray
    """(n, k) float32."""
    values: np.ndarray
    """(n, k) int64: the token that followed each key; 0 where nothing was found."""
    documents: np.ndarray
    """(n, k) int64: index of each key's document, for :meth:`NeighbourSource.document`; -1 where nothing was found."""
    positions: np.ndarray
    """(n, k) int64: where in its document each value stands."""


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

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`Neighbours.documents`."""
        ...


class BlockSource(Protocol):
    """Finds blocks of text that share rare words with a query (retrieve-in-context)."""

    def search(self, queries: Sequence[str]) -> list[Block | None]:
        """The best block for each query, or None where no block shares a word with it."""
        ...
