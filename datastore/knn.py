"""Nearest neighbours over all groups of a store as one FAISS index (kNN-LM, Khandelwal 2020).

Each group's inverted lists are mapped from disk. Those of several groups are read where they lie as the lists of one
index that has as many times more: list ``l`` of group ``g`` is its list ``g · lists + l``, and a query that probes
``l`` probes it in every group. (FAISS's other way to stack lists, side by side, copies each that it reads; a search for
each group and a merge fills a heap for each: 0.8 and 0.7 times as fast at four groups, measured.)

Equal distances come in the order of (hash of the document's id, position), which does not depend on how documents are
spread over shards and groups; so equal stores give equal neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import faiss
import numpy as np

from datastore.control import ControlPlane
from datastore.keys import KeyGroup
from silo.retrieval import SourceDocument

PROBES = 4
"""Inverted lists read a query. Four of 1,024 took a third of the time of sixteen, over 4.2 million keys, and the
mixture with the ∞-gram was worse by 0.4 %."""
QUERIES_PER_BATCH = 1024
SPARE = 8
"""Neighbours that are fetched beyond k, to see whether the k-th is tied with any that did not come."""


class NeighbourIndex:
    """A searchable view of some groups of keys."""

    def __init__(
        self,
        groups: Sequence[KeyGroup],
        control: ControlPlane,
        selected: Sequence[np.ndarray | None] | None = None,
        *,
        probes: int = PROBES,
    ) -> None:
        """Look at some groups' keys.

        Args:
            groups: of one store.
            control: the store's.
            selected: for each of ``groups``, which documents can be found, (documents,) bool; None for all.
            probes: inverted lists read a query.
        """
        masks = selected or [None] * len(groups)
        pairs = [pair for pair in zip(groups, masks, strict=True) if pair[1] is None or pair[1].any()]
        pairs.sort(key=lambda pair: pair[0].first_row)
        self._groups = [group for group, _ in pairs]
        self.num_keys = sum(group.rows if mask is None else int(group.lengths[mask].sum()) for group, mask in pairs)
        """How many keys there are to be found. (Not a length: an empty index would be false.)"""
        self._bits = _bits(pairs) if any(mask is not None for _, mask in pairs) else None
        self._coarse = control.coarse_index()
        self._num_lists = len(control.centroids)
        self._probes = min(probes, self._num_lists)
        filled = [group for group in self._groups if group.rows]
        self._stacked = len(filled)
        self._index = control.codes.index(self._coarse, self._num_lists * max(1, self._stacked))
        self._index.ntotal = sum(group.rows for group in filled)
        self._index.nprobe = self._probes * max(1, self._stacked)
        self._lists = [group.inverted_lists(self._index.code_size) for group in filled]
        pointers: Any = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
        for each in self._lists:
            pointers.push_back(each)
        if self._lists:
            self._stack = faiss.VStackInvertedLists(self._stacked, pointers.data())  # type: ignore[attr-defined]
            self._index.replace_invlists(self._stack, False)

    def search(self, keys: np.ndarray, k: int) -> FoundNeighbours:
        """The ``k`` nearest of the rows in the probed lists, for (n, dimension) float32 queries."""
        distances = np.full((len(keys), k), np.inf, dtype=np.float32)
        rows = np.full((len(keys), k), -1, dtype=np.int64)
        for start in range(0, len(keys), QUERIES_PER_BATCH):
            batch = np.ascontiguousarray(keys[start : start + QUERIES_PER_BATCH])
            at = slice(start, start + len(batch))
            distances[at], rows[at] = self._search(batch, k)
        return FoundNeighbours(self._groups, distances, rows)

    def _search(self, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k) in their final order.

        FAISS breaks a tie at the last place as it likes. So some more are fetched than asked for; and where even the
        last of those is tied with the k-th, everything that is as near is.
        """
        probed = self._probed(keys)
        distances, rows = self._nearest(keys, k + SPARE, *probed)
        distances[rows < 0] = np.inf
        equal = (distances[:, 1:] == distances[:, :-1]) & (rows[:, 1:] >= 0)
        for query in np.flatnonzero(equal.any(axis=1)):
            near, found = distances[query], rows[query]
            if near[k - 1] == near[-1] and found[-1] >= 0:
                one = slice(query, query + 1)
                as_near, also = self._as_near(keys[one], near[-1], *(array[one] for array in probed))
                found, first = np.unique(np.concatenate([found, also]), return_index=True)
                near = np.concatenate([near, as_near])[first]
            order = self._order(near, found)[:k]
            distances[query, :k], rows[query, :k] = near[order], found[order]
        return distances[:, :k], rows[:, :k]

    def _probed(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists to read for each query, nearest first, those of all groups; and how far their centroids are."""
        coarse, lists = self._coarse.search(keys, self._probes)
        of_group = np.arange(max(1, self._stacked)) * self._num_lists
        stacked = (lists[:, :, None] + of_group).reshape(len(keys), -1)
        return np.ascontiguousarray(stacked), np.ascontiguousarray(np.repeat(coarse, len(of_group), axis=1))

    def _nearest(
        self, keys: np.ndarray, k: int, lists: np.ndarray, coarse: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k) as FAISS orders them. (Its wrapper for Python takes no selection here.)"""
        distances, rows = np.empty((len(keys), k), np.float32), np.empty((len(keys), k), np.int64)
        arrays = (faiss.swig_ptr(each) for each in (lists, coarse, distances, rows))
        self._index.parallel_mode = 3  # over queries, which FAISS does unasked only where it chooses the lists itself
        self._index.search_preassigned_c(len(keys), faiss.swig_ptr(keys), k, *arrays, False, self._parameters())
        return distances, rows

    def _as_near(
        self, key: np.ndarray, distance: np.float32, lists: np.ndarray, coarse: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (m,) of all that is at most so far from one key."""
        radius, found = float(np.nextafter(distance, np.float32(np.inf))), faiss.RangeSearchResult(1)
        arrays = (faiss.swig_ptr(each) for each in (lists, coarse))
        self._index.parallel_mode = 0  # the only one that a range search of one query knows
        self._index.range_search_preassigned_c(
            1, faiss.swig_ptr(key), radius, *arrays, found, False, self._parameters()
        )
        count = int(faiss.rev_swig_ptr(found.lims, 2)[1])
        return tuple(faiss.rev_swig_ptr(each, count).copy() for each in (found.distances, found.labels))  # type: ignore[return-value]

    def _parameters(self) -> Any:
        """Which rows count; None for all."""
        if self._bits is None:
            return None
        selector: Any = faiss.IDSelectorBitmap
        parameters: Any = faiss.SearchParametersIVF
        return parameters(sel=selector(self._bits), nprobe=self._index.nprobe)

    def _order(self, distances: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The order of (n,) rows by distance, then by (hash of the document's id, position)."""
        hashes, positions = np.zeros(rows.shape, dtype=np.uint64), np.zeros(rows.shape, dtype=np.int64)
        for _, group, chosen, within in _by_group(self._groups, rows):
            document = np.searchsorted(group.begins, within, side="right") - 1
            hashes[chosen], positions[chosen] = group.ids[document], within - group.begins[document]
        return np.lexsort((positions, hashes, distances))

    def document(self, index: int) -> SourceDocument:
        """The document behind an index in :attr:`silo.retrieval.Neighbours.documents`."""
        return self._groups[int(index) >> 32].document(int(index) & 0xFFFFFFFF).described()


class FoundNeighbours:
    """What :class:`silo.retrieval.Neighbours` asks for. Where a neighbour stands is looked up when it is asked for,
    since mixing needs distances and tokens only."""

    def __init__(self, groups: Sequence[KeyGroup], squared_l2: np.ndarray, rows: np.ndarray) -> None:
        """``rows`` (n, k) int64 are numbered as in ``groups``; -1 where nothing was found."""
        self._groups, self._rows = groups, rows
        self.squared_l2 = squared_l2

    @cached_property
    def values(self) -> np.ndarray:
        """As :attr:`silo.retrieval.Neighbours.values`."""
        values = np.zeros_like(self._rows)
        for _, group, chosen, within in _by_group(self._groups, self._rows):
            values[chosen] = group.tokens[within]
        return values

    @property
    def documents(self) -> np.ndarray:
        """As :attr:`silo.retrieval.Neighbours.documents`."""
        return self._places[0]

    @property
    def positions(self) -> np.ndarray:
        """As :attr:`silo.retrieval.Neighbours.positions`."""
        return self._places[1]

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        documents, positions = np.full_like(self._rows, -1), np.zeros_like(self._rows)
        for number, group, chosen, within in _by_group(self._groups, self._rows):
            document = np.searchsorted(group.begins, within, side="right") - 1
            positions[chosen] = within - group.begins[document]
            documents[chosen] = document + (number << 32)
        return documents, positions


def _by_group(groups: Sequence[KeyGroup], rows: np.ndarray) -> Iterator[tuple[int, KeyGroup, np.ndarray, np.ndarray]]:
    """Which of some row numbers lie in which group: its number, the group, (rows' shape) bool, their rows within it."""
    for number, group in enumerate(groups):
        chosen = (rows >= group.first_row) & (rows < group.first_row + group.rows)
        within = rows[chosen]
        if len(within):
            yield number, group, chosen, within - group.first_row


def _bits(pairs: Sequence[tuple[KeyGroup, np.ndarray | None]]) -> np.ndarray:
    """One bit a row number, set for the rows of selected documents."""
    bits = np.zeros(max(group.first_row + group.rows for group, _ in pairs) // 8 + 1, dtype=np.uint8)
    for group, mask in pairs:
        rows = np.repeat(np.ones(len(group.lengths), dtype=bool) if mask is None else mask, group.lengths)
        shift = group.first_row % 8  # two groups may share a byte
        packed = np.packbits(np.concatenate([np.zeros(shift, dtype=bool), rows]), bitorder="little")
        begin = group.first_row // 8
        bits[begin : begin + len(packed)] |= packed
    return bits
