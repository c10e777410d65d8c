"""The mathematics of mixing: against slow references, exact limits, and a grid that the fit must beat."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silo.mixing import (
    discounted,
    fit_weights,
    interpolate,
    neighbour_distribution,
    neighbour_probability,
    neighbour_weights,
    perplexity,
)

DISTANCES = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8)


def slow_weights(distances: list[float], temperature: float) -> list[float]:
    """exp(-d²/τ) over its sum, shifted by the nearest as one does on paper."""
    nearest = min(distances)
    terms = [math.exp((nearest - distance) / temperature) for distance in distances]
    return [term / math.fsum(terms) for term in terms]


@given(DISTANCES, st.floats(0.01, 1000))
def test_neighbour_weights_are_a_softmax_of_negative_distance(distances, temperature):
    """Weights are exp(-d²/τ) over their sum, they sum to 1, and a nearer neighbour never has less."""
    ours = neighbour_weights(torch.tensor([distances], dtype=torch.float32), temperature)[0].numpy()
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, slow_weights(distances, temperature), rtol=1e-9, atol=1e-300)
    assert math.fsum(ours) == pytest.approx(1, abs=1e-12)
    in_order = ours[np.argsort(distances, kind="stable")]
    assert (np.diff(in_order) <= 0).all()


@given(DISTANCES, st.integers(0, 5))
def test_missing_neighbours_have_no_weight(distances, missing):
    """Infinite distances weigh nothing and take nothing from the others; a row of none but them is all zero."""
    padded = torch.tensor([distances + [math.inf] * missing, [math.inf] * (len(distances) + missing)])
    found, none = neighbour_weights(padded, 2.0)
    assert torch.equal(found[: len(distances)], neighbour_weights(padded[:1, : len(distances)], 2.0)[0])
    assert torch.equal(found[len(distances) :], torch.zeros(missing, dtype=torch.float64))
    assert torch.equal(none, torch.zeros_like(none))


def test_temperature_by_hand():
    """Distances 0 and τ·ln 3 weigh three to one."""
    weights = neighbour_weights(torch.tensor([[0.0, 8 * math.log(3)]]), 8.0)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]], dtype=torch.float64), rtol=1e-7, atol=0)


def test_neighbours_with_one_token_add_up():
    """A token's probability is the sum over the neighbours that it followed, in the distribution as for a target."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    values = torch.randint(4, (5, 7), generator=generator)
    distribution = neighbour_distribution(weights, values, 6)
    slow = np.zeros((5, 6))
    for row, column in itertools.product(range(5), range(7)):
        slow[row, values[row, column]] += weights[row, column].item()
    np.testing.assert_allclose(distribution.numpy(), slow, rtol=1e-14)
    for token in range(6):
        given_one = neighbour_probability(weights, values, torch.full((5,), token))
        np.testing.assert_allclose(given_one.numpy(), slow[:, token], rtol=1e-14)


def parts(count: int, rows: int = 200, seed: int = 0) -> list[torch.Tensor]:
    """Probabilities of some methods, each good at other tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, generator=generator, dtype=torch.float64) ** (1 + method) for method in range(count)]


def test_interpolation_is_the_weighted_sum():
    """The mixture is Σ λ p, whatever the number of methods."""
    lm, knn, ric = parts(3)
    mixed = interpolate({"lm": lm, "knn": knn, "ric": ric}, {"lm": 0.5, "knn": 0.3, "ric": 0.2})
    assert mixed.dtype == torch.float64
    np.testing.assert_allclose(mixed.numpy(), 0.5 * lm.numpy() + 0.3 * knn.numpy() + 0.2 * ric.numpy(), rtol=1e-14)


def test_all_weight_on_the_model_is_the_model():
    """λ_lm = 1 gives the language model's own bits, beside other methods or alone."""
    lm, knn = parts(2)
    assert torch.equal(interpolate({"lm": lm, "knn": knn}, {"lm": 1.0, "knn": 0.0}), lm)
    assert torch.equal(interpolate({"lm": lm}, {"lm": 1.0}), lm)


@pytest.mark.parametrize(
    "weights", [{"lm": 0.5}, {"lm": 0.5, "knn": 0.4}, {"lm": 0.5, "ric": 0.5}, {"lm": 0.5, "knn": 0.25, "ric": 0.25}]
)
def test_weights_that_do_not_fit_are_refused(weights):
    """A missing method, a method too many and a sum that is not 1 are errors, not a silently smaller mass."""
    lm, knn = parts(2)
    with pytest.raises(ValueError, match="must sum to 1"):
        interpolate({"lm": lm, "knn": knn}, weights)


def log_likelihood(methods: list[torch.Tensor], weights) -> float:
    mixed = sum(weight * part for weight, part in zip(weights, methods, strict=True))
    return mixed.clamp_min(1e-300).log().sum().item()


@pytest.mark.parametrize("count", [2, 3])
def test_the_fit_beats_a_grid(count: int):
    """No point of a fine grid over the weights gives validation text more probability than the fitted ones."""
    methods = parts(count)
    steps = 200 if count == 2 else 50
    best = max(
        log_likelihood(methods, (*point, 1 - sum(point)))
        for point in itertools.product(np.linspace(0, 1, steps + 1), repeat=count - 1)
        if sum(point) <= 1
    )
    assert log_likelihood(methods, fit_weights(methods)) >= best - 1e-9


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([1, 5, 300]), st.sampled_from([0.1, 1.0, 30.0]))
def test_the_fit_is_never_worse_than_a_part(seed: int, count: int, rows: int, sharpness: float):
    """Fitted weights lie in the simplex, and a mixture by them is at least as good as each method alone."""
    methods = [part**sharpness for part in parts(count, rows, seed)]
    weights = fit_weights(methods)
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    alone = [log_likelihood(methods, row) for row in np.eye(count)]
    assert log_likelihood(methods, weights) >= max(alone) - 1e-12 * abs(max(alone))


