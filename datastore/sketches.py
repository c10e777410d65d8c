"""A sample of each document's shingles, by which near-duplicates of a document are found in a store of any size.

    hashes.npy       (n,) uint64, sorted
    documents.npy    (n,) uint32: the number, in the group, of the document that has each

One shingle of six words in eight is kept, by its hash, in a group's search structure (FracMinHash, Irber 2022). It is a
hash of words, so that the words cannot be read from it, and goes with its document when the group is rewritten.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from silo.files import write_array
from silo.overlap import batches
from silo.shingles import shingles

SAMPLED = 8
FEWEST_SHARED = 3
"""Documents that share fewer sampled shingles are not looked at."""
LIKEST = 4
"""A document is compared with so many of the documents that it may be like."""
ALIKE = 0.5
"""Share of the shorter document's shingles from which on the longer one is a near-duplicate, or holds it."""


def write_sketches(directory: Path, texts: Iterable[str]) -> None:
    """Write the sketches of the documents of a group, in order."""
    hashes: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    count = 0
    for batch in batches(text.encode() for text in texts):
        found = shingles(batch)
        sampled = found.hashes % np.uint64(SAMPLED) == 0
        hashes.append(found.hashes[sampled])
        documents.append(found.documents[sampled] + np.uint32(count))
        count += len(batch)
    of_hash = np.concatenate([np.zeros(0, np.uint64), *hashes])
    of_document = np.concatenate([np.zeros(0, np.uint32), *documents])
    order = np.lexsort((of_document, of_hash))
    write_array(directory / "hashes.npy", of_hash[order])
    write_array(directory / "documents.npy", of_document[order])


def sample(text: str) -> np.ndarray:
    """The sampled shingles of a text, each once."""
    hashes = every_shingle(text)
    return hashes[hashes % np.uint64(SAMPLED) == 0]


def candidates(hashes: np.ndarray, documents: np.ndarray, wanted: Sequence[np.ndarray]) -> dict[int, list[int]]:
    """The documents of a group that share enough with some sketches to be looked at.

    Args:
        hashes: (n,) of the group's sketches, sorted.
        documents: (n,) the number of the document that has each.
        wanted: sketches that :func:`sample` made.

    Returns:
        Document → which of ``wanted`` it is most like, by the share of the smaller sketch; :data:`LIKEST` at most, or
        documents with one header in common would each be compared with each.
    """
    found: dict[int, list[tuple[float, int]]] = {}
    sizes = np.bincount(documents)
    for which, sketch in enumerate(wanted):
        begins, ends = np.searchsorted(hashes, sketch), np.searchsorted(hashes, sketch, side="right")
        runs = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]
        numbers, counts = np.unique(documents[np.concatenate([np.zeros(0, np.int64), *runs])], return_counts=True)
        shares = counts / np.minimum(sizes[numbers], len(sketch))
        enough = counts >= FEWEST_SHARED
        for number, share in zip(numbers[enough].tolist(), shares[enough].tolist(), strict=True):
            heap = found.setdefault(number, [])
            (heapq.heappushpop if len(heap) == LIKEST else heapq.heappush)(heap, (share, -which))
    return {number: sorted(-which for _, which in heap) for number, heap in found.items()}


def every_shingle(text: str) -> np.ndarray:
    """All shingles of a text, each once, sorted."""
    return np.unique(shingles([text.encode()]).hashes)


def containment(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the smaller of two sets of shingles that the larger one has."""
    return len(np.intersect1d(one, other, assume_unique=True)) / max(1, min(len(one), len(other)))
