"""What a store remembers of its changes: a receipt for each, and a log that chains them.

A receipt says which documents came or went, by id and hash, never by text; it holds no time, so equal histories give
equal receipts. The log adds the time, and each of its lines holds the hash of the line before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silo.errors import IntegrityError
from silo.files import canonical_json, check_digest, read_checked, sha256, sha256_file, sync_directory, write_file

FIRST = "0" * 64
"""What stands before the first line of a log."""


@dataclass(frozen=True)
class Receipt:
    """The record of one change, and the file that holds it."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def write(cls, directory: Path, content: dict[str, Any]) -> Receipt:
        """Write a receipt under its sequence number."""
        path = directory / f"{content['sequence']:06d}-{content['operation']}.json"
        write_file(path, canonical_json(content))
        return cls(path, content)

    @property
    def digest(self) -> str:
        """SHA-256 of the receipt's bytes."""
        return sha256(canonical_json(self.content))


def append(log: Path, receipt: Receipt) -> None:
    """Append a receipt to the log, unless it is there already (a crash came between commit and log)."""
    lines = read(log)
    if lines and lines[-1]["sequence"] >= receipt.content["sequence"]:
        return
    entry = {
        "sequence": receipt.content["sequence"],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "operation": receipt.content["operation"],
        "reason": receipt.content["reason"],
        "receipt": receipt.path.name,
        "receipt_sha256": receipt.digest,
        "previous": lines[-1]["hash"] if lines else FIRST,
    }
    write_file(log, b"".join(canonical_json(line) for line in [*lines, {**entry, "hash": _hash(entry)}]))


def _hash(entry: dict[str, Any]) -> str:
    return sha256(canonical_json(entry))


def read(log: Path) -> list[dict[str, Any]]:
    """The lines of a log, its chain checked.

    Raises:
        IntegrityError: a line was changed, or one is missing.
    """
    lines = []
    previous = FIRST
    for number, data in enumerate(log.read_bytes().splitlines() if log.exists() else [], start=1):
        try:
            line = json.loads(data)
            entry = {key: value for key, value in line.items() if key != "hash"}
            intact = line["previous"] == previous and line["hash"] == _hash(entry)
        except (ValueError, KeyError, AttributeError):
            intact = False
        if not intact:
            raise IntegrityError(f"{log}:{number}: the hash chain is broken here; restore the log from a backup")
        previous = line["hash"]
        lines.append(line)
    return lines


def verify(log: Path, receipts: Path, last_sequence: int) -> None:
    """Check the chain and every receipt that it names, up to the store's last change."""
    lines = read(log)
    found = lines[-1]["sequence"] if lines else 0
    if found != last_sequence or len(lines) != last_sequence:
        raise IntegrityError(
            f"{log} ends with change {found} after {len(lines)} lines, the store is at change {last_sequence}; "
            "restore the log from a backup"
        )
    for line in lines:
        path = receipts / line["receipt"]
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; restore it from a backup")
        check_digest(path, sha256_file(path), line["receipt_sha256"])


def load(path: Path, digest: str) -> Receipt:
    """Read a receipt whose digest is known."""
    return Receipt(path, json.loads(read_checked(path, digest)))


def discard_uncommitted(receipts: Path, last_sequence: int) -> None:
    """Remove receipts of changes that were never committed."""
    for path in receipts.iterdir():
        if not path.name[:6].isdigit() or int(path.name[:6]) > last_sequence:
            path.unlink()
    sync_directory(receipts)
