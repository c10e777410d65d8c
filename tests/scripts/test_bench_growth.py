"""The bench of growth: what is told of laws that are known, and a run over small stores."""

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

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


def test_a_run_over_small_stores(growth, model_dir, tmp_path):
    """Every cost is told at every size with its exponent, and stores that are kept are not made again."""
    rows = sorted(open_source("python:accelerate"), key=lambda row: row.id)[:60]
    texts = [row.to_json() | {"text": row.text[:3000]} for row in rows if len(row.text) > 3000]
    for number, row in enumerate(texts):
        row |= {"license": "MIT" if number % 2 else "GPL-3.0-only", "owner": f"author {number}"}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    sizes = [f"--tokens={n}" for n in (1000, 2000, 4000)] + [f"--owners={n}" for n in (4, 5, 6)]
    typed = [tmp_path / "texts.jsonl", "--model", model_dir, "--stores", tmp_path / "stores", *sizes]
    typed += ["--owned-tokens", "4000", "--rounds", "2"]
    done = CliRunner().invoke(growth.main, list(map(str, typed)), catch_exceptions=False)
    record = json.loads(done.stdout)
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
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("*")}
    again = CliRunner().invoke(growth.main, list(map(str, typed)), catch_exceptions=False)
    assert again.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("*") if path.name != ".lock"} == {
        path: at for path, at in made.items() if path.name != ".lock"
    }
