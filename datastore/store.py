"""The store: shards of restricted text that can be searched, and removed without a trace but the log.

    store.json       which shards and search structures are live; replaced by one rename, which is the commit
    tokenizer.json   the model's tokenizer, so that a removal needs no model
    control/         what shards share, learnt from permissive text only
    shards/          what is canonical: one directory a shard, named by its content
    search/          what is derived: inverted lists and a Lucene index over a group of shards
    receipts/, log.jsonl   what was added and removed, by id and hash

Every directory under ``shards`` and ``search`` is written once, whole, under a name that holds the hash of its content.
A change writes new directories, then replaces ``store.json``, then deletes what it no longer names; a process killed
anywhere in between leaves the old store or the new one, and orphans that the next change collects.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from datastore import history
from datastore import shard as shards_on_disk
from datastore.blocks import BLOCK_STRIDE, BLOCK_TOKENS, BlockIndex
from datastore.control import ControlPlane, describe
from datastore.groups import build_group, first_free_row, regroup, verify_group
from datastore.history import Receipt
from datastore.integrity import refuse_strays, verify_directory
from datastore.keys import KeyGroup
from datastore.knn import NeighbourIndex
from datastore.manifest import FORMAT, Group, Manifest, ShardEntry
from datastore.shard import DocumentRow, DocumentRows, Encoded, Shard
from silo.documents import Document
from silo.errors import DataError, StoreError, UsageError
from silo.files import (
    canonical_json,
    exclusive_lock,
    read_checked,
    remove_tree,
    sha256,
    sync_directory,
    write_file,
)

if TYPE_CHECKING:
    from silo.language_model import LanguageModel

PARTS = {"store.json", "tokenizer.json", "control", "shards", "search", "receipts", "log.jsonl", ".lock"}
"""All that a store's directory may hold."""

CHECKED_BYTES = 1 << 28
"""Search structures up to this size are read and checked when they are opened. Larger ones are mapped unread, so that a
store larger than memory opens at once; `silo datastore verify` checks them."""

Progress = Callable[[int, int], None]
"""Called with (done, total) while something long goes on."""


@dataclass(frozen=True)
class Selection:
    """Documents to remove: those that any of these names."""

    documents: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()

    def holds(self, shard: str, row: DocumentRow) -> bool:
        """Whether a document is among them."""
        return (
            row.id in self.documents or row.owner in self.owners or row.source in self.sources or shard in self.shards
        )

    def require_known(self, rows: dict[str, list[DocumentRow]]) -> None:
        """Raise :class:`UsageError` if anything named is not in the store: a misspelt takedown must not pass."""
        every = [row for of_shard in rows.values() for row in of_shard]
        known = {
            "document": ({row.id for row in every}, self.documents),
            "owner": ({row.owner for row in every}, self.owners),
            "source": ({row.source for row in every}, self.sources),
            "shard": (set(rows), self.shards),
        }
        if not any(asked for _, asked in known.values()):
            raise UsageError("nothing to remove was named; give --document, --owner, --source or --shard")
        for kind, (present, asked) in known.items():
            for name in asked:
                if name not in present:
                    some = ", ".join(sorted(present)[:5]) or "none"
                    raise UsageError(f"no {kind} {name!r} is in the store; there are {len(present)}, such as {some}")


