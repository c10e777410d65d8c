"""Checks that a store's files are those that were written: none changed, none missing, none added."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silo.errors import IntegrityError
from silo.files import canonical_json, check_digest, read_checked, sha256, sha256_file

_HEAD, _BETWEEN, _TAIL = b'{"content":', b',"seal":"', b'"}\n'
_SEAL_LENGTH = 64


def sealed(content: dict[str, Any]) -> bytes:
    """The bytes of a JSON file that carries the checksum of its own content."""
    body = canonical_json(content).rstrip(b"\n")
    return _HEAD + body + _BETWEEN + sha256(body).encode() + _TAIL


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`sealed` made. Raises :class:`IntegrityError` if it is missing or any byte was changed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise missing(path) from None
    end = len(data) - len(_TAIL) - _SEAL_LENGTH - len(_BETWEEN)
    body = data[len(_HEAD) : max(0, end)]
    if _HEAD + body + _BETWEEN + sha256(body).encode() + _TAIL != data:
        raise IntegrityError(f"{path} is damaged: its content is not what its seal says; restore it from a backup")
    return json.loads(body)


def verify_directory(directory: Path, index: str, expected_hash: str) -> None:
    """Check a directory whose file ``index``, of known hash, lists the others under ``files``."""
    verify_files(directory, json.loads(read_checked(directory / index, expected_hash))["files"], index=index)


def verify_files(directory: Path, files: dict[str, str], *, index: str) -> None:
    """Check that a directory holds these files, with these checksums, and nothing else but their list, ``index``.

    A file in a directory below is named with a slash.
    """
    for name, digest in files.items():
        if not (directory / name).is_file():
            raise missing(directory / name)
        check_digest(directory / name, sha256_file(directory / name), digest)
    below = {name.partition("/")[0] for name in files if "/" in name}
    refuse_strays(directory, {index, *below, *(name for name in files if "/" not in name)})
    for name in sorted(below):
        refuse_strays(directory / name, {file.partition("/")[2] for file in files if file.startswith(f"{name}/")})


def refuse_strays(directory: Path, known: set[str]) -> None:
    """Raise :class:`IntegrityError` at anything in a directory that is not known: it might be text that was removed."""
    for path in sorted(directory.iterdir()):
        if path.name not in known:
            raise IntegrityError(f"{path} does not belong to the store; remove it")


def missing(path: Path) -> IntegrityError:
    """The error for a file that should be there."""
    return IntegrityError(f"{path} is missing; restore it from a backup")


@contextlib.contextmanager
def noting(shard: str, damaged: set[str] | None) -> Iterator[None]:
    """Note a shard that turns out to be damaged, where this is asked for, and go on."""
    try:
        yield
    except IntegrityError:
        if damaged is None:
            raise
        damaged.add(shard)
