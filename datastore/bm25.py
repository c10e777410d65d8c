"""BM25 over blocks of text, in Lucene.

Lucene is driven through its own classes rather than Pyserini's: its ``MultiReader`` scores blocks that lie in several
directories with the statistics of all of them together, so that scores do not depend on how blocks are grouped.

An index holds which words a block has and how often, and the block's key; neither the text nor the order of the words
is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from datastore.jvm import java_cast, java_class, java_errors, java_text
from silo.errors import DataError, StoreError, UsageError
from silo.files import sha256

_LUCENE = "org.apache.lucene."
_KEY = "key"
_TEXT = "text"
_UNLIMITED_CLAUSES = 2**31 - 1
K1, B = 0.9, 0.4
"""Anserini's defaults, which SILO and In-Context RALM took over."""


class Block(NamedTuple):
    """A stretch of one document's text, the unit that BM25 finds."""

    key: str
    """Unique among all blocks of a store; blocks of equal score come in the order of their keys' code points."""
    text: str


def build_index(directory: Path, blocks: Iterable[Block]) -> None:
    """Index blocks into a directory, which is then complete and never changed.

    Words are those of Unicode's segmentation, in lower case, with no stop words and no stems: the text is code as
    often as prose. The index has one segment, so that a block that is not given leaves no trace. An index that is
    already there is replaced.

    Raises:
        DataError: a key has a character that UTF-8 cannot hold.
        StoreError: Lucene cannot write, for example because the disk is full. What it wrote so far is not an index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with java_errors(f"cannot write the BM25 index {directory}"), _open_directory(directory) as files:
        _write(files, lambda writer: _add_blocks(writer, blocks))


def cut_index(directory: Path, whole: Path, gone: Iterable[str]) -> None:
    """Index into an empty directory the blocks of another index without those of some keys.

    Lucene merges what stays into a new segment; its content is that of an index to which the others were never given.
    Raises :class:`StoreError` as :func:`build_index` does.
    """
    for file in whole.iterdir():
        shutil.copyfile(file, directory / file.name)
    with java_errors(f"cannot write the BM25 index {directory}"), _open_directory(directory) as files:
        _write(files, lambda writer: writer.deleteDocuments(_with_keys(gone)), mode="APPEND")
        wordless = _wordless_keys(files)
        if wordless is not None:  # else a merge leaves the files of words there, with none in them
            _write(files, lambda writer: _add_blocks(writer, (Block(key, "") for key in wordless)))
    _require_one_segment(directory)


def _wordless_keys(files: Any) -> list[str] | None:
    """The keys of all blocks of an index of one segment, in order, if none of them has a word; else None."""
    with contextlib.closing(_lucene("index.DirectoryReader").open(files)) as reader:
        if reader.getSumTotalTermFreq(_TEXT):
            return None
        leaf = java_cast(f"{_LUCENE}index.LeafReader", reader.leaves().get(0).reader())
        keys = leaf.getSortedDocValues(_KEY)
        found = []
        while keys.nextDoc() < leaf.maxDoc():
            found.append(str(keys.lookupOrd(keys.ordValue()).utf8ToString()))
        return found


@dataclass(frozen=True)
class CutIndex:
    """Some of an index's blocks as an index of their own, in memory; it is made when a searcher opens it."""

    whole: Path
    """The directory of the index."""
    keys: Callable[[], Iterable[str]]
    """Of blocks that stay, or that do not."""
    stay: bool
    """Which of both."""

    def open(self) -> Any:
        """The directory as Lucene sees it, made anew; to be closed by the caller."""
        with java_errors(f"cannot index some blocks of {self.whole}"), _open_directory(self.whole) as source:
            files = _lucene("store.ByteBuffersDirectory")()
            for name in source.listAll():
                files.copyFrom(source, name, name, _lucene("store.IOContext").DEFAULT)
            found = _with_keys(self.keys())
            _write(files, lambda writer: writer.deleteDocuments(_all_but(found) if self.stay else found), mode="APPEND")
            return files


def _with_keys(keys: Iterable[str]) -> Any:
    """A query that finds the blocks of some keys."""
    wanted = [_lucene("util.BytesRef")(_key_bytes(key)) for key in keys]
    return _lucene("document.SortedDocValuesField").newSlowSetQuery(_KEY, *wanted)


