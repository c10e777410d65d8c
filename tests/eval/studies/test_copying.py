"""Copying: runs are looked up as they stand, and a mixture that copies shows."""

import numpy as np
import pytest

from eval.leakage import leakage
from eval.studies import copying
from eval.studies.continuation import continued
from silo.errors import UsageError
from silo.files import read_sealed, sha256


@pytest.fixture(scope="module")
def result(subject):
    return copying.study(subject, prompts=4, prompt=16, written=24, temperature=0.0, longest_copy=5)


def test_runs_are_in_the_store(result, subject):
    """The longest run of a mixture is the longest piece of what it wrote that is a piece of a stored document."""
    chosen = sorted(subject.test, key=lambda each: sha256(each.id.encode()))
    tokens = [subject.model.tokenize(each) for each in chosen]
    begin = np.stack([each[:16] for each in tokens if len(each) >= 40][:4])
    mixture = subject.mixture()
    written = continued(mixture, subject.weighings(mixture)["lm+ngram"], begin, 24)
    held = [
        each.tokens.tolist() for name in subject.store.manifest.shards for each in subject.store.shard(name).documents()
    ]

    def there(run: list[int]) -> bool:
        return any(run == whole[at : at + len(run)] for whole in held for at in range(len(whole) - len(run)))

    longest = []
    for row in written.tolist():
        runs = [row[first:last] for first in range(24) for last in range(first + 1, 25)]
        longest.append(max((len(run) for run in runs if there(run)), default=0))
    found = result["mixtures"]["lm+ngram"]
    assert found["longest"] == max(longest)
    assert found["mean"] == pytest.approx(np.mean(longest))


def test_what_is_copied_shows(result, subject):
    """Held-out text that the store has is found whole; the ∞-gram copies more of the store than the model alone."""
    found = result["mixtures"]
    assert list(found) == [copying.TRUE_TEXT, "lm", "lm+knn", "lm+ngram", "all", copying.LIMITED]
    assert found["all"]["longest"] > 5 >= found[copying.LIMITED]["longest"]
    assert found["lm+ngram"]["mean"] > found["lm"]["mean"]
    assert found[copying.TRUE_TEXT]["longest"] == 24, "the test text of this fixture is cut from stored documents"
    ngrams = subject.store.ngrams()
    assert leakage(ngrams, [np.zeros(5, dtype=np.int32)])["longest"] < 5


def test_drawing_is_repeatable(subject):
    """Equal seeds write equal text, other seeds other text, and every prompt gets as many tokens as asked for."""
    mixture = subject.mixture()
    weighing = subject.weighings(mixture)["all"]
    prompts = np.stack([subject.model.tokenize(each)[:8] for each in subject.test[:3]])
    first, again, other = (
        continued(mixture, weighing, prompts, 12, temperature=1.0, seed=seed).tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
    assert [len(row) for row in first] == [12] * 3


def test_too_few_prompts(subject):
    """More prompts than documents that are long enough are an error of use."""
    with pytest.raises(UsageError, match="smaller number"):
        copying.study(subject, prompts=13, prompt=16, written=24, temperature=0.0, longest_copy=5)


def test_the_command(run):
    """The record names every mixture."""
    done, out = run("copying", "--prompts", 2, "--prompt-tokens", 8, "--new-tokens", 8, "--temperature", 1)
    assert done.exit_code == 0, done.stderr
    assert len(read_sealed(out, 1)["result"]["mixtures"]) == 6
    assert "Model alone" in out.with_suffix(".svg").read_text()
