"""Proofs about a store beyond its checksums: that what is derived follows from what is canonical, and that a given text
is nowhere in it."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datastore.bm25 import index_content
from datastore.groups import NGRAMS, PARTS, SEARCH, build_group, build_ngrams
from datastore.manifest import Group
from datastore.shard import TOKEN_TYPES
from datastore.sketches import sample
from datastore.snapshot import Snapshot
from silo.documents import Document
from silo.errors import IntegrityError
from silo.files import exclusive_lock, load_array, remove_tree, sha256_file, staging

if TYPE_CHECKING:
    from silo.language_model import LanguageModel

RUN_TOKENS = 32
"""Tokens in a row that count as a trace of a text. Fewer than this are anybody's: the head of a function, a phrase."""
RUN_BYTES = 128
"""Bytes in a row that count as a trace."""
LEAST_BYTES = 32
"""A text of fewer bytes is not looked for by them: it is a name, or two words, which ids, licences and receipts hold as
well, and files of numbers by chance. By its tokens, which are how a store holds text, it is looked for all the same."""
MOST = 0.5
"""Share of a text's shingles, or of its keys' codes, that counts as a trace."""
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")
_PROBES = 64
"""Places of a text at which its bytes are looked for."""


def verify_derived(store: Snapshot) -> int:
    """Build every search structure anew from the shards, and compare it with the store's.

    It is built inside the store, where the next writer deletes it if this process dies: it is restricted text. No other
    process writes meanwhile.

    Returns:
        How many were compared.

    Raises:
        IntegrityError: one is not what its shards give; the file is named.
        StoreError: another process is writing, or has changed the store since it was opened.
    """
    with exclusive_lock(store.path / ".lock"):
        store.require_unchanged()
        for group in store.manifest.groups:
            with _scratch(store.path / SEARCH) as again:
                _require_search(store, group, again)
        for group in store.manifest.ngrams:
            with _scratch(store.path / NGRAMS) as again:
                entries = [store.manifest.shards[name] for name in group.shards]
                build_ngrams(again, [store.read_texts(name) for name in group.shards], entries)
                _require_equal(again, store.path / NGRAMS / group.directory, PARTS[NGRAMS])
    return len(store.manifest.groups) + len(store.manifest.ngrams)


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A directory of its own, which is gone afterwards."""
    with staging(parent) as directory:
        try:
            yield directory
        finally:
            remove_tree(directory)


def _require_search(store: Snapshot, group: Group, again: Path) -> None:
    """Raise unless keys, sketches and blocks of a group are what is built of its shards, in an empty directory."""
    directory, lists = store.path / SEARCH / group.directory, len(store.control.centroids)
    entries, shards = [store.manifest.shards[name] for name in group.shards], map(store.shard, group.shards)
    build_group(again, list(shards), entries, store.tokenizer, lists=lists, first_row=group.first_row)
    _require_equal(again, directory, ("keys", "sketches"))
    ours, theirs = index_content(directory / "blocks"), index_content(again / "blocks")
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise _other_than_built(directory / "blocks", f" ({', '.join(different)})")


def _require_equal(built: Path, directory: Path, parts: Iterable[str]) -> None:
    for file in (file for part in parts for file in sorted((built / part).iterdir())):
        path = directory / file.relative_to(built)
        if not path.is_file() or sha256_file(path) != sha256_file(file):
            raise _other_than_built(path)


def _other_than_built(path: Path, how: str = "") -> IntegrityError:
    advice = "delete it, and `silo datastore verify --repair` builds it anew"
    return IntegrityError(f"{path} is not what its shards give{how}; {advice}")


@dataclass(frozen=True, slots=True)
class Trace:
    """Something of a text that was found in a store."""

    document: str
    """The id of the text that was looked for."""
    kind: str
    """``bytes``, ``tokens``, ``shingles`` or ``codes``."""
    file: Path
    """Where."""


def find_traces(store: Snapshot, documents: Iterable[Document], model: LanguageModel | None = None) -> Iterator[Trace]:
    """Look for some texts in every file of a store.

    For runs of their bytes, in every encoding that is likely; for runs of tokens; for their shingles in the sketches;
    and, with a model, for the codes of their keys; also in what an unfinished add has encoded. A text that stands in
    another document too, such as a licence's header, is found there. Only the tokenizer, which learned from permissive
    text, is not searched.
    """
    files = [path for path in sorted(store.path.rglob("*")) if path.is_file() and path.name != "tokenizer.json"]
    try:
        for document in documents:
            yield from _traces(store, files, document, model)
    except OSError:
        store.require_unchanged()
        raise


def _traces(store: Snapshot, files: Sequence[Path], document: Document, model: LanguageModel | None) -> Iterator[Trace]:
    """Look for one text in some files."""
    text = document.full_text
    tokens = np.asarray(store.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    length = min(RUN_TOKENS, len(tokens))  # a short text is looked for as a whole
    runs, sketch = _runs(tokens, length), sample(text)
    codes = store.control.encode(model.keys(model.tokenize(document)))[1] if model is not None else None
    pieces = [piece for encoding in ENCODINGS for piece in _pieces(text.encode(encoding))]
    for path in files:
        if path.stat().st_size and _has_bytes(path, pieces):
            yield Trace(document.id, "bytes", path)
        if any(np.isin(_runs(held, length), runs).any() for held in _tokens(path)):
            yield Trace(document.id, "tokens", path)
        if path.name == "hashes.npy" and len(sketch) and np.isin(sketch, load_array(path)).mean() > MOST:
            yield Trace(document.id, "shingles", path)
        if codes is not None and _share(codes, _codes(path, codes.shape[1])) > MOST:
            yield Trace(document.id, "codes", path)


def _pieces(data: bytes) -> list[bytes]:
    """Runs of bytes at places all over a text; none where it is too short to be told from anything else."""
    if len(data) < LEAST_BYTES:
        return []
    width = min(RUN_BYTES, len(data))
    return [data[at : at + width] for at in range(0, len(data) - width + 1, max(1, (len(data) - width) // _PROBES))]


def _has_bytes(path: Path, pieces: Iterable[bytes]) -> bool:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(piece) >= 0 for piece in pieces)


def _tokens(path: Path) -> list[np.ndarray]:
    """The tokens (n,) that a file of a shard, a search structure or a spool holds, in each way in which it may be read;
    of another file nothing."""
    if path.name == "tokens.npy":
        return [load_array(path)]
    # A spool's file does not say how wide its tokens are.
    return [np.fromfile(path, dtype=kind) for kind in TOKEN_TYPES] if path.name == "tokens.bin" else []


def _codes(path: Path, width: int) -> np.ndarray:
    """The codes (n, width) that a file of a shard or a spool holds; of another file none."""
    if path.name == "codes.npy":
        return load_array(path)
    data = np.fromfile(path, dtype=np.uint8) if path.name == "codes.bin" else np.zeros(0, dtype=np.uint8)
    return data[: len(data) // width * width].reshape(-1, width)


def _runs(tokens: np.ndarray, length: int) -> np.ndarray:
    """A hash of every run of so many tokens; none where there are fewer."""
    if not 0 < length <= len(tokens):
        return np.zeros(0, dtype=np.uint64)
    factors = np.asarray([pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(length)], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), length)
    return (windows * factors).sum(axis=1, dtype=np.uint64)


def _share(codes: np.ndarray, among: np.ndarray) -> float:
    """Share of some codes that are among others."""
    present = {row.tobytes() for row in among}
    return float(np.mean([row.tobytes() in present for row in codes])) if present and len(codes) else 0.0
