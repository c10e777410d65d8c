"""BM25 over blocks of words beside Pyserini's searcher and bm25s: building an index, and searching it, at three sizes.

    pip install '.[bench]'
    python scripts/bench bm25 CORPUS/*.jsonl.zst > scripts/results/bm25.json

Restricted text is cut into blocks of 96 words, and queries are 32 words of other text, each word once. Words are given
as they are, in lower case: none is stemmed, none left out. All have k1 = 0.9 and b = 0.4, and must give the same scores
to five digits: blocks of one length have the same norm in Lucene, which keeps a length in one byte, as in bm25s, which
keeps it whole.

- Pyserini's searcher: Anserini's Java classes that ``LuceneSearcher`` and ``LuceneIndexer`` wrap, since to import the
  wrappers takes an API key.
- bm25s with numpy, and with numba, if they are installed. It keeps its index in memory.

All search with one thread, one query after the other as their interfaces ask. A query cannot do without the postings of
its words, so many bytes of Lucene's file of postings.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from recording import files_hash

from bench import ceiling
from bench.harness import Contest, alike, compete, exponent, say, subject, versions
from datastore.bm25 import K1, B, Block, BM25Searcher, build_index
from datastore.jvm import java_class
from silo.files import sha256
from silo.licensing import DEFAULT_POLICY
from silo.sources import open_source

BLOCK_WORDS, QUERY_WORDS = 96, 32
WORD = re.compile(r"\b[a-z]{1,60}\b")
FINER = 1000.0
"""Pyserini's searcher rounds scores to four decimals; such a boost keeps seven."""
TOLERANCE = 1e-5
SIZES = (8_000, 32_000, 128_000)
BUILDING_ROUNDS = 3
"""Each takes as long as thousands of queries."""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--blocks", "sizes", multiple=True, type=int, default=SIZES, show_default=True, help="In an index.")
@click.option("--queries", default=128, show_default=True, help="A round.")
@click.option("--k", default=10, show_default=True, help="Blocks that are found for a query.")
@click.option("--rounds", default=5, show_default=True, help="Counted rounds, after one that warms up.")
@subject
def main(files: tuple[Path, ...], sizes: tuple[int, ...], queries: int, k: int, rounds: int) -> dict[str, Any]:
    """Building and searching, beside Pyserini and bm25s."""
    torch.set_num_threads(1)
    roof = ceiling.measure()
    blocks, asked = cut(files, max(sizes), queries)
    contests, result = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            root = Path(scratch) / str(size)
            root.mkdir()
            builders, searchers = contestants(root, blocks[:size], asked, k)
            building = compete(builders, BUILDING_ROUNDS, units=dict.fromkeys(builders, size))
            contests[size] = searching = compete(
                {name: make() for name, make in searchers.items()},
                rounds,
                units=dict.fromkeys(searchers, len(asked)),
                judge=alike(TOLERANCE),
            )
            work = ceiling.Work(bytes=bytes_a_query(root / "silo", blocks[:size], asked))
            result[str(size)] = {
                "building": building.told("silo"),
                "searching": searching.told("silo"),
                "ceiling": roof.share(work, searching.taken("silo").value, 1),
            }
            say(f"{size:,} blocks: { {name: str(searching.rate(name)) for name in searchers} } queries/s")
    return {
        "seed": 0,
        "data": files_hash(files),
        "k": k,
        "queries": queries,
        "rounds": rounds,
        "peers": versions("pyserini", "bm25s", "numba"),
        "ceiling": roof.told(),
        "result": result,
        "growth": growth(contests) if len(sizes) > 2 else None,
    }


