"""Writes one side of a corpus as a stream: its splits, its index, and last the manifest that vouches for both."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from pathlib import Path

from silo.audit import Tally
from silo.corpus import FORMAT, SIDES, Row, split_of
from silo.documents import Document
from silo.files import canonical_json, sealed, sha256, sync_directory, write_json
from silo.licensing import Policy


class SideWriter:
    """Writes the files of one side as a stream, and its manifest last."""

    def __init__(self, directory: Path, side: str, policy: Policy, tally: Tally) -> None:
        directory.mkdir()
        self._directory, self._side, self._policy, self._tally = directory, side, policy, tally
        names = ["index.jsonl", *(f"{split}.jsonl" for split in SIDES[side])]
        self._files = {name: HashedFile(directory / name) for name in names}
        self._counts: Counter[str] = Counter()

    def write(self, document: Document, line: bytes | None = None) -> None:
        """Append a document's line to its split, and its row to the index. ``line`` saves spelling it out again."""
        split = split_of(document.id, self._side)
        line = line or canonical_json(document.to_json())
        file = self._files[f"{split}.jsonl"]
        tier = self._policy.tier(document)
        row = Row(
            id=document.id,
            license=document.license,
            owner=document.owner,
            source=document.source,
            title=document.title,
            tier=tier.value,
            split=split,
            offset=file.bytes,
            bytes=len(line),
            sha256=sha256(line),
            content=document.content_hash,
        )
        file.write(line)
        self._files["index.jsonl"].write(canonical_json(dataclasses.asdict(row)))
        kind = self._tally.add(document, tier)
        self._counts.update({kind: 1, split: 1})

    def close(self, audit: str) -> None:
        """Sync the files and write the manifest, which vouches for them all."""
        files = {name: {"sha256": file.close(), "bytes": file.bytes} for name, file in self._files.items()}
        manifest = {
            "format": FORMAT,
            "side": self._side,
            "policy": self._policy.to_json(),
            "policy_fingerprint": self._policy.fingerprint,
            "audit": audit,
            "counts": {name: self._counts[name] for name in ("documents", "pairs", *SIDES[self._side])},
            "files": files,
        }
        write_json(self._directory / "manifest.json", sealed(manifest))
        sync_directory(self._directory)


class HashedFile:
    """A file written once, from front to back, whose digest is known when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close(), which makes it durable first
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> None:
        """Append some bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def close(self) -> str:
        """Make the bytes durable and return their SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()
