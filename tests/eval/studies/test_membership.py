"""Membership: members of the whole store stand out, and what was removed is as if it never was there."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest

from datastore.store import Store
from eval.perplexity import score
from eval.studies import membership
from eval.studies.continuation import continued, longest_run, longest_subsequence
from silo.errors import UsageError
from silo.files import read_sealed
from silo.weights import Weights


@pytest.fixture(scope="module")
def strangers(subject, documents):
    """The subject, with text of which the store has nothing to compare with."""
    long = [each for each in documents if len(each.text) > 1000]
    others = [replace(each, id=f"new/{each.id}", text=each.text[700:1200]) for each in long]
    return replace(subject, test=others)


@pytest.fixture(scope="module")
def result(strangers):
    return membership.study(strangers, "document", 4)


def test_removed_is_as_never_held(result):
    """At 1, 2 and 4 removals scores and writing are those of a store that never held the text."""
    assert [step["removals"] for step in result["steps"]] == [1, 2, 4]
    assert result["equal"]
    for step in result["steps"]:
        for name in ("loss", "min_k"):
            assert step["auc"][name]["after"] == step["auc"][name]["never"]
            assert step["auc"][name]["before"] > 0.9, "a member of the whole store stands out"
            assert step["priv_leak"][name] == 0
        assert step["rouge_l"]["after"] == step["rouge_l"]["never"]
        assert step["longest_run"]["after"] == step["longest_run"]["never"]
    # The documents begin with one licence notice, so the others still know it; the whole store writes it on, whole.
    assert result["steps"][0]["rouge_l"]["before"] == 1.0


def test_the_store_writes_its_text_on(strangers):
    """With all weight on what follows the longest suffix, the whole store writes a passage of its own on, whole."""
    [first] = membership.leaving(strangers, "document", 1)
    prompts = first.passage.tokens[None, : membership.PROMPT]
    weighing = Weights({"lm": 0.01, "ngram": 0.99})
    written = continued(strangers.mixture(), weighing, prompts, membership.WRITTEN)[0].tolist()
    truth = first.passage.tokens[membership.PROMPT :].tolist()
    run = longest_run(written, truth)
    assert run > 20
    assert longest_subsequence(written, truth) >= run


def test_passages_are_the_stores(strangers):
    """A passage that leaves is text of the document that is removed, and each removal is another's."""
    for unit, count in (("document", 5), ("owner", 2)):
        going = membership.leaving(strangers, unit, count)
        assert len({each.name for each in going}) == count
        assert sum(len(each.ids) for each in going) == len(frozenset().union(*(each.ids for each in going)))
        for each in going:
            owner = each.passage.document.owner
            documents = {of.document.id: of.tokens for of in strangers.store.shard(owner).documents()}
            whole = documents[each.passage.document.id]
            assert each.passage.document.id in each.ids
            assert np.array_equal(whole[each.passage.begin :][: len(each.passage.tokens)], each.passage.tokens)


def test_auc_and_scores():
    """AUC is the share of pairs in the right order; Min-K% Prob looks at the least probable fifth alone."""
    members, others = np.asarray([3.0, 1.0, 2.0]), np.asarray([1.0, 0.0])
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(members, others)]
    assert membership.auc(members, others) == pytest.approx(np.mean(pairs))
    logs = np.asarray([[-5.0, -1, -1, -1, -9, -1, -1, -1, -1, -1]])
    assert membership.min_k(logs) == pytest.approx([-7])
    assert membership.mean_log(logs) == pytest.approx([-2.2])


def test_too_many_removals(strangers):
    """As many removals as documents would leave nothing to ask."""
    with pytest.raises(UsageError, match="smaller number"):
        membership.leaving(strangers, "document", 12)


def test_what_is_left_behind_is_seen(strangers, monkeypatch):
    """If nothing is removed, the study says that the store does not answer as one that never held the text."""
    monkeypatch.setattr(Store, "remove", lambda *_, **__: None)
    result = membership.study(strangers, "document", 1)
    assert result["equal"] is False
    assert result["steps"][0]["equal"] is False


def test_the_store_is_not_touched(strangers, result, tmp_path):
    """After the study the store is whole: a copy of it passes verification, with the same hash."""
    shutil.copytree(strangers.store.path, tmp_path / "copy")
    assert Store.open(tmp_path / "copy").verify()["hash"] == strangers.store.hash
    passages = [each.passage for each in membership.leaving(strangers, "document", 4)]
    scores = score(strangers.mixture(Store.open(strangers.store.path)), passages)
    assert len(scores) == 4 * (membership.PROMPT + membership.WRITTEN)


def test_the_command(run):
    """Owners can be what leaves; the figure has both questions."""
    done, out = run("membership", "--by", "owner", "--removals", 1)
    assert done.exit_code == 0, done.stderr
    result = read_sealed(out, 1)["result"]
    assert result["unit"] == "owner"
    assert result["steps"][0]["documents"] == 4
    assert "ROUGE-L" in out.with_suffix(".svg").read_text()
