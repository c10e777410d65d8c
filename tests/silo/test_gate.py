"""The gate: what it learns from made-up evidence, its limits, and its file."""

import json
from dataclasses import replace

import pytest
import torch

import silo.gate
from silo.errors import UsageError
from silo.gate import Gate, Lessons, fit_gate
from silo.nearest import Nearest, Spare

TOKENS = 2000


def lessons(seed: int, *, neighbours: bool = True) -> Lessons:
    """Tokens of which the ∞-gram knows those with a long suffix, the neighbours those that are near, the model few.

    Half of the tokens are near and half are long, apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    long, near = (torch.rand(TOKENS, generator=generator) < 0.5 for _ in range(2))
    given = {
        "lm": torch.full((TOKENS,), 0.05, dtype=torch.float64),
        "ngram": torch.where(long, 0.9, 0.0).double(),
    }
    evidence = {
        "lm_entropy": torch.rand(TOKENS, generator=generator).double(),
        "ngram_length": torch.where(long, 2.0, 0.5).double(),
        "ngram_class": long.double(),
    }
    right = torch.rand(TOKENS, generator=generator) < 0.7
    distances = torch.where(near, 1.0, 20.0).float().unsqueeze(1) + torch.tensor([0.0, 4.0])
    distances[::7] = torch.inf  # where no neighbour was found
    near = near & torch.isfinite(distances[:, 0])
    evidence["knn_nearest"] = torch.where(near, 0.0, 3.0).double()
    hits = torch.stack([near & right, near & ~right], dim=1)
    return Lessons(evidence, given, distances if neighbours else None, hits if neighbours else None)


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(silo.gate, "STEPS", 600)
        yield


@pytest.fixture(scope="module")
def gate(_few_steps) -> Gate:
    return fit_gate(lessons(0), lessons(1), ["lm", "knn", "ngram"])


def test_it_learns_what_each_piece_of_evidence_is_worth(gate):
    """Long suffixes move the weight to the ∞-gram, near keys to the neighbours, neither to the model."""
    of = {}
    for near in (0.0, 3.0):
        for long in (2.0, 0.5):
            evidence = {"lm_entropy": 0.5, "knn_nearest": near, "ngram_length": long}
            weights = gate.weigh({name: torch.tensor([value]) for name, value in evidence.items()})
            of[near == 0, long == 2] = {name: value.item() for name, value in weights.items()}
    assert of[False, False]["lm"] > 0.95
    assert of[False, True]["ngram"] > 0.9
    assert of[True, False]["knn"] > 0.9
    assert of[True, True]["lm"] < 0.05


def test_it_beats_every_fixed_weight(gate):
    """On text that it did not learn from, no weights for all tokens alike are as good, whatever τ."""
    asked = lessons(2)
    out = gate._out(asked.evidence)
    value = asked.log_probability(out, gate.methods, gate.base_temperature).mean()
    for knn in (0.0, 0.2, 0.4, 0.6):
        for ngram in (0.0, 0.2, 0.39):
            weights = torch.tensor([1 - knn - ngram, knn, ngram]).clamp_min(1e-9).log()
            for temperature in (0.5, 2.0, 8.0):
                fixed = torch.cat([weights, torch.zeros(1)]).double().expand(TOKENS, 4)
                assert asked.log_probability(fixed, gate.methods, temperature).mean() < value


def test_weights_sum_to_one_and_temperatures_are_bounded(gate):
    """Whatever the evidence, also far from what was learnt: λ sums to 1 within 1e-12, τ is finite and positive."""
    evidence = {name: torch.tensor([0.0, 1e6, -1e6, 3.0]) for name in gate.features}
    assert (sum(gate.weigh(evidence).values()) - 1).abs().max() < 1e-12
    temperatures = gate.temperatures(evidence)
    assert temperatures.shape == (4, 1)
    assert (temperatures > 0).all()
    assert temperatures.isfinite().all()


def test_what_it_minimises_is_the_mixture(gate):
    """The logarithm that is learnt from equals that of Σ λ p with the gate's own λ and τ."""
    asked = lessons(3)
    weights, tau = gate.weigh(asked.evidence), gate.temperatures(asked.evidence)
    of_neighbour = torch.softmax(-asked.distances.double() / tau, dim=1)
    knn = torch.where(asked.distances[:, 0].isfinite(), (of_neighbour * asked.hits).sum(dim=1), asked.given["lm"])
    mixed = weights["lm"] * asked.given["lm"] + weights["knn"] * knn + weights["ngram"] * asked.given["ngram"]
    learnt = asked.log_probability(gate._out(asked.evidence), gate.methods, gate.base_temperature)
    torch.testing.assert_close(learnt, mixed.log(), rtol=1e-9, atol=1e-9)


