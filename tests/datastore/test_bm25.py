"""BM25: the scores of the textbook, the same however blocks are spread, and nothing left of a deleted block."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import click
import numpy as np
import pytest

from datastore.bm25 import Block, BM25Searcher, build_index
from datastore.jvm import java_class
from silo.errors import DataError, StoreError, UsageError

ROOT = Path(__file__).resolve().parents[2]
K1, B = 0.9, 0.4


def real_blocks(size=120):
    """Blocks of ``size`` words from the source of an installed package, as many documents as it has files."""
    blocks = []
    for path in sorted(Path(click.__file__).parent.glob("*.py")):
        words = re.findall("[A-Za-z]+", path.read_text(encoding="utf-8"))
        for start in range(0, len(words), size):
            blocks.append(Block(f"{path.stem}\0{start:09d}", " ".join(words[start : start + size])))
    return blocks


def some_queries(blocks, *, count=60, length=24):
    """Stretches of real blocks, with words repeated as the text repeats them."""
    rng = random.Random(0)
    queries = []
    for block in rng.choices(blocks, k=count):
        words = block.text.split()
        start = rng.randrange(max(1, len(words) - length))
        queries.append(" ".join(words[start : start + length]))
    return queries


@pytest.fixture(scope="module")
def blocks():
    """Some hundreds of blocks of real text, 30 of them twice under other keys, so that scores tie."""
    blocks = real_blocks()
    return blocks + [Block(f"copy of {block.key}", block.text) for block in blocks[::20][:30]]


@pytest.fixture(scope="module")
def index(blocks, tmp_path_factory):
    """All blocks in one index."""
    directory = tmp_path_factory.mktemp("bm25") / "whole"
    build_index(directory, blocks)
    return directory


def search(directories, queries, k=10):
    with BM25Searcher(directories) as searcher:
        return searcher.search(queries, k)


def kept_length(length):
    """The length that Lucene's one byte for it stands for (SmallFloat: exact below 40, then four significant bits)."""
    exact = 24
    if length < exact:
        return length
    rest = length - exact
    shift = max(rest.bit_length() - 4, 0)
    return exact + (rest >> shift << shift)


def reference_search(blocks, query, k):
    """Plain BM25 over all blocks (Lucene's form of it: no factor k1 + 1), best first, ties by key."""
    counts = [Counter(block.text.lower().split()) for block in blocks]
    lengths = np.array([sum(count.values()) for count in counts])
    norms = K1 * (1 - B + B * np.array([kept_length(int(length)) for length in lengths]) / lengths.mean())
    scores = np.zeros(len(blocks))
    for word, repeats in Counter(query.lower().split()).items():
        frequency = np.array([count[word] for count in counts])
        holders = np.count_nonzero(frequency)
        weight = np.log(1 + (len(blocks) - holders + 0.5) / (holders + 0.5))
        scores += repeats * weight * frequency / (frequency + norms)
    order = sorted(np.flatnonzero(scores), key=lambda i: (-np.round(scores[i], 9), blocks[i].key))
    return [(blocks[i].key, scores[i]) for i in order[:k]]


def test_scores_are_the_textbooks(blocks, index):
    """Keys, order and scores are those of BM25 written out in numpy, to single precision."""
    queries = some_queries(blocks)
    for query, found in zip(queries, search([index], queries), strict=True):
        expected = reference_search(blocks, query, 10)
        np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=1e-6)
        assert [key for key, _ in found] == [key for key, _ in expected]


FINER = 1000.0
"""Pyserini's searcher rounds scores to four decimals (it tells ties apart below that); such a boost keeps seven."""


