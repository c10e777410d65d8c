"""What keys are near to a query: distances that are functions of the two alone, bit for bit.

Where codes are whole numbers, queries are made whole numbers too, and distances are exact products of matrices; where
codes are not, each pair is measured by itself.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, Protocol, Self

import faiss
import numpy as np
import torch

from datastore.choosing import decode, finish_pairs, products_of_pairs
from datastore.codes import Codes
from silo.retrieval import Metric

WHOLE_WEIGHT = 1 << 17
"""The sum of a query's weights in units, at most. Times 128, the largest code, it is 2 ^ 24: so far float32 counts."""

BLOCK_NUMBERS = 1 << 19
"""Coordinates that are decoded at a time: what the processor's cache holds, and no fewer, since threads that take turns
with the interpreter's lock wait at every call."""
LOWEST = {False: np.float32(0), True: np.float32(-np.inf)}
"""What no distance is below: a squared one, or that of an inner product."""


class Workspace(threading.local):
    """Memory that is used again and again, one for each thread: to have it given by the system each time, page by page,
    takes as long as to compute in it."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns) float32, with whatever was left in it."""
        if name not in self._kept or self._kept[name].numel() < rows * columns:
            self._kept[name] = torch.empty(rows * columns)
        return self._kept[name][: rows * columns].view(rows, columns)


def prepare(codes: Codes, keys: np.ndarray, metric: Metric) -> Queries:
    """Some keys (n, dimension) float32 that are to be compared with others, which are kept as codes."""
    kind = GridQueries if codes.name == "sq8" else PlainQueries
    return kind(codes, keys, by_product=metric == "inner_product")


class Queries(Protocol):
    """Keys that others are compared with.

    A distance is squared Euclidean, or −2 times the inner product; and it is a function of the two keys alone, bit for
    bit, however it is asked for.
    """

    dimension: int
    keys: np.ndarray
    """(n, dimension) float32: where they are, or were moved to."""
    units: np.ndarray
    constants: np.ndarray
    """(n,) float32 both; see :meth:`products`."""
    lowest: np.float32
    by_product: bool
    """Whether they are compared by inner product, to which squares add nothing."""

    def __len__(self) -> int: ...

    @property
    def weights(self) -> np.ndarray | None:
        """(n, dimension) float32, whole numbers that codes are multiplied with; None where codes are not such."""
        ...

    def chosen(self, which: np.ndarray) -> Self:
        """Some of them, by their (m,) numbers, any more than once."""
        ...

    def products(self, codes: np.ndarray, space: Workspace, into: torch.Tensor) -> None:
        """Write what is the distance, or ``lowest`` if that is more, when it has been multiplied with ``units``, and a
        key's :meth:`datastore.codes.Codes.squares` and ``constants`` added: (m, n) of m queries and n keys of codes (n,
        bytes) uint8."""
        ...

    def measured(self, codes: np.ndarray) -> np.ndarray:
        """The distances of n queries to k keys each, of codes (n, k, bytes): (n, k) float32."""
        ...


