"""k, λ and τ: one search answers for all, validation text chooses, and the grid's numbers are the mixture's."""

import numpy as np
import pytest

from eval.perplexity import TEMPERATURES, score
from eval.studies import neighbours
from silo.files import read_sealed
from silo.mixing import perplexity
from silo.nearest import Nearest
from silo.weights import Weights


@pytest.fixture(scope="module")
def result(subject):
    return neighbours.study(subject, Nearest.k)


def test_the_nearest_of_many_are_the_nearest(subject):
    """The first k of one large search are what a search for k gives, bit for bit."""
    index, texts = subject.store.neighbours(), subject.texts(subject.test)
    large = neighbours.read(subject.model, index, texts, 64)
    small = neighbours.read(subject.model, index, texts, 5)
    assert large.distances[:, :5].equal(small.distances)
    assert large.hits[:, :5].equal(small.hits)
    for temperature in (0.5, 8.0):
        assert large.knn(5, temperature).equal(small.knn(5, temperature))


def test_the_grid_is_the_mixture(result, subject):
    """A point of the grid is the perplexity of the mixture with these k, τ and λ on validation text."""
    scores = score(subject.mixture(), subject.texts(subject.validation))
    grid = result["validation"]
    assert grid["k"][-1] == Nearest.k
    for temperature, weight in ((0, 3), (5, 12), (11, 0)):
        weights = Weights({"lm": 1 - grid["lambda"][weight], "knn": grid["lambda"][weight]}, TEMPERATURES[temperature])
        expected = perplexity(scores.log_probabilities(weights))
        assert grid["perplexity"][-1][temperature][weight] == pytest.approx(expected, rel=1e-9)


def test_validation_text_chooses(result, subject):
    """For each k and each λ the point is the grid's lowest, and test perplexity is that of the same point."""
    grid = np.asarray(result["validation"]["perplexity"])
    for number, row in enumerate(result["by_k"]):
        assert row["validation"] == grid[number].min()
    for number, row in enumerate(result["by_lambda"]):
        assert row["validation"] == grid[:, :, number].min()
    test = neighbours.read(subject.model, subject.store.neighbours(), subject.texts(subject.test), Nearest.k)
    for row in (*result["by_k"], *result["by_lambda"], result["chosen"]):
        mixed = (1 - row["lambda"]) * test.lm + row["lambda"] * test.knn(row["k"], row["temperature"])
        assert row["test"] == pytest.approx(perplexity(mixed.log()), rel=1e-12)
    assert result["chosen"]["validation"] <= grid.min()
    assert result["by_lambda"][0]["test"] == pytest.approx(result["lm"]["test"])


def test_the_exact_weight_is_that_of_the_fit(result, subject):
    """At the chosen k and τ no weight is better on validation text than the exact one."""
    chosen = result["chosen"]
    index = subject.store.neighbours()
    validation = neighbours.read(subject.model, index, subject.texts(subject.validation), Nearest.k)
    others = validation.nats(chosen["k"], chosen["temperature"], np.linspace(0, 1, 101).tolist()).exp()
    assert chosen["validation"] <= others.min().item() + 1e-9


def test_the_command(run):
    """k is taken in powers of two up to the largest."""
    done, out = run("neighbours", "--largest", 6)
    assert done.exit_code == 0, done.stderr
    result = read_sealed(out, 1)["result"]
    assert [row["k"] for row in result["by_k"]] == [1, 2, 4, 6]
    assert "neighbours, k" in out.with_suffix(".svg").read_text()