@pytest.fixture(scope="module")
def anserini(blocks, tmp_path_factory):
    """Pyserini's own searcher over one index of the same blocks, which its own indexer wrote.

    Both are the Java classes that ``LuceneIndexer`` and ``LuceneSearcher`` wrap: to import the wrappers takes an API
    key. Words are split in Python, since Anserini's default is to stem them and to drop the frequent ones."""
    directory = str(tmp_path_factory.mktemp("anserini") / "index")
    indexer = java_class("io.anserini.index.SimpleIndexer")(
        ["-index", directory, "-pretokenized", "-input", "", "-collection", "JsonCollection", "-threads", "1"]
    )
    for number, block in enumerate(blocks):
        indexer.addRawDocument(json.dumps({"id": str(number), "contents": " ".join(block.text.lower().split())}))
    indexer.close()
    searcher = java_class("io.anserini.search.SimpleSearcher")(directory)
    return searcher


def search_with_pyserini(searcher, text, k):
    """Number and score of the ``k`` best blocks, the query made by Pyserini too."""
    analyzer = java_class("org.apache.lucene.analysis.core.WhitespaceAnalyzer")()
    bag = java_class("io.anserini.search.query.BagOfWordsQueryGenerator")().buildQuery("contents", analyzer, text)
    query = java_class("org.apache.lucene.search.BoostQuery")(bag, FINER)
    return {int(hit.docid): hit.score / FINER for hit in searcher.search(query, k)}


@pytest.mark.parametrize(("k1", "b"), [(K1, B), (1.2, 0.75), (0.0, 0.4), (2.0, 1.0)])
def test_scores_are_pyserinis(blocks, anserini, tmp_path, k1, b):
    """Over three directories every block that matches has the score, to 1e-5, that Pyserini's searcher gives it over
    one index of them all, and no other block matches."""
    anserini.set_bm25(k1, b)
    parts = [tmp_path / str(number) for number in range(3)]
    for number, part in enumerate(parts):
        build_index(part, blocks[number::3])
    queries = some_queries(blocks, count=20)
    with BM25Searcher(parts, k1=k1, b=b) as searcher:
        found = searcher.search(queries, len(blocks))
    for query, hits in zip(queries, found, strict=True):
        theirs = search_with_pyserini(anserini, query.lower(), len(blocks))
        expected = {blocks[number].key: score for number, score in theirs.items()}
        assert dict(hits) == pytest.approx(expected, rel=0, abs=1e-5)


def test_grouping_changes_nothing(blocks, index, tmp_path):
    """Blocks spread over five directories in any order give the very same keys, scores and order, ties included."""
    shuffled = random.Random(1).sample(blocks, len(blocks))
    parts = [tmp_path / str(number) for number in range(5)]
    for number, part in enumerate(parts):
        build_index(part, shuffled[number::5])
    queries = some_queries(blocks)
    whole = search([index], queries, k=40)
    assert search(parts, queries, k=40) == whole
    assert search(parts[::-1], queries, k=40) == whole
    assert any(a[1] == b[1] for hits in whole for a, b in itertools.pairwise(hits))


@pytest.mark.parametrize("k", [1, 5, 100])
def test_ties_at_the_cut_go_to_the_smaller_key(tmp_path, k):
    """Of thousands of blocks with equal scores the k with the smallest keys are found, however deep in the index."""
    keys = [f"d\0{number:09d}" for number in range(3000)]
    shuffled = random.Random(2).sample(keys, len(keys))
    build_index(tmp_path / "a", [Block(key, "same words here") for key in shuffled[:2000]])
    build_index(tmp_path / "b", [Block(key, "same words here") for key in shuffled[2000:]])
    (found,) = search([tmp_path / "a", tmp_path / "b"], ["words here"], k)
    assert [key for key, _ in found] == keys[:k]


def test_search_after_removal_is_that_of_a_fresh_index(blocks, index, tmp_path):
    """Adding a directory and taking it away again leaves the results as they were without it."""
    queries = some_queries(blocks)
    fresh = search([index], queries)
    build_index(tmp_path / "more", [Block("x\0000000000", queries[0]), Block("y\0000000000", "words words words")])
    assert search([index, tmp_path / "more"], queries) != fresh
    shutil.rmtree(tmp_path / "more")
    assert search([index], queries) == fresh


