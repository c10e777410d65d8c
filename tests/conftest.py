"""What many tests share: a small real corpus, a small model really trained on it, and a store of it.

The text is that of distributions which every installation of SILO has. "Restricted" documents here are the same kind
of files under a copyleft licence label and owners of their own, so that a test needs no network; the quickstart's own
copyleft packages are real.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from silo.collect import collect
from silo.documents import Document
from silo.sources import open_source

torch.set_num_threads(1)
OWNERS = ("Ada", "Grace", "Mary")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The permissive side of a collected corpus."""
    out = tmp_path_factory.mktemp("corpus") / "out"
    collect(["python:click", "python:rich", "python:fsspec"], out, pairs=True)
    return out / "permissive"


@pytest.fixture(scope="session")
def model_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100,000 parameters, trained by the command that users call."""
    root = tmp_path_factory.mktemp("model")
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"corpus: {corpus}\noutput: {root / 'model'}\ntoken_budget: 65536\nvocab_size: 512\nsequence_length: 64\n"
        "model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,"
        " intermediate_size: 64, num_experts: 4}\n"
    )
    subprocess.run([sys.executable, "-m", "silo", "train", str(recipe)], check=True, capture_output=True)
    return root / "model"


@pytest.fixture(scope="session")
def model(model_dir: Path):
    """That model, loaded."""
    from silo.language_model import LanguageModel

    return LanguageModel.load(model_dir)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Twelve short documents of three owners, four each: the heads of real files."""
    files = sorted(open_source("python:accelerate", downloads=None), key=lambda document: document.id)
    return [
        replace(
            file,
            id=f"{owner}/{number}",
            text=file.text[:1500],
            owner=owner,
            license="GPL-3.0-only",
            source=f"{owner}'s",
        )
        for number in range(4)
        for file, owner in zip(files[number * 3 : number * 3 + 3], OWNERS, strict=True)
    ]


@pytest.fixture(scope="session")
def control(model, corpus: Path):
    """A control plane fitted on permissive text that the model did not train on."""
    from datastore.control import fit_control_plane
    from silo.licensing import DEFAULT_POLICY

    return fit_control_plane(model, corpus, DEFAULT_POLICY, set())


@pytest.fixture
def make_store(model, model_dir: Path, control, tmp_path: Path):
    """A function that makes a store of some documents under a name."""
    from datastore.store import Store

    def make(name: str, documents: list[Document] = []) -> Store:  # noqa: B006 (never changed)
        store = Store.create(tmp_path / name, model, model_dir / "tokenizer.json", control)
        if documents:
            store.add(documents, model)
        return store

    return make
