"""Opting out: the store is not touched, and what the study says of it is what the stores themselves say."""

import json
import shutil

import pytest

from datastore.store import Store
from eval.perplexity import score
from eval.studies import opt_out
from silo.errors import UsageError
from silo.files import read_sealed


@pytest.fixture(scope="module")
def result(subject):
    return opt_out.study(subject, opt_out.owners_of(subject, (), 10))


def test_after_equals_never(result, subject):
    """Every owner's removal leaves the store that never held them, which is another than before."""
    assert {row["owner"] for row in result["owners"]} == {"Ada", "Grace", "Mary"}
    assert result["equal"]
    for row in result["owners"]:
        assert row["equal"]
        assert row["log_probabilities"]["before"] != row["log_probabilities"]["after"]
        assert row["perplexity"]["after"] == row["perplexity"]["never"]
        assert row["stores"]["never"] != subject.store.hash


def test_the_numbers_are_those_of_stores(result, subject, documents, make_store):
    """Perplexity before is that of the whole store; after, that of a store of all others' documents."""
    [row] = [row for row in result["owners"] if row["owner"] == "Ada"]
    stored = [each for each in opt_out.rows_of(subject.store) if each.owner != "Ada"]
    names = {each.id for each in stored}
    others = make_store("others")
    others.insert(
        [
            each
            for name in subject.store.manifest.shards
            for each in subject.store.shard(name).documents()
            if each.document.id in names
        ]
    )
    assert row["stores"]["after"] == others.hash
    weighings = subject.weighings(subject.mixture())
    texts = subject.texts([each for each in subject.test if each.owner == "Ada"])
    for moment, mixture in (("before", subject.mixture()), ("never", subject.mixture(others))):
        assert opt_out.digest(score(mixture, texts), weighings) == row["log_probabilities"][moment]
    assert row["test_tokens"] == sum(len(text.tokens) for text in texts)


def test_one_bit_tells(subject):
    """The digest sees the last bit of one log-probability, which no rounded perplexity shows."""
    scores = score(subject.mixture(), subject.texts(subject.test[:1]))
    weighings = subject.weighings(subject.mixture())
    before = opt_out.digest(scores, weighings)
    scores.given["lm"][3] = scores.given["lm"][3].nextafter(scores.given["lm"].new_tensor(1.0))
    assert opt_out.digest(scores, weighings) != before


def test_the_command_leaves_a_record_and_the_store(run, place):
    """The record is sealed, the figure lies beside it, and nothing of the user's store has changed."""
    before = {path: path.read_bytes() for path in (place / "store").rglob("*") if path.is_file()}
    done, out = run("opt-out", "--owner", "Grace")
    assert done.exit_code == 0, done.stderr
    assert "equal" in done.stdout
    record = read_sealed(out, 1)
    assert [row["owner"] for row in record["result"]["owners"]] == ["Grace"]
    assert record["subject"]["store"] == Store.open(place / "store").hash
    assert record["made"]["command"].startswith(
        "silo eval study opt-out --model model --store store --data test.jsonl "
    )
    figure = out.with_suffix(".svg").read_text()
    assert "store that never held them" in figure
    assert ">Grace<" in figure
    assert {path: path.read_bytes() for path in (place / "store").rglob("*") if path.is_file()} == before


def test_what_is_left_behind_fails(run, monkeypatch):
    """If a removal took out another owner than it should, the record says so and the command fails."""

    def wrong(store: Store, owner: str, directory):
        shutil.copytree(store.path, directory / "after")
        return Store.open(directory / "after")

    monkeypatch.setattr(opt_out, "removed", wrong)
    done, out = run("opt-out", "--owners", 1)
    assert done.exit_code == 1
    assert "does not answer as one that never held them" in done.stderr
    assert json.loads(out.read_bytes())["result"]["equal"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--owner", "Nobody"], "no text of owner 'Nobody' is in the store"), (["--out", "x"], ".json")],
)
def test_wrong_use(run, options, said):
    """An owner without text, and a record without the ending, are errors of use."""
    done, _ = run("opt-out", *options)
    assert done.exit_code == UsageError.exit_code
    assert said in done.stderr