def test_index_without_a_block_has_no_word_of_it(blocks, tmp_path):
    """A word of a block is in the index's files while the block is there, and in none once it is rebuilt without."""
    secret = Block("vqhjxw\0000000000", "The Qzxjvkwpyhb spoke of nothing else.")
    build_index(tmp_path / "with", [*blocks, secret])
    build_index(tmp_path / "without", blocks)
    for word in (b"zxjvkwpyhb", b"vqhjxw"):
        assert any(word in file.read_bytes() for file in (tmp_path / "with").iterdir())
        assert not any(word in file.read_bytes().lower() for file in (tmp_path / "without").iterdir())
    assert search([tmp_path / "without"], ["qzxjvkwpyhb"]) == [[]]


def test_text_itself_is_not_stored(tmp_path):
    """No two words that follow each other in a block follow each other in the index's files."""
    words = random.Random(3).sample(
        [f"{a}{b}{c}{d}" for a in "bdf" for b in "aeiou" for c in "klmn" for d in "oiu"], 150
    )
    build_index(tmp_path / "index", [Block("k", " ".join(words))])
    data = b"".join(file.read_bytes() for file in (tmp_path / "index").iterdir())
    assert not [pair for pair in itertools.pairwise(words) if " ".join(pair).encode() in data]


def test_index_keeps_words_and_counts_only(tmp_path):
    """Lucene itself finds neither stored fields nor positions nor vectors in an index."""
    build_index(tmp_path / "index", [Block("k", "one two two")])
    with BM25Searcher([tmp_path / "index"]) as searcher:
        assert searcher._reader.storedFields().document(0).getFields().size() == 0
        field = searcher._reader.leaves().get(0).reader().getFieldInfos().fieldInfo("text")
        assert field.getIndexOptions().toString() == "DOCS_AND_FREQS"
        assert searcher._reader.termVectors().get(0) is None


def test_readers_outlive_their_directory(tmp_path):
    """A searcher keeps its answers when the directory is deleted under it."""
    build_index(tmp_path / "index", [Block("k", "one two")])
    with BM25Searcher([tmp_path / "index"]) as searcher:
        shutil.rmtree(tmp_path / "index")
        assert searcher.search(["two"], 5)[0][0][0] == "k"


def test_relative_path_is_that_of_the_working_directory(tmp_path, monkeypatch):
    """A relative path means Python's working directory, also if that has changed since Java started."""
    build_index(tmp_path / "first", [])
    monkeypatch.chdir(tmp_path)
    build_index(Path("second"), [Block("k", "word")])
    assert search([tmp_path / "second"], ["word"])[0][0][0] == "k"


def test_nothing_in_nothing_out(tmp_path):
    """Without directories, without blocks, without queries or without words there are no hits and no error."""
    build_index(tmp_path / "empty", [])
    build_index(tmp_path / "full", [Block("k", "word"), Block("wordless", "... --- ...")])
    assert search([], ["word"]) == [[]]
    assert search([tmp_path / "empty"], ["word"]) == [[]]
    assert search([tmp_path / "full"], []) == []
    assert search([tmp_path / "full"], ["", " \n", "--- ***", "word"])[:3] == [[], [], []]


def test_num_blocks_counts_all_directories(tmp_path):
    """The number of blocks is the sum over directories, blocks without a word included."""
    build_index(tmp_path / "a", [Block("1", "x"), Block("2", "...")])
    build_index(tmp_path / "b", [Block("3", "x")])
    with BM25Searcher([tmp_path / "a", tmp_path / "b"]) as searcher:
        assert searcher.num_blocks == 3


def test_query_has_no_syntax(tmp_path):
    """Characters that mean something to Lucene's query parser are only text."""
    build_index(tmp_path / "index", [Block("k", "alpha beta"), Block("l", "gamma")])
    (found,) = search([tmp_path / "index"], ['+alpha -beta AND (NOT "gamma") text:x [a TO b] /~^*?\\'])
    assert {key for key, _ in found} == {"k", "l"}


