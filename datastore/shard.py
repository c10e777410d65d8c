"""A shard: one owner's documents as tokens and coded keys, in files that never change once they are written.

    shard.json        counts, and the checksum of each file below
    documents.jsonl   one row a document, sorted by id: licence, source, title, hash, token range
    tokens.npy        (tokens,) uint16 or uint32, documents end to end
    lists.npy         (keys,) int32, the inverted list of each key
    codes.npy         (keys, bytes) uint8, each key's code

Documents have a key for each token, or none: those cannot be found by nearest neighbours, and cost no call of a model.

A document's rows depend on that document alone (and on model and control plane), so a shard without a document is the
shard's files with that document's rows cut out. Rows are JSON Lines, not Parquet, because a Parquet file's bytes depend
on the version of the library that wrote them, and these bytes are hashed.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from silo.documents import Document
from silo.files import canonical_json, load_array, map_array, read_checked, write_file, write_rows
from silo.retrieval import SourceDocument

INDEX = "shard.json"
ARRAYS = ("tokens", "lists", "codes")
OF_KEYS = ARRAYS[1:]
TOKEN_TYPES = (np.uint16, np.uint32)
"""What tokens are stored as, from narrow to wide."""


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """What a shard knows of one of its documents; ``begin`` and ``end`` are where its tokens are."""

    id: str
    owner: str
    license: str
    source: str
    title: str
    content_hash: str
    begin: int
    end: int
    keyed: bool = True
    """Whether its tokens have keys."""

    @property
    def keys(self) -> int:
        """How many keys it has."""
        return self.end - self.begin if self.keyed else 0

    def written(self) -> dict[str, Any]:
        """As files hold it."""
        fields = asdict(self)
        if self.keyed:
            del fields["keyed"]
        return fields

    def described(self) -> SourceDocument:
        """Who stands behind text of it."""
        return SourceDocument(self.id, self.owner, self.license, self.source, self.title)


def describe(document: Document, length: int, *, keyed: bool = True) -> DocumentRow:
    """The row of a document of so many tokens that stands at the beginning."""
    row = (document.id, document.owner, document.license, document.source, document.title, document.content_hash)
    return DocumentRow(*row, 0, length, keyed)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as a shard holds it."""

    document: DocumentRow
    tokens: np.ndarray
    lists: np.ndarray
    codes: np.ndarray

    @classmethod
    def make(cls, document: Document, tokens: np.ndarray, lists: np.ndarray, codes: np.ndarray) -> Encoded:
        """Put a document and its arrays together, of which those of keys may be empty."""
        return cls(describe(document, len(tokens), keyed=len(lists) == len(tokens)), tokens, lists, codes)

    def text(self, tokenizer: Tokenizer) -> str:
        """Its text, decoded."""
        return str(tokenizer.decode(self.tokens.tolist(), skip_special_tokens=False))


@dataclass(frozen=True)
class Texts:
    """The documents of a shard and their tokens, mapped from disk."""

    rows: list[DocumentRow]
    tokens: np.ndarray

    @classmethod
    def read(cls, directory: Path, expected_hash: str) -> Texts:
        """Map what a shard has of them, every byte checked. Raises :class:`silo.errors.IntegrityError` naming the
        damaged file."""
        rows, arrays = _read(directory, expected_hash, ARRAYS[:1])
        return Texts(rows, *arrays)


@dataclass(frozen=True)
class Shard(Texts):
    """A shard, mapped from disk."""

    lists: np.ndarray
    codes: np.ndarray

    def documents(self) -> list[Encoded]:
        """Its documents, each with views of its rows."""
        ends = itertools.accumulate(row.keys for row in self.rows)
        return [
            Encoded(
                row,
                self.tokens[row.begin : row.end],
                *(array[end - row.keys : end] for array in (self.lists, self.codes)),
            )
            for row, end in zip(self.rows, ends, strict=True)
        ]

    @classmethod
    def read(cls, directory: Path, expected_hash: str) -> Shard:
        """Map a shard, every byte checked. Raises :class:`silo.errors.IntegrityError` naming the damaged file."""
        rows, arrays = _read(directory, expected_hash, ARRAYS)
        return cls(rows, *arrays)


