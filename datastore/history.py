"""What a store remembers of its changes: a receipt for each, and a log that chains them.

A receipt says which documents came or went, by id and hash, never by text; it holds no time, so equal histories give
equal receipts. The log adds the time, and each of its lines holds the hash of the line before.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datastore.integrity import missing, refuse_strays
from datastore.selection import KINDS
from datastore.signing import sign, signer
from silo.errors import IntegrityError
from silo.files import canonical_json, read_checked, sha256, sync_directory, write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from datastore.shard import DocumentRow

FIRST = "0" * 64
"""What stands before the first line of a log."""


@dataclass(frozen=True)
class Receipt:
    """The record of one change, and the file that holds it."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def write(cls, directory: Path, content: dict[str, Any], key: Ed25519PrivateKey | None = None) -> Receipt:
        """Write a receipt under its sequence number, signed if there is a key."""
        if key is not None:
            content = sign(content, key)
        path = directory / f"{content['sequence']:06d}-{content['operation']}.json"
        write_file(path, canonical_json(content))
        return cls(path, content)

    @property
    def digest(self) -> str:
        """SHA-256 of the receipt's bytes."""
        return sha256(canonical_json(self.content))


def append(log: Path, receipt: Receipt) -> None:
    """Append a receipt to the log, unless it is there already (a crash came between commit and log).

    Raises:
        IntegrityError: the log ends elsewhere than just before or at this change.
    """
    lines = read(log)
    sequence = receipt.content["sequence"]
    if len(lines) != sequence - 1:
        _require_end(log, lines, sequence, receipt.digest)
        return
    entry = {
        "sequence": sequence,
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
    for number, data in enumerate(_lines(log), start=1):
        try:
            line = json.loads(data)
            entry = {key: value for key, value in line.items() if key != "hash"}
            chained = (line["sequence"], line["previous"], line["hash"]) == (number, previous, _hash(entry))
            intact = chained and canonical_json(line) == data
        except (ValueError, KeyError, AttributeError, TypeError):
            intact = False
        if not intact:
            raise IntegrityError(f"{log}:{number}: the hash chain is broken here; restore the log from a backup")
        previous = line["hash"]
        lines.append(line)
    return lines


def _lines(log: Path) -> list[bytes]:
    return log.read_bytes().splitlines(keepends=True) if log.exists() else []


def _require_end(log: Path, lines: list[dict[str, Any]], sequence: int, receipt_sha256: str) -> None:
    if len(lines) != sequence or (lines[-1]["receipt_sha256"] if lines else FIRST) != receipt_sha256:
        raise IntegrityError(
            f"{log} ends with change {len(lines)}, the store is at change {sequence} with receipt "
            f"{receipt_sha256[:12]}…; restore the log from a backup"
        )


def verify(log: Path, receipts: Path, last_sequence: int, last_receipt_sha256: str) -> list[str | None]:
    """Check the chain up to the store's last change, every receipt that it names, and that there are no others.

    Returns:
        Who signed each receipt, by public key; None where nobody did.
    """
    signers = []
    lines = read(log)
    _require_end(log, lines, last_sequence, last_receipt_sha256)
    for line in lines:
        path = receipts / line["receipt"]
        if not path.is_file():
            raise missing(path)
        signers.append(signer(load(path, line["receipt_sha256"]).content, path))
    refuse_strays(receipts, {line["receipt"] for line in lines})
    return signers


def load(path: Path, digest: str) -> Receipt:
    """Read a receipt whose digest is known."""
    return Receipt(path, json.loads(read_checked(path, digest)))


def told(log: Path, receipts: Path) -> list[dict[str, Any]]:
    """The lines of a log, each with what its receipt says of the change: ``what`` in a few words, how many
    ``documents``, and whether it is ``signed``.

    Raises:
        IntegrityError: a line or a receipt was changed, or is missing.
    """
    lines = []
    for line in read(log):
        receipt = load(receipts / line["receipt"], line["receipt_sha256"])
        content, signed = receipt.content, signer(receipt.content, receipt.path) is not None
        lines.append({**line, "what": _what(content), "documents": len(content["documents"]), "signed": signed})
    return lines


def _what(content: dict[str, Any]) -> str:
    """What a change was about: what was asked for, or whose documents came, or what was noted."""
    number = len(content["documents"])
    count = f"{number:,} document{'s' * (number != 1)}"
    if content["request"]:
        asked = "; ".join(f"{KINDS[kind]} {_some(names)}" for kind, names in sorted(content["request"].items()))
        return f"{asked}: {count}"
    if number:
        return f"{count} of {_some(sorted({row['owner'] or row['source'] for row in content['documents']}))}"
    if "weights" in content:
        return f"weights {content['weights']['file']}"
    return f"{len(content['damaged'])} search structures built anew" if "damaged" in content else ""


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def out_of_reach(log: Path, receipts: Path, ids: set[str], shards: Collection[str] = ()) -> dict[str, list[str]]:
    """What a removal of some documents, and of whole shards, does not reach, if there is any: the receipts of
    ``exports`` that held one of them, and files of weights that were fitted with the store."""
    found: dict[str, set[str]] = {"exports": set(), "weights_to_fit_again": set()}
    for line in read(log):
        if line["operation"] in ("export", "fit"):
            content = load(receipts / line["receipt"], line["receipt_sha256"]).content
            if line["operation"] == "fit":
                found["weights_to_fit_again"].add(content["weights"]["file"])
            elif any(row["id"] in ids or row["shard"] in shards for row in content["documents"]):
                found["exports"].add(line["receipt"])
    return {name: sorted(each) for name, each in found.items() if each}


def discard_uncommitted(receipts: Path, last_sequence: int) -> None:
    """Remove receipts of changes that were never committed, and half-written ones."""
    for path in receipts.iterdir():
        number = path.name.partition("-")[0]
        if path.name.endswith(".tmp") or (number.isdigit() and int(number) > last_sequence):
            path.unlink()
    sync_directory(receipts)


def receipt_row(shard: str, row: DocumentRow) -> dict[str, Any]:
    """What a receipt says of a document: never its text or title."""
    return {
        "id": row.id,
        "shard": shard,
        "owner": row.owner,
        "license": row.license,
        "source": row.source,
        "content_hash": row.content_hash,
        "tokens": row.end - row.begin,
    }
