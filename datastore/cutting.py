"""A group's search structures without some of its documents, cut out of those that it has.

What they hold of a document is that document's alone, in an order that knows nothing of the others (but for numbers,
which are counted again). So to cut a document out gives, byte for byte, what would be built without it, in a fraction
of the time and with no look at other owners' shards; `silo datastore verify --deep` builds and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datastore.shard import DocumentRow
from datastore.suffix_arrays import FILES, row_type
from silo.files import load_array, write_array


@dataclass(frozen=True)
class Whole:
    """A group that has all documents of another, in the same order, and some that are to go."""

    directory: Path
    first_row: int
    document: Callable[[int], DocumentRow]
    """Gives its document of a number, from 0."""
    kept: np.ndarray
    """(documents,) bool, which of them stay."""

    def gone(self) -> Iterator[DocumentRow]:
        """Those that do not."""
        return map(self.document, np.flatnonzero(~self.kept).tolist())


def cut_sketches(directory: Path, whole: Whole) -> None:
    """Write what :func:`datastore.sketches.write_sketches` would write of the documents that stay."""
    hashes, documents = (load_array(whole.directory / "sketches" / f"{name}.npy") for name in ("hashes", "documents"))
    stays, numbers = whole.kept[documents], _counted(whole.kept, documents.dtype)
    write_array(directory / "hashes.npy", hashes[stays])
    write_array(directory / "documents.npy", numbers[documents[stays]])


def cut_suffixes(directory: Path, whole: Whole, of_row: np.ndarray) -> None:
    """Write what :func:`datastore.suffix_arrays.write_suffixes` would write of the documents that stay, whose rows
    ``of_row`` names, (rows,) bool."""
    rows, lengths = (load_array(whole.directory / "suffixes" / name) for name in FILES)
    stays, numbers = of_row[rows], _counted(of_row, row_type(int(of_row.sum())))
    write_array(directory / FILES[0], numbers[rows[stays]])
    write_array(directory / FILES[1], lengths[stays])


def _counted(kept: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    """The new number of each that is kept of (n,)."""
    return np.cumsum(kept, dtype=dtype) - 1
