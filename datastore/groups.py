"""Search structures: each serves a group of shards, many small ones or one large one. There are two kinds of groups.

    search/   keys/         :mod:`datastore.keys`
              blocks/       :mod:`datastore.bm25`
              sketches/     :mod:`datastore.sketches`
    ngrams/   texts/        :mod:`datastore.group_texts`
              suffixes/     :mod:`datastore.suffix_arrays`
    both      group.json    the shards that it was built from, and the checksum of every file

An index a shard was measured and is slow by the number of shards; one for all would have to be rewritten as a whole at
each removal. Which shards share a group changes no result: scores use the statistics of all groups together. Suffixes
take a tenth of what keys take to rewrite, and a pass for each group to search: so their groups are larger.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from datastore.blocks import block_keys, cut_blocks
from datastore.cutting import Whole, cut_sketches, cut_suffixes
from datastore.group_texts import GroupTexts, cut_texts, write_texts
from datastore.integrity import read_sealed, sealed, verify_files
from datastore.keys import KeyGroup, cut_keys, write_keys
from datastore.manifest import Group, ShardEntry
from datastore.shard import Shard, Texts
from datastore.sketches import write_sketches
from datastore.suffix_arrays import write_suffixes
from silo.errors import IntegrityError
from silo.files import read_array, sha256_file, sync_directory, write_file

GROUP_TOKENS = 4_000_000
"""Shards share keys, blocks and sketches up to this many tokens, suffixes up to a multiple of it (:data:`TIMES`), which
bounds what a removal must rewrite."""
ALONE_TOKENS = 500_000
"""A shard from this size on has a search structure of its own, so that its removal rewrites nothing."""
INDEX = "group.json"
SEARCH, NGRAMS = "search", "ngrams"
KINDS = (SEARCH, NGRAMS)
PARTS = {SEARCH: ("keys", "blocks", "sketches"), NGRAMS: ("texts", "suffixes")}
"""What each kind of group has, and the directory of a store that groups of it are in."""
TIMES = {SEARCH: 1, NGRAMS: 8}
"""How many times as many tokens as :data:`GROUP_TOKENS` a group of each kind may have."""


@dataclass
class _Members:
    """The shards of a group that is planned."""

    bound: int
    names: list[str] = field(default_factory=list)
    tokens: int = 0
    largest: int = 0

    def has_room(self, tokens: int) -> bool:
        """Whether a shard of so many tokens may join."""
        small = max(self.largest, tokens) < ALONE_TOKENS and self.tokens + tokens <= self.bound
        return small or not self.names

    def take(self, name: str, tokens: int) -> None:
        """Let a shard join."""
        self.names.append(name)
        self.tokens, self.largest = self.tokens + tokens, max(self.largest, tokens)


def regroup(
    groups: Sequence[Group], entries: Mapping[str, ShardEntry], changed: set[str], kind: str = SEARCH
) -> list[list[str]]:
    """Say which shards share a group after a change: each stays where it is while there is room.

    A shard that outgrew its group, or is new, goes to the first group with room for it, a large one alone. A group that
    no change touches and that takes in no shard comes out as it went in, so that it need not be rewritten.
    """
    planned: list[_Members] = []
    placed: set[str] = set()
    for group in groups:
        planned.append(_Members(TIMES[kind] * GROUP_TOKENS))
        left = [name for name in group.shards if name in entries]
        for name in sorted(left, key=lambda name: name in changed):  # those that stay as they are first
            if name not in changed or planned[-1].has_room(entries[name].tokens):
                planned[-1].take(name, entries[name].tokens)
                placed.add(name)
    for name in sorted(set(entries) - placed):
        tokens = entries[name].tokens
        members = next((each for each in planned if each.has_room(tokens)), None)
        if members is None:
            planned.append(members := _Members(TIMES[kind] * GROUP_TOKENS))
        members.take(name, tokens)
    return [sorted(members.names) for members in planned if members.names]


def first_free_row(groups: Sequence[Group], entries: Mapping[str, ShardEntry], rows: int) -> int:
    """The lowest row number from which on ``rows`` numbers are in no group's use."""
    taken = sorted((group.first_row, sum(entries[name].tokens for name in group.shards)) for group in groups)
    free = 0
    for begin, length in taken:
        if begin - free >= rows:
            break
        free = max(free, begin + length)
    return free


