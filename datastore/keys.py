"""The keys of a group of shards as inverted lists on disk, which are read where they lie.

    lists.bin     each list's codes, then its row numbers; it is mapped, so that a store may be larger than memory
    sizes.npy     (lists,) int64, how many keys each list has
    places.npy    (rows,) uint32, or int64 where a group has more than that counts: how many codes are before each row's
                  in the lists, padding included; the highest number for a row without a key
    tokens.npy, begins.npy, ids.npy   :mod:`datastore.group_texts`; the token of a row is the one that its key predicts

In the lists rows are numbered from the group's ``first_row`` on, so that the lists of all groups can be read as one
index. All of it is derived from the shards.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from datastore.codes import Codes
from datastore.group_texts import GroupTexts, cut_texts, write_texts
from datastore.shard import DocumentRow, Shard
from silo.errors import IntegrityError
from silo.files import load_array, not_whole, write_array

GATHERED_BYTES = 1 << 28
"""Codes that are in memory at a time while lists are written."""
_ROW_BYTES = 8
_ALIGNED = 8
"""Row numbers begin at multiples of so many bytes; lists are padded to such a number of keys."""


def write_keys(directory: Path, shards: Sequence[Shard], *, lists: int, first_row: int) -> None:
    """Write the keys of some shards, in order, into a directory that has none."""
    documents = [row for shard in shards for row in shard.rows]
    lengths = [row.end - row.begin for row in documents]
    write_texts(directory, shards)
    numbers = np.concatenate([shard.lists for shard in shards])
    order = np.argsort(numbers, kind="stable").astype(np.int64)
    sizes = np.bincount(numbers, minlength=lists).astype(np.int64)
    row_of = np.flatnonzero(np.repeat([row.keyed for row in documents], lengths))  # of each key
    _write_places(directory, row_of[order], sizes, sum(lengths))
    with open(directory / "lists.bin", "wb") as file:
        _write_lists(file, shards, order, sizes, first_row + row_of)
        file.flush()
        os.fsync(file.fileno())


def cut_keys(directory: Path, whole: KeyGroup, kept: np.ndarray, *, first_row: int) -> None:
    """Write what :func:`write_keys` would write of some of a group's documents, (documents,) bool."""
    of_row = np.repeat(kept, whole.lengths)
    numbers, ordered = np.cumsum(of_row) - 1, []
    cut_texts(directory, whole, kept)
    with open(directory / "lists.bin", "wb") as file:
        for number in range(len(whole.lists.sizes)):
            codes, rows = whole.list(number)
            stay = of_row[rows - whole.first_row]
            ordered.append(numbers[rows[stay] - whole.first_row])
            padding = -len(ordered[-1]) % _ALIGNED
            for array in (_items(codes)[stay] if codes.size else codes, ordered[-1] + first_row):
                file.write(array.tobytes() + bytes(padding * array.itemsize))
        file.flush()
        os.fsync(file.fileno())
    sizes = np.asarray([len(each) for each in ordered])
    _write_places(directory, np.concatenate(ordered), sizes, int(of_row.sum()))


def _write_places(directory: Path, ordered: np.ndarray, sizes: np.ndarray, rows: int) -> None:
    """Write how many keys each list has, and where those of so many rows are, which have them in this order."""
    write_array(directory / "sizes.npy", sizes)
    write_array(directory / "places.npy", _places(ordered, sizes, rows))


def _places(ordered: np.ndarray, sizes: np.ndarray, rows: int) -> np.ndarray:
    """Where the code of each of so many rows is in the lists, which have those with keys in this order."""
    skipped = _before(_capacity(sizes)) - _before(sizes)
    counted = np.uint32 if rows + _ALIGNED * len(sizes) < 1 << 32 else np.int64
    places = np.full(rows, np.iinfo(counted).max, dtype=counted)
    places[ordered] = np.arange(len(ordered)) + np.repeat(skipped, sizes)
    return places


