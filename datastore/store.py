"""The store: shards of restricted text that can be searched, and removed without a trace but the log.

    store.json       which shards and search structures are live; replaced by one rename, which is the commit
    tokenizer.json   the model's tokenizer, so that a removal needs no model
    control/         what shards share, learnt from permissive text only
    shards/          what is canonical: one directory a shard, named by its content
    search/          what is derived: a Lucene index over a group of shards
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from datastore import history
from datastore import shard as shards_on_disk
from datastore.blocks import BLOCK_STRIDE, BLOCK_TOKENS, BlockIndex, cut_blocks
from datastore.control import ControlPlane, describe
from datastore.history import Receipt
from datastore.knn import NeighbourIndex
from datastore.shard import DocumentRow, Encoded, Shard
from silo.documents import Document
from silo.errors import DataError, StoreError, UsageError
from silo.files import (
    canonical_json,
    check_digest,
    exclusive_lock,
    read_checked,
    read_json,
    remove_tree,
    sha256,
    sha256_file,
    sync_directory,
    write_file,
)
from silo.language_model import LanguageModel

FORMAT = 1
GROUP_TOKENS = 4_000_000
"""Shards share a search structure up to this many tokens, which bounds what a removal must rewrite."""

Progress = Callable[[int, int], None]
"""Called with (done, total) while something long goes on."""


@dataclass(frozen=True)
class ShardEntry:
    """A live shard: its directory's name under ``shards``, its hash, and its tokens."""

    directory: str
    hash: str
    tokens: int


