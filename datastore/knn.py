"""Nearest neighbours over all groups of a store (kNN-LM, Khandelwal 2020).

Inverted lists are read in every group where they lie, mapped from disk, each once for all the queries that probe it
(:mod:`datastore.scan`).

Neighbours can also be followed instead of searched for (RetoMaton, Alon 2022): where a neighbour's token is the one
that the text went on with, the next key of its document is a candidate for the next query. What is then measured are
some hundred keys, where a search reads thousands.

Equal distances come in the order of (hash of the document's id, position), which does not depend on how documents are
spread over shards and groups; so equal stores give equal neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from datastore.choosing import look_up
from datastore.control import ControlPlane
from datastore.keys import KeyGroup
from datastore.queries import Queries, prepare
from datastore.scan import Documents, Scan, in_threads, merged
from silo.retrieval import PROBES, Metric, SourceDocument

QUERIES_PER_BATCH = 1 << 14
"""Queries that are searched for at a time, which bounds the memory that their candidates take."""
MEASURED_AT_ONCE = 16
"""Queries whose keys are measured at a time."""


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
        filled = (pair for pair in zip(groups, masks, strict=True) if pair[0].num_keys)
        pairs = [pair for pair in filled if pair[1] is None or pair[1].any()]
        pairs.sort(key=lambda pair: pair[0].first_row)
        self._groups = [group for group, _ in pairs]
        for group in self._groups:
            group.require_width(control.codes.size)
        self.searches = 0
        """Queries that were searched for so far; those that pointers answered are not among them."""
        self._selected = [
            None if mask is None or mask.all() else np.repeat(mask, group.lengths) for group, mask in pairs
        ]
        self.num_keys = sum(
            group.num_keys if rows is None else int((rows & group.keyed).sum())
            for group, rows in zip(self._groups, self._selected, strict=True)
        )
        """How many keys there are to be found. (Not a length: an empty index would be false.)"""
        self._control, self._probes, self._metric = control, probes, metric
        self._usual = np.float32((control.centroids.astype(np.float64) ** 2).sum(axis=1).mean())

    @cached_property
    def _documents(self) -> Documents:
        return Documents.of(self._groups)

    def search(self, keys: np.ndarray, k: int) -> FoundNeighbours:
        """The ``k`` nearest of the rows in the probed lists, for (n, dimension) float32 queries."""
        return self._found(keys, *self._search_all(keys, k))

    def _search_all(self, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k), nearest first, so many queries at a time."""
        self.searches += len(keys)
        parts = [self._search(keys[at : at + QUERIES_PER_BATCH], k) for at in range(0, len(keys), QUERIES_PER_BATCH)]
        if not parts:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        distances, rows = zip(*parts, strict=True)
        return np.concatenate(distances), np.concatenate(rows)

    def _search(self, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same, all at once."""
        asked = prepare(self._control.codes, keys, self._metric)
        probed = self._control.nearest(keys, self._probes, self._metric)
        return Scan(self._groups, self._selected, self._documents, self._control.codes, asked, k).run(probed)

    def follow(
        self, keys: np.ndarray, tokens: np.ndarray, k: int, *, turns: np.ndarray, pointers: int, wanted: np.ndarray
    ) -> FoundNeighbours:
        """Search for queries whose turn it is, and follow their neighbours for those that come after.

        All queries of one turn go side by side, which is what makes following fast.

        Args:
            keys: (n, dimension) float32, of successive positions of some texts.
            tokens: (n,) what the texts have there.
            k: neighbours of a query.
            turns: (n,) 0 for a search; else one more than the turn of the query before, which is followed.
            pointers: where fewer go on, there is a search all the same.
            wanted: (n,) bool, the queries that are to be answered; pointers go on through the others.
        """
        distances = np.full((len(keys), k), np.inf, dtype=np.float32)
        rows = np.full((len(keys), k), -1, dtype=np.int64)
        for turn in range(int(turns.max(initial=0)) + 1):
            at = np.flatnonzero(turns == turn)
            if turn:
                rows[at] = self._next(rows[at - 1], tokens[at - 1])
            asked = at[wanted[at]]
            anew = (rows[asked] >= 0).sum(axis=1) < pointers
            distances[asked[anew]], rows[asked[anew]] = self._search_all(keys[asked[anew]], k)
            distances[asked[~anew]], rows[asked[~anew]] = self._measured(
                prepare(self._control.codes, keys[asked[~anew]], self._metric), rows[asked[~anew]]
            )
        rows[~wanted] = -1
        return self._found(keys, distances, rows)

    def _found(self, keys: np.ndarray, distances: np.ndarray, rows: np.ndarray) -> FoundNeighbours:
        """What was found; of an inner product twice its negative until here, the distance that it stands for."""
        if self._metric == "inner_product":
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

    def _measured(self, asked: Queries, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k), nearest first, of n queries to given rows; -1 is infinitely far."""
        distances = np.full(rows.shape, np.inf, dtype=np.float32)

        def measure(at: np.ndarray) -> None:
            there = rows[at] >= 0
            codes = self._codes(np.where(there, rows[at], self._groups[0].first_row))
            distances[at] = np.where(there, asked.chosen(at).measured(codes), np.inf)

        numbers = np.arange(len(rows))
        for _ in in_threads(measure, np.split(numbers, numbers[MEASURED_AT_ONCE::MEASURED_AT_ONCE])):
            pass
        return self._ordered(distances, rows)

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        """The codes (…, bytes) of rows (…,)."""
        if len(self._groups) == 1:
            return self._groups[0].codes(rows - self._groups[0].first_row)
        codes = np.empty((*rows.shape, self._control.codes.size), dtype=np.uint8)
        for _, group, chosen, within in _by_group(self._groups, rows):
            codes[chosen] = group.codes(within)
        return codes

    def _ordered(self, distances: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (n, k) in order: nearest first, and what is equally near by (hash of the document's id,
        position)."""
        return merged(distances[None], rows[None], self._documents)

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

    def part(self, begin: int, end: int) -> FoundNeighbours:
        """As :meth:`silo.retrieval.Neighbours.part`."""
        return FoundNeighbours(self._groups, self.distances[begin:end], self._rows[begin:end])

    @cached_property
    def values(self) -> np.ndarray:
        """As :attr:`silo.retrieval.Neighbours.values`."""
        values = np.zeros(self._rows.shape, dtype=np.int64)
        for group in self._groups:
            look_up(self._rows.ravel(), group.first_row, group.tokens, values.ravel())
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
