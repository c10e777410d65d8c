"""The store: shards of restricted text that can be searched, and removed without a trace but the log.

    store.json       which shards and search structures are live; replaced by one rename, which is the commit
    tokenizer.json   the model's tokenizer, so that a removal needs no model
    control/         what shards share, learnt from permissive text only
    shards/          what is canonical: one directory a shard, named by its content
    search/          what is derived: inverted lists, Lucene and sketches over a group of shards
    ngrams/          likewise: suffixes over a larger one
    receipts/, log.jsonl   what was added and removed, by id and hash
    spool/           what an unfinished add has encoded: no part of the store

Every directory under ``shards``, ``search`` and ``ngrams`` is written once, whole, under a name that holds the hash of
its content. A change writes new directories, then replaces ``store.json``, then deletes what it no longer names; a
process killed anywhere in between leaves the old store or the new one, and orphans that the next change collects.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from datastore import history
from datastore import spool as spooled
from datastore.admission import Fitting, require_one_type
from datastore.blocks import BLOCK_STRIDE, BLOCK_TOKENS
from datastore.control import ControlPlane, describe
from datastore.groups import KINDS
from datastore.history import Receipt, receipt_row
from datastore.integrity import refuse_strays, verify_directory
from datastore.interchange import read_export, write_export
from datastore.manifest import FORMAT, Manifest, ShardEntry
from datastore.regrouping import Change
from datastore.selection import Selection
from datastore.shard import INDEX, DocumentRow, Encoded, Shard, shard_name, slug, token_type, write_shard
from datastore.snapshot import Snapshot
from datastore.spool import Spool
from silo.documents import Document, require_unicode
from silo.errors import LicenseError, StoreError, UsageError
from silo.files import (
    canonical_json,
    exclusive_lock,
    publish,
    read_checked,
    remove_tree,
    sha256,
    sha256_file,
    staging,
    sync_directory,
    write_file,
)
from silo.licensing import DEFAULT_POLICY, Policy

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from silo.gate import Gate
    from silo.language_model import LanguageModel

SPOOL = "spool"
FILLED = ("shards", *KINDS, "receipts")
"""Directories that may be empty, which what copies a store may leave out: git does, and so do object stores."""
PARTS = {"store.json", "tokenizer.json", "control", *FILLED, "log.jsonl", ".lock", SPOOL}
"""All that a store's directory may hold."""

Progress = Callable[[int, int], None]
"""Called with (done, total) while something long goes on."""


