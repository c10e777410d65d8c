"""The bench of BM25, on some documents: peers must agree, and a run is recorded as it is read."""

import importlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from silo.sources import open_source

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = ["--blocks", "20", "--blocks", "40", "--blocks", "80", "--queries", "5", "--rounds", "2", "--k", "3"]


@pytest.fixture(scope="module")
def bm25():
    """``scripts/bench/bm25.py``, with Pyserini as its one peer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        module = importlib.import_module("bench.bm25")
        patch.setattr(module, "installed", lambda package: False)
        patch.setattr("bench.ceiling.ARRAY_BYTES", 2**20)
        patch.setattr("bench.ceiling.MATRIX", 64)
        patch.setattr("bench.ceiling.READS", 2**10)
        yield module


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Restricted documents."""
    path = tmp_path_factory.mktemp("bench") / "restricted.jsonl"
    rows = [row.to_json() | {"license": "GPL-3.0-only"} for row in open_source("python:accelerate")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    return str(path)


def test_a_run_is_recorded_and_read(bm25, file):
    """Pyserini agrees with us at every size, and ratios, ceiling and growth are told."""
    done = CliRunner().invoke(bm25.main, [file, *SMALL])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    ratios = importlib.import_module("bench.ratios").ratios(record | {"command": "python scripts/bench bm25 f.jsonl"})
    assert {each.peer for each in ratios} == {"pyserini"}
    assert {each.what for each in ratios} == {
        f"BM25, {doing} {size} blocks" for doing in ("building", "searching") for size in (20, 40, 80)
    }
    assert set(record["growth"]) == {"silo", "pyserini"}
    said = importlib.import_module("render_bench").bm25(record | {"command": "python scripts/bench bm25 f.jsonl"})
    assert said.count("| pyserini |") == 3
    for found in record["result"].values():
        assert found["ceiling"]["share"] > 0
        assert found["ceiling"]["bytes"] > 0


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_wrong_scores_stop_the_run(bm25, file, monkeypatch, wrong):
    """A side that scores with another k1 ends the run in one line, and nothing is printed as a result."""
    if wrong == "peer":
        monkeypatch.setattr(bm25, "K1", 1.2)
    else:
        right = bm25.BM25Searcher
        monkeypatch.setattr(bm25, "BM25Searcher", lambda indexes: right(indexes, k1=1.2))
    done = CliRunner().invoke(bm25.main, [file, *SMALL])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: round 0: silo gave ")


def test_too_little_text_is_told(bm25, file):
    """Sizes that the files cannot fill are refused with what they have."""
    with pytest.raises(click.ClickException, match=r"^the files have [\d,]+ blocks and 0 queries"):
        bm25.cut([Path(file)], 10**9, 5)


def test_queries_are_of_other_documents(bm25, file):
    """No query is a block's own text, each of its words comes once, and blocks are of one length."""
    blocks, asked = bm25.cut([Path(file)], 80, 5)
    assert {len(block.split()) for block in blocks} == {bm25.BLOCK_WORDS}
    assert all(len(set(query.split())) == len(query.split()) == bm25.QUERY_WORDS for query in asked)
    assert (len(blocks), len(asked)) == (80, 5)