def _all_but(query: Any) -> Any:
    """A query that finds what another one does not."""
    occur = _lucene("search.BooleanClause$Occur")
    both = _lucene("search.BooleanQuery$Builder")()
    both.add(_lucene("search.MatchAllDocsQuery")(), occur.MUST)
    both.add(query, occur.MUST_NOT)
    return both.build()


def _write(files: Any, change: Callable[[Any], None], *, mode: str = "CREATE") -> None:
    """Change the index in a Lucene directory, or make a new one, and leave it in one segment without deleted blocks."""
    writer = _lucene("index.IndexWriter")(files, _writer_config(mode))
    try:
        change(writer)
        writer.forceMerge(1)
        writer.close()
    except BaseException:
        writer.rollback()
        raise


_ID_BYTES, _CHECKSUM_BYTES = 16, 8
_HEADER_MAGIC = bytes.fromhex("3fd76c17")
"""A Lucene file begins with this, its codec's name, a version and the segment's random id, and ends with a checksum."""


def index_content(directory: Path) -> dict[str, str]:
    """SHA-256 of what each file of an index says, without the random id that Lucene gives a segment.

    Equal blocks in equal order give equal content. The two files that only name the segment are left out: they also
    hold the time and the machine. Raises :class:`StoreError` if it is no index, or one with remains of another.
    """
    _require_one_segment(directory)
    found = {}
    for path in sorted(directory.iterdir()):
        if not path.name.startswith("segments") and path.suffix != ".si":
            data = path.read_bytes()
            name_length = data[4]
            begin = 4 + 1 + name_length + 4
            identity = data[begin : begin + _ID_BYTES]
            if not data.startswith(_HEADER_MAGIC):
                raise StoreError(f"{path} is no file of a Lucene index; rebuild it")
            found[path.suffix] = sha256(data.replace(identity, bytes(_ID_BYTES))[:-_CHECKSUM_BYTES])
    return found


def _require_one_segment(directory: Path) -> None:
    """Raise :class:`StoreError` if there are files of more than one segment: of one that Lucene did not delete."""
    segments = {re.split(r"[._]", path.name)[1] for path in directory.iterdir() if path.name.startswith("_")}
    if len(segments) > 1:
        raise StoreError(
            f"{directory} holds segments {', '.join(sorted(segments))} of Lucene, expected one; rebuild it"
        )


class BM25Searcher:
    """Finds the blocks of several indexes that match a query best.

    The searcher sees its indexes as they were when it was opened, also when their directories are deleted meanwhile.
    ``k1`` is how much a word counts that comes again, ``b`` how much long blocks are held back.

    Scores are the same to the last bit however the blocks are spread over directories: document frequencies and
    lengths are summed as integers over all of them, and a block's score is a sum in double precision of a few
    single-precision terms of similar size, which is exact in any order.

    Raises:
        StoreError: a directory holds no index that Lucene can read.
        UsageError: ``k1`` is negative or no number, or ``b`` is not from 0 to 1.
    """

    def __init__(self, indexes: Sequence[Path | CutIndex], *, k1: float = K1, b: float = B) -> None:
        if not (0 <= k1 < float("inf") and 0 <= b <= 1):  # nan compares false
            raise UsageError(f"BM25 with k1 = {k1} and b = {b}; expected k1 from 0, and b from 0 to 1")
        with java_errors("cannot search with BM25"):
            self._reader = _open_readers(indexes)
            self._searcher = _lucene("search.IndexSearcher")(java_cast(f"{_LUCENE}index.IndexReader", self._reader))
            self._searcher.setSimilarity(_lucene("search.similarities.BM25Similarity")(k1, b))
            self._searcher.setMaxClauseCount(_UNLIMITED_CLAUSES)
            self._queries = _lucene("util.QueryBuilder")(_analyzer())
            self._order = _score_then_key()

    @property
    def num_blocks(self) -> int:
        """How many blocks the indexes hold together."""
        return int(self._reader.numDocs())

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The keys and scores of the ``k`` best blocks for each query, best first, equal scores by key.

        A query is a bag of words: it has no syntax, a word that it repeats counts as often as it is repeated, and a
        block matches if it has any of them. A query without words finds nothing.
        """
        if k < 1:
            raise UsageError(f"k is {k}, expected at least 1 block")
        with java_errors("cannot search with BM25"):
            return [self._search(query, k) for query in queries]

    def close(self) -> None:
        """Let go of the indexes' files. The searcher cannot be used afterwards."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _search(self, text: str, k: int) -> list[tuple[str, float]]:
        query = self._queries.createBooleanQuery(_TEXT, java_text(text))
        if query is None:
            return []
        top = self._searcher.search(query, k, self._order)
        hits = (java_cast(f"{_LUCENE}search.FieldDoc", hit).fields for hit in top.scoreDocs)
        return [(key.utf8ToString(), float(score)) for score, key in hits]


