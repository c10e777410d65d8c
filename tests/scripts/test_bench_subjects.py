"""What subjects of the bench do with what they measured: judges, and records as their readers expect them."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

MADE = {
    "machine": {"cpu": "one", "cores": 1, "memory_bytes": 2**30, "python": "3", "versions": {}},
    "commit": "c",
    "data": "d",
    "rounds": 3,
}
"""What every record has."""


def test_layers_are_told_as_they_are_read(bench):
    """Each two contestants have a ratio by both clocks, under the names that the reader knows."""
    found = bench("model").compare({name: lambda: sum(range(2000)) for name in ("silo", "transformers")}, 3)
    assert set(found) == {"wall", "processor"}
    for of in found.values():
        assert set(of["milliseconds"]) == {"silo", "transformers"}
        low, high = of["spread"]["transformers_over_silo"]
        assert low <= of["ratio"]["transformers_over_silo"] <= high
    ratios = bench("ratios").ratios({"command": "python scripts/bench model", "result": {"dense": found}})
    assert [each.clock for each in ratios] == ["wall", "processor"]


def test_mixtures_are_told_beside_the_model(bench):
    """The model's own time is 1, and both clocks have times and spreads."""
    calls = {name: lambda: sum(range(2000)) for name in ("lm", "all")}
    found = bench("mixing").in_turns(calls, {"lm": 10, "all": 10}, "lm", 3)
    assert set(found) == {"tokens_per_second", "times_lm", "spread", "processor_times_lm", "processor_spread"}
    assert found["times_lm"]["lm"] == 1
    assert found["spread"]["lm"] == [1, 1]


def test_the_bench_of_mixing_is_read(bench):
    """Mixtures, owners and others' loops are ratios by both clocks, with the goal of the model that is scored."""
    names = ("lm", "all", "ours", "silo-lm", "1 owners", "200 owners", "none", "some")
    work = {name: lambda: sum(range(2000)) for name in names}

    def raced(*names):
        return bench("mixing").in_turns({name: work[name] for name in names}, dict.fromkeys(names, 1), names[0], 3)

    result = {
        "store": {"tokens": 100, "documents": 5, "groups": 1, "control_lists": 4},
        "own_keys": 100,
        "scored": {"tokens": 10},
        "mixtures": {"perplexity": {"lm": 9.0}, **raced("lm", "all")},
        "neighbours": {"perplexity": {}, **raced("1 owners", "200 owners")},
        "spared": {"searched": {"none": 1.0, "some": 0.5}, "perplexity": {"some": 8.0}, **raced("none", "some")},
        "ngram": raced("1 owners", "200 owners"),
        "peers": {"k": 256, "probes": 4, "same_distances": 1.0, **raced("ours", "silo-lm")},
    }
    record = {"command": "python scripts/bench mixing f.jsonl", "result": result}
    told = importlib.import_module("render_bench").mixing(MADE | record, "a model")
    assert told.count("\n| ") == 9  # three heads, two rows each
    assert "| some | 50% |" in told
    assert "silo-lm " in told
    for name, goal in (("mixing", 5.0), ("mixing_smollm2", 2.1)):
        found = {(each.what, each.peer, each.better): each.goal for each in bench("ratios").ratios(record, name)}
        assert found == {
            ("scoring, all methods", "the model alone", "lower"): goal,
            ("∞-gram, 200 owners", "one owner's", "lower"): 1.25,
            ("neighbours alone", "the loop of silo-lm", "higher"): 10.0,
        }


def test_the_bench_of_evaluation_is_read(bench):
    """The ratio is taken round by round to the peer's best batch."""
    rates = {"silo": [4.0, 9.0, 4.0], "a": [2.0, 3.0, 1.0], "b": [1.0, 1.0, 1.0]}
    record = {
        "command": "python scripts/bench evaluation f.jsonl",
        "result": {"tokens_per_second": rates, "best_peer": "a"},
    }
    (found,) = bench("ratios").ratios(record)
    assert found.measured == (3, 2, 4)
    record["result"] |= {"tokens": 9, "times_the_best_peer": 3.0, "largest_difference_a_token": 1e-7}
    told = importlib.import_module("render_bench").evaluation(
        MADE | record | {"documents": 1, "context": 64}, "any model"
    )
    assert "| a | 2 (1 to 3) |" in told