def _read(directory: Path, expected_hash: str, arrays: Sequence[str]) -> tuple[list[DocumentRow], list[np.ndarray]]:
    manifest = read_manifest(directory, expected_hash)
    files = manifest["files"]
    rows = read_rows(directory, manifest)
    return rows, [map_array(directory / f"{name}.npy", files[f"{name}.npy"]) for name in arrays]


def write_shard(directory: Path, documents: Iterable[Encoded], *, context: dict[str, str]) -> tuple[str, Shard]:
    """Write some documents of one owner into an empty directory, end to end in the order of their ids, so that the
    order of adding leaves no trace.

    What is written is read document by document, so that a shard may be larger than memory.

    Args:
        directory: an empty one.
        documents: at least one.
        context: says which model and control plane made the keys.

    Returns:
        The shard's hash, which is that of ``shard.json``, and the shard.
    """
    ordered = sorted(documents, key=lambda encoded: encoded.document.id)
    ends = list(itertools.accumulate(len(encoded.tokens) for encoded in ordered))
    rows = [
        replace(encoded.document, begin=end - len(encoded.tokens), end=end)
        for encoded, end in zip(ordered, ends, strict=True)
    ]
    files = {"documents.jsonl": write_file(directory / "documents.jsonl", b"".join(map(_line, rows)))}
    keys = sum(row.keys for row in rows)
    for name in ARRAYS:
        parts = (getattr(encoded, name) for encoded in ordered)
        files[f"{name}.npy"] = write_rows(directory / f"{name}.npy", parts, count=keys if name in OF_KEYS else ends[-1])
    manifest = {
        "documents": len(rows),
        "tokens": ends[-1],
        "licenses": sorted({row.license for row in rows}),
        "sources": sorted({row.source for row in rows}),
        "files": files,
    }
    digest = write_file(directory / INDEX, canonical_json({**manifest, "owner": rows[0].owner, **context}))
    return digest, Shard(rows, *(load_array(directory / f"{name}.npy", mapped=True) for name in ARRAYS))


def _line(row: DocumentRow) -> bytes:
    return canonical_json(row.written())


class DocumentRows:
    """The rows of some shards, one shard after the other, each read when one of its documents is asked for."""

    def __init__(
        self, shards: Sequence[tuple[Path, str, int]], reading: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """``shards`` are (directory, hash, documents); ``reading`` is entered while one is read."""
        self._shards, self._reading = list(shards), reading
        self._ends = list(itertools.accumulate(count for _, _, count in shards))
        self._read: dict[int, list[DocumentRow]] = {}

    def __call__(self, number: int) -> DocumentRow:
        """The document of a number, from 0."""
        shard = self.shard_of(number)
        directory, expected, count = self._shards[shard]
        if shard not in self._read:
            with self._reading():
                self._read[shard] = read_rows(directory, read_manifest(directory, expected))
        return self._read[shard][number - self._ends[shard] + count]

    def shard_of(self, number: int) -> int:
        """Which of the shards a document is in, from 0."""
        return bisect.bisect_right(self._ends, number)


def read_manifest(directory: Path, expected_hash: str) -> dict:
    """Read and check ``shard.json``."""
    return json.loads(read_checked(directory / INDEX, expected_hash))


def read_rows(directory: Path, manifest: dict) -> list[DocumentRow]:
    """Read and check the rows of a shard whose manifest is known."""
    data = read_checked(directory / "documents.jsonl", manifest["files"]["documents.jsonl"])
    return [DocumentRow(**json.loads(line)) for line in data.splitlines()]


def shard_name(document: Document | DocumentRow) -> str:
    """The shard that a document belongs to: its owner's, or its source's where no owner is known."""
    return document.owner or document.source


def slug(name: str) -> str:
    """A shard's name as part of a file name; the hash beside it makes it unique."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "shard"


def token_type(vocab_size: int) -> type:
    """The narrowest type for the tokens of a vocabulary."""
    narrow, wide = TOKEN_TYPES
    return narrow if vocab_size <= 1 << 16 else wide
