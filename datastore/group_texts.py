"""The documents of a group as tokens, one after the other, mapped from disk.

    tokens.npy    (rows,) uint16 or uint32: the documents end to end
    begins.npy    (documents + 1,) int64, where each document begins in them
    ids.npy       (documents,) uint64, the hash of each document's id

A group's rows stand in the order (shard name, document id, position). All of it is derived from the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from datastore.shard import DocumentRow, Texts
from silo.errors import IntegrityError
from silo.files import load_array, sha256, write_array, write_rows


def id_hash(document_id: str) -> int:
    """The first 64 bits of the SHA-256 of a document's id: an order of documents that knows nothing of shards."""
    return int(sha256(document_id.encode())[:16], 16)


def write_texts(directory: Path, shards: Sequence[Texts]) -> None:
    """Write the documents of some shards, in order, into a directory that has none."""
    rows = [row for shard in shards for row in shard.rows]
    ends = np.cumsum([0, *(row.end - row.begin for row in rows)]).astype(np.int64)
    write_rows(directory / "tokens.npy", (shard.tokens for shard in shards), count=int(ends[-1]))
    write_array(directory / "begins.npy", ends)
    write_array(directory / "ids.npy", np.asarray([id_hash(row.id) for row in rows], dtype=np.uint64))


def cut_texts(directory: Path, whole: GroupTexts, kept: np.ndarray) -> None:
    """Write what :func:`write_texts` would write of some of a group's documents, (documents,) bool."""
    write_array(directory / "tokens.npy", whole.tokens[np.repeat(kept, whole.lengths)])
    write_array(directory / "begins.npy", np.concatenate([[0], np.cumsum(whole.lengths[kept])]).astype(np.int64))
    write_array(directory / "ids.npy", whole.ids[kept])


class GroupTexts:
    """The documents of one group."""

    def __init__(self, directory: Path, *, first_row: int, document: Callable[[int], DocumentRow]) -> None:
        """Map the files.

        Args:
            directory: what :func:`write_texts` filled.
            first_row: the number of the group's first row among those of all groups of its kind.
            document: gives what is known of the group's document of a number, from 0.
        """
        self.first_row = first_row
        self.document = document
        self.tokens = load_array(directory / "tokens.npy", mapped=True)
        self.begins = load_array(directory / "begins.npy", mapped=True)
        self.ids = load_array(directory / "ids.npy", mapped=True)
        self.rows = len(self.tokens)
        if self.begins[-1] != self.rows:
            raise IntegrityError(f"{directory} has {self.rows} tokens, not {self.begins[-1]}; restore it from a backup")

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int64, how many rows each document has."""
        return np.diff(self.begins)
