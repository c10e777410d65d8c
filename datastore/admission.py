"""What a document, and an exported shard, must be for a store to take it in.

Of a shard, checksums say that a file is what was written, not that whoever wrote it was a store. So everything that
later reading relies on is looked at before a byte is committed: one shard that is not what it seems would spoil its
whole group.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datastore.shard import ARRAYS, INDEX, TOKEN_TYPES, DocumentRow, Encoded, Shard, shard_name
from silo.documents import Document
from silo.errors import DataError, StoreError
from silo.files import load_array, read_checked

if TYPE_CHECKING:
    from datastore.snapshot import Snapshot

LONGEST_ID = 8192
"""Bytes. Lucene takes no word of more than 32,766, and an id becomes a part of one."""
FILES = {INDEX, "documents.jsonl", *(f"{name}.npy" for name in ARRAYS)}
_TYPES = {"begin": int, "end": int, "keyed": bool}
"""Of the fields of a row that are no strings."""


@dataclass(frozen=True)
class Fitting:
    """What a store asks of the arrays of its shards."""

    token_types: Sequence[np.dtype]
    """One of which tokens have."""
    tokens: int
    """What every token is below."""
    lists: int
    """How many inverted lists there are."""
    code_bytes: int
    """Width of a code."""

    @classmethod
    def of(cls, store: Snapshot) -> Fitting:
        """What a store asks. Which type tokens have hangs on the model, so a store of no shards may take both."""
        tokens = 1 + max(store.tokenizer.get_vocab().values(), default=-1)
        types = [each for each in _token_types(store) if tokens <= 1 << 8 * each.itemsize]
        return cls(types, tokens, len(store.control.centroids), store.control.codes.size)


def _token_types(store: Snapshot) -> list[np.dtype]:
    """Those that tokens of a shard may have beside the store's."""
    for entry in store.manifest.shards.values():
        return [load_array(store.path / "shards" / entry.directory / "tokens.npy", mapped=True).dtype]
    return [np.dtype(each) for each in TOKEN_TYPES]


def require_one_type(store: Snapshot, encoded: Iterable[Encoded]) -> None:
    """Raise :class:`StoreError` where tokens to add are of another type than the store's: no model gives both."""
    types = _token_types(store)
    for each in encoded:
        if each.tokens.dtype not in types:
            raise StoreError(
                f"the tokens in {store.path} are {types[0]}, those of {each.document.id!r} {each.tokens.dtype}; the "
                "store took in a shard that its model did not make: remove that first"
            )


def require_storable(document: Document | DocumentRow) -> None:
    """Raise :class:`DataError` for a document that cannot be written: it is no Unicode text, or its id is too long."""
    for name in ("id", "owner", "license", "source", "title", "prompt", "text"):
        try:
            size = len(getattr(document, name, "").encode())
        except UnicodeEncodeError:
            raise DataError(
                f"document {document.id[:40]!r} has a {name} with an unpaired surrogate, which is no Unicode text; "
                "mend or drop it"
            ) from None
        if name == "id" and size > LONGEST_ID:
            raise DataError(
                f"document {document.id[:40]!r}… has an id of {size:,} bytes; give it one of {LONGEST_ID:,} at most"
            )


def read_index(directory: Path, expected_hash: str) -> dict[str, Any]:
    """What ``shard.json`` of a shard that was unpacked says, checked against its hash.

    Raises:
        IntegrityError: it is not what the hash says.
        DataError: it does not say what a shard's does.
    """
    index = _parsed(read_checked(directory / INDEX, expected_hash), INDEX)
    _require({"files", "model", "control"} <= index.keys(), f"{INDEX} does not say of which model it is")
    files = index["files"]
    listed = isinstance(files, dict) and files.keys() == FILES - {INDEX}
    _require(listed and all(isinstance(each, str) for each in files.values()), f"{INDEX} does not list its files")
    return index


def read_fitting(directory: Path, name: str, expected_hash: str, fitting: Fitting) -> Shard:
    """Map a shard that was unpacked, every byte checked.

    Args:
        directory: where it is.
        name: the shard's.
        expected_hash: likewise.
        fitting: what the store asks.

    Raises:
        IntegrityError: a file is not what its checksum says.
        DataError: the shard is not such as a store writes, or not such as this store has.
    """
    digest = read_index(directory, expected_hash)["files"]["documents.jsonl"]
    lines = enumerate(read_checked(directory / "documents.jsonl", digest).splitlines(), start=1)
    _require_rows([_parsed(line, f"line {number} of its documents") for number, line in lines])
    shard = Shard.read(directory, expected_hash)
    _require_documents(shard.rows, name)
    _require_arrays(shard, fitting)
    return shard


def _require(holds: bool, wrong: str) -> None:
    if not holds:
        raise DataError(wrong)


def _parsed(data: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    _require(isinstance(found, dict), f"{what} is no JSON object")
    return dict(found)


def _require_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Check the fields of rows and their types."""
    names = {each.name for each in fields(DocumentRow)}
    _require(bool(rows), "it has no documents")
    for number, row in enumerate(rows, start=1):
        whole = row.keys() | {"keyed"} == names
        typed = whole and all(type(value) is _TYPES.get(name, str) for name, value in row.items())
        _require(typed, f"the fields of its document {number} are not those of a document")


def _require_documents(rows: Sequence[DocumentRow], shard: str) -> None:
    """Check that documents of one shard lie end to end in the order of their ids."""
    _require(all(shard_name(row) == shard for row in rows), f"not all its documents are of the shard {shard!r}")
    begins = [0, *(row.end for row in rows)]
    end_to_end = all(row.begin == begin < row.end for row, begin in zip(rows, begins, strict=False))
    in_order = all(one.id < other.id for one, other in itertools.pairwise(rows))
    _require(end_to_end and in_order, "its documents do not lie end to end in the order of their ids")


def _require_arrays(shard: Shard, fitting: Fitting) -> None:
    """Check types, shapes and ranges of what a shard's documents point into."""
    keys = sum(row.keys for row in shard.rows)
    kinds = " or ".join(str(each) for each in fitting.token_types)
    _require(shard.tokens.dtype in fitting.token_types, f"its tokens are of type {shard.tokens.dtype}, not {kinds}")
    wanted = {
        "tokens": (shard.tokens.dtype, (shard.rows[-1].end,), fitting.tokens),
        "lists": (np.dtype(np.int32), (keys,), fitting.lists),
        "codes": (np.dtype(np.uint8), (keys, fitting.code_bytes), 1 << 8),
    }
    for name, (dtype, shape, bound) in wanted.items():
        array = getattr(shard, name)
        told = f"its {name} are {array.dtype} of shape {array.shape}, not {dtype} of shape {shape}"
        _require((array.dtype, array.shape) == (dtype, shape), told)
        within = name == "codes" or not array.size or (int(array.min()) >= 0 and int(array.max()) < bound)
        _require(within, f"its {name} are not all from 0 to {bound - 1}, as the store has them")
