"""The k nearest keys of inverted lists, where each list is read once for all the queries that probe it.

A search query by query decodes a list anew for each query that probes it, and that is nearly all of its time. Here a
list's keys are decoded once, some thousand at a time, and one matrix product compares them with all queries that probe
it.

The last bits of a product depend on what else is in it, unless all its sums are of whole numbers that float32 has; for
which :mod:`datastore.queries` takes care. So a distance is a function of its query and its key alone, bit for bit,
however queries are batched and keys are spread over groups.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import faiss
import numpy as np
import torch

from datastore.codes import Codes
from datastore.keys import KeyGroup
from datastore.queries import Queries, Workspace

BLOCK_NUMBERS = 1 << 18
"""Coordinates that are decoded at a time: what the processor's cache holds."""
KEYS_AT_ONCE = 1 << 13
"""Keys of a list among which the nearest are chosen at a time."""
QUERIES_AT_ONCE = 512
"""Queries in a product, at most."""
PENDING = 1 << 24
"""Candidates that are kept until those are thrown out that nearer ones have overtaken."""
QUERIES_FINISHED = 2048
"""Queries whose candidates are put in order at a time."""
_ALONE = threading.Lock()
"""Held while torch is told to use one thread, which holds for the whole process."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Candidates(NamedTuple):
    """Keys that may be near to queries: for each (n,) the query's number, the distance and the key's row number."""

    queries: np.ndarray
    distances: np.ndarray
    rows: np.ndarray

    def chosen(self, which: np.ndarray | slice) -> Candidates:
        """Some of them."""
        return Candidates(*(each[which] for each in self))

    @classmethod
    def joined(cls, parts: Iterable[Candidates]) -> Candidates:
        """All of some."""
        nothing = (np.zeros(0, kind) for kind in (np.int32, np.float32, np.int64))
        return cls(*(np.concatenate(each) for each in zip(nothing, *parts, strict=True)))


class Scan:
    """One search of some queries in the lists of some groups."""

    def __init__(
        self,
        groups: Sequence[KeyGroup],
        selected: Sequence[np.ndarray | None],
        codes: Codes,
        queries: Queries,
        k: int,
    ) -> None:
        """Get ready.

        Args:
            groups: of one store.
            selected: for each of them which rows can be found, (rows,) bool; None for all.
            codes: the store's.
            queries: n of them.
            k: neighbours of a query.
        """
        self._groups, self._selected, self._queries, self._k = groups, selected, queries, k
        self._codes, self._space = codes, Workspace()
        self._block = max(1, BLOCK_NUMBERS // codes.dimension)
        self._bounds = np.full(len(queries), np.inf, dtype=np.float32)  # what the k-th distance is at most

    def run(self, probed: np.ndarray, finish: Callable[[Candidates], Result]) -> Iterator[Result]:
        """Find the k nearest of the lists that each query probes, (n, probes), and what is as near as the k-th; give
        what ``finish`` makes of them, some successive queries at a time, each by query."""
        which = np.repeat(np.arange(len(probed), dtype=np.int32), probed.shape[1])
        order = np.argsort(probed.ravel(), kind="stable")
        numbers, begins = np.unique(probed.ravel()[order], return_index=True)
        lists = zip(numbers.tolist(), np.split(which[order], begins[1:]), strict=True)
        found: list[Candidates] = []
        pending, most = 0, PENDING
        for of_list in in_threads(lambda pair: self._of_list(*pair), lists):
            found.extend(of_list)
            pending += sum(len(part.rows) for part in of_list)
            if pending > most:
                found = list(self._nearest(found, lambda part: part))
                pending = sum(len(part.rows) for part in found)
                most = PENDING + pending
        yield from self._nearest(found, finish)

    def _of_list(self, number: int, who: np.ndarray) -> list[Candidates]:
        """What may be near to queries ``who`` in one list, of all groups, in parts that each come by query."""
        found = []
        for start in range(0, len(who), QUERIES_AT_ONCE):
            asked = who[start : start + QUERIES_AT_ONCE]
            queries = self._queries.chosen(asked)
            for codes, *others in self._keys(number):
                rows, squares = map(np.concatenate, others)
                distances, end = self._space.take("distances", len(asked), len(rows)), 0
                for block in self._blocks(codes):
                    begin, end = end, end + len(block)
                    decoded = self._space.take("keys", len(block), queries.dimension)
                    queries.decode(block, decoded)
                    queries.products(decoded, distances[:, begin:end])
                queries.finish(distances, squares)
                found.append(self._within(distances.numpy(), asked, rows))
        return found

    def _blocks(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Codes (n, bytes) as few at a time as are decoded at a time."""
        for codes in pieces:
            yield from (codes[begin : begin + self._block] for begin in range(0, len(codes), self._block))

    def _keys(self, number: int) -> Iterator[Iterable[tuple[np.ndarray, ...]]]:
        """Codes (n, bytes), rows (n,) and squares (n,) of one list, each in one piece or several, so many at a time."""
        pieces: list[tuple[np.ndarray, ...]] = []
        room = KEYS_AT_ONCE
        for group, mask in zip(self._groups, self._selected, strict=True):
            piece: tuple[np.ndarray, ...] = (*group.list(number), group.squares(number, self._codes))
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

    def _within(self, distances: np.ndarray, asked: np.ndarray, rows: np.ndarray) -> Candidates:
        """Those of (queries, keys) distances that may be among the k smallest of their queries."""
        near = distances <= self._bounds[asked][:, None]
        counts = np.add.reduce(near.view(np.uint8), axis=1, dtype=np.uint16)  # a sum of bools counts in 64 bits
        many = np.flatnonzero(counts > self._k)
        if len(many):
            last = np.partition(distances[many], self._k - 1, axis=1)[:, self._k - 1]
            self._bounds[asked[many]] = last
            near[many] = distances[many] <= last[:, None]
        row, column = np.divmod(np.flatnonzero(near), len(rows))  # quicker than two-dimensional nonzero
        return Candidates(asked[row], distances[row, column], rows[column])

    def _nearest(self, found: Sequence[Candidates], finish: Callable[[Candidates], Result]) -> Iterator[Result]:
        """Keep what is among the k nearest of its query, or as near as the k-th, of parts that each come by query."""
        if not found:
            return
        bounds = np.append(np.arange(0, len(self._bounds), QUERIES_FINISHED), len(self._bounds))
        cuts = np.stack([np.searchsorted(part.queries, bounds) for part in found], axis=1)

        def one(begins: np.ndarray, ends: np.ndarray) -> Result:
            parts = zip(found, begins, ends, strict=True)
            return finish(self._cut(Candidates.joined(part.chosen(slice(*at)) for part, *at in parts)))

        yield from in_threads(lambda pair: one(*pair), itertools.pairwise(cuts))

    def _cut(self, found: Candidates) -> Candidates:
        """The same for a few successive queries, in any order."""
        first = found.queries.min(initial=len(self._bounds))
        found = found.chosen(np.argsort((found.queries - first).astype(np.uint16), kind="stable"))  # that is by radix
        for queries, distances, _ in tables(found):
            if distances.shape[1] >= self._k:
                last = np.partition(distances, self._k - 1, axis=1)[:, self._k - 1]
                self._bounds[queries] = np.minimum(self._bounds[queries], last)
        return found.chosen(found.distances <= self._bounds[found.queries])


