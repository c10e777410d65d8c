"""Who shares text with whom: copied passages and near-duplicates among many documents, in bounded memory.

Every shingle of every document goes to one of many buckets on disk, by its hash; each bucket is then joined by itself.
So all documents are compared with all, exactly and without a sketch that could miss a passage, and memory does not grow
with the corpus. Near-duplicates are proposed by a sample of the same shingles (FracMinHash, Irber 2022) and confirmed
on the texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from silo.shingles import SHINGLE_WORDS, Shingles, shingles

PASSAGE_WORDS = 40
"""A passage is a cluster of shared shingles that covers at least so many words."""
PASSAGE_GAP = 32
"""Words that may lie between two shared shingles of one passage: an edited stretch."""
PASSAGE_VARIETY = 12
"""Different shared shingles that a passage has at least; a row of zeros in a table has one."""
COMMON_DOCUMENTS = 10
"""A shingle that more permissive documents than this have is common property, such as a licence's header. It does not
count as copied from evaluation text. (It does count as copied from restricted text.)"""
SIMILAR = 0.8
"""Share of their shingles (Jaccard) from which on two documents are near-duplicates."""

_SAMPLED = 16
"""One shingle in so many, by its hash, proposes near-duplicates."""
_PROPOSED = 0.5
"""Share of a document's sample that another must have to be compared with it."""
_BUCKETS = 128
_BUFFERED = 1 << 21
"""Records that wait in memory until they are sorted into buckets."""
_JOINED = 1 << 21
"""Records that are joined at once: a bucket that holds more is read in parts."""

_RECORD = np.dtype([("hash", "<u8"), ("document", "<u4"), ("position", "<u4")])
_MATCH = np.dtype([("document", "<u4"), ("position", "<u4"), ("other", "<u4"), ("kind", "<u4"), ("hash", "<u8")])
_PAIR = np.dtype([("document", "<u4"), ("other", "<u4")])


class Role(IntEnum):
    """What a document is here. A permissive one is compared with those of both other kinds."""

    IGNORED = 0
    RESTRICTED = 1
    EVALUATION = 2
    """Text that is held out: nothing that trains may repeat it."""
    TRAINING = 3


@dataclass(frozen=True, slots=True)
class Passage:
    """A run of words of a permissive document that another document has too."""

    kind: Role
    """:attr:`Role.RESTRICTED` or :attr:`Role.EVALUATION`: whose text it is."""
    begin: int
    end: int
    """Words ``begin`` to ``end`` of the document."""
    words: int
    """How many of them lie in shared shingles."""
    other: int
    """The document that shares most of it."""


