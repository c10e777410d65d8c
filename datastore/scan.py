"""The k nearest keys of inverted lists.

Where many queries probe a list, it is read once for all of them: decoded some thousand keys at a time, and multiplied
with all queries as a matrix. Where hardly two probe the same, each query reads its lists, and codes are multiplied as
they are.

The last bits of a product depend on what else is in it, unless all its sums are of whole numbers that float32 has; for
which :mod:`datastore.queries` takes care. So a distance is a function of its query and its key alone, bit for bit,
however queries are batched and keys are spread over groups.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import faiss
import numpy as np
import torch

from datastore.choosing import choose, nearest, nearest_in_lists
from datastore.codes import Codes
from datastore.keys import KeyGroup, Lists
from datastore.queries import Queries, Workspace

KEYS_AT_ONCE = 1 << 13
"""Keys of a list among which the nearest are chosen at a time."""
QUERIES_AT_ONCE = 512
"""Queries in a product, at most."""
PENDING = 1 << 24
"""Candidates that are kept until those are thrown out that nearer ones have overtaken."""
QUERIES_FINISHED = 1024
"""Queries whose candidates are put in order at a time."""
QUERIES_SEARCHED = 16
"""Queries that a thread searches for at a time where each reads its lists."""
PAIRS_OF_A_LIST = 1 << 14
"""Below so many pairs of a query and a key of an average list each query reads its lists."""
THREADED = 1 << 28
"""Below so many products of coordinates one thread is as quick as several are made ready."""
_ALONE = threading.Lock()
"""Held while torch is told to use one thread, which holds for the whole process."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Documents(NamedTuple):
    """The documents of some groups, in the order of their rows: what tells the order of what is equally near."""

    first_rows: np.ndarray
    """(documents,) int64, the first row of each."""
    hashes: np.ndarray
    """(documents,) uint64, of their ids."""

    @classmethod
    def of(cls, groups: Sequence[KeyGroup]) -> Documents:
        """Those of some groups, which come in the order of their first rows."""
        rows = [group.first_row + np.asarray(group.begins[:-1]) for group in groups]
        nothing = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        return cls(np.concatenate([nothing[0], *rows]), np.concatenate([nothing[1], *(each.ids for each in groups)]))


class Candidates(NamedTuple):
    """Keys that may be near to some queries, by query."""

    queries: np.ndarray
    """(m,) the queries' numbers."""
    counts: np.ndarray
    """(m,) how many keys there are of each."""
    distances: np.ndarray
    rows: np.ndarray

    def of(self, begin: int, end: int) -> Candidates:
        """Those of some of the m queries."""
        first = int(self.counts[:begin].sum())
        keys = slice(first, first + int(self.counts[begin:end].sum()))
        return Candidates(self.queries[begin:end], self.counts[begin:end], self.distances[keys], self.rows[keys])


