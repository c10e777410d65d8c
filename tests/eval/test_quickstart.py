"""The quickstart on a smaller plan: fewer packages, a smaller model, and three owners that need no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import eval.quickstart
from eval.quickstart import Plan
from silo.cli import main
from silo.corpus import split_of
from silo.documents import Document
from silo.files import canonical_json

TRAINING = {
    "token_budget": 32768,
    "vocab_size": 512,
    "sequence_length": 64,
    "batch_size": 16,
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "num_experts": 4,
    },
}


def spread(documents: list[Document]) -> list[Document]:
    """Enough documents that each owner has some in every split: ids are numbered until they fall right."""
    wanted = ["train", "train", "val", "test"]
    result = []
    for index, document in enumerate(documents):
        split = wanted[index // 3 % 4]
        number = next(n for n in range(1000) if split_of(f"{document.id}-{n}", "restricted") == split)
        result.append(
            Document(
                id=f"{document.id}-{number}",
                text=document.text,
                license=document.license,
                owner=document.owner,
                source=document.source,
            )
        )
    return result


@pytest.fixture
def small_plan(documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan whose restricted side is a file."""
    path = tmp_path / "restricted.jsonl"
    path.write_bytes(b"".join(canonical_json(document.to_json()) for document in spread(documents)))
    plan = Plan(["python:click", "python:rich", "python:fsspec"], [str(path)], "Grace", 300, 300, TRAINING)
    monkeypatch.setattr(Plan, "load", classmethod(lambda cls: plan))
    return plan


def test_quickstart_proves_the_removal_and_repeats(small_plan: Plan, tmp_path: Path) -> None:
    """Two runs with one seed remove the owner, equal a store that never held them, and differ in nothing but times."""
    reports = []
    for name in ("first", "second"):
        result = CliRunner().invoke(main, ["quickstart", "--out", str(tmp_path / name), "--seed", "3"])
        assert result.exit_code == 0, result.output
        last = json.loads(result.stdout.splitlines()[-1])
        assert set(last) >= {"model", "store", "perplexity", "removed", "seconds", "peak_memory_bytes"}
        assert set(last["perplexity"]["restricted"]) == {"lm", "lm+knn", "lm+ric", "lm+ngram", "all"}
        assert Path(last["removed"]["receipt"]).is_file()
        assert (tmp_path / name / "report.html").read_text().startswith("<!DOCTYPE html>")
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert all(report.pop("times") for report in reports)
    assert reports[0] == reports[1]
    removal = reports[0]["removal"]
    assert removal["equal"]
    assert removal["distributions_after"] == removal["distributions_fresh"]
    assert removal["store_before"] != removal["store_after"] == removal["fresh_store"]
    assert all(row["removed"] == (row["owner"] == "Grace") for row in reports[0]["owners"])
    shown = [share for token in reports[0]["attribution"] for share in token["after"]["shares"]]
    assert all(share["owner"] != "Grace" for share in shown)


def test_a_difference_is_reported(small_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the store kept something of the owner, the run says that the distributions differ."""
    build_store = eval.quickstart.build_store

    def forgetful(run, model, path, documents, plane):
        kept = documents[1:] if path.name.startswith("store-that") else documents
        return build_store(run, model, path, kept, plane)

    monkeypatch.setattr(eval.quickstart, "build_store", forgetful)
    result = CliRunner().invoke(main, ["quickstart", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "differ" in result.stderr
    assert not json.loads((tmp_path / "out" / "report.json").read_text())["removal"]["equal"]


def test_registry_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a registry the run ends with one line that says which file to put where, and exit status 1."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    result = CliRunner().invoke(main, ["quickstart", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "astroid-4.3.4" in errors[0]
    assert str(tmp_path / "out" / "downloads") in errors[0]


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    """A directory that holds files is refused with exit status 2, and left as it is."""
    (tmp_path / "report.json").write_text("{}")
    result = CliRunner().invoke(main, ["quickstart", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert (tmp_path / "report.json").read_text() == "{}"


def test_the_plan_that_ships_is_pinned() -> None:
    """Every restricted package of the shipped plan is pinned by version and by sha256."""
    plan = Plan.load()
    assert len(plan.restricted) == 5
    assert all("==" in spec and "#sha256=" in spec for spec in plan.restricted)