def test_long_query_is_searched_whole(tmp_path):
    """A query of more words than Lucene's limit of 1,024 clauses still finds the block of its last word."""
    build_index(tmp_path / "index", [Block("k", "needle")])
    (found,) = search([tmp_path / "index"], [" ".join(f"w{number}" for number in range(3000)) + " needle"])
    assert [key for key, _ in found] == ["k"]


def test_any_unicode_is_text(tmp_path):
    """Astral letters are not mistaken for others, and NUL, emoji and lone surrogates break nothing."""
    build_index(
        tmp_path / "index",
        [Block("bold", "\U0001d400 one"), Block("hangul", "\ud400 two"), Block("odd", "a\0b \ud800 😀 \udfff three")],
    )
    found = search([tmp_path / "index"], ["\U0001d400", "\ud400", "😀", "three \ud800", "b"])
    assert [[key for key, _ in hits] for hits in found] == [["bold"], ["hangul"], ["odd"], ["odd"], ["odd"]]


def test_any_valid_key_comes_back(tmp_path):
    """A key with NUL, accents and emoji comes back as it was given, and ties follow code points."""
    keys = ["a\0000000000", "é\0000000001", "\ufffd", "😀\0000000000"]
    build_index(tmp_path / "index", [Block(key, "word") for key in reversed(keys)])
    (found,) = search([tmp_path / "index"], ["word"])
    assert [key for key, _ in found] == keys


def test_key_that_is_not_unicode_is_refused(tmp_path):
    """A key with a lone surrogate could not come back as itself, and is refused by name."""
    with pytest.raises(DataError, match=r"'k\\ud800' is not valid Unicode"):
        build_index(tmp_path / "index", [Block("k\ud800", "word")])


def test_failure_of_the_caller_comes_through(tmp_path):
    """An error while blocks are produced reaches the caller, and what was written is not an index."""

    def blocks():
        yield Block("k", "word")
        raise DataError("broken line")

    with pytest.raises(DataError, match="broken line"):
        build_index(tmp_path / "index", blocks())
    with pytest.raises(StoreError):
        BM25Searcher([tmp_path / "index"])


def test_missing_index_is_named(tmp_path):
    """Opening a directory without an index is an error of one line that names it."""
    build_index(tmp_path / "good", [])
    with pytest.raises(StoreError, match=r"^cannot open the BM25 index .*absent; rebuild it: [^\n]*$"):
        BM25Searcher([tmp_path / "good", tmp_path / "absent"])


def test_a_reader_makes_no_directory(tmp_path, monkeypatch):
    """Who looks for an index that is gone leaves nothing behind, also if it goes just then: a directory made anew would
    stop its deletion."""
    build_index(tmp_path / "going", [Block("a", "word")])
    with pytest.raises(StoreError, match=r"cannot open the BM25 index .*gone; rebuild it"):
        BM25Searcher([tmp_path / "gone"])
    real = os.open

    def open_and_lose(path, flags):
        descriptor = real(path, flags)
        if path == tmp_path / "going":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_and_lose)
        with pytest.raises(StoreError, match=r"cannot open the BM25 index .*going; rebuild it"):
            BM25Searcher([tmp_path / "going"])
    assert list(tmp_path.iterdir()) == []


def test_nonsensical_k_is_refused(index):
    """Asking for no block at all is a wrong call."""
    with pytest.raises(UsageError, match="k is 0"):
        search([index], ["word"], k=0)


def test_full_disk_is_one_clear_line(tmp_path):
    """If the system refuses to let a file grow, the error is a StoreError and names the index."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from pathlib import Path
from datastore.bm25 import Block, build_index
from silo.errors import StoreError
try:
    build_index(Path(sys.argv[1]), [Block(str(n), f"word{{n}} and{{n}}") for n in range(20000)])
except StoreError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "index")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith(f"cannot write the BM25 index {tmp_path / 'index'}: ")
    assert done.stderr == ""