@dataclass(frozen=True)
class Group:
    """A live search structure: the shards that it serves, its directory under ``search``, and its files' checksums."""

    shards: list[str]
    directory: str
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """The content of ``store.json``."""

    model: dict[str, Any]
    control: str
    tokenizer: str
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    sequence: int = 0
    receipt: str = ""
    """File name of the last change's receipt."""
    receipt_sha256: str = history.FIRST
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read ``store.json``; its own seal is checked.

        Raises:
            UsageError: there is no store, or one of another format.
            IntegrityError: the file was changed.
        """
        if not path.is_file():
            raise UsageError(f"{path.parent} is not a store; make one with `silo datastore create`")
        content = read_json(path)
        seal = content.pop("seal", "") if isinstance(content, dict) else ""
        check_digest(path, sha256(canonical_json(content)), seal)
        if content["format"] != FORMAT:
            raise UsageError(f"{path} has format {content['format']}; this version reads format {FORMAT}")
        content["shards"] = {name: ShardEntry(**entry) for name, entry in content["shards"].items()}
        content["groups"] = [Group(**group) for group in content["groups"]]
        return cls(**content)

    def write(self, path: Path) -> None:
        """Commit."""
        content = asdict(self)
        write_file(path, canonical_json({**content, "seal": sha256(canonical_json(content))}))

    @property
    def canonical_hash(self) -> str:
        """Hash of what the store answers from: model, control plane and shards, in no order and with no history."""
        live = {name: entry.hash for name, entry in self.shards.items()}
        return sha256(canonical_json([self.format, self.model, self.control, self.tokenizer, live]))


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
            row.id in self.documents
            or row.owner in self.owners
            or row.source in self.sources
            or shard in self.shards
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
    def create(cls, path: Path, model: LanguageModel, tokenizer_file: Path, control: ControlPlane | None = None) -> Store:
        """Make an empty store for the keys of one model. Raises :class:`UsageError` if something is there already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} is not empty; choose another directory")
        control = control or ControlPlane.unfitted(model.key_spec.dimension)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as staging:
            root = Path(staging) / "store"
            for directory in (root, *(root / name for name in ("control", "shards", "search", "receipts"))):
                directory.mkdir()
            control.save(root / "control")
            tokenizer = tokenizer_file.read_bytes()
            write_file(root / "tokenizer.json", tokenizer)
            search = {"block_tokens": BLOCK_TOKENS, "block_stride": BLOCK_STRIDE}
            Manifest({**model.describe(), "search": search}, control.hash, sha256(tokenizer)).write(root / "store.json")
            root.rename(path)
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
        control = ControlPlane.load(self.path / "control")
        check_digest(self.path / "control", control.hash, self.manifest.control)
        return control

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model that the store was made for."""
        return Tokenizer.from_str(read_checked(self.path / "tokenizer.json", self.manifest.tokenizer).decode())

    def shard(self, name: str) -> Shard:
        """Read one live shard, every byte checked."""
        entry = self.manifest.shards[name]
        return Shard.read(self.path / "shards" / entry.directory, entry.hash)

    @cached_property
    def _shards(self) -> list[Shard]:
        return [self.shard(name) for name in sorted(self.manifest.shards)]

    def rows(self) -> dict[str, list[DocumentRow]]:
        """The documents of each live shard."""
        found = {}
        for name, entry in sorted(self.manifest.shards.items()):
            directory = self.path / "shards" / entry.directory
            found[name] = shards_on_disk.read_rows(directory, shards_on_disk.read_manifest(directory, entry.hash))
        return found

    def neighbours(self) -> NeighbourIndex:
        """The kNN index over all live shards."""
        return NeighbourIndex(self._shards, self.control)

    def blocks(self) -> BlockIndex:
        """The BM25 index over all live shards; starts a JVM."""
        for group in self.manifest.groups:
            self._verify_group(group)
        return BlockIndex([self.path / "search" / group.directory for group in self.manifest.groups], self._shards)

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
            StoreError: the store is of another model, or another process is writing.
            DataError: a document is in the store already, or has neither owner nor source.
        """
        self.require_model(model)
        with self._writing():
            present = {row.id: name for name, rows in self.rows().items() for row in rows}
            for document in documents:
                if document.id in present:
                    raise DataError(
                        f"document {document.id!r} is in shard {present[document.id]!r} already; remove it first"
                    )
                if not shard_name(document):
                    raise DataError(f"document {document.id!r} has neither owner nor source; name who may remove it")
            added: dict[str, list[Encoded]] = {}
            for done, document in enumerate(documents, start=1):
                added.setdefault(shard_name(document), []).append(self.encode(document, model))
                if progress:
                    progress(done, len(documents))
            changed = {
                name: Shard.build(encoded + (self.shard(name).documents() if name in self.manifest.shards else []))
                for name, encoded in added.items()
            }
            rows = [(name, encoded.document) for name, of_shard in added.items() for encoded in of_shard]
            return self._commit(changed, "add", rows, request={}, reason="")

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
            changed: dict[str, Shard | None] = {}
            for name in sorted({name for name, _ in going}):
                staying = [e for e in self.shard(name).documents() if not selection.holds(name, e.document)]
                changed[name] = Shard.build(staying) if staying else None
            request = {kind: sorted(names) for kind, names in asdict(selection).items() if names}
            return self._commit(changed, "remove", going, request=request, reason=reason)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the one writer, on the store as it is now; finish first what a killed writer left."""
        with exclusive_lock(self.path / ".lock"):
            self._reload()
            self._collect()
            try:
                yield
            except BaseException:
                self._reload()
                self._collect()
                raise

    def _reload(self) -> None:
        """See the store as it is on disk now."""
        self.manifest = Manifest.read(self.path / "store.json")
        self.__dict__.pop("_shards", None)

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
        groups = self._regroup(entries, set(changed))
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
        return ShardEntry(final, digest, len(shard.tokens))

    def _regroup(self, entries: dict[str, ShardEntry], changed: set[str]) -> list[Group]:
        """Keep groups that no change touches; rewrite the others without what went; give new shards a group."""
        groups, free = [], []
        homeless = sorted(changed & set(entries))
        for group in self.manifest.groups:
            if not changed & set(group.shards):
                groups.append(group)
                free.append(group.shards)
                continue
            staying = [name for name in group.shards if name in entries]
            homeless = [name for name in homeless if name not in staying]
            free.append(staying)
        for name in homeless:
            for shards in free:
                if sum(entries[other].tokens for other in shards) + entries[name].tokens <= GROUP_TOKENS:
                    break
            else:
                free.append(shards := [])
            shards.append(name)
        kept = {tuple(group.shards): group for group in groups}
        wanted = [sorted(shards) for shards in free if shards]
        return [kept.get(tuple(shards)) or self._write_group(shards, entries) for shards in wanted]

    def _write_group(self, shards: list[str], entries: dict[str, ShardEntry]) -> Group:
        from datastore.bm25 import build_index

        read = (Shard.read(self.path / "shards" / entries[name].directory, entries[name].hash) for name in shards)
        with self._staging("search") as directory:
            build_index(directory, cut_blocks(read, self.tokenizer))
            files = {file.name: sha256_file(file) for file in sorted(directory.iterdir())}
            # Lucene's files hold random ids: the name comes from the shards, and the checksums tell the files.
            final = sha256(canonical_json([entries[name].hash for name in shards]))[:16] + f"-{self.manifest.sequence + 1}"
            self._publish(directory, self.path / "search" / final)
        return Group(shards, final, files)

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
            for directory in sorted((self.path / kind).iterdir()):
                if directory.name not in names:
                    remove_tree(directory)
                    collected.append(f"{kind}/{directory.name}")
        history.discard_uncommitted(self.path / "receipts", self.manifest.sequence)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        if self.manifest.sequence:
            path = self.path / "receipts" / self.manifest.receipt
            history.append(self.path / "log.jsonl", history.load(path, self.manifest.receipt_sha256))
        return collected

    def _verify_group(self, group: Group) -> None:
        shards_on_disk.verify_files(self.path / "search" / group.directory, group.files)

    def verify(self) -> dict[str, Any]:
        """Check every byte of the store: seal, checksums, log chain, receipts, and that no stray file is left.

        What a killed writer left is collected first, and named in the result.

        Raises:
            IntegrityError: something is damaged or missing; the file is named.
        """
        with exclusive_lock(self.path / ".lock"):
            self._reload()
            collected = self._collect()
            for entry in self.manifest.shards.values():
                shards_on_disk.verify(self.path / "shards" / entry.directory, entry.hash)
            for group in self.manifest.groups:
                self._verify_group(group)
            self.__dict__.pop("control", None)
            control = self.control
            check_digest(self.path / "tokenizer.json", sha256_file(self.path / "tokenizer.json"), self.manifest.tokenizer)
            history.verify(self.path / "log.jsonl", self.path / "receipts", self.manifest.sequence)
        return {
            "store": str(self.path),
            "verified": True,
            "hash": self.hash,
            "shards": len(self.manifest.shards),
            "groups": len(self.manifest.groups),
            "changes": self.manifest.sequence,
            "control": describe(control),
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
    from silo.language_model import TRAINED_ON

    path = model_directory / TRAINED_ON
    if not path.is_file():
        return set()
    return {json.loads(line)["content_hash"] for line in path.read_bytes().splitlines()}