def test_without_neighbours_it_weighs_the_rest():
    """Methods that are not used are neither weighed nor read."""
    gate = fit_gate(lessons(0, neighbours=False), lessons(1, neighbours=False), ["lm", "ngram"])
    assert gate.methods == ("lm", "ngram")
    assert not any(name.startswith("knn") for name in gate.features)


def test_what_never_varied_decides_nothing_later():
    """Evidence that was the same in all lessons may move by one at use, and the weights stay what they were, nearly."""
    constant = [
        replace(each, evidence={**each.evidence, "knn_found": torch.ones(TOKENS)}) for each in map(lessons, (0, 1))
    ]
    gate = fit_gate(*constant, ["lm", "knn", "ngram"])
    moved = {**constant[1].evidence, "knn_found": torch.zeros(TOKENS)}
    before, after = gate.weigh(constant[1].evidence), gate.weigh(moved)
    long = constant[1].evidence["ngram_class"].bool()
    for weights in (before, after):
        assert weights["ngram"][long].mean() > weights["ngram"][~long].mean() + 0.3


def test_equal_seeds_make_equal_bits(gate):
    """Learning again from the same tokens gives the same file."""
    again = fit_gate(lessons(0), lessons(1), ["lm", "knn", "ngram"])
    assert json.dumps(again.to_json()) == json.dumps(gate.to_json())


def test_as_json_and_back(gate):
    """A gate read from its file gives the same bits."""
    read = Gate.from_json(json.loads(json.dumps(gate.to_json())), where="x")
    evidence = lessons(4).evidence
    for one, other in zip(gate.weigh(evidence).values(), read.weigh(evidence).values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gate.temperatures(evidence), read.temperatures(evidence))


@pytest.mark.parametrize("spare", [None, Spare(), Spare(sure=0.9), Spare(suffix=8, steps=3, pointers=2)])
def test_a_file_says_how_neighbours_were_looked_up(gate, spare):
    """What is never spared has no number there, and a file that says nothing is of the usual way."""
    learnt = replace(gate, nearest=Nearest(k=9, probes=3, metric="inner_product", spare=spare))
    value = json.loads(json.dumps(learnt.to_json(), allow_nan=False))
    assert Gate.from_json(value, where="x").nearest == learnt.nearest
    value.pop("nearest")
    assert Gate.from_json(value, where="x").nearest == Nearest() == gate.nearest


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"methods": ["knn"]},
        {"temperature": 0},
        {"features": ["lm_top"]},
        {"nearest": 256},
        {"nearest": {"k": 0}},
        {"nearest": {"spare": {"never": 1}}},
    ],
)
def test_a_broken_file_is_refused(gate, change):
    """A file whose parts do not fit is a UsageError that says what to do."""
    with pytest.raises(UsageError, match=r"g\.json holds no gate; make one with `silo eval gate`"):
        Gate.from_json({**gate.to_json(), **change}, where="g.json")


def test_evidence_that_is_missing_is_named(gate):
    """A mixture without a method that the gate reads is refused by the method's evidence."""
    with pytest.raises(UsageError, match="the gate reads knn_nearest, which is not there"):
        gate.weigh({name: torch.zeros(1) for name in gate.features if not name.startswith("knn")})
