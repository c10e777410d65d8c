"""What the tests of studies share: a store of three owners, and other text of theirs in files."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from datastore.store import Store
from eval.studies.subject import Subject
from silo.cli import main
from silo.files import canonical_json

METHODS = ["lm", "knn", "ngram"]
LICENSES = {"Ada": "CC-BY-4.0", "Grace": "GPL-3.0-only", "Mary": "CC-BY-NC-4.0"}


@pytest.fixture(scope="session")
def place(model, model_dir, control, documents, tmp_path_factory) -> Path:
    """A directory with ``model``, ``store``, ``test.jsonl`` and ``val.jsonl``."""
    root = tmp_path_factory.mktemp("studies")
    (root / "model").symlink_to(model_dir)
    licensed = [replace(each, license=LICENSES[each.owner]) for each in documents]
    store = Store.create(root / "store", model, model_dir / "tokenizer.json", control)
    store.add([replace(each, text=each.text[:600]) for each in licensed], model)
    for name, begin in (("test", 200), ("val", 500)):
        cut = [replace(each, id=f"{name}/{each.id}", text=each.text[begin : begin + 300]) for each in licensed]
        (root / f"{name}.jsonl").write_bytes(b"".join(canonical_json(each.to_json()) for each in cut))
    return root


@pytest.fixture(scope="session")
def subject(place: Path) -> Subject:
    """The same, opened."""
    return Subject.open(
        place / "model", place / "store", METHODS, [place / "test.jsonl"], fit_on=[place / "val.jsonl"], budget=900
    )


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch):
    """A function that runs a study on that subject, with its options, and gives the result and the record's path.

    The words stand in `sys.argv` too, as in a process of its own: the record names its command by them.
    """

    def invoke(name: str, *options: object) -> tuple[Result, Path]:
        out = tmp_path / f"{name}.json"
        chosen = ["--model", place / "model", "--store", place / "store", "--data", place / "test.jsonl"]
        chosen += ["--fit", place / "val.jsonl", "--max-tokens", 900, "--out", out, *options]
        words = ["eval", "study", name, *map(str, chosen)]
        monkeypatch.setattr("sys.argv", ["silo", *words])
        return CliRunner().invoke(main, words), out

    return invoke
