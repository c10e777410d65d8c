"""D4 (Tirumala 2023, arXiv 2308.12284): fewer documents that say the same, by what they mean instead of by their words.

First semantic de-duplication (SemDeDup, Abbas 2023): within a cluster of embeddings, a document that lies closest to
another goes. Then diversification (SSL prototypes, Sorscher 2022): of what is left, clustered anew, the documents
nearest to their centroids go, since they are the most like all others. Both drop the same share, and ``keep`` is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np

SEED = 0
_ITERATIONS = 20
_POINTS_PER_CENTROID = 256


@dataclass(frozen=True, slots=True)
class Redundant:
    """A document that can go."""

    index: int
    other: int | None
    """The document that it is like, or None where it is like its cluster."""
    similarity: float
    """Cosine, with the other or with the centroid."""


def redundant(embeddings: np.ndarray, keep: float) -> Iterator[Redundant]:
    """The documents that D4 drops.

    Args:
        embeddings: (n, d) float32, of any length but zero; may be mapped from disk.
        keep: share of the documents that is left, above 0 and at most 1.
    """
    of_each = keep**0.5
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assigned, to_centroid = _clusters(units)
    nearest, similarity = _nearest_within(units, assigned, to_centroid)
    first = _largest(similarity, len(units) - round(of_each * len(units)))
    for index in first:
        yield Redundant(int(index), int(nearest[index]), float(similarity[index]))
    rest = np.setdiff1d(np.arange(len(units)), first)
    _, to_centroid = _clusters(units[rest])
    for index in _largest(to_centroid, len(rest) - round(keep * len(units))):
        yield Redundant(int(rest[index]), None, float(to_centroid[index]))


def _clusters(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means with √n clusters: each point's cluster (n,), and its cosine with the centroid (n,)."""
    count = max(1, round(len(units) ** 0.5))
    kmeans = faiss.Kmeans(
        units.shape[1], count, niter=_ITERATIONS, seed=SEED, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=_POINTS_PER_CENTROID,
    )  # fmt: skip
    kmeans.train(np.ascontiguousarray(units, dtype=np.float32))
    similarity, assigned = kmeans.assign(np.ascontiguousarray(units, dtype=np.float32))
    return assigned, similarity


def _nearest_within(units: np.ndarray, assigned: np.ndarray, to_centroid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each point the nearest of its cluster among those that come before it, farthest from the centroid first.

    Of two that are alike the one farther out is kept, as SemDeDup has it; the first of a cluster has no other, and -1.
    """
    nearest = np.full(len(units), -1)
    similarity = np.full(len(units), -np.inf)
    for cluster in np.unique(assigned):
        members = np.flatnonzero(assigned == cluster)
        members = members[np.lexsort((members, to_centroid[members]))]
        products = units[members] @ units[members].T
        products[np.triu_indices(len(members))] = -np.inf
        if len(members) > 1:
            nearest[members[1:]] = members[products[1:].argmax(axis=1)]
            similarity[members[1:]] = products[1:].max(axis=1)
    return nearest, similarity


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the ``count`` largest finite values, ties by place."""
    order = np.lexsort((np.arange(len(values)), -values))
    return np.asarray([place for place in order[: max(0, count)] if np.isfinite(values[place])], dtype=np.int64)