class GridQueries:
    """Queries to ``sq8``, whose codes are whole numbers c from -128 to 127: a coordinate is middle + step · c.

    With q' = (q − middle) and weights w = q' · step, a squared distance is Σ q'² − 2 Σ w c + Σ (step · c)². Weights are
    rounded to multiples of a unit, of which all weights of a query together have 2 ^ 17: then no sum of products with
    codes is beyond 2 ^ 24, all are whole numbers of units, and float32 has them exactly in whatever order they are
    added. That moves a query by about a thousandth of its length, where codes move it by several times that; and
    what is measured is the distance from where it was moved to, so that none is below zero.
    """

    def __init__(self, codes: Codes, keys: np.ndarray, *, by_product: bool) -> None:
        """Round keys (n, dimension)."""
        self.dimension, self._codes, self.by_product = codes.dimension, codes, by_product
        middle = codes.fitted[: self.dimension] + codes.step * np.float32(128.5)
        queries = keys if by_product else keys - middle
        weights = queries * codes.step
        unit = np.einsum("ij->i", np.abs(weights)) / np.float32(WHOLE_WEIGHT - self.dimension)
        unit[unit == 0] = 1
        rounded = np.rint(weights / unit[:, None])
        moved = np.divide(rounded * unit[:, None], codes.step, out=queries.copy(), where=codes.step > 0)
        self.weights, self.units = rounded, -2 * unit
        self.keys = moved if by_product else moved + middle
        self.constants = -2 * np.einsum("ij,j->i", keys, middle) if by_product else np.einsum("ij,ij->i", moved, moved)
        self.lowest = LOWEST[by_product]

    def __len__(self) -> int:
        return len(self.weights)

    def chosen(self, which: np.ndarray) -> Self:
        """As :meth:`Queries.chosen`."""
        some = copy.copy(self)
        some.weights, some.units, some.constants = self.weights[which], self.units[which], self.constants[which]
        some.keys = self.keys[which]
        return some

    def products(self, codes: np.ndarray, space: Workspace, into: torch.Tensor) -> None:
        """As :meth:`Queries.products`."""
        weights, at_once = torch.from_numpy(self.weights), max(1, BLOCK_NUMBERS // self.dimension)
        for begin in range(0, len(codes), at_once):
            block = codes[begin : begin + at_once]
            decoded = space.take("keys", *block.shape)
            decode(block, decoded.numpy())
            torch.mm(weights, decoded.T, out=into[:, begin : begin + at_once])

    def measured(self, codes: np.ndarray) -> np.ndarray:
        """As :meth:`Queries.measured`."""
        products = np.empty(codes.shape[:2], dtype=np.float32)
        products_of_pairs(self.weights, codes.reshape(len(codes), codes.shape[1] * self.dimension), products)
        squares = np.zeros_like(products)
        if not self.by_product:
            squares[:] = self._codes.squares(codes.reshape(-1, self.dimension)).reshape(products.shape)
        finish_pairs(products, self.units, self.constants, squares, self.lowest)
        return products


class PlainQueries:
    """Queries to other codes: each pair is measured by itself, by FAISS, which is slower."""

    def __init__(self, codes: Codes, keys: np.ndarray, *, by_product: bool) -> None:
        """Take keys (n, dimension)."""
        self.dimension, self.by_product, self.weights = codes.dimension, by_product, None
        self._quantizer: Any = codes.quantizer()
        self.keys = np.ascontiguousarray(keys)
        self.units, self.constants = np.ones(len(keys), np.float32), np.zeros(len(keys), np.float32)
        self.lowest = LOWEST[by_product]

    def __len__(self) -> int:
        return len(self.keys)

    def chosen(self, which: np.ndarray) -> Self:
        """As :meth:`Queries.chosen`."""
        some = copy.copy(self)
        some.keys, some.units, some.constants = self.keys[which], self.units[which], self.constants[which]
        return some

    def products(self, codes: np.ndarray, space: Workspace, into: torch.Tensor) -> None:
        """As :meth:`Queries.products`, but distances already."""
        keys = self._quantizer.decode(np.ascontiguousarray(codes))
        pairs = np.divmod(np.arange(into.numel()), into.shape[1])
        into.copy_(torch.from_numpy(self._pairs(*pairs, keys)).view(into.shape))

    def measured(self, codes: np.ndarray) -> np.ndarray:
        """As :meth:`Queries.measured`."""
        flat = np.ascontiguousarray(codes.reshape(-1, codes.shape[2]))
        at = np.arange(len(flat))
        return self._pairs(at // codes.shape[1], at, self._quantizer.decode(flat)).reshape(codes.shape[:2])

    def _pairs(self, which: np.ndarray, at: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Of queries, by their (n,) numbers, to keys, by theirs."""
        found = np.empty(len(which), dtype=np.float32)
        arrays = (self.keys, which, keys, at, found)
        kinds: Any = faiss
        measure = kinds.pairwise_indexed_inner_product if self.by_product else kinds.pairwise_indexed_L2sqr
        measure(self.dimension, len(found), *(faiss.swig_ptr(each) for each in arrays))
        return -2 * found if self.by_product else found
