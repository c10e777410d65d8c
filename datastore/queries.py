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

from datastore.codes import Codes, whole
from silo.retrieval import Metric

WHOLE_WEIGHT = 1 << 17
"""The sum of a query's weights in units, at most. Times 128, the largest code, it is 2 ^ 24: so far float32 counts."""


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

    def __len__(self) -> int: ...

    def beyond(self, distances: np.ndarray) -> np.ndarray:
        """How far that is at least which is not nearer than some squared distances (n,), as FAISS measures them.

        Both ways of measuring round sums of d terms, which puts them off by at most d units in the last place and a few
        more (Higham 2002, equation 3.5): of the distance where differences are added up; of the sum of both lengths,
        squared, where a product is taken from squares.
        """
        ...

    def chosen(self, which: np.ndarray) -> Self:
        """Some of them, by their (m,) numbers, any more than once."""
        ...

    def decode(self, codes: np.ndarray, into: torch.Tensor) -> None:
        """Write keys (n, dimension) as they are multiplied, from their codes (n, bytes) uint8."""
        ...

    def products(self, keys: torch.Tensor, into: torch.Tensor) -> None:
        """Write the products (m, n) of m queries with n keys that were decoded."""
        ...

    def finish(self, products: torch.Tensor, squares: np.ndarray) -> None:
        """Make products (m, n) distances, where keys have :meth:`datastore.codes.Codes.squares` (n,) or (m, n)."""
        ...

    def measured(self, codes: np.ndarray, space: Workspace) -> np.ndarray:
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
        self.dimension, self._codes, self._by_product = codes.dimension, codes, by_product
        middle = codes.fitted[: self.dimension] + codes.step * np.float32(128.5)
        queries = keys if by_product else keys - middle
        weights = queries * codes.step
        unit = np.einsum("ij->i", np.abs(weights)) / np.float32(WHOLE_WEIGHT - self.dimension)
        unit[unit == 0] = 1
        rounded = np.rint(weights / unit[:, None])
        self._weights, self._unit = torch.from_numpy(rounded), torch.from_numpy(-2 * unit)
        moved = np.divide(rounded * unit[:, None], codes.step, out=queries.copy(), where=codes.step > 0)
        self._squares = np.einsum("ij,ij->i", moved, moved)
        self.keys = moved if by_product else moved + middle
        constant = -2 * np.einsum("ij,j->i", keys, middle) if by_product else self._squares
        self._constant = torch.from_numpy(constant)

    def __len__(self) -> int:
        return len(self._weights)

    def beyond(self, distances: np.ndarray) -> np.ndarray:
        """As :meth:`Queries.beyond`."""
        unit = (self.dimension + 8) * 2.0**-24
        far = np.minimum(distances.astype(np.float64), np.finfo(np.float32).max)  # that is, also what is infinitely far
        length = np.sqrt(
            np.maximum(self._squares, np.einsum("ij,ij->i", self.keys, self.keys))
        )  # FAISS's has no middle
        return far * (1 - unit) - unit * (2 * length + np.sqrt(far)) ** 2

    def chosen(self, which: np.ndarray) -> Self:
        """As :meth:`Queries.chosen`."""
        some, at = copy.copy(self), torch.from_numpy(which)
        some._weights, some._unit, some._constant = (each[at] for each in (self._weights, self._unit, self._constant))
        some.keys, some._squares = self.keys[which], self._squares[which]
        return some

    def decode(self, codes: np.ndarray, into: torch.Tensor) -> None:
        """As :meth:`Queries.decode`: whole numbers."""
        into.copy_(torch.from_numpy(whole(codes)))

    def products(self, keys: torch.Tensor, into: torch.Tensor) -> None:
        """As :meth:`Queries.products`."""
        torch.mm(self._weights, keys.T, out=into)

    def finish(self, products: torch.Tensor, squares: np.ndarray) -> None:
        """As :meth:`Queries.finish`. Every operation rounds by itself: none is fused with the next."""
        products.mul_(self._unit[:, None])
        if self._by_product:
            products.add_(self._constant[:, None])
        else:
            products.add_(torch.from_numpy(squares)).add_(self._constant[:, None]).clamp_min_(0)

    def measured(self, codes: np.ndarray, space: Workspace) -> np.ndarray:
        """As :meth:`Queries.measured`."""
        flat = codes.reshape(-1, self.dimension)
        self.decode(flat, into=space.take("keys", *flat.shape))
        numbers = space.take("keys", *flat.shape).numpy().reshape(codes.shape)
        products = np.einsum("nkd,nd->nk", numbers, self._weights.numpy())  # for so few quicker than a library's
        self.finish(torch.from_numpy(products), self._codes.squares(numbers))
        return products


class PlainQueries:
    """Queries to other codes: each pair is measured by itself, by FAISS, which is slower."""

    def __init__(self, codes: Codes, keys: np.ndarray, *, by_product: bool) -> None:
        """Take keys (n, dimension)."""
        self.dimension, self._by_product = codes.dimension, by_product
        self._quantizer: Any = codes.quantizer()
        self.keys = np.ascontiguousarray(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def beyond(self, distances: np.ndarray) -> np.ndarray:
        """As :meth:`Queries.beyond`."""
        return distances.astype(np.float64) * (1 - 2 * (self.dimension + 8) * 2.0**-24)

    def chosen(self, which: np.ndarray) -> Self:
        """As :meth:`Queries.chosen`."""
        some = copy.copy(self)
        some.keys = self.keys[which]
        return some

    def decode(self, codes: np.ndarray, into: torch.Tensor) -> None:
        """As :meth:`Queries.decode`: the keys themselves."""
        into.copy_(torch.from_numpy(self._quantizer.decode(np.ascontiguousarray(codes))))

    def products(self, keys: torch.Tensor, into: torch.Tensor) -> None:
        """As :meth:`Queries.products`, but distances already."""
        pairs = np.divmod(np.arange(into.numel()), into.shape[1])
        into.copy_(torch.from_numpy(self._pairs(*pairs, keys.numpy())).view(into.shape))

    def finish(self, products: torch.Tensor, squares: np.ndarray) -> None:
        """As :meth:`Queries.finish`: there is nothing left to do."""

    def measured(self, codes: np.ndarray, space: Workspace) -> np.ndarray:
        """As :meth:`Queries.measured`."""
        flat = np.ascontiguousarray(codes.reshape(-1, codes.shape[2]))
        at = np.arange(len(flat))
        return self._pairs(at // codes.shape[1], at, self._quantizer.decode(flat)).reshape(codes.shape[:2])

    def _pairs(self, which: np.ndarray, at: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Of queries, by their (n,) numbers, to keys, by theirs."""
        found = np.empty(len(which), dtype=np.float32)
        arrays = (self.keys, which, keys, at, found)
        kinds: Any = faiss
        measure = kinds.pairwise_indexed_inner_product if self._by_product else kinds.pairwise_indexed_L2sqr
        measure(self.dimension, len(found), *(faiss.swig_ptr(each) for each in arrays))
        return -2 * found if self._by_product else found
