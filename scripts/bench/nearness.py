"""Which neighbours of ours and of FAISS's can be compared, and how near they must come.

We round a query to the grid of the codes, which moves it a little, and FAISS multiplies matrices to choose lists, so
that of two that are equally near it may read either, by what else is in the batch. Neither is an error.
"""

from __future__ import annotations

import numpy as np

from bench.harness import Judge, alike
from datastore.codes import Codes
from datastore.control import ControlPlane
from datastore.queries import prepare

TIE = 1e-5
"""Squared distances that differ by less than this share of the squared sum of both lengths are equal to float32."""


def decided(plane: ControlPlane, queries: np.ndarray, probes: int) -> np.ndarray:
    """Those of some queries (n, d) of which it is clear which lists are to be read."""
    keys, centroids = queries.astype(np.float64), plane.centroids.astype(np.float64)
    if probes >= len(centroids):
        return queries
    lengths, others = np.square(keys).sum(axis=1), np.square(centroids).sum(axis=1)
    nearest = np.partition(lengths[:, None] - 2 * keys @ centroids.T + others, (probes - 1, probes), axis=1)
    apart = nearest[:, probes] - nearest[:, probes - 1]
    return queries[apart > TIE * (np.sqrt(lengths) + np.sqrt(others.max())) ** 2]


def as_near(codes: Codes, queries: np.ndarray) -> Judge:
    """A judge who wants the same squared distances from all, up to what their query (n, d) was moved by, and to a
    millionth of its squared length, which is what float32 leaves of a difference of squares."""
    moves = np.linalg.norm(prepare(codes, queries, "l2").keys - queries, axis=1)
    judge = alike(1e-3, absolute=float(moves.max() + 1e-3 * np.linalg.norm(queries, axis=1).max()))
    return lambda given: judge({name: np.sqrt(each) for name, each in given.items()})
