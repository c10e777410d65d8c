"""What an unfinished add has encoded so far: the work of hours survives a kill, and need not fit in memory.

    of.json       which store, in which state, the documents were encoded for
    rows.jsonl    one row a document, written after its arrays, with their checksum
    tokens.bin, lists.bin, codes.bin   the arrays of all documents end to end, as :mod:`datastore.shard` has them;
                                       of keys as many as the documents have

A spool lies in the store's directory and is no part of the store. It lasts until the next change is committed,
whichever that is. A removal deletes it first of all if it may hold the very text that is to go.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datastore.shard import ARRAYS, OF_KEYS, TOKEN_TYPES, DocumentRow, Encoded, describe, shard_name
from silo.documents import Document
from silo.errors import DataError
from silo.files import canonical_json, remove_tree, sha256, write_file

OF = "of.json"
ROWS = "rows.jsonl"


def is_of(directory: Path, context: dict[str, Any]) -> bool:
    """Whether a spool is there, and was begun for this very state of a store."""
    try:
        return (directory / OF).read_bytes() == canonical_json(context)
    except FileNotFoundError:
        return False


def count(directory: Path) -> int:
    """How many documents a spool holds; 0 if there is none."""
    rows = directory / ROWS
    return len(rows.read_bytes().splitlines()) if rows.is_file() else 0


def lacks(directory: Path, wanted: Callable[[str, DocumentRow], bool], *, code_bytes: int) -> bool:
    """Whether a spool has no document that is wanted, given its shard and row, nor a torn one, whose nobody can say.

    Of a spool without keys that is not said: to encode it again takes no time.
    """
    rows = []
    try:
        for line in (directory / ROWS).read_bytes().splitlines(keepends=True):
            fields = json.loads(line)
            digest = fields.pop("sha256")
            rows.append((DocumentRow(**fields), digest))
            if not line.endswith(b"\n") or wanted(shard_name(rows[-1][0]), rows[-1][0]):
                return False
        arrays = [np.memmap(directory / f"{name}.bin", mode="r") for name in ARRAYS]
    except FileNotFoundError:
        return not directory.exists()
    except (ValueError, KeyError, TypeError):
        return False
    first, digest = rows[0]
    keys = sum(row.keys for row, _ in rows)
    for kind in TOKEN_TYPES:  # a spool does not say how wide its tokens are, but what the first document's bytes are
        widths = (np.dtype(kind).itemsize, 4, code_bytes)
        begun = [
            array[: count * width]
            for array, count, width in zip(arrays, (first.end, first.keys, first.keys), widths, strict=True)
        ]
        if sha256(b"".join(part.tobytes() for part in begun)) == digest:
            whole = zip(arrays, (rows[-1][0].end, keys, keys), widths, strict=True)
            return all(len(array) == count * width for array, count, width in whole)
    return False


class Spool:
    """Documents in the order in which they were encoded."""

    def __init__(self, directory: Path, context: dict[str, Any], *, token_type: type, code_bytes: int) -> None:
        """Open a spool, or begin one if there is none of this context.

        Args:
            directory: the spool's own.
            context: the state of the store.
            token_type: numpy's type of a token.
            code_bytes: width of a code.
        """
        self._directory = directory
        self._shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
            "tokens": (np.dtype(token_type), ()),
            "lists": (np.dtype(np.int32), ()),
            "codes": (np.dtype(np.uint8), (code_bytes,)),
        }
        if not is_of(directory, context):
            remove_tree(directory)
            directory.mkdir()
            write_file(directory / OF, canonical_json(context))
        self._rows = self._recover()
        self._numbers = {row.id: number for number, row in enumerate(self._rows)}

    def _path(self, name: str) -> Path:
        return self._directory / (ROWS if name == "rows" else f"{name}.bin")

    def _recover(self) -> list[DocumentRow]:
        """The documents that were written whole; what follows the last of them is cut off."""
        for name in ("rows", *ARRAYS):
            self._path(name).touch()
        rows: list[DocumentRow] = []
        kept = keys = 0
        for line in self._path("rows").read_bytes().splitlines(keepends=True):
            row = self._whole(line, rows[-1].end if rows else 0, keys)
            if row is None:
                break
            rows.append(row)
            keys += row.keys
            kept += len(line)
        self._cut("rows", kept)
        for name in self._shapes:
            self._cut(name, self._bytes(name, keys if name in OF_KEYS else (rows[-1].end if rows else 0)))
        return rows

    def _bytes(self, name: str, count: int) -> int:
        """Bytes of so many members of an array."""
        kind, shape = self._shapes[name]
        return count * kind.itemsize * int(np.prod(shape, dtype=int))

    def _whole(self, line: bytes, begin: int, first_key: int) -> DocumentRow | None:
        """The row of a line, if the line is whole and the arrays are what it says."""
        try:
            fields = json.loads(line)
            digest = fields.pop("sha256")
            row = DocumentRow(**fields)
            whole = line.endswith(b"\n") and row.begin == begin and self._digest(self._read(row, first_key)) == digest
        except (ValueError, KeyError, TypeError):
            return None
        return row if whole else None

    def _cut(self, name: str, size: int) -> None:
        with open(self._path(name), "r+b") as file:
            file.truncate(size)

    @staticmethod
    def _digest(encoded: Encoded) -> str:
        digest = hashlib.sha256()
        for name in ARRAYS:
            digest.update(np.ascontiguousarray(getattr(encoded, name)).view(np.uint8).data)
        return digest.hexdigest()

    def _read(self, row: DocumentRow, first_key: int) -> Encoded:
        """A document's arrays, mapped. Raises ValueError if a file is too short."""
        arrays: list[np.ndarray] = []
        for name, (kind, shape) in self._shapes.items():
            begin, count = (first_key, row.keys) if name in OF_KEYS else (row.begin, row.end - row.begin)
            if count:
                offset = self._bytes(name, begin)
                arrays.append(np.memmap(self._path(name), dtype=kind, mode="r", offset=offset, shape=(count, *shape)))
            else:
                arrays.append(np.zeros((0, *shape), kind))  # of which there is no map
        return Encoded(row, *arrays)

    def add(self, document: Document, encode: Callable[[Document], Encoded], *, keyed: bool = True) -> None:
        """Encode a document, unless the spool has it already, with keys or without as it is to be."""
        number = self._numbers.get(document.id)
        if number is not None and describe(document, 0, keyed=keyed) == replace(self._rows[number], begin=0, end=0):
            return
        encoded = encode(document)
        begin = self._rows[-1].end if self._rows else 0
        row = replace(encoded.document, begin=begin, end=begin + len(encoded.tokens))
        for name in ARRAYS:
            array = np.ascontiguousarray(getattr(encoded, name))
            self._append(name, array.view(np.uint8).data)
        self._append("rows", canonical_json({**row.written(), "sha256": self._digest(encoded)}))
        self._numbers[row.id] = len(self._rows)
        self._rows.append(row)

    def _append(self, name: str, data: bytes | memoryview) -> None:
        with open(self._path(name), "ab") as file:
            file.write(data)

    def encoded(self, ids: list[str]) -> list[Encoded]:
        """Some of the documents, their arrays mapped from disk. Raises :class:`DataError` if one is not there."""
        missing = next((each for each in ids if each not in self._numbers), None)
        if missing is not None:
            raise DataError(
                f"document {missing!r} was there when the input was checked and not when it was encoded; add it again, "
                "and leave the files alone meanwhile"
            )
        keys = list(itertools.accumulate((row.keys for row in self._rows), initial=0))
        whole = {
            name: (
                np.memmap(self._path(name), dtype=kind, mode="r").reshape(-1, *shape)
                if self._path(name).stat().st_size
                else np.zeros((0, *shape), kind)
            )
            for name, (kind, shape) in self._shapes.items()
        }
        found = []
        for number in (self._numbers[each] for each in ids):
            row, own = self._rows[number], slice(keys[number], keys[number + 1])
            arrays = (whole[name][own] for name in OF_KEYS)
            there = replace(row, begin=0, end=row.end - row.begin)
            found.append(Encoded(there, whole["tokens"][row.begin : row.end], *arrays))
        return found