def tables(found: Candidates) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The numbers of some queries (n,), and the distances and rows (n, m) of their candidates, filled up with infinity
    and -1.

    Candidates come by query. Queries that have far more than others have tables of their own.
    """
    if not len(found.queries):
        return
    queries, begins, counts = np.unique(found.queries, return_index=True, return_counts=True)
    usual = counts <= 4 * np.median(counts)
    own, filled = np.repeat(usual, counts), np.arange(counts[usual].max()) < counts[usual, None]
    distances = np.full(filled.shape, np.inf, dtype=np.float32)
    rows = np.full(filled.shape, -1, dtype=np.int64)
    distances[filled], rows[filled] = found.distances[own], found.rows[own]
    yield queries[usual], distances, rows
    for number in np.flatnonzero(~usual).tolist():
        at = slice(begins[number], begins[number] + counts[number])
        yield queries[number : number + 1], found.distances[None, at].copy(), found.rows[None, at].copy()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results for some items, in order, by as many threads as torch uses, each of which computes alone."""
    threads = torch.get_num_threads()
    if threads == 1 or (isinstance(items, list) and len(items) == 1):
        yield from map(function, items)
        return
    with _ALONE, ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(1)
        try:
            yield from pool.map(function, items)
        finally:
            torch.set_num_threads(threads)
