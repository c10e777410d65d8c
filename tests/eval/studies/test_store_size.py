"""Growing stores: nested views that answer as stores of their own, and a line that is fitted as it should be."""

import itertools

import numpy as np
import pytest

from eval.perplexity import perplexities, score
from eval.studies import store_size
from eval.studies.subject import rows_of
from silo.errors import UsageError
from silo.files import read_sealed


@pytest.fixture(scope="module")
def result(subject):
    return store_size.study(subject, 4)


def test_sizes_are_nested_and_double(subject):
    """Each store is a part of the next and has at least half its tokens; the last has all."""
    rows = rows_of(subject.store)
    stores = store_size.nested(rows, 4)
    tokens = [sum(row.end - row.begin for row in documents) for documents in stores]
    longest = max(row.end - row.begin for row in rows)
    for less, more in itertools.pairwise(stores):
        assert more[: len(less)] == less
    for size, power in zip(tokens, (3, 2, 1, 0), strict=True):
        assert 0 <= size - tokens[-1] / 2**power < longest
    assert len(stores[-1]) == len(rows)
    with pytest.raises(UsageError, match="at most one for each document"):
        store_size.nested(rows, len(rows) + 1)


def test_each_size_is_a_store_of_its_own(result, subject, make_store):
    """The smallest size has the perplexities, and the weights, of a store that holds its documents only."""
    small = store_size.nested(rows_of(subject.store), 4)[0]
    names = {row.id for row in small}
    shards = [subject.store.shard(name) for name in subject.store.manifest.shards]
    own = make_store("small")
    own.insert([each for shard in shards for each in shard.documents() if each.document.id in names])
    mixture = own.mixture(subject.model, subject.methods)
    weighings = subject.weighings(mixture)
    texts = subject.texts(subject.test)
    found = result["sizes"][0]
    assert found["weights"] == {name: each.to_json() for name, each in weighings.items()}
    expected = perplexities(score(mixture, texts), weighings)
    assert {name: each[0] for name, each in found["perplexity"].items()} == pytest.approx(expected, rel=1e-12)
    assert result["sizes"][-1]["perplexity"]["all"][0] < result["sizes"][0]["perplexity"]["all"][0]


def test_the_line(result):
    """A power law is fitted exactly; noise takes its share from r²; the study's fits are of its own numbers."""
    tokens = np.asarray([10, 20, 40, 80, 160])
    exact = store_size.log_linear(tokens, 50.0 * tokens**-0.25)
    assert exact["nats_a_doubling"] == pytest.approx(-0.25 * np.log(2))
    assert exact["at_one_token"] == pytest.approx(50)
    assert exact["r2"] == pytest.approx(1)
    noisy = store_size.log_linear(tokens, [8, 9, 5, 7, 4])
    expected = np.corrcoef(np.log(tokens), np.log([8, 9, 5, 7, 4]))[0, 1] ** 2
    assert noisy["r2"] == pytest.approx(expected)
    own = [(each["tokens"], each["perplexity"]["lm+knn"][0]) for each in result["sizes"]]
    assert result["fits"]["lm+knn"] == store_size.log_linear(*zip(*own, strict=True))


def test_the_command(run):
    """The record has the sizes that were asked for, and the figure the fit."""
    done, out = run("store-size", "--sizes", 3)
    assert done.exit_code == 0, done.stderr
    result = read_sealed(out, 1)["result"]
    assert len(result["sizes"]) == 3
    assert f"{result['fits']['all']['r2']:.3f}" in out.with_suffix(".svg").read_text()
