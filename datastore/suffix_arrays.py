"""The suffixes of a group's documents in order, as they are written.

    rows.npy       (rows,) uint32, or int64 where a group has more rows than that counts: where each suffix begins
    lengths.npy    (rows,) uint8, how many tokens each of these suffixes has, in the same order; 255 means 255 or more

A suffix ends with its document (law 3), and an end comes before any token. Suffixes of equal tokens come in the order
of their rows. So the order of two suffixes depends on their own documents only: taking a document out of a group takes
its entries out of these files, and changes no other but for the numbering of rows. Tokens are those of
:mod:`datastore.group_texts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydivsufsort import divsufsort

from datastore.shard import Texts
from silo.files import write_array

FILES = ("rows.npy", "lengths.npy")
LONG = np.iinfo(np.uint8).max
"""Lengths from here on are stored as this one, the largest of their type, and looked up where it matters."""
_MARK = 3
"""Units of the sorted text that stand for the end of a document: a zero, and the document's number."""


def write_suffixes(directory: Path, shards: Sequence[Texts]) -> None:
    """Write the suffixes of the documents of some shards, in order, into a directory that has none."""
    tokens = np.concatenate([shard.tokens for shard in shards])
    sizes = [row.end - row.begin for shard in shards for row in shard.rows]
    begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    for name, array in zip(FILES, suffix_arrays(tokens, begins), strict=True):
        write_array(directory / name, array)


def suffix_arrays(tokens: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the suffixes of some documents in order.

    Args:
        tokens: (rows,) uint16 or uint32, the documents end to end.
        begins: (documents + 1,) int64, where each document begins.

    Returns:
        What the files hold: where each suffix begins, and its length; (rows,) each.
    """
    rows = _sorted_rows(tokens, begins)
    ends = np.repeat(begins[1:].astype(rows.dtype), np.diff(begins))
    left = np.minimum(ends - np.arange(len(rows), dtype=rows.dtype), LONG).astype(np.uint8)
    return rows, left[rows]


def _sorted_rows(tokens: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Where each suffix begins, in the order of the suffixes."""
    rows = len(tokens)
    if not rows:
        return np.zeros(0, dtype=row_type(0))
    if tokens.max() >= 0xFFFF:  # The library sorts bytes: most groups use few enough tokens of a large vocabulary.
        tokens = np.unique(tokens, return_inverse=True)[1]
    unit = ">u2" if tokens.max() < 0xFFFF else ">u4"
    documents = np.arange(len(begins) - 1)
    ends = begins[1:] + documents * _MARK
    is_token = np.ones(rows + _MARK * len(documents), dtype=bool)
    for at in range(_MARK):
        is_token[ends + at] = False
    text = np.zeros(len(is_token), dtype=unit)
    text[is_token] = tokens.astype(unit) + 1
    # No two documents' ends are equal, so that no comparison goes beyond the end of a document.
    text[ends + 1], text[ends + 2] = documents >> 16, documents & 0xFFFF
    order = divsufsort(text.view(np.uint8))
    order = order[order % text.itemsize == 0] // text.itemsize
    return (np.cumsum(is_token, dtype=row_type(rows)) - 1)[order[is_token[order]]]


def row_type(rows: int) -> type:
    """What counts so many rows."""
    return np.uint32 if rows <= 1 << 32 else np.int64
