"""A shard: one owner's documents as tokens and coded keys, in files that never change once they are written.

    shard.json        counts, and the checksum of each file below
    documents.jsonl   one row a document, sorted by id: licence, source, title, hash, token range
    tokens.npy        (tokens,) uint16 or uint32, documents end to end
    lists.npy         (tokens,) int32, the inverted list of each key
    codes.npy         (tokens, bytes) uint8, each key's code

A document's rows depend on that document alone (and on model and control plane), so a shard without a document is the
shard's files with that document's rows cut out. Rows are JSON Lines, not Parquet, because a Parquet file's bytes depend
on the version of the library that wrote them, and these bytes are hashed.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from silo.documents import Document
from silo.files import canonical_json, read_array, read_checked, sha256, write_array, write_file
from silo.retrieval import SourceDocument

ARRAYS = ("tokens", "lists", "codes")


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """What a shard knows of one of its documents; ``begin`` and ``end`` are its rows in the arrays."""

    id: str
    owner: str
    license: str
    source: str
    title: str
    content_hash: str
    begin: int
    end: int

    def described(self) -> SourceDocument:
        """Who stands behind text of it."""
        return SourceDocument(self.id, self.owner, self.license, self.source, self.title)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as a shard holds it."""

    document: DocumentRow
    tokens: np.ndarray
    lists: np.ndarray
    codes: np.ndarray

    @classmethod
    def make(cls, document: Document, tokens: np.ndarray, lists: np.ndarray, codes: np.ndarray) -> Encoded:
        """Put a document and its arrays together."""
        row = DocumentRow(
            document.id,
            document.owner,
            document.license,
            document.source,
            document.title,
            document.content_hash,
            0,
            len(tokens),
        )
        return cls(row, tokens, lists, codes)

    def text(self, tokenizer: Tokenizer) -> str:
        """Its text, decoded."""
        return str(tokenizer.decode(self.tokens.tolist(), skip_special_tokens=False))


@dataclass(frozen=True)
class Shard:
    """A shard read into memory."""

    rows: list[DocumentRow]
    tokens: np.ndarray
    lists: np.ndarray
    codes: np.ndarray

    def documents(self) -> list[Encoded]:
        """Its documents, each with views of its rows."""
        return [
            Encoded(row, *(array[row.begin : row.end] for array in (self.tokens, self.lists, self.codes)))
            for row in self.rows
        ]

    def without(self, ids: set[str]) -> Shard:
        """The shard that never held some documents."""
        return Shard.build(each for each in self.documents() if each.document.id not in ids)

    @classmethod
    def build(cls, documents: Iterable[Encoded]) -> Shard:
        """Lay documents end to end in the order of their ids, so that the order of adding leaves no trace."""
        ordered = sorted(documents, key=lambda encoded: encoded.document.id)
        rows, at = [], 0
        for encoded in ordered:
            length = len(encoded.tokens)
            rows.append(DocumentRow(**{**asdict(encoded.document), "begin": at, "end": at + length}))
            at += length
        return cls(
            rows,
            np.concatenate([encoded.tokens for encoded in ordered]),
            np.concatenate([encoded.lists for encoded in ordered]),
            np.concatenate([encoded.codes for encoded in ordered]),
        )

    def write(self, directory: Path, *, context: dict[str, str]) -> str:
        """Write the files into an empty directory and return the shard's hash, which is that of ``shard.json``.

        ``context`` says which model and control plane made the keys.
        """
        rows = b"".join(canonical_json(asdict(row)) for row in self.rows)
        write_file(directory / "documents.jsonl", rows)
        files = {"documents.jsonl": sha256(rows)}
        for name in ARRAYS:
            files[f"{name}.npy"] = write_array(directory / f"{name}.npy", getattr(self, name))
        manifest = {
            "documents": len(self.rows),
            "tokens": len(self.tokens),
            "licenses": sorted({row.license for row in self.rows}),
            "sources": sorted({row.source for row in self.rows}),
            "files": files,
        }
        data = canonical_json({**manifest, "owner": self.rows[0].owner, **context})
        write_file(directory / "shard.json", data)
        return sha256(data)

    @classmethod
    def read(cls, directory: Path, expected_hash: str) -> Shard:
        """Read a shard, every byte checked. Raises :class:`silo.errors.IntegrityError` naming the damaged file."""
        manifest = read_manifest(directory, expected_hash)
        files = manifest["files"]
        return cls(
            read_rows(directory, manifest),
            *(read_array(directory / f"{name}.npy", files[f"{name}.npy"]) for name in ARRAYS),
        )


class DocumentRows:
    """The rows of some shards, one shard after the other, each read when one of its documents is asked for."""

    def __init__(self, shards: Sequence[tuple[Path, str, int]]) -> None:
        """``shards`` are (directory, hash, documents)."""
        self._shards = list(shards)
        self._ends = list(itertools.accumulate(count for _, _, count in shards))
        self._read: dict[int, list[DocumentRow]] = {}

    def __call__(self, number: int) -> DocumentRow:
        """The document of a number, from 0."""
        shard = self.shard_of(number)
        directory, expected, count = self._shards[shard]
        if shard not in self._read:
            self._read[shard] = read_rows(directory, read_manifest(directory, expected))
        return self._read[shard][number - self._ends[shard] + count]

    def shard_of(self, number: int) -> int:
        """Which of the shards a document is in, from 0."""
        return bisect.bisect_right(self._ends, number)


def read_manifest(directory: Path, expected_hash: str) -> dict:
    """Read and check ``shard.json``."""
    return json.loads(read_checked(directory / "shard.json", expected_hash))


def read_rows(directory: Path, manifest: dict) -> list[DocumentRow]:
    """Read and check the rows of a shard whose manifest is known."""
    data = read_checked(directory / "documents.jsonl", manifest["files"]["documents.jsonl"])
    return [DocumentRow(**json.loads(line)) for line in data.splitlines()]
