"""Search structures: inverted lists, Lucene and suffixes serve a group of shards, many small ones or one large one.

    keys/         :mod:`datastore.keys`
    blocks/       :mod:`datastore.bm25`
    sketches/     :mod:`datastore.sketches`
    suffixes/     :mod:`datastore.suffix_arrays`
    group.json    the shards that it was built from, and the checksum of every file

An index a shard was measured and is slow by the number of shards; one for all would have to be rewritten as a whole at
each removal. Which shards share a group changes no result: scores use the statistics of all groups together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from datastore.blocks import block_keys, cut_blocks
from datastore.cutting import Whole, cut_sketches, cut_suffixes
from datastore.integrity import read_sealed, sealed, verify_files
from datastore.keys import KeyGroup, cut_keys, write_keys
from datastore.manifest import Group, ShardEntry
from datastore.shard import Shard
from datastore.sketches import write_sketches
from datastore.suffix_arrays import write_suffixes
from silo.errors import IntegrityError
from silo.files import read_array, sha256_file, sync_directory, write_file

GROUP_TOKENS = 4_000_000
"""Shards share a search structure up to this many tokens, which bounds what a removal must rewrite."""
ALONE_TOKENS = 500_000
"""A shard from this size on has a search structure of its own, so that its removal rewrites nothing."""
INDEX = "group.json"
PARTS = ("keys", "blocks", "sketches", "suffixes")


def regroup(groups: Sequence[Group], entries: Mapping[str, ShardEntry], changed: set[str]) -> list[list[str]]:
    """Say which shards share a group after a change: each stays where it is while there is room.

    A shard that outgrew its group, or is new, goes to the first group with room for it, a large one alone. A group that
    no change touches and that takes in no shard comes out as it went in, so that it need not be rewritten.
    """

    def has_room(members: list[str], name: str) -> bool:
        sizes = [entries[other].tokens for other in [*members, name]]
        return not members or (sum(sizes) <= GROUP_TOKENS and max(sizes) < ALONE_TOKENS)

    planned: list[list[str]] = []
    for group in groups:
        members = [name for name in group.shards if name not in changed]
        for name in group.shards:
            if name in changed and name in entries and has_room(members, name):
                members.append(name)
        planned.append(members)
    placed = {name for members in planned for name in members}
    for name in sorted(set(entries) - placed):
        for members in planned:
            if has_room(members, name):
                break
        else:
            planned.append(members := [])
        members.append(name)
    return [sorted(members) for members in planned if members]


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
    """Index some shards, whose entries are given in the same order, into an empty directory."""
    from datastore.bm25 import build_index

    def write_arrays() -> None:
        write_keys(directory / "keys", shards, lists=lists, first_row=first_row)
        write_suffixes(directory / "suffixes", shards)
        texts = (each.text(tokenizer) for shard in shards for each in shard.documents())
        write_sketches(directory / "sketches", texts)

    with _parts(directory, entries, write_arrays):
        build_index(directory / "blocks", cut_blocks(shards, tokenizer))


def cut_group(directory: Path, entries: Sequence[ShardEntry], whole: Whole, *, first_row: int) -> None:
    """Write what :func:`build_group` would make of some shards, cut out of a group that holds all of them and more."""
    from datastore.bm25 import cut_index

    def write_arrays() -> None:
        keys = KeyGroup(whole.directory / "keys", first_row=whole.first_row, document=whole.rows.__getitem__)
        cut_keys(directory / "keys", keys, whole.kept, first_row=first_row)
        cut_suffixes(directory / "suffixes", whole)
        cut_sketches(directory / "sketches", whole)

    with _parts(directory, entries, write_arrays):
        cut_index(directory / "blocks", whole.directory / "blocks", block_keys(whole.gone()))


@contextlib.contextmanager
def _parts(directory: Path, entries: Sequence[ShardEntry], write_arrays: Callable[[], None]) -> Iterator[None]:
    """Directories for all parts; what is done meanwhile is done beside the writing of arrays, which waits for the disk;
    when both are done, the group is sealed.

    The checksums lie beside the index and not in the store's manifest: Lucene's files hold random ids, and the
    manifest's bytes are to be the same for the same input.
    """
    for name in PARTS:
        (directory / name).mkdir()
    with ThreadPoolExecutor(1) as beside:
        arrays = beside.submit(write_arrays)
        yield
        arrays.result()
    _seal(directory, entries)


def _seal(directory: Path, entries: Sequence[ShardEntry]) -> None:
    files = {
        f"{name}/{file.name}": sha256_file(file) for name in PARTS for file in sorted((directory / name).iterdir())
    }
    for name in PARTS:
        sync_directory(directory / name)
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
