"""A corpus on disk: permissive and restricted text in two directories, each with an index that carries no text.

    OUT/audit.json                        what was kept, by tier, licence and owner, and what was found
    OUT/findings.jsonl                    every refusal, conflict and cut, with its evidence
    OUT/permissive/  OUT/restricted/      manifest.json  index.jsonl  train.jsonl  val.jsonl  test.jsonl
    OUT/permissive/                       control.jsonl  tokens/

The index holds one row a document: its licence, its owner, and where its line lies. So the trainer's gate can refuse a
document before the first byte of any text is read, and the weights' side never has to open the other directory.
:mod:`silo.collect` writes a corpus. Nothing here holds more than one document in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from silo.documents import Document, parse_document
from silo.errors import IntegrityError, LicenseError, SiloError, UsageError
from silo.files import read_sealed, sha256, sha256_file
from silo.licensing import DEFAULT_POLICY, Policy

FORMAT = 2
SIDES = {"permissive": ("train", "val", "test", "control"), "restricted": ("train", "val", "test")}
"""Side → its splits. Control is permissive text that the weights did not train on, for the store's control plane."""

MODEL_CARD = "trained.json"
"""Beside our weights: what they were trained on, by which recipe, under which policy."""
TRAINED_ON = "trained_on.jsonl"
"""Beside our weights: one row for each document that taught them, with licence and hash, without text."""


def split_of(id: str, side: str = "permissive") -> str:
    """The split of a document: 10 % test, 10 % val, 10 % control (permissive side only), the rest train.

    It hangs on the id alone, up to the first ``#``: a pair follows its file, and adding documents moves none.
    """
    tenth = int(sha256(id.partition("#")[0].encode())[:8], 16) * 10 >> 32
    split = ("test", "val", "control")[tenth] if tenth < 3 else "train"
    return split if split in SIDES[side] else "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One document of a corpus, without its text."""

    id: str
    license: str
    owner: str
    source: str
    title: str
    tier: str
    """What the collector found. For people: the gate works it out again from the licence."""
    split: str
    offset: int
    """Where the document's line begins in ``<split>.jsonl``, in bytes."""
    bytes: int
    sha256: str
    """Of the line."""
    content: str
    """The document's :attr:`~silo.documents.Document.content_hash`."""

    def __post_init__(self) -> None:
        for name in ("id", "license", "owner", "source", "title", "split"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected a string")


@dataclass(frozen=True, slots=True)
class Corpus:
    """One side of a corpus, opened: its index is checked, its text is not read."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Open the directory of one side.

        Raises:
            UsageError: there is no corpus here, or this is the directory above both sides.
            IntegrityError: manifest, index and files do not agree; where one document is to blame, it is named.
        """
        _require_corpus(path)
        corpus = cls(path, read_sealed(path / "manifest.json", FORMAT))
        files = corpus.manifest["files"]
        for name in files:
            if not (path / name).is_file():
                raise IntegrityError(f"{path / name} is missing; restore it from a backup or collect the corpus again")
        index = path / "index.jsonl"
        if sha256_file(index) != files["index.jsonl"]["sha256"]:
            raise IntegrityError(f"{index} is damaged or another corpus's: {corpus._blame()}; collect the corpus again")
        found = dict(Counter(row.split for row in corpus.rows))
        counts = corpus.manifest["counts"]
        wanted = {split: counts[split] for split in SIDES[corpus.manifest["side"]] if counts[split]}
        if found != wanted:
            raise IntegrityError(f"{index} has rows {found}, the manifest says {wanted}; collect the corpus again")
        for name, file in files.items():
            size = (path / name).stat().st_size
            if size != file["bytes"]:
                raise IntegrityError(
                    f"{path / name} is damaged: {size} bytes, the manifest says {file['bytes']}; {corpus._blame()}"
                )
        return corpus

    @property
    def rows(self) -> Iterator[Row]:
        """One row a document, sorted by id, read anew each time."""
        index = self.path / "index.jsonl"
        with open(index, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = Row(**json.loads(line))
                except (TypeError, ValueError) as error:
                    raise IntegrityError(
                        f"{index}:{number} is no row of an index ({error}); collect the corpus again"
                    ) from None
                yield row

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, and through its checksums of all the corpus."""
        return str(self.manifest["digest"])

    def require_permissive(self, policy: Policy = DEFAULT_POLICY) -> None:
        """The gate: raise :class:`LicenseError` at the first document that the policy holds back.

        The tier is worked out from licence, owner and source here and now. The ``tier`` that the index states, and the
        name of the directory, are what someone else thought at another time.
        """
        for row in self.rows:
            require_permissive(row, policy, where=self.path)

    def documents(self, split: str) -> Iterator[Document]:
        """Read the documents of a split, in the order of the file, each line checked against the index.

        Raises:
            UsageError: this side has no such split.
            IntegrityError: a line is not the one that the index describes; file and document are named.
        """
        if split not in SIDES[self.manifest["side"]]:
            splits = ", ".join(SIDES[self.manifest["side"]])
            raise UsageError(f"{self.path} has no split {split!r}; expected one of {splits}")
        path = self.path / f"{split}.jsonl"
        with open(path, "rb") as file:
            for row in self.rows:
                if row.split == split:
                    yield _checked_document(_line_of(file, row), row, path)

    def _blame(self) -> str:
        """The first document whose row in the index is not that of its text, to tell what was changed by hand."""
        row = None
        try:
            for row in self.rows:
                path = self.path / f"{row.split}.jsonl"
                with open(path, "rb") as file:
                    _checked_document(_line_of(file, row), row, path)
        except (OSError, SiloError) as error:
            return f"{error} (first at document {row.id!r})" if row is not None else str(error)
        return f"its documents, up to {row.id!r}, are not those of the manifest" if row is not None else "it is empty"


def require_permissive(row: Any, policy: Policy, *, where: Path) -> None:
    """Raise :class:`LicenseError` unless weights may learn from what a row stands for."""
    if not policy.tier(row).permissive:
        raise LicenseError(
            f"{where}: document {row.id!r} is under {row.license!r}, which is restricted; weights learn "
            "from permissive text only: leave it out, put it into a datastore, or name it in a policy file"
        )


def _line_of(file: BinaryIO, row: Row) -> bytes:
    file.seek(row.offset)
    return file.read(row.bytes)


def _checked_document(line: bytes, row: Row, path: Path) -> Document:
    if sha256(line) != row.sha256:
        raise IntegrityError(f"{path} is damaged at document {row.id!r}; restore it from a backup or collect it again")
    document = parse_document(line, where=f"{path} at byte {row.offset}")
    for name in ("id", "license", "owner", "source", "title"):
        if getattr(document, name) != getattr(row, name):
            found, wanted = getattr(document, name), getattr(row, name)
            raise IntegrityError(f"{path}: document {row.id!r} has {name} {found!r}, the index says {wanted!r}")
    return document


def _require_corpus(path: Path) -> None:
    if (path / "manifest.json").is_file():
        return
    if path.is_file():
        raise UsageError(
            f"{path} is a file; expected a directory that `silo corpus collect {path} --out DIR` would make"
        )
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; expected a corpus that `silo corpus collect` wrote")
    sides = [f"{path / side}" for side in SIDES if (path / side / "manifest.json").is_file()]
    if sides:
        raise UsageError(f"{path} holds the sides of a corpus; use {' or '.join(sides)}")
    raise UsageError(f"{path} is not a corpus: it has no manifest.json; expected what `silo corpus collect` wrote")
