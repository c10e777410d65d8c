"""Nearest neighbours over all groups of a store as one FAISS index (kNN-LM, Khandelwal 2020).

Each group's inverted lists are mapped from disk. Those of several groups are read where they lie as the lists of one
index that has as many times more: list ``l`` of group ``g`` is its list ``g · lists + l``, and a query that probes
``l`` probes it in every group. (FAISS's other way to stack lists, side by side, copies each that it reads; a search for
each group and a merge fills a heap for each: 0.8 and 0.7 times as fast at four groups, measured.)

Neighbours can also be followed instead of searched for (RetoMaton, Alon 2022): where a neighbour's token is the one
that the text went on with, the next key of its document is a candidate for the next query. What is then measured are
some hundred keys, where a search reads thousands.

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
from silo.retrieval import PROBES, Metric, SourceDocument

QUERIES_PER_BATCH = 1024
MEASURED_AT_ONCE = 1 << 14
"""Keys that are decoded at a time where pointers are followed."""
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
        metric: Metric = "l2",
    ) -> None:
        """Look at some groups' keys.

        Args:
            groups: of one store.
            control: the store's.
            selected: for each of ``groups``, which documents can be found, (documents,) bool; None for all.
            probes: inverted lists read a query.
            metric: what is near. Lists are the same for all: they hold the keys that are nearest to a centroid in the
                Euclidean way, and those are read whose centroids are near as it says here.
        """
        masks = selected or [None] * len(groups)
        pairs = [pair for pair in zip(groups, masks, strict=True) if pair[1] is None or pair[1].any()]
        pairs.sort(key=lambda pair: pair[0].first_row)
        self._groups = [group for group, _ in pairs]
        self.searches = 0
        """Queries that were searched for so far; those that pointers answered are not among them."""
        self.num_keys = sum(group.rows if mask is None else int(group.lengths[mask].sum()) for group, mask in pairs)
        """How many keys there are to be found. (Not a length: an empty index would be false.)"""
        self._bits = _bits(pairs) if any(mask is not None for _, mask in pairs) else None
        self._by_product, self._usual = metric == "inner_product", np.float32(0)
        self._coarse: faiss.IndexFlat = control.coarse_index()
        if self._by_product:
            self._coarse = faiss.IndexFlatIP(control.dimension)
            self._coarse.add(control.centroids)
            self._usual = np.float32((control.centroids.astype(np.float64) ** 2).sum(axis=1).mean())
        self._num_lists = len(control.centroids)
        self._probes = min(probes, self._num_lists)
        filled = [group for group in self._groups if group.rows]
        self._stacked = len(filled)
        self._index = control.codes.index(self._coarse, self._num_lists * max(1, self._stacked), metric)
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
        return self._found(keys, *self._search_all(keys, k))

    def _search_all(self, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k), some queries at a time."""
        self.searches += len(keys)
        distances = np.full((len(keys), k), np.inf, dtype=np.float32)
        rows = np.full((len(keys), k), -1, dtype=np.int64)
        for start in range(0, len(keys), QUERIES_PER_BATCH):
            batch = np.ascontiguousarray(keys[start : start + QUERIES_PER_BATCH])
            at = slice(start, start + len(batch))
            distances[at], rows[at] = self._search(batch, k)
        return distances, rows

    def follow(
        self, keys: np.ndarray, tokens: np.ndarray, k: int, *, steps: int, pointers: int, wanted: np.ndarray
    ) -> FoundNeighbours:
        """Search for the first query and then follow its neighbours for so many ``steps``, and so on.

        All stretches of ``steps + 1`` queries go side by side, which is what makes following fast.

        Args:
            keys: (n, dimension) float32, of successive positions of one text.
            tokens: (n,) what the text has there; the last is not looked at.
            k: neighbours of a query.
            steps: queries in a row that pointers answer, at most.
            pointers: where fewer go on, there is a search.
            wanted: (n,) bool, the queries that are to be answered; pointers go on through the others.
        """
        distances = np.full((len(keys), k), np.inf, dtype=np.float32)
        rows = np.full((len(keys), k), -1, dtype=np.int64)
        for step in range(steps + 1):
            at = np.arange(step, len(keys), steps + 1)
            if step:
                rows[at] = self._next(rows[at - 1], tokens[at - 1])
            asked = at[wanted[at]]
            anew = (rows[asked] >= 0).sum(axis=1) < pointers
            distances[asked[anew]], rows[asked[anew]] = self._search_all(keys[asked[anew]], k)
            distances[asked[~anew]], rows[asked[~anew]] = self._measured(keys[asked[~anew]], rows[asked[~anew]])
        rows[~wanted] = -1
        return self._found(keys, distances, rows)

    def _found(self, keys: np.ndarray, distances: np.ndarray, rows: np.ndarray) -> FoundNeighbours:
        """What was found; of an inner product twice its negative until here, the distance that it stands for."""
        if self._by_product:
            distances = distances + (np.einsum("ij,ij->i", keys, keys) + self._usual)[:, None]
        return FoundNeighbours(self._groups, distances, rows)

    def _next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The rows after those of (n, k) whose token is the query's, of (n,), in the same document; -1 for others."""
        after = np.full_like(rows, -1)
        for _, group, chosen, within in _by_group(self._groups, rows):
            same = group.tokens[within] == np.broadcast_to(tokens[:, None], rows.shape)[chosen]
            document = np.searchsorted(group.begins, within, side="right") - 1
            goes_on = same & (within + 1 < group.begins[document + 1])
            after[chosen] = np.where(goes_on, group.first_row + within + 1, -1)
        return after

    def _measured(self, keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k), nearest first, of the keys (n, dimension) to given rows; -1 is infinitely far."""
        distances = np.full(rows.shape, np.inf, dtype=np.float32)
        query, place = np.nonzero(rows >= 0)
        for start in range(0, len(query), MEASURED_AT_ONCE):
            at = slice(start, start + MEASURED_AT_ONCE)
            asked, found = query[at], rows[query[at], place[at]]
            decoded = self._decoded(found)
            if self._by_product:
                distances[asked, place[at]] = -2 * np.einsum("ij,ij->i", decoded, keys[asked])
            else:
                decoded -= keys[asked]
                distances[asked, place[at]] = np.einsum("ij,ij->i", decoded, decoded)
        order = np.argsort(distances, axis=1, kind="stable")
        distances, rows = (np.take_along_axis(each, order, axis=1) for each in (distances, rows))
        for tied in _with_ties(distances, rows):
            order = self._order(distances[tied], rows[tied])
            distances[tied], rows[tied] = distances[tied, order], rows[tied, order]
        return distances, rows

    def _decoded(self, rows: np.ndarray) -> np.ndarray:
        """The keys (n, dimension) of rows (n,), as their codes have them."""
        if self._index.direct_map.type == faiss.DirectMap.NoMap:  # type: ignore[attr-defined]
            self._map_rows()
        return self._index.reconstruct_batch(rows)

    def _map_rows(self) -> None:
        """Tell FAISS in which list each row lies, and where: 8 bytes a row, in memory. (Its own way to find out wants
        rows without gaps.)"""
        places = np.full(max(group.first_row + group.rows for group in self._groups), -1, dtype=np.int64)
        for number in range(self._index.nlist):
            size = self._stack.list_size(number)
            if size:
                of_list = faiss.rev_swig_ptr(self._stack.get_ids(number), size)
                places[of_list] = (number << 32) | np.arange(size)
        faiss.copy_array_to_vector(places, self._index.direct_map.array)
        self._index.direct_map.type = faiss.DirectMap.Array  # type: ignore[attr-defined]

    def _search(self, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k) in their final order.

        FAISS breaks a tie at the last place as it likes. So some more are fetched than asked for; and where even the
        last of those is tied with the k-th, everything that is as near is.
        """
        probed = self._probed(keys)
        distances, rows = self._nearest(keys, k + SPARE, *probed)
        distances[rows < 0] = np.inf
        for query in _with_ties(distances, rows):
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
        if self._by_product:
            distances[rows < 0] = -np.inf
            distances *= -2
        return distances, rows

    def _as_near(
        self, key: np.ndarray, distance: np.float32, lists: np.ndarray, coarse: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (m,) of all that is at most so far from one key."""
        radius, found = np.nextafter(distance, np.float32(np.inf)), faiss.RangeSearchResult(1)
        if self._by_product:
            radius = -radius / 2
        arrays = (faiss.swig_ptr(each) for each in (lists, coarse))
        self._index.parallel_mode = 0  # the only one that a range search of one query knows
        self._index.range_search_preassigned_c(
            1, faiss.swig_ptr(key), float(radius), *arrays, found, False, self._parameters()
        )
        count = int(faiss.rev_swig_ptr(found.lims, 2)[1])
        distances, rows = (faiss.rev_swig_ptr(each, count).copy() for each in (found.distances, found.labels))
        return (-2 * distances if self._by_product else distances), rows

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

    def __init__(self, groups: Sequence[KeyGroup], distances: np.ndarray, rows: np.ndarray) -> None:
        """``rows`` (n, k) int64 are numbered as in ``groups``; -1 where nothing was found."""
        self._groups, self._rows = groups, rows
        self.distances = distances

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


def _with_ties(distances: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The numbers of the queries that have two rows of (n, k) equally far, where -1 is no row and rows come nearest
    first."""
    equal = (distances[:, 1:] == distances[:, :-1]) & (rows[:, 1:] >= 0)
    return np.flatnonzero(equal.any(axis=1))


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