class Scan:
    """One search of some queries in the lists of some groups."""

    def __init__(
        self,
        groups: Sequence[KeyGroup],
        selected: Sequence[np.ndarray | None],
        documents: Documents,
        codes: Codes,
        queries: Queries,
        k: int,
    ) -> None:
        """Get ready.

        Args:
            groups: of one store.
            selected: for each of them which rows can be found, (rows,) bool; None for all.
            documents: the groups'.
            codes: the store's.
            queries: n of them.
            k: neighbours of a query.
        """
        self._groups, self._selected, self._documents = groups, selected, documents
        self._queries, self._k = queries, k
        self._codes, self._space = codes, Workspace()
        self._bounds = np.full(len(queries), np.inf, dtype=np.float32)  # what the k-th distance is at most

    def run(self, probed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k) of what is nearest in the lists that each query probes, (n, probes); infinity and
        -1 where there is no more."""
        lists = len(self._groups[0].lists.sizes) if self._groups else 1
        keys = sum(group.num_keys for group in self._groups) / lists  # of a list, on average
        threads = 1 if probed.size * keys * self._queries.dimension < THREADED else None
        if self._queries.weights is not None and probed.size / lists * keys < PAIRS_OF_A_LIST:
            return self._by_query(probed, self._queries.weights, threads)
        return self._by_list(probed, threads)

    def _by_query(self, probed: np.ndarray, weights: np.ndarray, threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The same, where each query reads its lists, and multiplies codes with its weights as they are."""
        shape = (len(self._groups), len(probed), self._k)
        distances, rows = np.full(shape, np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int64)
        queries, groups = self._queries, [self._lists(group, probed) for group in self._groups]
        masks = [np.zeros(0, dtype=bool) if mask is None else mask for mask in self._selected]

        def search(begin: int) -> None:
            at = slice(begin, begin + QUERIES_SEARCHED)
            asked = (probed[at], weights[at], queries.units[at], queries.constants[at], queries.lowest)
            for number, group in enumerate(self._groups):
                into = (distances[number, at], rows[number, at])
                own = groups[number]
                places = (own.file, own.numbers, own.codes, own.rows, own.sizes, own.firsts, own.squares)
                nearest_in_lists(*places, *asked, masks[number], group.first_row, *self._documents, *into)

        for _ in in_threads(search, range(0, len(probed), QUERIES_SEARCHED), threads):
            pass
        return merged(distances, rows, self._documents)

    def _lists(self, group: KeyGroup, probed: np.ndarray) -> Lists:
        """A group's lists, with squares of those that are probed; or with zeros, where squares do not count."""
        if self._queries.by_product:
            return group.lists._replace(squares=np.zeros_like(group.lists.squares))
        for number in np.unique(probed).tolist():
            group.squares(number, self._codes)
        return group.lists

    def _by_list(self, probed: np.ndarray, threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The same, where each list is read once for all queries that probe it, and decoded for a product of
        matrices."""
        which = np.repeat(np.arange(len(probed), dtype=np.int32), probed.shape[1])
        order = np.argsort(probed.ravel(), kind="stable")
        numbers, begins = np.unique(probed.ravel()[order], return_index=True)
        lists = list(zip(numbers.tolist(), np.split(which[order], begins[1:]), strict=True))
        found: list[Candidates] = []
        pending = 0
        for of_list in in_threads(lambda pair: self._of_list(*pair), lists, threads):
            found.extend(of_list)
            pending += sum(len(part.rows) for part in of_list)
            if pending > PENDING + len(probed) * self._k:
                nearer = self._nearest(found, 1)
                np.minimum(self._bounds, nearer[0][:, -1], out=self._bounds)
                found = [self._candidates(*nearer)]
                pending = len(found[0].rows)
        return self._nearest(found, threads)

    def _of_list(self, number: int, who: np.ndarray) -> list[Candidates]:
        """What may be near to queries ``who`` in one list, of all groups."""
        found = []
        for start in range(0, len(who), QUERIES_AT_ONCE):
            asked = who[start : start + QUERIES_AT_ONCE]
            queries = self._queries.chosen(asked)
            for codes, *others in self._keys(number):
                rows, squares = map(np.concatenate, others)
                products, end = self._space.take("products", len(asked), len(rows)), 0
                for piece in codes:
                    begin, end = end, end + len(piece)
                    queries.products(piece, self._space, products[:, begin:end])
                found.append(self._chosen(products.numpy(), queries, squares, asked, rows))
        return found

    def _chosen(
        self, products: np.ndarray, queries: Queries, squares: np.ndarray, asked: np.ndarray, rows: np.ndarray
    ) -> Candidates:
        """Of products (m, n), which may be among the k nearest of their queries."""
        measure = (queries.units, queries.constants, squares, queries.lowest)
        return Candidates(asked, *choose(products, *measure, rows, asked, self._bounds, self._k))

    def _keys(self, number: int) -> Iterator[Iterable[tuple[np.ndarray, ...]]]:
        """Codes (n, bytes), rows (n,) and squares (n,) of one list, each in one piece or several, so many at a time."""
        pieces: list[tuple[np.ndarray, ...]] = []
        room = KEYS_AT_ONCE
        for group, mask in zip(self._groups, self._selected, strict=True):
            codes, rows = group.list(number)
            none = self._queries.by_product
            squares = np.zeros(len(rows), np.float32) if none else group.squares(number, self._codes)
            piece: tuple[np.ndarray, ...] = (codes, rows, squares)
            if mask is not None:
                chosen = mask[piece[1] - group.first_row]
                piece = tuple(each[chosen] for each in piece)
            while len(piece[1]):
                pieces.append(tuple(each[:room] for each in piece))
                piece, room = tuple(each[room:] for each in piece), room - len(pieces[-1][1])
                if not room:
                    yield zip(*pieces, strict=True)
                    pieces, room = [], KEYS_AT_ONCE
        if pieces:
            yield zip(*pieces, strict=True)

    def _nearest(self, found: Sequence[Candidates], threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k) of the nearest of all parts."""
        distances = np.full((len(self._bounds), self._k), np.inf, dtype=np.float32)
        rows = np.full(distances.shape, -1, dtype=np.int64)
        begins = np.append(np.arange(0, len(rows), QUERIES_FINISHED), len(rows))
        cuts = np.stack([np.searchsorted(part.queries, begins) for part in found], axis=1) if found else begins[:0]

        def finish(number: int) -> None:
            at = slice(begins[number], begins[number + 1])
            some = [part.of(*cut) for part, *cut in zip(found, cuts[number], cuts[number + 1], strict=True)]
            queries, counts = (np.concatenate([part[which] for part in some]) for which in (0, 1))
            order = np.argsort(queries, kind="stable")
            firsts = np.searchsorted(queries[order], np.arange(at.start, at.stop + 1))
            near, where = (np.concatenate([part[which] for part in some]) for which in (2, 3))
            parts = (np.cumsum(counts) - counts)[order]
            nearest(firsts, parts, counts[order], near, where, *self._documents, distances[at], rows[at])

        for _ in in_threads(finish, range(len(cuts[:-1])), threads):
            pass
        return distances, rows

    def _candidates(self, distances: np.ndarray, rows: np.ndarray) -> Candidates:
        """The same as candidates for what is still to be read."""
        there = rows >= 0
        queries = np.arange(len(rows), dtype=np.int32)
        return Candidates(queries, there.sum(axis=1), distances[there], rows[there])


def merged(distances: np.ndarray, rows: np.ndarray, documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """Of (parts, n, k) distances and rows the nearest of all parts in order, (n, k) both: what is equally near by (hash
    of the document's id, position). A row of -1 is none, which is infinitely far."""
    count, n, k = rows.shape
    near, where = np.full((n, k), np.inf, dtype=np.float32), np.full((n, k), -1, dtype=np.int64)
    parts = np.arange(count * n).reshape(count, n).T.ravel() * k
    candidates = (np.arange(n + 1) * count, parts, np.full(len(parts), k), distances.ravel(), rows.ravel())
    nearest(*candidates, *documents, near, where)
    return near, where


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int | None = None
) -> Iterator[Result]:
    """The results for some items, in order, by so many threads, or as many as torch uses, each of which computes
    alone."""
    usual = torch.get_num_threads()
    threads = usual if threads is None else threads
    if threads == 1 or len(items) == 1:
        yield from map(function, items)
        return
    with _ALONE, ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(1)
        try:
            yield from pool.map(function, items)
        finally:
            torch.set_num_threads(usual)
