"""The bench of growth: what is told of laws that are known, and a run over small stores."""

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from datastore import groups
from datastore.store import Store
from silo.sources import open_source

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def growth():
    """``scripts/bench/growth.py``, with little to measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        module = importlib.import_module("bench.growth")
        patch.setattr("bench.ceiling.ARRAY_BYTES", 2**20)
        patch.setattr("bench.ceiling.MATRIX", 64)
        patch.setattr("bench.ceiling.READS", 2**10)
        patch.setattr(module, "ENCODED_TOKENS", (500, 1000, 2000))
        patch.setattr(module, "WINDOW", 64)
        yield module


def test_a_known_law_is_found_and_projected(growth):
    """What takes four times the time at twice the size has the exponent 2, and grows on so."""
    seconds = {"wall": {str(size): [1e-6 * size**2, 2e-6 * size**2] for size in (10, 20, 40)}}
    told = growth.told(growth.Contest(seconds))
    assert told["wall"]["exponent"].value == pytest.approx(2)
    result = {"tokens": {"a query": told}, "encoded": {"documents": told}}
    assert growth.projected(result, 400)["a query"] == pytest.approx(1.5e-6 * 400**2)


def test_work_is_a_share_of_the_ceiling(growth):
    """What would take a tenth of the time at the ceiling, by bytes or operations, has reached a tenth of it."""
    rate = {"1": growth.Measured(100.0, 100.0, 100.0)}
    roof = growth.Ceiling(copy=rate, triad=rate, matmul=rate, random=rate)
    assert roof.share(growth.Work(bytes=50, flops=20), 5, 1) == {
        "bytes": 50,
        "flops": 20,
        "seconds_at_the_ceiling": 0.5,
        "share": 0.1,
    }


@pytest.fixture(scope="module")
def small(model_dir, tmp_path_factory):
    """What to type: some documents of both sides, the model, and where stores are kept."""
    root = tmp_path_factory.mktemp("growth")
    rows = sorted(open_source("python:accelerate"), key=lambda row: row.id)[:60]
    texts = [row.to_json() | {"text": row.text[:3000]} for row in rows if len(row.text) > 3000]
    for number, row in enumerate(texts):
        row |= {"license": "MIT" if number % 2 else "GPL-3.0-only", "owner": f"author {number}"}
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    typed = [root / "texts.jsonl", "--model", model_dir, "--stores", root / "stores", "--rounds", "2"]
    return [*map(str, typed), "--owned-tokens=4000", *(f"--owners={n}" for n in (4, 5, 6))]


def run(module, typed):
    """The record of a run that is sound."""
    done = CliRunner().invoke(module.main, typed, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) | {"command": f"python scripts/bench {module.__name__.partition('.')[2]} f.jsonl"}


def test_a_run_over_small_stores(growth, small, monkeypatch):
    """Every cost is told at every size with its exponent, and stores that are kept are not made again; the large owner
    has a group alone."""
    monkeypatch.setattr(groups, "ALONE_TOKENS", 4000)
    typed = [*small, *(f"--tokens={n}" for n in (1000, 2000, 4000))]
    record = run(growth, typed)
    assert {of: set(found) for of, found in record["result"].items()} == {
        "tokens": {
            "a query for neighbours",
            "a query for blocks",
            "a token of the ∞-gram",
            "opening",
            "removing one document",
        },
        "owners": {"opening", "removing an owner in a group", "removing an owner with a group"},
        "encoded": {"documents"},
    }
    for found in record["result"]["tokens"].values():
        assert set(found["wall"]["seconds"]) == {"1000", "2000", "4000"}
        assert len(found["wall"]["exponent"]) == 3
    assert set(record["projected"]) == {"1000000000", "100000000000"}
    assert all(growth.BOUNDED not in projected for projected in record["projected"].values())
    assert importlib.import_module("render_bench").growth(record).count("| opening |") == 3  # and where it would go
    stores = Path(typed[typed.index("--stores") + 1])
    for n in (4, 5, 6):
        assert [growth.LARGE] in [list(group.shards) for group in Store.open(stores / f"owners-{n}").manifest.groups]
    made = {path: path.stat().st_mtime_ns for path in stores.rglob("*")}
    run(growth, typed)
    assert {path: path.stat().st_mtime_ns for path in stores.rglob("*")} == made
    other = CliRunner().invoke(growth.main, [*typed, "--owned-tokens=5000"])
    assert (other.exit_code, other.stdout) == (1, "")
    assert "owners-4 is a store of" in other.stderr


def test_a_size_that_the_text_has_not_is_refused(growth, small):
    """More tokens than there are in the files are not told as if they were there."""
    done = CliRunner().invoke(growth.main, [*small, *(f"--tokens={n}" for n in (1000, 2000, 10_000_000))])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "tokens of restricted text, and 10,000,000 are wanted" in done.stderr


def test_opening_beside_faiss(growth, small, monkeypatch):
    """Stores and FAISS find the same neighbours, and each is told; a FAISS that reads other lists stops the run."""
    opening = importlib.import_module("bench.opening")
    record = run(opening, small)
    ratios = importlib.import_module("bench.ratios").ratios(
        record | {"command": "python scripts/bench opening f.jsonl"}
    )
    assert {(each.what, each.peer) for each in ratios} == {
        (f"opening, {n} owners", peer) for n in (4, 5, 6) for peer in ("FAISS, read", "FAISS, mapped")
    }
    assert importlib.import_module("render_bench").opening(record).count("| silo, ") == 3
    monkeypatch.setattr(opening, "PROBES", 1)
    done = CliRunner().invoke(opening.main, small)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert " gave " in done.stderr.splitlines()[-1]


def test_the_ceiling(growth):
    """Each rate is told with one thread and with all, and rendered."""
    ceiling = importlib.import_module("bench.ceiling")
    record = run(ceiling, ["--rounds", "1"])
    assert set(record["result"]) == {"copy", "triad", "matmul", "random"}
    assert all(of["1"][0] > 0 for of in record["result"].values())
    assert "copying, GB/s" in importlib.import_module("render_bench").ceiling(record)