class Store(Snapshot):
    """A store as it was when it was opened, or after the last change that was made through this object."""

    @classmethod
    def create(
        cls, path: Path, model: LanguageModel, tokenizer_file: Path, control: ControlPlane | None = None
    ) -> Store:
        """Make an empty store for the keys of one model. Raises :class:`UsageError` if something is there already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} is not empty; choose another directory")
        control = control or ControlPlane.unfitted(model.key_spec.dimension)
        place = Path(os.path.realpath(path))  # a link stays one, to the store
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=place.parent, prefix=f".{place.name}.", ignore_cleanup_errors=True
        ) as scratch:
            root = Path(scratch) / "store"
            for directory in (root, *(root / name for name in ("control", *FILLED))):
                directory.mkdir()
            control_hash = control.save(root / "control")
            tokenizer = tokenizer_file.read_bytes()
            write_file(root / "tokenizer.json", tokenizer)
            search = {"block_tokens": BLOCK_TOKENS, "block_stride": BLOCK_STRIDE}
            Manifest({**model.describe(), "search": search}, control_hash, sha256(tokenizer)).write(root / "store.json")
            root.rename(place)
            sync_directory(place.parent)
        return cls.open(path)

    def add(
        self,
        documents: Iterable[Document],
        model: LanguageModel,
        *,
        keyed: bool = True,
        progress: Progress | None = None,
        key: Ed25519PrivateKey | None = None,
    ) -> Receipt:
        """Encode documents and add each to its owner's shard; all are added, or none.

        What is encoded goes to a spool on disk, so that neither all documents nor all keys need fit in memory. If the
        process dies, the same call goes on where it stopped, as long as the store was not changed meanwhile.

        Args:
            documents: gone through twice, so no iterator.
            model: that of the store.
            keyed: whether they get keys. Without them no neighbours are found in them, and the model is not run, which
                is what takes the time; blocks and ∞-grams are the same.
            progress: called after each document.
            key: signs the receipt.

        Raises:
            UsageError: there are no documents.
            StoreError: the store is of another model, or another process is writing.
            DataError: a document is in the store already, comes twice, or has neither owner nor source.
        """
        if iter(documents) is documents:
            raise UsageError("documents are read twice, first to check them; give a sequence, not an iterator")
        self.require_model(model)
        with self._writing():
            ids = self.require_addable(documents)
            code_bytes = self.control.codes.size
            spool = Spool(self._spool, self._state(), token_type=token_type(model.vocab_size), code_bytes=code_bytes)
            for done, document in enumerate(documents, start=1):
                spool.add(document, lambda each: self.encode(each, model, keyed=keyed), keyed=keyed)
                if progress:
                    progress(done, len(ids))
            return self._insert(spool.encoded(ids), key)

    def insert(self, encoded: Sequence[Encoded], *, key: Ed25519PrivateKey | None = None) -> Receipt:
        """Add documents that :meth:`encode` made, here or in another store of the same model and control plane.

        Raises:
            UsageError: there are none.
            DataError: as :meth:`add` raises it.
        """
        with self._writing():
            self.require_addable([each.document for each in encoded])
            return self._insert(encoded, key)

    def _insert(self, encoded: Sequence[Encoded], key: Ed25519PrivateKey | None) -> Receipt:
        require_one_type(self, encoded)
        changed: dict[str, list[Encoded]] = {}
        rows = []
        for each in encoded:
            name = shard_name(each.document)
            if name not in changed:
                changed[name] = self.shard(name).documents() if name in self.manifest.shards else []
            changed[name].append(each)
            rows.append((name, each.document))
        return self._commit(changed, "add", rows, request={}, reason="", key=key)

    def encode(self, document: Document, model: LanguageModel, *, keyed: bool = True) -> Encoded:
        """A document as a shard holds it, with a key for each token or without any."""
        tokens = model.tokenize(document)
        none = (np.zeros(0, np.int32), np.zeros((0, self.control.codes.size), np.uint8))
        parts = [self.control.encode(keys) for keys in model.key_batches(tokens)] if keyed else [none]
        lists, codes = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Encoded.make(document, tokens.astype(token_type(model.vocab_size)), lists, codes)

    def export(self, name: str, file: Path, *, reason: str = "", key: Ed25519PrivateKey | None = None) -> Receipt:
        """Write a shard as one file, for another store of the same model and control plane; the log keeps that it was.

        Args:
            name: the shard's.
            file: must not be there yet.
            reason: why, for receipt and log.
            key: signs the receipt.

        Raises:
            UsageError: there is no such shard, or there is such a file, or it would lie in the store.
            IntegrityError: the shard is damaged.
        """
        require_unicode(reason, "the reason")
        if self.path.resolve() in file.resolve().parents:
            raise UsageError(f"{file} would lie in the store {self.path}; choose a place outside")
        with self._writing():
            rows = self.affected(Selection(shards=(name,)))
            entry = self.manifest.shards[name]
            verify_directory(self.path / "shards" / entry.directory, INDEX, entry.hash)
            before = self.manifest.sequence
            write_export(self.path / "shards" / entry.directory, entry, name, file, self.manifest)
            try:
                return self._commit({}, "export", rows, request={"shards": [name]}, reason=reason, key=key)
            except BaseException:
                if self.manifest.sequence == before:  # nothing remembers it
                    file.unlink()
                raise

    def take_in(self, file: Path, *, key: Ed25519PrivateKey | None = None) -> Receipt:
        """Add the documents of a shard that another store has exported, with no call of the model.

        Raises:
            UsageError: there is no such file.
            StoreError: it is of another model or control plane, or its keys are made in another way.
            DataError: it is no exported shard, or one of its documents is in the store already.
            IntegrityError: it is damaged.
        """
        with self._writing():
            directory = self.path / "shards" / ".import"  # which the next writer collects
            directory.mkdir()
            shard = read_export(file, directory, self.manifest, Fitting.of(self))
            self.require_addable(shard.rows, advice="remove it first: a shard is imported as a whole")
            return self._insert(shard.documents(), key)

    def note_weights(self, file: Path, owners: Iterable[str]) -> Receipt:
        """Remember that weights were fitted with this store, on text of some owners: removals name them from now on.

        The weights themselves stay outside the store.
        """
        with self._writing():
            noted = {"file": file.name, "sha256": sha256_file(file), "owners": sorted(set(owners))}
            return self._commit({}, "fit", [], request={}, reason="", told={"weights": noted})

    def keep_gate(self, gate: Gate, provenance: dict[str, Any], policy: Policy = DEFAULT_POLICY) -> Receipt:
        """Make a gate the store's own, in place of the one before: its readers weigh by it if they say nothing else.

        Args:
            gate: what :func:`eval.rehearsal.rehearse` learnt for this store, from permissive text.
            provenance: what it said of how.
            policy: judges its teachers' licences, anew.

        Raises:
            LicenseError: one of its teachers is restricted (law 2).
            StoreError: it was learnt for another model or beside another control plane.
        """
        for each in provenance["teachers"]:
            named = {name: each.get(name, "") for name in ("id", "license", "owner", "source")}
            if not policy.tier(Document(**named, text="-")).permissive:
                said = f"{each['id']!r} under {each['license'] or 'no licence'} taught the gate, and is restricted"
                raise LicenseError(f"{said}; a store keeps a gate that permissive text alone has taught")
        with self._writing():
            learnt_for = (provenance.get("model"), provenance.get("control"))
            if learnt_for != (self.manifest.model["fingerprint"], self.manifest.control):
                raise StoreError("the gate was learnt for another model or control plane; learn one with this store")
            data = canonical_json({**gate.to_json(), "provenance": provenance})
            self.manifest = replace(self.manifest, gate=sha256(data))
            write_file(self.path / str(self.manifest.gate_file), data)
            return self._commit({}, "gate", [], request={}, reason="", told={"gate": self.manifest.gate})

    def remove(
        self,
        selection: Selection,
        *,
        reason: str = "",
        duplicates: Literal["ignore", "report", "remove"] = "ignore",
        key: Ed25519PrivateKey | None = None,
    ) -> Receipt:
        """Remove documents, physically: when this returns, no file of the store holds them.

        A shard that loses all its documents is deleted. One that loses some is written anew without them, with no
        call of the model, and equals the shard that never held them. What an unfinished add has encoded goes first,
        whoever's it is; if what is named is nowhere in the store, it goes if it may hold that.

        A damaged shard can be removed as a whole. Its text is not compared with others', as the receipt says; if its
        documents cannot be read either, it must be named as a shard, and the receipt has its hash in their place.

        Args:
            selection: which documents.
            reason: why, for receipt and log.
            duplicates: whether near-duplicates elsewhere in the store are looked for and named in the receipt, or
                removed as well.
            key: signs the receipt.

        Raises:
            UsageError: something named is not in the store.
        """
        require_unicode(reason, "the reason")
        with self._writing():
            if not spooled.lacks(self._spool, selection.holds, code_bytes=self.control.codes.size):
                remove_tree(self._spool)
            going, lost = self.affected(selection), self.unreadable(selection)
            remove_tree(self._spool)
            damaged = set(lost)
            alike = self.near_duplicates(going, damaged) if duplicates != "ignore" else []
            if duplicates == "remove" and alike:
                also = tuple(str(row["id"]) for row in alike)
                going += self._locate(also).values()
            ids = {row.id for _, row in going}
            changed: dict[str, list[Encoded] | None] = dict.fromkeys(lost)
            leaving = Counter(name for name, _ in going)
            for name in sorted(leaving):
                whole = leaving[name] == self.manifest.shards[name].documents
                staying = (
                    [] if whole else [each for each in self.shard(name).documents() if each.document.id not in ids]
                )
                changed[name] = staying or None
            told: dict[str, Any] = {"near_duplicates": alike} if duplicates != "ignore" else {}
            told |= {"not_compared": sorted(damaged)} if damaged and duplicates != "ignore" else {}
            told |= {"unreadable_shards": [self._identity(name) for name in lost]} if lost else {}
            told |= history.out_of_reach(self.path / "log.jsonl", self.path / "receipts", ids, lost)
            return self._commit(
                changed, "remove", going, request=selection.request(), reason=reason, told=told, key=key
            )

    def _identity(self, name: str) -> dict[str, Any]:
        """What the manifest knows of a shard."""
        entry = self.manifest.shards[name]
        return {"shard": name, "hash": entry.hash, "documents": entry.documents, "tokens": entry.tokens}

    @property
    def _spool(self) -> Path:
        return self.path / SPOOL

    def _state(self) -> dict[str, Any]:
        """What a spool must have been begun for to be of use."""
        return {"format": FORMAT, "sequence": self.manifest.sequence, "store": self.hash}

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
        """See the store as it is on disk now; a map of a file that is gone would keep it on the disk."""
        self._mapped.clear()
        self.manifest = Manifest.read(self.path / "store.json")
        for directory in (self.path / name for name in FILLED):
            if not directory.is_dir():
                directory.mkdir()

    def _commit(
        self,
        changed: Mapping[str, Sequence[Encoded] | None],
        operation: str,
        documents: list[tuple[str, DocumentRow]],
        *,
        request: dict[str, list[str]],
        reason: str,
        told: dict[str, Any] | None = None,
        damaged: Collection[str] = (),
        key: Ed25519PrivateKey | None = None,
    ) -> Receipt:
        """Write new shards (None: gone), and groups in place of those that they touch or that are damaged, then switch
        to them and delete the old."""
        entries = dict(self.manifest.shards)
        written: dict[str, Shard] = {}
        for name, of_shard in changed.items():
            entries.pop(name, None)
            if of_shard is not None:
                entries[name], written[name] = self._write_shard(name, of_shard)
        groups, ngrams = Change(self, entries, set(changed), written, damaged).groups()
        sequence = self.manifest.sequence + 1
        manifest = replace(self.manifest, shards=entries, groups=groups, ngrams=ngrams, sequence=sequence)
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
                **(told or {}),
            },
            key,
        )
        manifest = replace(manifest, receipt=receipt.path.name, receipt_sha256=receipt.digest)
        manifest.write(self.path / "store.json")
        self.manifest = manifest
        self._mapped.clear()
        self._collect()
        return receipt

    def _write_shard(self, name: str, documents: Iterable[Encoded]) -> tuple[ShardEntry, Shard]:
        context = {"model": self.manifest.model["fingerprint"], "control": self.manifest.control}
        with staging(self.path / "shards") as directory:
            digest, shard = write_shard(directory, documents, context=context)
            final = f"{slug(name)}-{digest[:16]}"
            publish(directory, final)
        return ShardEntry(final, digest, len(shard.tokens), len(shard.rows)), shard

    def _collect(self) -> list[str]:
        """Delete what the manifest does not name, and log a change that was committed but not logged.

        What an unfinished add has encoded for the store as it is now stays, for the add to go on.
        """
        live = {
            "shards": {entry.directory for entry in self.manifest.shards.values()},
            **{kind: {group.directory for group in self.groups_of(kind)} for kind in KINDS},
        }
        collected, failed = [], []
        for kind, names in live.items():
            for name in sorted(set(os.listdir(self.path / kind)) - names):
                orphan = self.path / kind / name
                try:
                    remove_tree(orphan) if orphan.is_dir() and not orphan.is_symlink() else orphan.unlink()
                except OSError as error:  # which keeps nothing else on the disk
                    failed.append(error)
                collected.append(f"{kind}/{name}")
        if failed:
            raise failed[0]
        if self._spool.exists() and not spooled.is_of(self._spool, self._state()):
            remove_tree(self._spool)
            collected.append(SPOOL)
        history.discard_uncommitted(self.path / "receipts", self.manifest.sequence)
        for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("gate-*.json")):
            if leftover.name != self.manifest.gate_file:
                leftover.unlink()
                collected += [leftover.name] if leftover.suffix == ".json" else []
        if self.manifest.sequence:
            path = self.path / "receipts" / self.manifest.receipt
            history.append(self.path / "log.jsonl", history.load(path, self.manifest.receipt_sha256))
        return collected

    def repair(self) -> list[str]:
        """Build search structures anew, from the shards, where they are damaged; no answer of the store changes.

        Returns:
            The names that those had, which are gone.

        Raises:
            IntegrityError: a shard is damaged as well.
        """
        with self._writing():
            damaged = [
                f"{kind}/{group.directory}"
                for kind in KINDS
                for group in self.groups_of(kind)
                if not self.is_sound(kind, group)
            ]
            if damaged:
                told = {"damaged": damaged}
                self._commit({}, "repair", [], request={}, reason="", told=told, damaged=damaged)
            return damaged

    def verify(self) -> dict[str, Any]:
        """Check every byte of the store: seal, checksums, log chain, receipts, and that no stray file is left.

        What a killed writer left is collected first, and named in the result.

        Raises:
            IntegrityError: something is damaged or missing; the file is named.
        """
        with exclusive_lock(self.path / ".lock"):
            self._reload()
            collected = self._collect()
            refuse_strays(self.path, PARTS | ({self.gate_path().name} if self.manifest.gate else set()))
            read_checked(self.path / "tokenizer.json", self.manifest.tokenizer)
            verify_directory(self.path / "control", "control.json", self.manifest.control)
            for entry in self.manifest.shards.values():
                verify_directory(self.path / "shards" / entry.directory, INDEX, entry.hash)
            for kind in KINDS:
                for group in self.groups_of(kind):
                    self._verify_group(kind, group)
            signers = history.verify(
                self.path / "log.jsonl", self.path / "receipts", self.manifest.sequence, self.manifest.receipt_sha256
            )
        return {
            "store": str(self.path),
            "verified": True,
            "hash": self.hash,
            "shards": len(self.manifest.shards),
            "groups": len(self.manifest.groups),
            "ngram_groups": len(self.manifest.ngrams),
            "changes": self.manifest.sequence,
            "signed": sum(each is not None for each in signers),
            "signers": sorted({each for each in signers if each is not None}),
            "control": describe(self.control),
            "collected": collected,
            "unfinished_add": spooled.count(self._spool),
        }