def test_a_useless_method_gets_no_weight():
    """A method that is worse at every token has weight 0, and of equal methods the first has all."""
    good = parts(1)[0]
    assert fit_weights([good * 0.5, good]) == [0.0, 1.0]
    assert fit_weights([good, good]) == [1.0, 0.0]
    assert fit_weights([good]) == [1.0]
    assert log_likelihood([good, good], fit_weights([good, good])) == pytest.approx(log_likelihood([good], [1.0]))


def test_the_fit_is_at_its_summit():
    """No method would gain by more weight: the mark of the global optimum, on likelihoods of every steepness."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        methods = torch.rand(2 + trial % 3, (1, 3, 50, 2000)[trial % 4], generator=generator, dtype=torch.float64)
        methods = methods ** (60 * torch.rand(len(methods), 1, generator=generator))
        weights = torch.tensor(fit_weights(list(methods)), dtype=torch.float64)
        assert (methods / (weights @ methods)).mean(dim=1).max() < 1 + 1e-8, trial


def test_a_rare_rescue_keeps_its_weight():
    """One token in three million that only the model can explain keeps the model's weight above zero."""
    lm, knn = torch.full((3_000_000,), 1e-9, dtype=torch.float64), torch.full((3_000_000,), 0.5, dtype=torch.float64)
    knn[17], lm[17] = 0.0, 0.5
    assert 1e-8 < fit_weights([lm, knn])[0] < 1e-6


def test_hopeless_probabilities_do_not_blind_the_fit():
    """Where one method is next to impossible and another likely, rounding does not make the first the answer."""
    lm, knn = torch.full((1000,), 1e-20, dtype=torch.float64), torch.full((1000,), 0.3, dtype=torch.float64)
    assert fit_weights([lm, knn]) == [0.0, 1.0]
    assert fit_weights([knn, lm]) == [1.0, 0.0]
    assert fit_weights([lm, lm * 1.1, knn])[2] == 1.0


def test_near_twins_do_not_hold_up_the_fit():
    """Where two methods say almost the same, the fit of three is as good as that of the better two."""
    lm, knn = parts(2, 20_000)
    twin = lm * (1 + 0.05 * torch.randn(len(lm), generator=torch.Generator().manual_seed(1), dtype=torch.float64)).abs()
    three = log_likelihood([lm, knn, twin], fit_weights([lm, knn, twin]))
    assert three >= log_likelihood([lm, knn], fit_weights([lm, knn])) - 1e-6
    assert three >= log_likelihood([twin, knn], fit_weights([twin, knn])) - 1e-6


def test_tokens_that_nobody_explains_do_not_spoil_the_fit():
    """Zero probability by every method, at one token or at all, still gives finite weights that sum to 1."""
    lm, knn = parts(2)
    lm[3] = knn[3] = 0.0
    assert fit_weights([lm, knn])[0] == pytest.approx(fit_weights([lm[4:], knn[4:]])[0], abs=0.05)
    nothing = torch.zeros(5, dtype=torch.float64)
    assert fit_weights([nothing, nothing]) == pytest.approx([0.5, 0.5])


def test_perplexity_by_hand():
    """Tokens of probability 1/2 and 1/8 have a perplexity of 4."""
    assert perplexity(torch.tensor([0.5, 0.125], dtype=torch.float64).log()) == pytest.approx(4)


COUNTS = st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4)


def slow_discounted(orders: list[list[int]], discount: float, below: list[float]) -> list[float]:
    """p of each of five tokens, by the recursion of the paper from the shortest n-gram up."""
    said = below
    for counts in orders:
        total, kinds = sum(counts), sum(count > 0 for count in counts)
        if total:
            said = [
                max(count - discount, 0) / total + discount * kinds / total * lower
                for count, lower in zip(counts, said, strict=True)
            ]
    return said


@given(COUNTS, st.floats(0.01, 1), st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_discounts_are_given_to_shorter_ngrams(orders, discount, below):
    """What is taken off counts goes to the next shorter n-gram, and in the end to what is below: the recursion of the
    paper, and a distribution if that below is one."""
    below = [each / sum(below) for each in below]
    tables = [np.asarray(counts) for counts in orders]
    given_, left = discounted([(hits, hits.sum(), (hits > 0).sum()) for hits in tables], discount)
    ours = given_ + left * np.asarray(below)
    np.testing.assert_allclose(ours, slow_discounted(orders, discount, below), rtol=0, atol=1e-12)
    assert ours.sum() == pytest.approx(1, abs=1e-12)


def test_nothing_known_leaves_everything():
    """Where no suffix occurs, all is left; where one always goes on with one token, the discount alone is."""
    given_, left = discounted([(np.asarray([0, 4]), np.asarray([0, 4]), np.asarray([0, 1]))], 0.8)
    np.testing.assert_allclose(left, [1.0, 0.2])
    np.testing.assert_allclose(given_, [0.0, 0.8])
