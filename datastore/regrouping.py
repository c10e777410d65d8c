"""What a change makes of a store's groups: which are written anew, and from what."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datastore.cutting import Whole
from datastore.groups import (
    NGRAMS,
    SEARCH,
    build_group,
    build_ngrams,
    cut_group,
    cut_ngrams,
    first_free_row,
    regroup,
)
from datastore.manifest import Group, ShardEntry
from datastore.shard import Shard
from datastore.snapshot import Snapshot
from silo.errors import IntegrityError
from silo.files import canonical_json, publish, sha256, staging


@dataclass(frozen=True)
class Change:
    """What comes, goes and is written anew."""

    store: Snapshot
    """As it is before."""
    entries: Mapping[str, ShardEntry]
    """All shards that there are after it."""
    shards: set[str]
    """Those that come, go or are written anew."""
    written: Mapping[str, Shard]
    """Those that are written, which need not be read again."""
    damaged: Collection[str]
    """Search structures that are to be built anew, as :meth:`Store.repair` names them."""

    def groups(self) -> tuple[list[Group], list[Group]]:
        """The groups of both kinds after it, of which those are written that it touches or that are damaged."""
        with ThreadPoolExecutor(1) as beside:
            ngrams = beside.submit(self._regrouped, NGRAMS)
            return self._regrouped(SEARCH), ngrams.result()

    def _regrouped(self, kind: str) -> list[Group]:
        before = self.store.groups_of(kind)
        untouched = {
            tuple(group.shards): group
            for group in before
            if not self.shards & set(group.shards) and f"{kind}/{group.directory}" not in self.damaged
        }
        groups: list[Group] = []
        for names in regroup(before, self.entries, self.shards, kind):
            known = untouched.pop(tuple(names), None)
            groups.append(known or self._write(kind, names, [*untouched.values(), *groups]))
        return groups

    def _write(self, kind: str, names: list[str], beside: Sequence[Group]) -> Group:
        """Make the search structure of some shards, cut out of one that has more where there is such."""
        entries = [self.entries[name] for name in names]
        first_row = first_free_row(beside, self.entries, sum(entry.tokens for entry in entries))
        whole = self._around(kind, names)
        with staging(self.store.path / kind) as directory:
            if kind == NGRAMS:
                cut_ngrams(directory, entries, whole) if whole else self._build_ngrams(directory, names, entries)
            elif whole:
                cut_group(directory, entries, whole, first_row=first_row)
            else:
                self._build_group(directory, names, entries, first_row)
            content = sha256(canonical_json([entry.hash for entry in entries]))[:16]
            final = f"{content}-{self.store.manifest.sequence + 1}"
            publish(directory, final)
        return Group(names, final, first_row)

    def _build_group(self, directory: Path, names: list[str], entries: list[ShardEntry], first_row: int) -> None:
        shards = [self.written.get(name) or self.store.shard(name) for name in names]
        lists = len(self.store.control.centroids)
        build_group(directory, shards, entries, self.store.tokenizer, lists=lists, first_row=first_row)

    def _build_ngrams(self, directory: Path, names: list[str], entries: list[ShardEntry]) -> None:
        build_ngrams(directory, [self.written.get(name) or self.store.read_texts(name) for name in names], entries)

    def _around(self, kind: str, names: Sequence[str]) -> Whole | None:
        """The group of a kind that has all documents of some shards, as they are after the change, and more; unless it
        is damaged, or a shard is that goes, or there is none."""
        for group in self.store.groups_of(kind):
            if set(names) <= set(group.shards):
                kept = np.concatenate([self._kept(name, name in names) for name in group.shards])
                after = sum(self.entries[name].documents for name in names)
                gone = set(group.shards) - set(names)
                if kept.sum() == after < len(kept) and self.store.is_sound(kind, group) and self._can_be_named(gone):
                    directory = self.store.path / kind / group.directory
                    return Whole(directory, group.first_row, self.store.document_rows(group), kept)
        return None

    def _can_be_named(self, shards: Iterable[str]) -> bool:
        """Whether it can be read which documents some shards have, as one must know to cut them out."""
        try:
            return all(self.store.rows_of(name) for name in shards)
        except IntegrityError:
            return False

    def _kept(self, name: str, stays: bool) -> np.ndarray:
        """Which documents of a shard are in what it becomes if it stays, (documents,) bool; of one that is not written,
        nothing is read."""
        if not stays or name not in self.written:
            return np.full(self.store.manifest.shards[name].documents, stays)
        after = {(row.id, row.content_hash) for row in self.written[name].rows}
        return np.asarray([(row.id, row.content_hash) in after for row in self.store.rows_of(name)])