def build_group(
    directory: Path,
    shards: Sequence[Shard],
    entries: Sequence[ShardEntry],
    tokenizer: Tokenizer,
    *,
    lists: int,
    first_row: int,
) -> None:
    """Index the keys and blocks of some shards, whose entries are given in the same order, into an empty directory."""
    from datastore.bm25 import build_index

    def write_arrays() -> None:
        write_keys(directory / "keys", shards, lists=lists, first_row=first_row)
        texts = (each.text(tokenizer) for shard in shards for each in shard.documents())
        write_sketches(directory / "sketches", texts)

    with _parts(directory, SEARCH, entries), _beside(write_arrays):
        build_index(directory / "blocks", cut_blocks(shards, tokenizer))


def cut_group(directory: Path, entries: Sequence[ShardEntry], whole: Whole, *, first_row: int) -> None:
    """Write what :func:`build_group` would make of some shards, cut out of a group that holds all of them and more."""
    from datastore.bm25 import cut_index

    def write_arrays() -> None:
        keys = KeyGroup(whole.directory / "keys", first_row=whole.first_row, document=whole.document)
        cut_keys(directory / "keys", keys, whole.kept, first_row=first_row)
        cut_sketches(directory / "sketches", whole)

    with _parts(directory, SEARCH, entries), _beside(write_arrays):
        cut_index(directory / "blocks", whole.directory / "blocks", block_keys(whole.gone()))


def build_ngrams(directory: Path, shards: Sequence[Texts], entries: Sequence[ShardEntry]) -> None:
    """Index the suffixes of some shards, whose entries are given in the same order, into an empty directory."""
    with _parts(directory, NGRAMS, entries):
        write_texts(directory / "texts", shards)
        write_suffixes(directory / "suffixes", shards)


def cut_ngrams(directory: Path, entries: Sequence[ShardEntry], whole: Whole) -> None:
    """Write what :func:`build_ngrams` would make of some shards, cut out of a group that holds all of them and more."""
    with _parts(directory, NGRAMS, entries):
        texts = GroupTexts(whole.directory / "texts", first_row=whole.first_row, document=whole.document)
        cut_texts(directory / "texts", texts, whole.kept)
        cut_suffixes(directory / "suffixes", whole, np.repeat(whole.kept, texts.lengths))


@contextlib.contextmanager
def _parts(directory: Path, kind: str, entries: Sequence[ShardEntry]) -> Iterator[None]:
    """Directories for all parts of a group, which is sealed when they are filled.

    The checksums lie beside the index and not in the store's manifest: Lucene's files hold random ids, and the
    manifest's bytes are to be the same for the same input.
    """
    for name in PARTS[kind]:
        (directory / name).mkdir()
    yield
    _seal(directory, entries)


@contextlib.contextmanager
def _beside(work: Callable[[], None]) -> Iterator[None]:
    """Do something else beside Lucene's work, such as the writing of arrays, which waits for the disk."""
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(work)
        yield
        done.result()


def _seal(directory: Path, entries: Sequence[ShardEntry]) -> None:
    parts = sorted(part for part in directory.iterdir() if part.is_dir())
    files = {f"{part.name}/{file.name}": sha256_file(file) for part in parts for file in sorted(part.iterdir())}
    for part in parts:
        sync_directory(part)
    write_file(directory / INDEX, sealed({"shards": [entry.hash for entry in entries], "files": files}))


def group_array(directory: Path, name: str) -> np.ndarray:
    """One array of a group, such as ``keys/ids.npy``, read whole and checked."""
    return read_array(directory / name, read_sealed(directory / INDEX)["files"][name])


def verify_group(directory: Path, entries: Sequence[ShardEntry]) -> None:
    """Check every file of a search structure, and that it was built from these shards."""
    try:
        content = read_sealed(directory / INDEX)
        if content["shards"] != [entry.hash for entry in entries]:
            raise IntegrityError(f"{directory / INDEX} is of other shards than the store's; restore it from a backup")
        verify_files(directory, content["files"], index=INDEX)
    except IntegrityError as error:
        raise IntegrityError(f"{error}; `silo datastore verify --repair` rebuilds it") from None
