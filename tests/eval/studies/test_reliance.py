"""Reliance: what is cut is what the mask says, and nothing else."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eval.studies import reliance
from silo.cli import main
from silo.files import read_sealed
from silo.in_context import InContext, find_blocks, read_blocks


@pytest.fixture(scope="module")
def placed(subject):
    """A text with the blocks of its strides, and the positions of it that are read."""
    text = subject.texts(subject.test)[1]
    found = find_blocks(subject.model, subject.store.blocks(), text.tokens, 0, len(text.tokens), InContext())
    return text, found, dict(reliance.places(subject, text, found))


def test_nothing_cut_is_the_models_reading(subject, placed):
    """With no pair cut the probability is what retrieval in context gives by the best block alone."""
    text, found, places = placed
    assert len(places) > 3
    reading = read_blocks(subject.model, text.tokens, found)
    for position, place in places.items():
        expected = reading.log_probabilities[reading.rows[position, 0], place.token]
        assert reliance.read(subject, place)[0][0].item() == pytest.approx(float(expected), abs=1e-4)


def test_masks_cut_pairs():
    """Each mask is causal but for the pairs that it names."""
    seen = reliance.masks(7, 2).squeeze(1).numpy()
    causal = np.tril(np.ones((7, 7), dtype=bool))
    assert (seen[0] == causal).all()
    assert np.argwhere(causal & ~seen[1]).tolist() == [[6, 1], [6, 2]]
    assert np.argwhere(causal & ~seen[2]).tolist() == [[row, column] for row in range(3, 7) for column in (1, 2)]
    assert np.argwhere(causal & ~seen[3]).tolist() == [[6, 3], [6, 4], [6, 5]]
    assert (seen <= causal).all()


def test_what_cannot_be_seen_does_not_matter(subject, placed):
    """With the text cut from the block, another block of that length gives the same; with nothing cut it does not."""
    place = next(iter(reversed(placed[2].values())))
    inputs = place.inputs.clone()
    inputs[1 : 1 + place.block] = inputs[1 : 1 + place.block].roll(7) % 300
    logs, changed = reliance.read(subject, place)[0], reliance.read(subject, place._replace(inputs=inputs))[0]
    text = reliance.CUTS.index("text")
    assert changed[text].item() == pytest.approx(logs[text].item(), abs=1e-6)
    assert abs((changed[0] - logs[0]).item()) > 1e-4


def test_the_path_through_the_text_remains(subject, placed):
    """In a model of two layers, cutting the last position only is less than cutting all of the text."""
    place = next(iter(reversed(placed[2].values())))
    logs = reliance.read(subject, place)[0]
    last, text = (reliance.CUTS.index(name) for name in ("last", "text"))
    assert not torch.allclose(logs[last], logs[text], atol=1e-7)


def test_groups_add_up(subject):
    """Tokens in the block and others are all tokens, and what is lost is the difference of the log-probabilities."""
    result = reliance.study(subject)["groups"]
    every, inside, outside = (result[name] for name in reliance.GROUPS)
    assert every["positions"] == inside["positions"] + outside["positions"]
    for cut in reliance.CUTS[1:]:
        logs = every["log_probability"]
        assert every["lost"][cut][0] == pytest.approx(logs["all"] - logs[cut])
        mixed = inside["lost"][cut][0] * inside["positions"] + outside["lost"][cut][0] * outside["positions"]
        assert mixed / every["positions"] == pytest.approx(every["lost"][cut][0])


def test_the_command(place, tmp_path):
    """The study needs no weights; its figure names the cuts."""
    out = tmp_path / "reliance.json"
    options = ["--model", place / "model", "--store", place / "store", "--data", place / "test.jsonl", "--out", out]
    done = CliRunner().invoke(main, ["eval", "study", "reliance", *map(str, options), "--max-tokens", "200"])
    assert done.exit_code == 0, done.stderr
    assert read_sealed(out, 1)["result"]["documents"] > 0
    assert "attention knocked out" in out.with_suffix(".svg").read_text()