def _add_blocks(writer: Any, blocks: Iterable[Block]) -> None:
    """Index blocks one by one with a document that is made once: three calls into Java a block."""
    text = _lucene("document.Field")(
        _TEXT,
        java_cast("java.lang.CharSequence", java_class("java.lang.String")("")),
        java_cast(f"{_LUCENE}index.IndexableFieldType", _words_and_counts()),
    )
    key = _lucene("document.SortedDocValuesField")(_KEY, _lucene("util.BytesRef")(b""))
    document = _lucene("document.Document")()
    document.add(text)
    document.add(key)
    for block in blocks:
        key.setBytesValue(_key_bytes(block.key))
        text.setStringValue(java_text(block.text))
        writer.addDocument(document)


def _key_bytes(key: str) -> bytes:
    try:
        return key.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the block key {key!r} is not valid Unicode ({error.reason}); give its document another id"
        ) from None


def _words_and_counts() -> Any:
    """The kind of field that keeps of a text which words it has and how often, and nothing else."""
    kind = _lucene("document.FieldType")()
    kind.setTokenized(True)
    kind.setIndexOptions(_lucene("index.IndexOptions").DOCS_AND_FREQS)
    kind.freeze()
    return kind


def _writer_config(mode: str) -> Any:
    """Settings under which writing is one thread's work, so that an error reaches the caller, and blocks stay in the
    order in which they came, also where there are so many that they are written in several parts."""
    config = _lucene("index.IndexWriterConfig")(_analyzer())
    config.setOpenMode(getattr(java_class(f"{_LUCENE}index.IndexWriterConfig$OpenMode"), mode))
    config.setMergeScheduler(_lucene("index.SerialMergeScheduler")())
    config.setUseCompoundFile(False)  # which would hide ids and checksums from index_content()
    merging = _lucene("index.LogDocMergePolicy")()
    merging.setNoCFSRatio(0.0)
    config.setMergePolicy(merging)
    return config


def _analyzer() -> Any:
    """What makes words of a text, the same for blocks and for queries."""
    return _lucene("analysis.standard.StandardAnalyzer")()


def _score_then_key() -> Any:
    """The order of hits. Lucene's own breaks ties by position in the index, which grouping would change."""
    field = _lucene("search.SortField")
    by_key = field(_KEY, java_class(f"{_LUCENE}search.SortField$Type").STRING)
    return _lucene("search.Sort")(field.FIELD_SCORE, by_key)


def _open_readers(indexes: Sequence[Path | CutIndex]) -> Any:
    """One reader over all indexes; closing it closes theirs. None stays open if one cannot be opened."""
    with contextlib.ExitStack() as on_failure:
        readers = []
        for index in indexes:
            opened = _open_directory(index) if isinstance(index, Path) else contextlib.closing(index.open())
            with java_errors(f"cannot open the BM25 index {index}; rebuild it"), opened as files:
                readers.append(_lucene("index.DirectoryReader").open(files))
            on_failure.callback(readers[-1].close)
        together = _lucene("index.MultiReader")(readers, True)
        on_failure.pop_all()
        return together


@contextlib.contextmanager
def _open_directory(directory: Path) -> Iterator[Any]:
    """A directory as Lucene sees it, without a lock file: the store has its own lock, and an index never changes.

    Lucene makes a directory that is not there, also one that a removal has just deleted. So it gets a name that is
    always that of a directory: of one that was opened. Raises :class:`StoreError` if there is none.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"cannot open the BM25 index {directory}; rebuild it: {error.strerror}") from None
    try:
        path = java_class("java.nio.file.Paths").get(f"/proc/self/fd/{descriptor}")
        files = _lucene("store.FSDirectory").open(path, _lucene("store.NoLockFactory").INSTANCE)
    finally:
        os.close(descriptor)  # Lucene has asked for the real path
    try:
        yield files
    finally:
        files.close()


def _lucene(name: str) -> Any:
    return java_class(_LUCENE + name)
