"""A sample of each document's shingles, by which near-duplicates of a document are found in a store of any size.

    hashes.npy       (n,) uint64, sorted
    documents.npy    (n,) uint32: the number, in the group, of the document that has each

One shingle of six words in eight is kept, by its hash, in a group's search structure (FracMinHash, Irber 2022). It is a
hash of words, so that the words cannot be read from it, and goes with its document when the group is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from silo.files import write_array
from silo.overlap import batches
from silo.shingles import shingles

SAMPLED = 8
FEWEST_SHARED = 3
"""Documents that share fewer sampled shingles are not looked at."""
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
    hashes = np.unique(shingles([text.encode()]).hashes)
    return hashes[hashes % np.uint64(SAMPLED) == 0]


def candidates(directory: Path, wanted: Sequence[np.ndarray]) -> set[int]:
    """The documents of a group that share enough with one of some sketches to be looked at."""
    hashes = np.load(directory / "hashes.npy", mmap_mode="r")
    documents = np.load(directory / "documents.npy", mmap_mode="r")
    found: set[int] = set()
    for each in wanted:
        begins, ends = np.searchsorted(hashes, each), np.searchsorted(hashes, each, side="right")
        runs = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]
        places = np.concatenate([np.zeros(0, np.int64), *runs])
        numbers, counts = np.unique(documents[places], return_counts=True)
        found.update(numbers[counts >= FEWEST_SHARED].tolist())
    return found


def containment(one: str, other: str) -> float:
    """Share of the shorter text's shingles that the longer one has."""
    first, second = (np.unique(shingles([text.encode()]).hashes) for text in (one, other))
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, min(len(first), len(second)))
