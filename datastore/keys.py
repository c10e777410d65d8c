"""The keys of a group of shards as inverted lists on disk, which FAISS reads where they lie.

    lists.bin     each list's codes, then its row numbers; FAISS maps it, so that a store may be larger than memory
    sizes.npy     (lists,) int64, how many keys each list has
    tokens.npy    (rows,) the token that each key predicts: the documents of the group end to end
    begins.npy    (documents + 1,) int64, where each document begins in them
    ids.npy       (documents,) uint64, the hash of each document's id

A group's rows stand in the order (shard name, document id, position). In the lists they are numbered from the group's
``first_row`` on, so that the lists of all groups can be read as one index. All of it is derived from the shards.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from datastore.shard import DocumentRow, Shard
from silo.files import sha256, write_array

FILES = ("lists.bin", "sizes.npy", "tokens.npy", "begins.npy", "ids.npy")
_ALIGNED = 8
"""Row numbers begin at multiples of so many bytes; lists are padded to such a number of keys."""


def id_hash(document_id: str) -> int:
    """The first 64 bits of the SHA-256 of a document's id: an order of documents that knows nothing of shards."""
    return int(sha256(document_id.encode())[:16], 16)


def write_keys(directory: Path, shards: Sequence[Shard], *, lists: int, first_row: int) -> None:
    """Write the keys of some shards, in order, into a directory that has none."""
    documents = [encoded for shard in shards for encoded in shard.documents()]
    lengths = [len(encoded.tokens) for encoded in documents]
    write_array(directory / "tokens.npy", np.concatenate([shard.tokens for shard in shards]))
    write_array(directory / "begins.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    write_array(
        directory / "ids.npy", np.asarray([id_hash(encoded.document.id) for encoded in documents], dtype=np.uint64)
    )
    numbers = np.concatenate([shard.lists for shard in shards])
    codes = np.concatenate([shard.codes for shard in shards])
    order = np.argsort(numbers, kind="stable").astype(np.int64)
    bounds = np.searchsorted(numbers[order], np.arange(lists + 1))
    write_array(directory / "sizes.npy", np.diff(bounds).astype(np.int64))
    with open(directory / "lists.bin", "wb") as file:
        for begin, end in itertools.pairwise(bounds):
            rows = order[begin:end]
            padding = _capacity(len(rows)) - len(rows)
            file.write(codes[rows].tobytes() + bytes(padding * codes.shape[1]))
            file.write((first_row + rows).tobytes() + bytes(padding * 8))
        file.flush()
        os.fsync(file.fileno())


def _capacity(size: int | np.ndarray) -> int | np.ndarray:
    return -(-size // _ALIGNED) * _ALIGNED


class KeyGroup:
    """The keys of one group, mapped from disk."""

    def __init__(self, directory: Path, *, first_row: int, document: Callable[[int], DocumentRow]) -> None:
        """Map the files.

        Args:
            directory: what :func:`write_keys` filled.
            first_row: the number of the group's first row.
            document: gives what is known of the group's document of a number, from 0.
        """
        self.first_row = first_row
        self.document = document
        self._directory = directory
        self._sizes = np.load(directory / "sizes.npy")
        self.tokens = np.load(directory / "tokens.npy", mmap_mode="r")
        self.begins = np.load(directory / "begins.npy", mmap_mode="r")
        self.ids = np.load(directory / "ids.npy", mmap_mode="r")
        self.rows = int(self.begins[-1])

    def inverted_lists(self, code_size: int) -> faiss.OnDiskInvertedLists:
        """The lists as FAISS sees them. The file stays mapped as long as the result lives, also if it is deleted."""
        found: Any = faiss.OnDiskInvertedLists()
        found.nlist, found.code_size, found.read_only = len(self._sizes), code_size, True
        found.filename = str(self._directory / "lists.bin")
        found.prefetch_nthread = 0  # FAISS would start 32 threads a search to touch pages: 1.4 times as slow, measured
        capacity = np.asarray(_capacity(self._sizes), dtype=np.uint64)
        ends = np.cumsum(capacity * np.uint64(code_size + 8))
        found.totsize = int(ends[-1])
        found.lists.resize(len(self._sizes))
        # OnDiskOneList is three size_t: size, capacity, offset. Set all at once: there are thousands in each group.
        address = int(found.lists.data().this)
        memory: Any = (ctypes.c_uint64 * (3 * len(self._sizes))).from_address(address)
        table = np.frombuffer(memory, dtype=np.uint64).reshape(-1, 3)
        table[:, 0], table[:, 1] = self._sizes, capacity
        table[0, 2], table[1:, 2] = 0, ends[:-1]
        if found.totsize:
            found.do_mmap()
        return found