class Store:
    """A store as it was when it was opened, or after the last change that was made through this object."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(
        cls, path: Path, model: LanguageModel, tokenizer_file: Path, control: ControlPlane | None = None
    ) -> Store:
        """Make an empty store for the keys of one model. Raises :class:`UsageError` if something is there already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} is not empty; choose another directory")
        control = control or ControlPlane.unfitted(model.key_spec.dimension)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True
        ) as staging:
            root = Path(staging) / "store"
            for directory in (root, *(root / name for name in ("control", "shards", "search", "receipts"))):
                directory.mkdir()
            control_hash = control.save(root / "control")
            tokenizer = tokenizer_file.read_bytes()
            write_file(root / "tokenizer.json", tokenizer)
            search = {"block_tokens": BLOCK_TOKENS, "block_stride": BLOCK_STRIDE}
            Manifest({**model.describe(), "search": search}, control_hash, sha256(tokenizer)).write(root / "store.json")
            root.rename(path)
            sync_directory(path.parent)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a store. Files are checked against their checksums when they are first read."""
        return cls(path, Manifest.read(path / "store.json"))

    @property
    def hash(self) -> str:
        """The canonical hash: equal for stores that hold the same documents under the same model and control plane."""
        return self.manifest.canonical_hash

    @cached_property
    def control(self) -> ControlPlane:
        """The control plane."""
        return ControlPlane.load(self.path / "control", self.manifest.control)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model that the store was made for."""
        return Tokenizer.from_str(read_checked(self.path / "tokenizer.json", self.manifest.tokenizer).decode())

    def shard(self, name: str) -> Shard:
        """Read one live shard, every byte checked."""
        entry = self.manifest.shards[name]
        with self._as_opened():
            return Shard.read(self.path / "shards" / entry.directory, entry.hash)

    @contextlib.contextmanager
    def _as_opened(self) -> Iterator[None]:
        """Say so if what is being read is missing because another process changed the store since it was opened."""
        try:
            yield
        except (OSError, StoreError) as error:
            if Manifest.read(self.path / "store.json").sequence != self.manifest.sequence:
                raise StoreError(f"{self.path} was changed since it was opened; open it again") from error
            raise

    def rows(self) -> dict[str, list[DocumentRow]]:
        """The documents of each live shard."""
        found = {}
        for name, entry in sorted(self.manifest.shards.items()):
            directory = self.path / "shards" / entry.directory
            with self._as_opened():
                found[name] = shards_on_disk.read_rows(directory, shards_on_disk.read_manifest(directory, entry.hash))
        return found

    def neighbours(self) -> NeighbourIndex:
        """The kNN index over all live shards, mapped from disk."""
        with self._as_opened():
            return NeighbourIndex(self._key_groups(), self.control)

    def blocks(self) -> BlockIndex:
        """The BM25 index over all live shards; starts a JVM."""
        with self._as_opened():
            directories = [self.path / "search" / group.directory / "blocks" for group in self.manifest.groups]
            return BlockIndex(directories, self._key_groups())

    def _key_groups(self) -> list[KeyGroup]:
        """The keys of every group. Their files are checked first, if that takes no longer than a moment."""
        found = []
        for group in self.manifest.groups:
            directory = self.path / "search" / group.directory
            if sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) <= CHECKED_BYTES:
                self._verify_group(group)
            entries = [self.manifest.shards[name] for name in group.shards]
            rows = DocumentRows([(self.path / "shards" / e.directory, e.hash, e.documents) for e in entries])
            found.append(KeyGroup(directory / "keys", first_row=group.first_row, document=rows))
        return found

    def require_model(self, model: LanguageModel) -> None:
        """Raise :class:`StoreError` unless the store's keys are those of this model."""
        expected = self.manifest.model["fingerprint"]
        if model.fingerprint != expected:
            raise StoreError(
                f"{self.path} holds keys of the model {expected[:12]}…, not of {model.fingerprint[:12]}…; "
                "use that model, or make a new store for this one"
            )

    def add(self, documents: Sequence[Document], model: LanguageModel, *, progress: Progress | None = None) -> Receipt:
        """Encode documents and add each to its owner's shard; all are added, or none.

        Raises:
            UsageError: there are no documents.
            StoreError: the store is of another model, or another process is writing.
            DataError: a document is in the store already, comes twice, or has neither owner nor source.
        """
        if not documents:
            raise UsageError("nothing to add; give at least one document")
        self.require_model(model)
        with self._writing():
            self._require_addable(documents)
            added: dict[str, list[Encoded]] = {}
            for done, document in enumerate(documents, start=1):
                added.setdefault(shard_name(document), []).append(self.encode(document, model))
                if progress:
                    progress(done, len(documents))
            changed: dict[str, Shard | None] = {
                name: Shard.build(encoded + (self.shard(name).documents() if name in self.manifest.shards else []))
                for name, encoded in added.items()
            }
            rows = [(name, encoded.document) for name, of_shard in added.items() for encoded in of_shard]
            return self._commit(changed, "add", rows, request={}, reason="")

    def _require_addable(self, documents: Sequence[Document]) -> None:
        present = {row.id: name for name, rows in self.rows().items() for row in rows}
        new: set[str] = set()
        for document in documents:
            if document.id in present:
                raise DataError(
                    f"document {document.id!r} is in shard {present[document.id]!r} already; remove it first"
                )
            if document.id in new:
                raise DataError(f"document {document.id!r} comes twice; ids are unique, also between files")
            if not shard_name(document):
                raise DataError(f"document {document.id!r} has neither owner nor source; name who may remove it")
            new.add(document.id)

    def encode(self, document: Document, model: LanguageModel) -> Encoded:
        """A document as a shard holds it."""
        tokens = model.tokenize(document)
        narrow = np.uint16 if model.vocab_size <= 1 << 16 else np.uint32
        return Encoded.make(document, tokens.astype(narrow), *self.control.encode(model.keys(tokens)))

    def affected(self, selection: Selection) -> list[tuple[str, DocumentRow]]:
        """The documents that :meth:`remove` would remove, with their shards."""
        rows = self.rows()
        selection.require_known(rows)
        return [(name, row) for name, of_shard in rows.items() for row in of_shard if selection.holds(name, row)]

    def remove(self, selection: Selection, *, reason: str = "") -> Receipt:
        """Remove documents, physically: when this returns, no file of the store holds them.

        A shard that loses all its documents is deleted. One that loses some is written anew without them, with no
        call of the model, and equals the shard that never held them.

        Raises:
            UsageError: something named is not in the store.
        """
        with self._writing():
            going = self.affected(selection)
            leaving: Counter[str] = Counter()
            for name, row in going:
                leaving[name] += row.end - row.begin
            changed: dict[str, Shard | None] = {}
            for name, tokens in leaving.items():
                if tokens == self.manifest.shards[name].tokens:
                    changed[name] = None
                else:
                    documents = self.shard(name).documents()
                    changed[name] = Shard.build(e for e in documents if not selection.holds(name, e.document))
            request = {kind: sorted(names) for kind, names in asdict(selection).items() if names}
            return self._commit(changed, "remove", going, request=request, reason=reason)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the one writer, on the store as it is now; finish first what a killed writer left.

        A change that fails is undone. One that fails after its commit stands, and the error says so.
        """
        with exclusive_lock(self.path / ".lock"):
            self._reload()
            self._collect()
            before = self.manifest.sequence
            try:
                yield
            except BaseException as error:
                self._reload()
                if self.manifest.sequence == before:
                    with contextlib.suppress(OSError):  # the next writer collects
                        self._collect()
                    raise
                raise StoreError(
                    f"{self.path}: change {self.manifest.sequence} is committed, but what it replaced may still be on "
                    f"disk ({error}); finish it with `silo datastore verify`"
                ) from error

    def _reload(self) -> None:
        """See the store as it is on disk now."""
        self.manifest = Manifest.read(self.path / "store.json")

    def _commit(
        self,
        changed: dict[str, Shard | None],
        operation: str,
        documents: list[tuple[str, DocumentRow]],
        *,
        request: dict[str, list[str]],
        reason: str,
    ) -> Receipt:
        """Write new shards (None: gone) and the groups that they touch, then switch to them and delete the old."""
        entries = dict(self.manifest.shards)
        for name, shard in changed.items():
            entries.pop(name, None)
            if shard is not None:
                entries[name] = self._write_shard(name, shard)
        untouched = {
            tuple(group.shards): group for group in self.manifest.groups if not changed.keys() & set(group.shards)
        }
        groups: list[Group] = []
        for names in regroup(self.manifest.groups, entries, set(changed)):
            known = untouched.pop(tuple(names), None)
            groups.append(known or self._write_group(names, entries, [*untouched.values(), *groups]))
        manifest = replace(self.manifest, shards=entries, groups=groups, sequence=self.manifest.sequence + 1)
        receipt = Receipt.write(
            self.path / "receipts",
            {
                "format": FORMAT,
                "sequence": manifest.sequence,
                "operation": operation,
                "request": request,
                "reason": reason,
                "documents": [receipt_row(name, row) for name, row in sorted(documents, key=lambda d: d[1].id)],
                "store_before": self.hash,
                "store_after": manifest.canonical_hash,
                "previous_receipt": self.manifest.receipt_sha256,
            },
        )
        replace(manifest, receipt=receipt.path.name, receipt_sha256=receipt.digest).write(self.path / "store.json")
        self._reload()
        self._collect()
        return receipt

    def _write_shard(self, name: str, shard: Shard) -> ShardEntry:
        with self._staging("shards") as directory:
            digest = shard.write(
                directory, context={"model": self.manifest.model["fingerprint"], "control": self.manifest.control}
            )
            final = f"{slug(name)}-{digest[:16]}"
            self._publish(directory, self.path / "shards" / final)
        return ShardEntry(final, digest, len(shard.tokens), len(shard.rows))

    def _write_group(self, names: list[str], entries: dict[str, ShardEntry], beside: Sequence[Group]) -> Group:
        shards = [entries[name] for name in names]
        first_row = first_free_row(beside, entries, sum(entry.tokens for entry in shards))
        with self._staging("search") as directory:
            lists = len(self.control.centroids)
            build_group(directory, self.path / "shards", shards, self.tokenizer, lists=lists, first_row=first_row)
            content = sha256(canonical_json([entry.hash for entry in shards]))[:16]
            final = f"{content}-{self.manifest.sequence + 1}"
            self._publish(directory, self.path / "search" / final)
        return Group(names, final, first_row)

    @contextlib.contextmanager
    def _staging(self, kind: str) -> Iterator[Path]:
        """A directory that is nobody's until it is published."""
        directory = self.path / kind / ".staging"
        remove_tree(directory)
        directory.mkdir()
        yield directory

    @staticmethod
    def _publish(staged: Path, final: Path) -> None:
        sync_directory(staged)
        staged.rename(final)
        sync_directory(final.parent)

    def _collect(self) -> list[str]:
        """Delete what the manifest does not name, and log a change that was committed but not logged."""
        live = {
            "shards": {entry.directory for entry in self.manifest.shards.values()},
            "search": {group.directory for group in self.manifest.groups},
        }
        collected = []
        for kind, names in live.items():
            for orphan in sorted((self.path / kind).iterdir()):
                if orphan.name not in names:
                    remove_tree(orphan) if orphan.is_dir() and not orphan.is_symlink() else orphan.unlink()
                    collected.append(f"{kind}/{orphan.name}")
        history.discard_uncommitted(self.path / "receipts", self.manifest.sequence)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        if self.manifest.sequence:
            path = self.path / "receipts" / self.manifest.receipt
            history.append(self.path / "log.jsonl", history.load(path, self.manifest.receipt_sha256))
        return collected

    def _verify_group(self, group: Group) -> None:
        verify_group(self.path / "search" / group.directory, [self.manifest.shards[name] for name in group.shards])

    def verify(self) -> dict[str, Any]:
        """Check every byte of the store: seal, checksums, log chain, receipts, and that no stray file is left.

        What a killed writer left is collected first, and named in the result.

        Raises:
            IntegrityError: something is damaged or missing; the file is named.
        """
        with exclusive_lock(self.path / ".lock"):
            self._reload()
            collected = self._collect()
            refuse_strays(self.path, PARTS)
            read_checked(self.path / "tokenizer.json", self.manifest.tokenizer)
            verify_directory(self.path / "control", "control.json", self.manifest.control)
            for entry in self.manifest.shards.values():
                verify_directory(self.path / "shards" / entry.directory, "shard.json", entry.hash)
            for group in self.manifest.groups:
                self._verify_group(group)
            history.verify(
                self.path / "log.jsonl", self.path / "receipts", self.manifest.sequence, self.manifest.receipt_sha256
            )
        return {
            "store": str(self.path),
            "verified": True,
            "hash": self.hash,
            "shards": len(self.manifest.shards),
            "groups": len(self.manifest.groups),
            "changes": self.manifest.sequence,
            "control": describe(self.control),
            "collected": collected,
        }

    def summary(self) -> list[dict[str, Any]]:
        """One row a shard, for people."""
        table = []
        for name, rows in self.rows().items():
            directory = self.path / "shards" / self.manifest.shards[name].directory
            table.append(
                {
                    "shard": name,
                    "owner": rows[0].owner,
                    "licenses": sorted({row.license for row in rows}),
                    "documents": len(rows),
                    "tokens": rows[-1].end,
                    "bytes": sum(file.stat().st_size for file in directory.iterdir()),
                }
            )
        return table

    def log(self) -> list[dict[str, Any]]:
        """What was added and removed, and when."""
        return history.read(self.path / "log.jsonl")


def shard_name(document: Document) -> str:
    """The shard that a document belongs to: its owner's, or its source's where no owner is known."""
    return document.owner or document.source


def slug(name: str) -> str:
    """A shard's name as part of a file name; the hash beside it makes it unique."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "shard"


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


def read_trained_on(model_directory: Path) -> set[str]:
    """Content hashes of the documents that taught a model of ours; none for a model that does not say."""
    from silo.corpus import TRAINED_ON

    path = model_directory / TRAINED_ON
    if not path.is_file():
        return set()
    return {json.loads(line)["content_hash"] for line in path.read_bytes().splitlines()}
