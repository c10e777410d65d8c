"""Licences: each expression is in the class of what it permits, and each step is the store of all freer text."""

import pytest

from datastore.selection import Selection
from eval.perplexity import score
from eval.studies import licenses
from silo.files import read_sealed


@pytest.fixture(scope="module")
def result(subject):
    return licenses.study(subject)


@pytest.mark.parametrize(
    ("license", "step"),
    [
        ("CC0-1.0", 0),
        ("MIT OR GPL-3.0-only", 0),
        ("MIT AND GPL-3.0-only", 1),
        ("CC-BY-SA-3.0", 1),
        ("GFDL-1.3-or-later", 1),
        ("CC-BY-NC-ND-4.0", 2),
        ("CC-BY-NC-4.0 OR CC-BY-SA-4.0", 1),
        ("LicenseRef-BBC-all-rights-reserved", 3),
        ("", 3),
    ],
)
def test_step_of_a_licence(license, step):
    """A choice takes the freer side, a sum the stricter."""
    assert licenses.step_of(license) == step


def test_steps_add_up(result, subject):
    """The steps' documents are the store's, each once, and the last step answers as the whole store."""
    assert [step["adds"] for step in result["steps"]] == list(licenses.STEPS[:3])
    assert [step["licenses"] for step in result["steps"]] == [["CC-BY-4.0"], ["GPL-3.0-only"], ["CC-BY-NC-4.0"]]
    assert sum(step["tokens"] for step in result["steps"]) == subject.described()["store_tokens"]
    texts, mixture = subject.texts(subject.test), subject.mixture()
    weighings = subject.weighings(mixture)
    whole = subject.perplexities(score(mixture, texts), texts, weighings)
    assert result["steps"][-1]["perplexity"]["all"] == whole


def test_a_step_is_a_view(result, subject):
    """The second step answers as the store without non-commercial text; a group's numbers are of its texts alone."""
    mixture = subject.store.mixture(subject.model, subject.methods, deny=Selection(licenses=("CC-BY-NC-4.0",)))
    weighings = subject.weighings(mixture)
    texts = [text for text in subject.texts(subject.test) if text.document.license == "GPL-3.0-only"]
    found = result["steps"][1]["perplexity"][licenses.STEPS[1]]
    expected = subject.perplexities(score(mixture, texts), texts, weighings)
    assert {name: each[0] for name, each in found.items()} == pytest.approx(
        {name: each[0] for name, each in expected.items()}, rel=1e-12
    )


def test_the_command(run):
    """The record has each step, and the figure names it."""
    done, out = run("licenses")
    assert done.exit_code == 0, done.stderr
    assert len(read_sealed(out, 1)["result"]["steps"]) == 3
    assert "share-alike" in out.with_suffix(".svg").read_text()