def _write_lists(
    file: BinaryIO, shards: Sequence[Shard], order: np.ndarray, sizes: np.ndarray, row_of: np.ndarray
) -> None:
    """Write each list's codes and row numbers, where keys come in the ``order`` of their lists and ``row_of`` says
    which row each is of.

    Codes are gathered so many keys at a time, each shard read in its own order.
    """
    width = shards[0].codes.shape[1]
    capacity, ends = _capacity(sizes), np.cumsum(sizes)
    begins, places = ends - sizes, _before(capacity) * (width + _ROW_BYTES)
    at_once = max(1, GATHERED_BYTES // width)
    for start in range(0, len(order), at_once):
        keys = order[start : start + at_once]
        codes, stop = _gather(shards, keys), start + len(keys)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        for number in range(int(first), int(last) + 1):
            low, high = max(start, int(begins[number])), min(stop, int(ends[number]))
            of, into = slice(low - start, high - start), low - int(begins[number])
            padding = int(capacity[number] - sizes[number]) if high == ends[number] else 0
            file.seek(int(places[number]) + into * width)
            file.write(codes[of].tobytes() + bytes(padding * width))
            file.seek(int(places[number]) + int(capacity[number]) * width + into * _ROW_BYTES)
            file.write(row_of[keys[of]].tobytes() + bytes(padding * _ROW_BYTES))


def _gather(shards: Sequence[Shard], keys: np.ndarray) -> np.ndarray:
    """The codes (n, bytes) of some of the shards' keys (n,), numbered through.

    Each is moved as one item, which takes numpy a fourth of the time that rows of bytes do.
    """
    starts = np.cumsum([0, *(len(shard.codes) for shard in shards)])
    ascending = np.argsort(keys)
    cuts = np.searchsorted(keys[ascending], starts)
    codes = np.empty((len(keys), shards[0].codes.shape[1]), dtype=np.uint8)
    for shard, start, (begin, end) in zip(shards, starts, itertools.pairwise(cuts), strict=False):
        places = ascending[begin:end]
        _items(codes)[places] = _items(shard.codes)[keys[places] - start]
    return codes


def _items(codes: np.ndarray) -> np.ndarray:
    """Codes (n, bytes) seen as (n,) items without a type."""
    return np.asarray(codes).view(np.dtype((np.void, codes.shape[1])))[:, 0]


def _capacity(size: np.ndarray) -> np.ndarray:
    return -(-size // _ALIGNED) * _ALIGNED


def _before(sizes: np.ndarray) -> np.ndarray:
    """How many there are before each of some parts, (n,)."""
    return np.cumsum(sizes) - sizes


class Lists(NamedTuple):
    """Inverted lists as the compiled loops of :mod:`datastore.choosing` read them."""

    file: np.ndarray
    """(bytes,) uint8, mapped from disk."""
    numbers: np.ndarray
    """The same as int64."""
    codes: np.ndarray
    """(lists,) int64, where the codes of each list begin in ``file``."""
    rows: np.ndarray
    """(lists,) int64, where its row numbers do in ``numbers``."""
    sizes: np.ndarray
    """(lists,) int64, how many keys each has."""
    firsts: np.ndarray
    """(lists,) int64, where each begins in ``squares``."""
    squares: np.ndarray
    """float32, :meth:`datastore.codes.Codes.squares` of the keys of those lists of which they were asked for."""


class KeyGroup(GroupTexts):
    """The documents of one group and their keys."""

    def __init__(self, directory: Path, *, first_row: int, document: Callable[[int], DocumentRow]) -> None:
        """As :class:`GroupTexts` says, of what :func:`write_keys` filled."""
        super().__init__(directory, first_row=first_row, document=document)
        sizes = load_array(directory / "sizes.npy")
        self.num_keys = int(sizes.sum())
        self._places = load_array(directory / "places.npy", mapped=True)
        self._path = directory / "lists.bin"
        self._width, self.lists = _map_lists(self._path, sizes)
        self._squared = np.zeros(len(sizes), dtype=bool)

    @property
    def keyed(self) -> np.ndarray:
        """(rows,) bool, which rows have keys."""
        return np.asarray(self._places != np.iinfo(self._places.dtype).max)

    def require_width(self, width: int) -> None:
        """Raise :class:`silo.errors.IntegrityError` if codes are not of so many bytes, since nobody looks while they
        are read."""
        wanted = int(_capacity(self.lists.sizes).sum()) * (width + _ROW_BYTES)
        if len(self.lists.file) != wanted:
            raise IntegrityError(
                f"{self._path} has {len(self.lists.file)} bytes, not {wanted}; restore it from a backup, or rebuild it "
                "with `silo datastore verify --repair`"
            )

    def list(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes (n, bytes) uint8 and the row numbers (n,) int64 of an inverted list, where they lie."""
        size, codes, rows = (int(each[number]) for each in (self.lists.sizes, self.lists.codes, self.lists.rows))
        of_list = self.lists.file[codes : codes + size * self._width].reshape(size, self._width)
        return of_list, self.lists.numbers[rows : rows + size]

    def squares(self, number: int, codes: Codes) -> np.ndarray:
        """:meth:`Codes.squares` of the keys of a list, (n,); kept from when they are first asked for, 4 bytes a key."""
        first = int(self.lists.firsts[number])
        kept = self.lists.squares[first : first + int(self.lists.sizes[number])]
        if not self._squared[number]:
            kept[:] = codes.squares(self.list(number)[0])
            self._squared[number] = True
        return kept

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """The codes (n, bytes) of rows (n,), numbered from the group's first; of one without a key, any."""
        places = self._places[rows].astype(np.int64)
        places[places == np.iinfo(self._places.dtype).max] = 0
        list_of = np.searchsorted(self.lists.firsts, places, side="right") - 1
        begins = places * self._width + self.lists.firsts[list_of] * _ROW_BYTES
        every_byte = (max(0, len(self.lists.file) - self._width + 1), self._width)
        return np.lib.stride_tricks.as_strided(self.lists.file, every_byte, (1, 1), writeable=False)[begins]


def _map_lists(path: Path, sizes: np.ndarray) -> tuple[int, Lists]:
    """Bytes a code, and lists of given sizes (lists,) that were written into a file."""
    capacity = _capacity(sizes)
    keys, firsts = int(capacity.sum()), _before(capacity)
    size = path.stat().st_size
    if size < keys * (_ROW_BYTES + 1):
        raise not_whole(path, f"{size} bytes are not those of {keys} keys")
    file = np.asarray(np.memmap(path, mode="r")) if keys else np.zeros(0, np.uint8)
    width = len(file) // keys - _ROW_BYTES if keys else 0
    codes = firsts * (width + _ROW_BYTES)
    rows = (codes + capacity * width) // _ROW_BYTES
    squares = np.empty(keys, dtype=np.float32)  # which takes no memory until they are known
    numbers = file[: len(file) // _ROW_BYTES * _ROW_BYTES].view(np.int64)
    return width, Lists(file, numbers, codes, rows, sizes, firsts, squares)
