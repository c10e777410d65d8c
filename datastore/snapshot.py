"""A store as its readers see it: one manifest, and the files that it names, which never change.

A snapshot stays whole while another process changes the store, as long as what it reads is mapped or read already; what
was removed meanwhile is missed with an error that says so.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from tokenizers import Tokenizer

from datastore import history
from datastore import shard as shards_on_disk
from datastore.admission import require_storable
from datastore.blocks import BlockIndex
from datastore.bm25 import K1, B
from datastore.control import ControlPlane, describe
from datastore.group_texts import GroupTexts, id_hash
from datastore.groups import KINDS, NGRAMS, PARTS, SEARCH, group_array, verify_group
from datastore.integrity import noting
from datastore.keys import KeyGroup
from datastore.manifest import Group, Manifest
from datastore.selection import Licensed, Selection, unknown
from datastore.shard import DocumentRow, DocumentRows, Shard, Texts, shard_name
from datastore.sketches import ALIKE, candidates, containment, every_shingle, sample
from datastore.view import OfKind, Part, View
from silo.documents import Document
from silo.errors import DataError, IntegrityError, StoreError, UsageError
from silo.files import read_checked
from silo.purposes import matches, touches
from silo.retrieval import PROBES, Metric

if TYPE_CHECKING:
    from datastore.knn import NeighbourIndex
    from datastore.ngrams import NgramIndex
    from silo.in_context import InContext
    from silo.language_model import LanguageModel
    from silo.mixture import Mixture
    from silo.nearest import Nearest

CHECKED_BYTES = 1 << 28
"""Search structures that have no more than this together are read and checked when they are opened. More are mapped
unread, so that a store larger than memory opens at once; `silo datastore verify` checks them."""


class Snapshot:
    """What can be asked of a store without changing it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._mapped: dict[Path, GroupTexts] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
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

    def read_texts(self, name: str) -> Texts:
        """Read what a live shard has besides keys, every byte of it checked."""
        entry = self.manifest.shards[name]
        with self._as_opened():
            return Texts.read(self.path / "shards" / entry.directory, entry.hash)

    @contextlib.contextmanager
    def _as_opened(self) -> Iterator[None]:
        """Say so if what is being read is missing because another process changed the store since it was opened."""
        try:
            yield
        except (OSError, StoreError):
            self.require_unchanged()
            raise

    def require_unchanged(self) -> None:
        """Raise :class:`StoreError` if another process has changed the store since it was opened."""
        if Manifest.read(self.path / "store.json").sequence != self.manifest.sequence:
            raise StoreError(f"{self.path} was changed since it was opened; open it again")

    def licenses(self) -> list[str]:
        """The licences that the live documents have, as they are stated, sorted."""
        return sorted({license for name in self.manifest.shards for license in self._shard_manifest(name)["licenses"]})

    def rows(self) -> dict[str, list[DocumentRow]]:
        """The documents of each live shard."""
        return {name: self.rows_of(name) for name in sorted(self.manifest.shards)}

    def rows_of(self, name: str) -> list[DocumentRow]:
        """The documents of one live shard."""
        with self._as_opened():
            return shards_on_disk.read_rows(self._shard_directory(name), self._shard_manifest(name))

    def _shard_directory(self, name: str) -> Path:
        return self.path / "shards" / self.manifest.shards[name].directory

    def _shard_manifest(self, name: str) -> dict[str, Any]:
        with self._as_opened():
            return shards_on_disk.read_manifest(self._shard_directory(name), self.manifest.shards[name].hash)

    def document_rows(self, group: Group) -> DocumentRows:
        """The documents of a group, of which none is read yet."""
        entries = [self.manifest.shards[name] for name in group.shards]
        shards = [(self.path / "shards" / each.directory, each.hash, each.documents) for each in entries]
        # They are read when the store, and this very object, may be in another state.
        return DocumentRows(shards, Snapshot(self.path, self.manifest)._as_opened)

    def require_addable(
        self,
        documents: Iterable[Document | DocumentRow],
        *,
        advice: str = "remove it first, or add with --skip-present",
    ) -> list[str]:
        """The documents' ids, none of which the store has; ``advice`` says what to do if it has one.

        Raises:
            UsageError: there are none.
            DataError: a document is in the store already, comes twice, has neither owner nor source, or cannot be
                written.
        """
        shards: dict[str, str] = {}
        for document in documents:
            require_storable(document)
            if document.id in shards:
                raise _comes_twice(document.id)
            if not shard_name(document):
                raise DataError(f"document {document.id!r} has neither owner nor source; name who may remove it")
            shards[document.id] = shard_name(document)
        if not shards:
            raise UsageError("nothing to add; give at least one document")
        for id, (shard, _) in self._locate(list(shards)).items():
            raise DataError(f"document {id!r} is in shard {shard!r} already; {advice}")
        return list(shards)

    def groups_of(self, kind: str) -> list[Group]:
        """The groups of a kind."""
        return {SEARCH: self.manifest.groups, NGRAMS: self.manifest.ngrams}[kind]

    def is_sound(self, kind: str, group: Group) -> bool:
        """Whether every file of a group is what was written."""
        try:
            self._verify_group(kind, group)
        except IntegrityError:
            return False
        return True

    def neighbours(self, *, probes: int = PROBES, metric: Metric = "l2") -> NeighbourIndex:
        """The kNN index over all live shards, mapped from disk; ``probes`` and ``metric`` are as in
        :class:`silo.nearest.Nearest`."""
        with self._as_opened():
            return self.select().neighbours(probes=probes, metric=metric)

    def blocks(self, *, k1: float = K1, b: float = B) -> BlockIndex:
        """The BM25 index over all live shards, with ``k1`` and ``b`` as :class:`datastore.bm25.BM25Searcher` says;
        starts a JVM."""
        with self._as_opened():
            return self.select().blocks(k1=k1, b=b)

    def ngrams(self) -> NgramIndex:
        """The ∞-gram over all live shards, mapped from disk."""
        with self._as_opened():
            return self.select().ngrams()

    def select(self, *, allow: Selection | None = None, deny: Selection | None = None) -> View:
        """The documents that ``allow`` names (all, where nothing is given) and ``deny`` does not.

        A name that no document has selects nothing and is no error: a policy is written for many stores.
        """
        with self._as_opened():
            chosen: dict[str, np.ndarray] | None = None
            if allow is not None or deny is not None:
                allowed = self._chooser(allow, matches, otherwise=True)
                denied = self._chooser(deny, touches, otherwise=False)
                chosen = {name: allowed(name) & ~denied(name) for name in self.manifest.shards}
            keys, ngrams = self._opened(SEARCH, KeyGroup), self._opened(NGRAMS, GroupTexts)
            return View(self._parts(SEARCH, keys, chosen), self._parts(NGRAMS, ngrams, chosen), self.control)

    def _parts(
        self, kind: str, opened: Sequence[OfKind], chosen: Mapping[str, np.ndarray] | None
    ) -> list[Part[OfKind]]:
        """The groups of a kind, with which of their documents are chosen, given by shard; None for all."""
        return [
            Part(
                self.path / kind / group.directory,
                texts,
                np.concatenate([chosen[name] for name in group.shards]) if chosen is not None else None,
            )
            for group, texts in zip(self.groups_of(kind), opened, strict=True)
        ]

    def require_model(self, model: LanguageModel) -> None:
        """Raise :class:`StoreError` unless the store's keys are those of this model, made as it makes them."""
        expected = self.manifest.model["fingerprint"]
        if model.fingerprint != expected:
            raise StoreError(
                f"{self.path} holds keys of the model {expected[:12]}…, not of {model.fingerprint[:12]}…; "
                "use that model, or make a new store for this one"
            )
        other = self.manifest.other_keys(asdict(model.key_spec))
        if other:
            raise StoreError(
                f"{self.path} holds other keys of this model: it was loaded with {other}; load it as it was for the "
                "store, or make a new store for such keys"
            )

    def mixture(
        self,
        model: LanguageModel,
        use: Sequence[str],
        *,
        allow: Selection | None = None,
        deny: Selection | None = None,
        in_context: InContext | None = None,
        nearest: Nearest | None = None,
    ) -> Mixture:
        """The model beside what some documents answer; ``use`` and what comes after are as in :class:`View`.

        Raises:
            StoreError: the keys are those of another model.
        """
        self.require_model(model)
        with self._as_opened():
            return self.select(allow=allow, deny=deny).mixture(model, use, in_context, nearest)

    def _chooser(
        self, selection: Selection | None, licensed: Licensed, *, otherwise: bool
    ) -> Callable[[str], np.ndarray]:
        """A function from a shard's name to which of its documents are selected, (documents,) bool.

        A shard's rows are read only where its manifest leaves the answer open.
        """
        named = {shard for shard, _ in self._locate(selection.documents).values()} if selection else set()

        def choose(name: str) -> np.ndarray:
            entry = self.manifest.shards[name]
            answer = otherwise if selection is None else selection.of_all(name, self._shard_manifest(name), licensed)
            if selection and (answer is None or (answer is False and name in named)):
                return np.asarray([selection.holds(name, row, licensed) for row in self.rows_of(name)], dtype=bool)
            return np.full(entry.documents, bool(answer))

        return choose

    def _opened(self, kind: str, documents: type[OfKind]) -> list[OfKind]:
        """The documents of every group of a kind. Files of those that are new are checked first, if to check all groups
        takes no longer than a moment."""
        with self._as_opened():
            return self._open(kind, documents)

    def _open(self, kind: str, documents: type[OfKind]) -> list[OfKind]:
        directories = [self.path / kind / group.directory for group in self.groups_of(kind)]
        if new := [directory for directory in directories if directory not in self._mapped]:
            every = (self.path / of / group.directory for of in KINDS for group in self.groups_of(of))
            few = not _exceed(CHECKED_BYTES, (file for directory in every for file in directory.rglob("*")))
        for group, directory in zip(self.groups_of(kind), directories, strict=True):
            if directory in new:
                if few:
                    self._verify_group(kind, group)
                rows = self.document_rows(group)
                self._mapped[directory] = documents(
                    directory / PARTS[kind][0], first_row=group.first_row, document=rows
                )
        return [cast(OfKind, self._mapped[directory]) for directory in directories]

    def present(self, documents: Iterable[Document]) -> set[str]:
        """The ids of those that the store has. Raises :class:`DataError` where an id comes twice, or the store has
        another text under it."""
        hashes: dict[str, str] = {}
        for document in documents:
            if document.id in hashes:
                raise _comes_twice(document.id)
            hashes[document.id] = document.content_hash
        found = self._locate(list(hashes))
        for id, (_, row) in found.items():
            if row.content_hash != hashes[id]:
                raise DataError(f"document {id!r} is in the store with another text; remove it first, or give a new id")
        return set(found)

    def _locate(self, ids: Sequence[str]) -> dict[str, tuple[str, DocumentRow]]:
        """The shard and the row of each document that is in the store; no other shard than its own is read."""
        wanted = np.asarray([id_hash(each) for each in ids], dtype=np.uint64)
        asked, found = set(ids), {}
        if not asked:
            return {}
        with self._as_opened():
            for group in self.manifest.groups:
                known = group_array(self.path / "search" / group.directory, "keys/ids.npy")
                rows = self.document_rows(group)
                for number in np.flatnonzero(np.isin(known, wanted)).tolist():
                    row = rows(number)
                    if row.id in asked:
                        found[row.id] = (group.shards[rows.shard_of(number)], row)
        return found

    def affected(self, selection: Selection) -> list[tuple[str, DocumentRow]]:
        """The documents that a selection holds, with their shards, sorted; of :meth:`unreadable` shards none.

        Shards that cannot hold any by what their manifest says are not read.

        Raises:
            UsageError: something named is not in the store.
        """
        concerned = {shard for shard, _ in self._locate(selection.documents).values()}
        concerned |= self.manifest.shards.keys() & {*selection.owners, *selection.shards}
        if selection.sources or selection.licenses:
            rest = self.manifest.shards.keys() - concerned
            concerned |= {name for name in rest if selection.may_concern(self._shard_manifest(name))}
        lost = self.unreadable(selection)
        found = []
        for name in sorted(concerned.difference(lost)):
            try:
                found += [(name, row) for row in self.rows_of(name) if selection.holds(name, row)]
            except IntegrityError as error:
                raise IntegrityError(f"{error}; `silo datastore remove --shard {name!r}` removes all of it") from None
        selection.require_found(found, self._known, lost)
        return found

    def unreadable(self, selection: Selection) -> list[str]:
        """Of the shards that a selection names as a whole, those of whose documents nothing can be read: they can be
        removed all the same."""
        damaged: set[str] = set()
        for name in self.manifest.shards.keys() & set(selection.shards):
            with noting(name, damaged):
                self.rows_of(name)
        return sorted(damaged)

    def require_known(self, selection: Selection) -> None:
        """Raise :class:`UsageError` if an owner, a source or a shard that is named is not in the store.

        Of documents and licences a selection may name more than one store has.
        """
        for name in selection.owners:
            rows = self.rows_of(name) if name in self.manifest.shards else []
            if not any(row.owner == name for row in rows):
                raise unknown("owners", name, self._known()["owners"])
        for kind in ("sources", "shards"):
            if named := getattr(selection, kind):
                known = self._known()[kind]
                for name in sorted(set(named) - set(known)):
                    raise unknown(kind, name, known)

    def _known(self) -> dict[str, list[str]]:
        """Names that the store has, for people who misspelt one."""
        manifests = [self._shard_manifest(name) for name in sorted(self.manifest.shards)]
        first = self.rows_of(min(self.manifest.shards)) if self.manifest.shards else []
        return {
            "documents": [row.id for row in first],
            "owners": sorted({manifest["owner"] for manifest in manifests} - {""}),
            "shards": sorted(self.manifest.shards),
            **{kind: sorted({name for m in manifests for name in m[kind]}) for kind in ("sources", "licenses")},
        }

    def near_duplicates(
        self, documents: Sequence[tuple[str, DocumentRow]], damaged: set[str] | None = None
    ) -> list[dict[str, Any]]:
        """Other documents of the store that hold half of the text of one of some documents, or are half held by one.

        Found by their sketches, confirmed on their texts. One row each: what it is like most, and how much.

        A shard that is damaged is named in ``damaged`` and passed over, or where that is not given an error.
        """
        own = {row.id for _, row in documents}
        texts: list[tuple[str, str]] = []
        for name in sorted({name for name, _ in documents}):
            with noting(name, damaged):
                texts += self._texts(name, own)
        wanted, whole = [sample(text) for _, text in texts], [every_shingle(text) for _, text in texts]
        found = []
        for shard, asked in self._alike(wanted, own, damaged).items():
            with noting(shard, damaged):
                for id, text in self._texts(shard, set(asked)):
                    theirs = every_shingle(text)
                    share, of = max((containment(whole[which], theirs), texts[which][0]) for which in asked[id])
                    if share >= ALIKE:
                        found.append({"id": id, "shard": shard, "of": of, "share": round(share, 4)})
        return sorted(found, key=lambda row: str(row["id"]))

    def _alike(
        self, wanted: Sequence[np.ndarray], own: set[str], damaged: set[str] | None
    ) -> dict[str, dict[str, list[int]]]:
        """Shard → document → which of some sketches it may be like, apart from the documents of these sketches."""
        found: dict[str, dict[str, list[int]]] = {}
        for group in self.manifest.groups:
            directory, rows = self.path / "search" / group.directory, self.document_rows(group)
            with self._as_opened():
                hashes, documents = (group_array(directory, f"sketches/{name}.npy") for name in ("hashes", "documents"))
            for number, which in sorted(candidates(hashes, documents, wanted).items()):
                shard = group.shards[rows.shard_of(number)]
                with noting(shard, damaged):
                    if (id := rows(number).id) not in own:
                        found.setdefault(shard, {})[id] = which
        return found

    def _texts(self, name: str, ids: set[str]) -> list[tuple[str, str]]:
        """Id and decoded text of some documents of a shard."""
        documents = self.shard(name).documents()
        return [(each.document.id, each.text(self.tokenizer)) for each in documents if each.document.id in ids]

    def _verify_group(self, kind: str, group: Group) -> None:
        verify_group(self.path / kind / group.directory, [self.manifest.shards[name] for name in group.shards])

    def describe(self) -> dict[str, Any]:
        """What the store is made of, in numbers."""
        model = self.manifest.model
        control = describe(self.control)
        return {
            "hash": self.hash,
            "model": model["fingerprint"],
            "key_layer": model["key_spec"]["layer"],
            "documents": sum(entry.documents for entry in self.manifest.shards.values()),
            "tokens": sum(entry.tokens for entry in self.manifest.shards.values()),
            "keys": sum(group.num_keys for group in self._opened(SEARCH, KeyGroup)),
            "groups": len(self.manifest.groups),
            "ngram_groups": len(self.manifest.ngrams),
            "changes": self.manifest.sequence,
            **{f"control_{name}": value for name, value in control.items()},
        }

    def summary(self) -> list[dict[str, Any]]:
        """One row a shard, for people."""
        table = []
        for name, rows in self.rows().items():
            directory = self._shard_directory(name)
            with self._as_opened():
                size = sum(file.stat().st_size for file in directory.iterdir())
            table.append(
                {
                    "shard": name,
                    "owner": rows[0].owner,
                    "licenses": sorted({row.license for row in rows}),
                    "documents": len(rows),
                    "tokens": rows[-1].end,
                    "keys": sum(row.keys for row in rows),
                    "bytes": size,
                }
            )
        return table

    def gate_path(self) -> Path:
        """The file of the store's own gate, its checksum compared.

        Raises:
            UsageError: it has none.
        """
        if self.manifest.gate_file is None:
            raise UsageError(f"{self.path} has no gate of its own; learn one with `silo eval gate`")
        with self._as_opened():
            read_checked(self.path / self.manifest.gate_file, self.manifest.gate)
        return self.path / self.manifest.gate_file

    def log(self) -> list[dict[str, Any]]:
        """What was added and removed, and when."""
        return history.read(self.path / "log.jsonl")


def _comes_twice(id: str) -> DataError:
    return DataError(f"document {id!r} comes twice; ids are unique, also between files")


def _exceed(limit: int, files: Iterable[Path]) -> bool:
    """Whether some files have more bytes together; no more are looked at than it takes to know."""
    sizes = (file.stat().st_size for file in files if file.is_file())
    return any(total > limit for total in itertools.accumulate(sizes))