def test_neighbours_of_either_side_are_judged(bench):
    """Distances that are as good as equal pass, also where FAISS found fewer than it was asked for; others on either
    side do not."""
    judge = bench("store").same_neighbours(bench("harness").alike(0.01))
    merged = np.array([[1.0, 1e38]], np.float32), np.array([[7, -1]])
    ours = SimpleNamespace(distances=np.array([[1.002, np.inf]], np.float32))
    assert judge({"merged": merged, "200": ours}) == ""
    wrong = SimpleNamespace(distances=np.array([[1.5, np.inf]], np.float32))
    assert "200 gave 1.5" in judge({"merged": merged, "200": wrong})
    assert "where merged gave 2.0" in judge({"merged": (2 * merged[0], merged[1]), "200": ours})


def test_blocks_of_another_document_are_judged(bench):
    """Stores that find another block, or the same with another score, are named."""
    judge = bench("store").same_blocks

    def found(id, score):
        return [[SimpleNamespace(document=SimpleNamespace(id=id), start=64, score=score)], []]

    assert judge({"1": found("a", 2.0), "4": found("a", 2.0)}) == ""
    assert judge({"1": found("a", 2.0), "4": found("a", 2.0), "200": found("b", 2.0)}).startswith("the stores of 200 ")
    assert judge({"1": found("a", 2.0), "4": found("a", 2.1)}).startswith("the stores of 4 ")


@pytest.mark.parametrize("wrong", ["silo", "lm_eval, batches of 1"])
def test_sums_of_a_text_are_judged_by_the_token(bench, wrong):
    """A sum that is off by more than a hundred-thousandth a token is told, whoever's it is; so is one that is none."""
    seen = []
    judge = bench("evaluation").agreed([100, 1000], seen)
    sums = {"silo": [-50.0, -700.0], "lm_eval, batches of 1": [-50.0, -700.0]}
    assert judge({**sums, wrong: [-50.0, -700.005]}) == ""
    assert seen == [pytest.approx(5e-6)]
    assert "differ by 2.0e-05 a token in text 1" in judge({**sums, wrong: [-50.0, -700.02]})
    assert judge({**sums, wrong: [float("nan"), -700.0]})
    module = bench("evaluation")
    assert module.agreed([1000], seen, module.ROUNDED)({"silo": [-700.0], wrong + "'s": [-700.05]}) == ""


def test_training_steps_beside_the_bare_one_and_accelerates(bench, corpus, monkeypatch):
    """Ours, the bare loop and accelerate's have the same losses, and both ratios are told; a loop with other data is
    found out."""
    module = bench("training_step")
    small = ["batch_size=2", "sequence_length=32", "vocab_size=512", "model.hidden_size=32"]
    small += ["model.intermediate_size=64", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
    small += ["model.num_key_value_heads=1", "model.num_experts=4"]
    monkeypatch.setattr(module, "SHAPES", {"small": small, "two passes": [*small, "micro_batch_size=1"]})
    done = CliRunner().invoke(module.main, [str(corpus), "--rounds", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout) | {"command": "python scripts/bench training_step permissive"}
    ratios = bench("ratios").ratios(record)
    assert [each.peer for each in ratios] == 2 * ["a bare step", "accelerate's loop"]
    right = module.bare_loop
    monkeypatch.setattr(module, "bare_loop", lambda model, recipe, steps: right(model, recipe, [*steps[1:], steps[0]]))
    done = CliRunner().invoke(module.main, [str(corpus), "--rounds", "2"])
    assert done.exit_code == 1
    assert "gave" in done.stderr.splitlines()[-1]
