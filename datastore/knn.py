"""Nearest neighbours over all groups of a store as one FAISS index (kNN-LM, Khandelwal 2020).

Each group's inverted lists are mapped from disk. Those of several groups are read where they lie as the lists of one
index that has as many times more: list ``l`` of group ``g`` is its list ``g · lists + l``, and a query that probes
``l`` probes it in every group. (FAISS's other way to stack lists, side by side, copies each that it reads; a search for
each group and a merge fills a heap for each: 0.8 and 0.7 times as fast at four groups, measured.)

Equal distances come in the order of (hash of the document's id, position), which does not depend on how documents are
spread over shards and groups; so equal stores give equal neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from datastore.control import ControlPlane
from datastore.keys import KeyGroup
from silo.retrieval import Neighbours, SourceDocument

PROBES = 16
"""Inverted lists read a query."""
QUERIES_PER_BATCH = 1024
SPARE = 8
"""Neighbours that are fetched beyond k, to see whether the k-th is tied with any that did not come."""


class NeighbourIndex:
    """A searchable view of some groups of keys."""

    def __init__(self, groups: Sequence[KeyGroup], control: ControlPlane, *, probes: int = PROBES) -> None:
        self._groups = sorted(groups, key=lambda group: group.first_row)
        self._firsts = np.asarray([group.first_row for group in self._groups], dtype=np.int64)
        self.num_keys = sum(group.rows for group in self._groups)
        """How many keys there are to be found. (Not a length: an empty index would be false.)"""
        self._coarse = control.coarse_index()
        self._num_lists = len(control.centroids)
        self._probes = min(probes, self._num_lists)
        filled = [group for group in self._groups if group.rows]
        self._stacked = len(filled)
        self._index = control.codes.index(self._coarse, self._num_lists * max(1, self._stacked))
        self._index.ntotal, self._index.nprobe = self.num_keys, self._probes * max(1, self._stacked)
        self._lists = [group.inverted_lists(self._index.code_size) for group in filled]
        pointers: Any = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
        for each in self._lists:
            pointers.push_back(each)
        if self._lists:
            self._stack = faiss.VStackInvertedLists(self._stacked, pointers.data())  # type: ignore[attr-defined]
            self._index.replace_invlists(self._stack, False)

    def search(self, keys: np.ndarray, k: int) -> Neighbours:
        """The ``k`` nearest of the rows in the probed lists, for (n, dimension) float32 queries."""
        distances = np.full((len(keys), k), np.inf, dtype=np.float32)
        rows = np.full((len(keys), k), -1, dtype=np.int64)
        for start in range(0, len(keys), QUERIES_PER_BATCH):
            batch = np.ascontiguousarray(keys[start : start + QUERIES_PER_BATCH])
            at = slice(start, start + len(batch))
            distances[at], rows[at] = self._search(batch, k)
        return self._describe(distances, rows)

    def _search(self, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k) in their final order.

        FAISS breaks a tie at the last place as it likes. So some more are fetched than asked for; and where even the
        last of those is tied with the k-th, everything that is as near is.
        """
        coarse, lists = self._probed(keys)
        distances, rows = self._index.search_preassigned(keys, k + SPARE, lists, coarse)
        distances[rows < 0] = np.inf
        equal = (distances[:, 1:] == distances[:, :-1]) & (rows[:, 1:] >= 0)
        for query in np.flatnonzero(equal.any(axis=1)):
            near, found = distances[query], rows[query]
            if near[k - 1] == near[-1] and found[-1] >= 0:
                radius = float(np.nextafter(near[-1], np.float32(np.inf)))
                one = slice(query, query + 1)
                _, as_near, also = self._index.range_search_preassigned(keys[one], radius, lists[one], coarse[one])
                found, first = np.unique(np.concatenate([found, also]), return_index=True)
                near = np.concatenate([near, as_near])[first]
            order = self._order(near, found)[:k]
            distances[query, :k], rows[query, :k] = near[order], found[order]
        return distances[:, :k], rows[:, :k]

    def _probed(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists to read for each query, nearest first, those of all groups; and how far their centroids are."""
        coarse, lists = self._coarse.search(keys, self._probes)
        of_group = np.arange(max(1, self._stacked)) * self._num_lists
        return np.repeat(coarse, len(of_group), axis=1), (lists[:, :, None] + of_group).reshape(len(keys), -1)

    def _order(self, distances: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The order of (n,) rows by distance, then by (hash of the document's id, position)."""
        hashes, positions = np.zeros(rows.shape, dtype=np.uint64), np.zeros(rows.shape, dtype=np.int64)
        for number, chosen, within in self._by_group(rows):
            group = self._groups[number]
            document = np.searchsorted(group.begins, within, side="right") - 1
            hashes[chosen], positions[chosen] = group.ids[document], within - group.begins[document]
        return np.lexsort((positions, hashes, distances))

    def _by_group(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Which of some row numbers (n,) lie in which group: (its number, their places, their rows within it)."""
        if not len(self._groups):
            return []
        of = np.where(rows >= 0, np.searchsorted(self._firsts, rows, side="right") - 1, -1)
        found = []
        for number in np.unique(of[of >= 0]):
            chosen = np.flatnonzero(of == number)
            found.append((int(number), chosen, rows[chosen] - self._firsts[number]))
        return found

    def _describe(self, distances: np.ndarray, rows: np.ndarray) -> Neighbours:
        flat = rows.ravel()
        values, positions = np.zeros_like(flat), np.zeros_like(flat)
        documents = np.full_like(flat, -1)
        for number, chosen, within in self._by_group(flat):
            group = self._groups[number]
            document = np.searchsorted(group.begins, within, side="right") - 1
            values[chosen] = group.tokens[within]
            positions[chosen] = within - group.begins[document]
            documents[chosen] = document + (number << 32)
        shaped = (array.reshape(rows.shape) for array in (values, documents, positions))
        return Neighbours(distances, *shaped)

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`silo.retrieval.Neighbours.documents`."""
        return self._groups[int(index) >> 32].document(int(index) & 0xFFFFFFFF).described()
