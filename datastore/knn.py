"""Nearest neighbours over all live shards as one FAISS index (kNN-LM, Khandelwal 2020).

The inverted lists are laid out in memory when the store is opened, from codes and list numbers that the shards hold.
Rows are numbered in the order (document id, position), whatever shard holds them, and stand in that order in each
list: equal shards give an equal index, and equal distances come in the order of the rows. (Only where the k-th place
is tied between lists, the list nearer to the query has it.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import faiss
import numpy as np

from datastore.control import ControlPlane
from datastore.shard import Encoded, Shard
from silo.retrieval import Neighbours, SourceDocument

PROBES = 16
"""Inverted lists read a query."""
QUERIES_PER_BATCH = 256


class NeighbourIndex:
    """A searchable view of some shards."""

    def __init__(self, shards: Sequence[Shard], control: ControlPlane, *, probes: int = PROBES) -> None:
        documents = sorted(
            (document for shard in shards for document in shard.documents()), key=lambda encoded: encoded.document.id
        )
        self._documents = [encoded.document for encoded in documents]
        lengths = np.asarray([len(encoded.tokens) for encoded in documents], dtype=np.int64)
        self._begins = np.concatenate(([0], np.cumsum(lengths)))
        self._values = _concatenate([encoded.tokens for encoded in documents]).astype(np.int64)
        self._coarse = control.coarse_index()  # FAISS keeps a pointer to it, not a reference.
        self._index = faiss.IndexIVFScalarQuantizer(
            self._coarse,
            control.dimension,
            len(control.centroids),
            control.quantizer().qtype,
            faiss.METRIC_L2,
            False,
        )
        self._index.sq = control.quantizer()
        self._index.is_trained = True
        self._index.nprobe = min(probes, len(control.centroids))
        self._fill(documents)

    @property
    def num_keys(self) -> int:
        """How many keys there are to be found. (Not a length: an empty index would be false.)"""
        return int(self._begins[-1])

    def _fill(self, documents: Sequence[Encoded]) -> None:
        """Hand each inverted list its rows, in order."""
        if not documents:
            return
        lists = _concatenate([encoded.lists for encoded in documents])
        codes = np.concatenate([encoded.codes for encoded in documents])
        order = np.argsort(lists, kind="stable").astype(np.int64)
        bounds = np.searchsorted(lists[order], np.arange(self._index.nlist + 1)).tolist()
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if end > begin:
                rows = order[begin:end]
                of_list = np.ascontiguousarray(codes[rows])
                self._index.invlists.add_entries(  # type: ignore[union-attr]
                    number, end - begin, faiss.swig_ptr(rows), faiss.swig_ptr(of_list)
                )
        self._index.ntotal = self.num_keys

    def search(self, keys: np.ndarray, k: int) -> Neighbours:
        """The ``k`` nearest of the rows in the probed lists, for (n, dimension) float32 queries."""
        distances = np.full((len(keys), k), np.inf, dtype=np.float32)
        rows = np.full((len(keys), k), -1, dtype=np.int64)
        for start in range(0, len(keys), QUERIES_PER_BATCH):
            batch = np.ascontiguousarray(keys[start : start + QUERIES_PER_BATCH])
            at = slice(start, start + len(batch))
            distances[at], rows[at] = self._index.search(batch, k)
        found = rows >= 0
        distances[~found] = np.inf
        order = np.lexsort((rows, distances), axis=-1)
        distances, rows = np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)
        return self._describe(distances, rows)

    def _describe(self, distances: np.ndarray, rows: np.ndarray) -> Neighbours:
        if not self.num_keys:
            nothing = np.zeros_like(rows)
            return Neighbours(distances, nothing, nothing - 1, nothing)
        found = rows >= 0
        documents = np.where(found, np.searchsorted(self._begins, rows, side="right") - 1, -1)
        return Neighbours(
            distances,
            np.where(found, self._values[rows], 0),
            documents,
            np.where(found, rows - self._begins[documents], 0),
        )

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`silo.retrieval.Neighbours.documents`."""
        row = self._documents[index]
        return SourceDocument(row.id, row.owner, row.license, row.source, row.title)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
