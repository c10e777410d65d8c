"""What is live in a store: the content of ``store.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datastore.history import FIRST
from datastore.integrity import read_sealed, sealed
from silo.errors import UsageError
from silo.files import canonical_json, sha256, write_file

FORMAT = 5


@dataclass(frozen=True)
class ShardEntry:
    """A live shard: its directory's name under ``shards``, its hash, and how many tokens and documents it has."""

    directory: str
    hash: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class Group:
    """A live search structure: the shards that it serves, sorted, and its directory's name under that of its kind
    (:mod:`datastore.groups`)."""

    shards: list[str]
    directory: str
    first_row: int
    """Its tokens are numbered from here on; no two groups' numbers of a kind overlap."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``store.json``."""

    model: dict[str, Any]
    control: str
    tokenizer: str
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    """Those of keys, blocks and sketches."""
    ngrams: list[Group] = field(default_factory=list)
    """Those of suffixes."""
    sequence: int = 0
    """Number of changes so far."""
    receipt: str = ""
    """File name of the last change's receipt."""
    receipt_sha256: str = FIRST
    gate: str = ""
    """SHA-256 of the file of the store's own gate, if it has one. It is learnt from permissive text, and no part of
    what the store answers: only of how a reader weighs it."""
    format: int = FORMAT

    @property
    def gate_file(self) -> str | None:
        """The name of the gate's file."""
        return f"gate-{self.gate[:16]}.json" if self.gate else None

    def other_keys(self, spec: Mapping[str, Any]) -> str:
        """In what keys by some :class:`silo.language_model.KeySpec` are not such as the store's; empty if they are."""
        own = self.model["key_spec"]
        different = (name for name in own if spec.get(name) != own[name])
        return ", ".join(f"{name} {spec.get(name)!r} instead of {own[name]!r}" for name in different)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read ``store.json``; its own seal is checked.

        Raises:
            UsageError: there is no store, or one of another format.
            IntegrityError: the file was changed.
        """
        if not path.is_file():
            raise UsageError(f"{path.parent} is not a store; make one with `silo datastore create`")
        content = read_sealed(path)
        if content["format"] != FORMAT:
            raise UsageError(
                f"{path} has format {content['format']}; this version reads format {FORMAT}: make the store anew, or "
                "use the version that wrote it"
            )
        content["shards"] = {name: ShardEntry(**entry) for name, entry in content["shards"].items()}
        for kind in ("groups", "ngrams"):
            content[kind] = [Group(**group) for group in content[kind]]
        return cls(**content)

    def write(self, path: Path) -> None:
        """Commit."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        content["shards"] = {name: vars(entry) for name, entry in self.shards.items()}
        for kind in ("groups", "ngrams"):
            content[kind] = [vars(group) for group in content[kind]]
        write_file(path, sealed(content))

    @property
    def canonical_hash(self) -> str:
        """Hash of what the store answers from: model, control plane and shards, in no order and with no history."""
        live = {name: entry.hash for name, entry in self.shards.items()}
        return sha256(canonical_json([self.format, self.model, self.control, self.tokenizer, live]))