class Spill:
    """Records in buckets on disk, sorted into them a buffer at a time."""

    def __init__(self, directory: Path, dtype: np.dtype, buckets: int = _BUCKETS) -> None:
        directory.mkdir()
        self._paths = [directory / f"{bucket:03}" for bucket in range(buckets)]
        self._dtype, self._waiting, self._held = dtype, [], 0  # type: ignore[var-annotated]

    def add(self, buckets: np.ndarray, records: np.ndarray) -> None:
        """Add records (n,), each to the bucket of its number (n,)."""
        self._waiting.append((buckets.astype(np.uint8), records))
        self._held += len(records)
        if self._held >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._held:
            return
        buckets = np.concatenate([of_batch for of_batch, _ in self._waiting])
        records = np.concatenate([of_batch for _, of_batch in self._waiting])
        order = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[order], np.arange(len(self._paths) + 1))
        records = records[order]
        for path, begin, end in zip(self._paths, bounds, bounds[1:], strict=False):
            if begin < end:
                with open(path, "ab") as file:
                    records[begin:end].tofile(file)
        self._waiting, self._held = [], 0

    def read(self, by: str) -> Iterator[np.ndarray]:
        """Each bucket once, in parts of bounded size; records that are equal in ``by`` come in the same part."""
        self.flush()
        for path in self._paths:
            if not path.exists():
                continue
            parts = np.uint64(-(-path.stat().st_size // (self._dtype.itemsize * _JOINED)))
            whole = np.memmap(path, dtype=self._dtype, mode="r")
            for part in range(int(parts)):
                chosen = [
                    piece[piece[by].astype(np.uint64) // np.uint64(_BUCKETS) % parts == part]
                    for piece in (whole[at : at + _JOINED] for at in range(0, len(whole), _JOINED))
                ]
                yield np.concatenate(chosen)
            del whole
            path.unlink()


class Overlap:
    """Takes documents one after the other, and then tells which share text.

    Documents are numbered from 0 in the order in which they come. ``rank`` and ``role`` are known only when all are
    there, since a licence file read last may restrict a document read first.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._spill = Spill(directory / "shingles", _RECORD)
        self._count = 0
        self._words: list[np.ndarray] = []
        self._samples: list[np.ndarray] = []

    def add(self, texts: Sequence[bytes]) -> None:
        """Take the next documents."""
        found = shingles(texts)
        records = np.empty(len(found.hashes), dtype=_RECORD)
        records["hash"], records["position"] = found.hashes, found.positions
        records["document"] = found.documents + np.uint32(self._count)
        self._spill.add(found.hashes % np.uint64(_BUCKETS), records)
        self._words.append(found.words.astype(np.uint32))
        self._samples.append(_sample_sizes(found, len(texts)))
        self._count += len(texts)

    @property
    def words(self) -> np.ndarray:
        """How many words each document has, (documents,)."""
        return np.concatenate([np.zeros(0, np.uint32), *self._words])

    def compare(self, roles: np.ndarray, ranks: np.ndarray) -> None:
        """Compare all documents. Afterwards :meth:`passages` and :meth:`similar` tell what was found.

        Args:
            roles: (documents,) :class:`Role` of each.
            ranks: (documents,) their order of precedence, from 0, all different. Where several could be named or kept,
                the one of the lowest rank is.
        """
        self._roles, self._ranks = roles.astype(np.uint8), ranks.astype(np.uint32)
        self._ranked = np.argsort(self._ranks).astype(np.uint32)
        self._matches = Spill(self._directory / "matches", _MATCH)
        self._pairs = Spill(self._directory / "pairs", _PAIR)
        for records in self._spill.read(by="hash"):
            self._join(records)

    def _join(self, records: np.ndarray) -> None:
        roles = self._roles[records["document"]]
        records, roles = records[roles != Role.IGNORED], roles[roles != Role.IGNORED]
        order = np.argsort(records["hash"])
        records, roles = records[order], roles[order]
        permissive = roles >= Role.EVALUATION
        ours, our_roles = records[permissive], roles[permissive]
        self._match(ours, self._first_of_each(records[roles == Role.RESTRICTED]), Role.RESTRICTED)
        learnt = ours[(our_roles == Role.TRAINING) & ~_common(ours)]
        self._match(learnt, self._first_of_each(ours[our_roles == Role.EVALUATION]), Role.EVALUATION)
        self._propose(ours[ours["hash"] // np.uint64(_BUCKETS) % np.uint64(_SAMPLED) == 0])

    def _first_of_each(self, records: np.ndarray) -> np.ndarray:
        """Of records sorted by hash, one of each hash, with the document of the lowest rank that has it."""
        begins = _begins(records["hash"])
        first = records[begins]
        if len(begins):
            first["document"] = self._ranked[np.minimum.reduceat(self._ranks[records["document"]], begins)]
        return first

    def _match(self, ours: np.ndarray, theirs: np.ndarray, kind: Role) -> None:
        if not len(theirs):
            return
        at = np.searchsorted(theirs["hash"], ours["hash"])
        at[at == len(theirs)] = 0
        shared = theirs["hash"][at] == ours["hash"]
        ours, at = ours[shared], at[shared]
        matches = np.empty(len(ours), dtype=_MATCH)
        for name in ("document", "position", "hash"):
            matches[name] = ours[name]
        matches["other"], matches["kind"] = theirs["document"][at], kind
        self._matches.add(matches["document"] % np.uint32(_BUCKETS), matches)

    def _propose(self, sampled: np.ndarray) -> None:
        first = self._first_of_each(sampled)
        pairs = np.empty(len(sampled), dtype=_PAIR)
        pairs["document"] = sampled["document"]
        pairs["other"] = first["document"][np.searchsorted(first["hash"], sampled["hash"])] if len(first) else 0
        pairs = pairs[pairs["document"] != pairs["other"]]
        self._pairs.add(pairs["document"] % np.uint32(_BUCKETS), pairs)

    def passages(self) -> Iterator[tuple[int, list[Passage]]]:
        """Each permissive document that repeats restricted or held-out text, and the passages."""
        for matches in self._matches.read(by="document"):
            order = np.lexsort((matches["position"], matches["kind"], matches["document"]))
            matches = matches[order]
            for of_document in _split(matches, np.flatnonzero(np.diff(matches["document"])) + 1):
                found = list(self._passages_of(of_document))
                if found:
                    yield int(of_document["document"][0]), found

    def _passages_of(self, matches: np.ndarray) -> Iterator[Passage]:
        jump = np.diff(matches["position"].astype(np.int64)) > SHINGLE_WORDS + PASSAGE_GAP
        for cluster in _split(matches, np.flatnonzero(jump | (np.diff(matches["kind"]) != 0)) + 1):
            positions = cluster["position"].astype(np.int64)
            words = int(np.minimum(np.diff(positions), SHINGLE_WORDS).sum()) + SHINGLE_WORDS
            if words < PASSAGE_WORDS or len(np.unique(cluster["hash"])) < PASSAGE_VARIETY:
                continue
            counts = Counter(cluster["other"].tolist())
            other = min(counts, key=lambda document: (-counts[document], self._ranks[document]))
            yield Passage(
                Role(int(cluster["kind"][0])), int(positions[0]), int(positions[-1]) + SHINGLE_WORDS, words, other
            )

    def similar(self) -> Iterator[tuple[int, int]]:
        """Pairs of permissive documents that may be near-duplicates, the one to keep second; see :func:`similarity`."""
        sizes = np.concatenate([np.zeros(0, np.uint32), *self._samples])
        for pairs in self._pairs.read(by="document"):
            order = np.lexsort((pairs["other"], pairs["document"]))
            pairs = pairs[order]
            whole = pairs["document"].astype(np.uint64) << np.uint64(32) | pairs["other"]
            _, first, shared = np.unique(whole, return_index=True, return_counts=True)
            for document, other, count in zip(pairs[first]["document"], pairs[first]["other"], shared, strict=True):
                if count >= _PROPOSED * min(sizes[document], sizes[other]):
                    yield int(document), int(other)


def similarity(one: bytes, other: bytes) -> float:
    """Jaccard similarity of two texts' sets of shingles."""
    first, second = (np.unique(shingles([text]).hashes) for text in (one, other))
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)


def batches(texts: Iterable[bytes], size: int = 1 << 20) -> Iterator[list[bytes]]:
    """Texts in batches of about ``size`` bytes, which fit the processor's cache."""
    batch: list[bytes] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _sample_sizes(found: Shingles, documents: int) -> np.ndarray:
    sampled = found.documents[found.hashes // np.uint64(_BUCKETS) % np.uint64(_SAMPLED) == 0]
    return np.bincount(sampled, minlength=documents).astype(np.uint32)


def _common(records: np.ndarray) -> np.ndarray:
    """Which of some records, sorted by hash, have a hash that is in more than :data:`COMMON_DOCUMENTS` documents."""
    lengths = np.diff(np.append(_begins(records["hash"]), len(records)))
    often = np.repeat(lengths > COMMON_DOCUMENTS, lengths)
    few = records[often]  # of which a document may have several
    few = few[np.lexsort((few["document"], few["hash"]))]
    begins = _begins(few["hash"])
    if len(begins):
        another = np.diff(few["document"].astype(np.int64), prepend=-1) != 0
        another[begins] = True
        documents = np.add.reduceat(another, begins, dtype=np.int64)
        often[often] = np.repeat(documents > COMMON_DOCUMENTS, np.diff(np.append(begins, len(few))))
    return often


def _begins(values: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins, in sorted values."""
    return np.flatnonzero(np.diff(values, prepend=values[:1] ^ np.uint64(1)))


def _split(array: np.ndarray, at: np.ndarray) -> Iterator[np.ndarray]:
    for begin, end in zip([0, *at.tolist()], [*at.tolist(), len(array)], strict=True):
        if begin < end:
            yield array[begin:end]