def cut(files: Sequence[Path], blocks: int, queries: int) -> tuple[list[str], list[str]]:
    """So many blocks of restricted text, and queries from other documents."""
    documents = [d for file in files for d in open_source(str(file)) if not DEFAULT_POLICY.tier(d).permissive]
    documents.sort(key=lambda document: sha256(document.id.encode()))
    found: list[str] = []
    asked: list[str] = []
    for document in documents:
        words = WORD.findall(document.full_text.lower())
        if len(found) < blocks:
            starts = range(0, len(words) - BLOCK_WORDS + 1, BLOCK_WORDS // 2)
            found += [" ".join(words[at : at + BLOCK_WORDS]) for at in starts]
        elif len(asked) < queries:
            if len(once := list(dict.fromkeys(words))) >= QUERY_WORDS:
                asked.append(" ".join(once[-QUERY_WORDS:]))
        else:
            return found[:blocks], asked
    raise click.ClickException(
        f"the files have {len(found):,} blocks and {len(asked)} queries of restricted text; name fewer with --blocks"
    )


Found = list[list[float]]
"""The scores of the best blocks of each query."""


def contestants(
    root: Path, blocks: list[str], asked: list[str], k: int
) -> tuple[dict[str, Callable[[], None]], dict[str, Callable[[], Callable[[], Found]]]]:
    """Who builds an index of blocks, and who opens what was built so as to search it."""
    engines: dict[str, tuple[Callable[[], None], Callable[[], Callable[[], Found]]]] = {
        "silo": (lambda: build_silo(root / "silo", blocks), lambda: open_silo(root / "silo", asked, k)),
        "pyserini": (
            lambda: build_pyserini(root / "pyserini", blocks),
            lambda: open_pyserini(root / "pyserini", asked, k),
        ),
    }
    for backend in ("numpy", "numba"):
        if not (installed("bm25s") and installed(backend)):
            say(f"bm25s with {backend} is not installed, and left out")
            continue
        name = f"bm25s, {backend}"
        at = root / name
        engines[name] = (
            lambda at=at, backend=backend: build_bm25s(at, blocks, backend),  # type: ignore[misc]
            lambda at=at, backend=backend: open_bm25s(at, asked, k, backend),  # type: ignore[misc]
        )
    return {name: of[0] for name, of in engines.items()}, {name: of[1] for name, of in engines.items()}


def installed(package: str) -> bool:
    """Whether a peer is there."""
    return importlib.util.find_spec(package) is not None


def build_silo(directory: Path, blocks: list[str]) -> None:
    """Our index."""
    build_index(directory, (Block(f"{number:09d}", text) for number, text in enumerate(blocks)))


def open_silo(directory: Path, asked: list[str], k: int) -> Callable[[], Found]:
    """Our searcher."""
    searcher = BM25Searcher([directory])
    return lambda: [[score for _, score in hits] for hits in searcher.search(asked, k)]


def build_pyserini(directory: Path, blocks: list[str]) -> None:
    """Anserini's index, written by its own indexer."""
    indexer = java_class("io.anserini.index.SimpleIndexer")(
        ["-index", str(directory), "-pretokenized", "-input", "", "-collection", "JsonCollection", "-threads", "1"]
    )
    for number, text in enumerate(blocks):
        indexer.addRawDocument(json.dumps({"id": str(number), "contents": text}))
    indexer.close()


def open_pyserini(directory: Path, asked: list[str], k: int) -> Callable[[], Found]:
    """Anserini's searcher."""
    searcher = java_class("io.anserini.search.SimpleSearcher")(str(directory))
    searcher.set_bm25(K1, B)
    boosted, bag = (
        java_class(name)
        for name in (
            "org.apache.lucene.search.BoostQuery",
            "io.anserini.search.query.BagOfWordsQueryGenerator",
        )
    )
    generator, analyzer = bag(), java_class("org.apache.lucene.analysis.core.WhitespaceAnalyzer")()

    def search() -> Found:
        found = []
        for text in asked:
            query = boosted(generator.buildQuery("contents", analyzer, text), FINER)
            found.append([hit.score / FINER for hit in searcher.search(query, k)])
        return found

    return search


def build_bm25s(directory: Path, blocks: list[str], backend: str) -> None:
    """bm25s's index, saved too, as the others' are."""
    import bm25s

    index = bm25s.BM25(k1=K1, b=B, method="lucene", backend=backend)
    index.index(bm25s.tokenize(blocks, **_AS_THEY_ARE), show_progress=False)
    index.save(directory)


def open_bm25s(directory: Path, asked: list[str], k: int, backend: str) -> Callable[[], Found]:
    """bm25s's searcher, its index in memory."""
    import bm25s

    index = bm25s.BM25.load(directory)
    index.backend = backend
    if backend == "numba":
        index.activate_numba_scorer()

    def search() -> Found:
        found = []
        for text in asked:
            words = bm25s.tokenize([text], return_ids=False, **_AS_THEY_ARE)
            found.append(index.retrieve(words, k=k, show_progress=False, n_threads=1).scores[0].tolist())
        return found

    return search


_AS_THEY_ARE: dict[str, Any] = {"token_pattern": r"\S+", "stopwords": None, "stemmer": None, "show_progress": False}


def bytes_a_query(directory: Path, blocks: list[str], asked: list[str]) -> float:
    """Bytes of the postings of a query's words, on average."""
    frequency = Counter(word for text in blocks for word in set(text.split()))
    postings = sum(path.stat().st_size for path in directory.glob("*.doc"))
    read = sum(frequency[word] for text in asked for word in text.split())
    return postings / sum(frequency.values()) * read / len(asked)


def growth(contests: dict[int, Contest]) -> dict[str, Any]:
    """How the time of a search grows with the number of blocks."""
    names = list(next(iter(contests.values())).seconds["wall"])
    return {
        name: exponent(
            list(contests), np.transpose([each.seconds["wall"][name] for each in contests.values()]).tolist()
        )
        for name in names
    }
