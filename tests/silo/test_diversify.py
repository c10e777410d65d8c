"""D4: what means the same goes first, then what is most like all the rest."""

from pathlib import Path

import numpy as np
import pytest

from silo.audit import read_findings
from silo.collect import collect
from silo.corpus import Corpus
from silo.diversify import redundant


def points(seed: int, centres: int, each: int, spread: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    middle = np.repeat(random.normal(size=(centres, 16)), each, axis=0)
    return (middle + spread * random.normal(size=middle.shape)).astype(np.float32)


@pytest.mark.parametrize("keep", [1.0, 0.81, 0.5, 0.1])
def test_the_share_is_kept(keep):
    """As many documents are left as were asked for, and none goes twice."""
    gone = [each.index for each in redundant(points(0, 10, 20, 0.3), keep)]
    assert len(set(gone)) == len(gone) == 200 - round(keep * 200)


def test_twins_go_before_others():
    """Of twenty pairs of twins among a hundred documents, those that go first are one of each pair."""
    embeddings = points(1, 100, 1, 0)
    embeddings[80:] = embeddings[:20] * 2  # the same direction
    found = [each for each in redundant(embeddings, 0.64) if each.other is not None]
    assert len(found) == 20
    assert {each.index % 80 for each in found} == set(range(20))
    assert all(each.other in ((each.index + 80), (each.index - 80)) for each in found)
    assert min(each.similarity for each in found) == pytest.approx(1, abs=1e-5)


def test_the_same_documents_go_every_time():
    """Nothing is left to chance."""
    one, two = (list(redundant(points(2, 8, 25, 0.5), 0.5)) for _ in range(2))
    assert one == two


def test_collect_diversifies_training_text_alone(model_dir: Path, tmp_path: Path):
    """With a model, a fifth of the training files goes, is listed with what it is like, and held-out text stays."""
    collect(["python:rich"], tmp_path / "plain")
    collect(["python:rich"], tmp_path / "diverse", diversify=(model_dir, 0.8))
    plain, diverse = (Corpus.open(tmp_path / name / "permissive").manifest["counts"] for name in ("plain", "diverse"))
    assert diverse["train"] == round(0.8 * plain["train"])
    assert {split: diverse[split] for split in ("val", "test")} == {split: plain[split] for split in ("val", "test")}
    listed = [f for f in read_findings(tmp_path / "diverse") if f.reason == "redundant: says what others say"]
    assert len(listed) == plain["train"] - diverse["train"]
    assert any("python:rich/" in finding.detail for finding in listed)
