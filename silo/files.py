"""Files that are whole or absent: atomic writes, checksums, canonical JSON, one writer at a time.

Small files are written by :func:`write_file`. What is too large for that, or written by another library, goes into a
directory of its own that takes its name by one rename when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from silo.errors import DataError, IntegrityError, StoreError, UsageError


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that is hashed and stored: sorted keys, no spare spaces, a final newline."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def sha256(data: bytes | memoryview) -> str:
    """Hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_place(path: Path, option: str) -> None:
    """Raise :class:`UsageError` unless a file can have this name: asked before the work whose result it is to hold.

    Args:
        path: the file that is to be written.
        option: by which it was named, for the message.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; {option} wants the name of a file")
    if not path.parent.is_dir():
        found = "is not a directory" if path.parent.exists() else "does not exist"
        raise UsageError(f"{path.parent} {found}; {option} wants a file in a directory that does")


def write_file(path: Path, data: bytes | memoryview) -> str:
    """Write a file so that a reader sees the old bytes or all of the new ones, also after a power cut.

    The bytes go to a temporary neighbour, are synced, and take the name by one rename. On failure the neighbour is
    removed and the old file stands. Returns the SHA-256 of the bytes.
    """
    return _write_parts(path, [data])


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name as :func:`write_file` says when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a directory that is none
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None  # the name that was asked for
        raise
    sync_directory(path.parent)


def _write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    with written_whole(path) as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a value as canonical JSON."""
    write_file(path, canonical_json(value))


def write_array(path: Path, array: np.ndarray) -> str:
    """Write an array as ``.npy``, which carries its shape and type, and return the file's SHA-256."""
    return write_rows(path, [array], count=len(array))


def write_rows(path: Path, parts: Iterable[np.ndarray], *, count: int) -> str:
    """Write arrays that follow each other as one ``.npy``, of which only one at a time is in memory.

    Args:
        path: where.
        parts: at least one; all of one type, and of one shape but for their lengths.
        count: the sum of their lengths.

    Returns:
        The file's SHA-256.
    """
    return _write_parts(path, _npy(iter(parts), count))


def _npy(parts: Iterator[np.ndarray], count: int) -> Iterator[bytes | memoryview]:
    first = next(parts)
    header = io.BytesIO()
    shape = {
        "shape": (count, *first.shape[1:]),
        "fortran_order": False,
        "descr": np.lib.format.dtype_to_descr(first.dtype),
    }
    np.lib.format.write_array_header_1_0(header, shape)
    yield header.getvalue()
    for part in itertools.chain([first], parts):
        yield np.ascontiguousarray(part).view(np.uint8).data


def read_checked(path: Path, expected: str) -> bytes:
    """Read a file whose SHA-256 is known.

    Raises:
        IntegrityError: the file is missing, or its bytes are not the promised ones.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing; restore it from a backup or rebuild what holds it") from None
    check_digest(path, sha256(data), expected)
    return data


_PARSING = threading.Lock()
"""Held while an array is loaded: where two threads parse heads of arrays at a time and something listens to the garbage
collector, Python 3.11 fails now and then (``SystemError: AST constructor recursion depth mismatch``)."""


def load_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """Read an ``.npy`` array, or map it; by any thread, and unchecked. Raises :class:`IntegrityError` if it is none, or
    not a whole one."""
    return _loaded(path, path, mapped=mapped)


def _loaded(source: Path | BinaryIO, path: Path, *, mapped: bool = False) -> np.ndarray:
    try:
        with _PARSING:
            found = np.load(source, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # whatever stumbles over a cut head
        raise not_whole(path, str(error)) from None
    if not isinstance(found, np.ndarray):
        raise not_whole(path, f"it holds a {type(found).__name__}")
    return found


def not_whole(path: Path, how: str) -> IntegrityError:
    """The error for a file of numbers that was cut or is no such file, found before its checksum was looked at."""
    return IntegrityError(
        f"{path} is damaged: it is no whole array ({how}); restore it from a backup, or rebuild what holds it: of a "
        "store's search structures `silo datastore verify --repair` does"
    )


def read_array(path: Path, expected: str) -> np.ndarray:
    """Read an ``.npy`` array whose SHA-256 is known. Raises :class:`IntegrityError` as :func:`read_checked` does."""
    return _loaded(io.BytesIO(read_checked(path, expected)), path)


def map_array(path: Path, expected: str) -> np.ndarray:
    """Map an ``.npy`` array whose SHA-256 is known, read through once for it. Raises :class:`IntegrityError`."""
    try:
        found = sha256_file(path)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing; restore it from a backup or rebuild what holds it") from None
    check_digest(path, found, expected)
    return load_array(path, mapped=True)


def check_digest(path: Path, found: str, expected: str) -> None:
    """Raise :class:`IntegrityError` unless a file's digest is the expected one."""
    if found != expected:
        raise IntegrityError(
            f"{path} is damaged: its sha256 is {found[:12]}…, the manifest says {expected[:12]}…; "
            "restore it from a backup or rebuild what holds it"
        )


def read_json(path: Path, *, wanted: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        wanted: of a file that a user names: what it should be, and what writes it.

    Raises:
        UsageError: it is not there; or it is not JSON, and what was wanted is known.
        IntegrityError: it is not JSON.
    """
    told = f"; expected {wanted}" if wanted else ""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} does not exist{told}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory{told or '; expected a file'}") from None
    except ValueError as error:
        if wanted:
            raise UsageError(f"{path} is not valid JSON ({error}){told}") from None
        raise IntegrityError(f"{path} is not valid JSON ({error}); restore it from a backup") from None


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its own digest in it, so that it vouches for itself."""
    return {**record, "digest": sha256(canonical_json(record))}


def read_sealed(path: Path, format: int) -> dict[str, Any]:
    """Read a file that :func:`sealed` made.

    Raises:
        UsageError: there is no such file.
        IntegrityError: a byte of it was changed.
        DataError: another version of SILO wrote it.
    """
    record = read_json(path)
    if not isinstance(record, dict) or sealed({k: v for k, v in record.items() if k != "digest"}) != record:
        raise IntegrityError(f"{path} is damaged: it does not have the digest that it states; make it again")
    if record.get("format") != format:
        raise DataError(f"{path} has format {record.get('format')!r}, this version reads {format}; make it again")
    return record


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory durable."""
    sync_file(directory)


def sync_file(path: Path) -> None:
    """Make what another library wrote durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory and all it holds, durably. Absent is fine: an earlier, interrupted call may have been here."""
    shutil.rmtree(path, ignore_errors=False) if path.exists() else None
    sync_directory(path.parent)


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """An empty directory in another, which is nobody's until it is published."""
    directory = parent / ".staging"
    remove_tree(directory)
    directory.mkdir()
    yield directory


def publish(staged: Path, name: str) -> None:
    """Give a directory that is whole its name, durably."""
    sync_directory(staged)
    staged.rename(staged.with_name(name))
    sync_directory(staged.parent)


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a file lock for one writer. The kernel frees it when the process dies, however it dies.

    Raises:
        StoreError: another process holds it, and ``wait`` is not set.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise StoreError(f"{path.parent} is being written by another process; try again when it is done") from None
        yield
