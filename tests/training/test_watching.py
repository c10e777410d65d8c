"""What is told while a model trains, and how a run ends whose loss is no number."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import silo.routing
import training.loop
import training.run
from silo.collect import collect
from silo.config import load_config
from silo.errors import SiloError, UsageError
from silo.language_model import LanguageModel
from silo.modeling import SiloConfig, SiloForCausalLM
from training.data import Mixture
from training.loop import describe, train
from training.measure import Routing, evaluating, validation_loss
from training.recipe import Recipe
from training.run import Run

RECIPE = {
    "token_budget": 8 * 4 * 16,
    "vocab_size": 300,
    "sequence_length": 16,
    "batch_size": 4,
    "learning_rate": 0.01,
    "domains": "source",
    "log_every": 2,
    "validate_every": 4,
    "checkpoint_every": 3,
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "num_experts": 4,
    },
}


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small permissive corpus of two sources and two tiers."""
    root = tmp_path_factory.mktemp("corpus")
    rows = [
        {"id": f"{source}{n}", "text": f"{source} says {n} of {n * n}. " * 9, "license": license, "owner": "Ada"}
        | {"source": source}
        for source, license in (("books", "CC0-1.0"), ("code", "MIT"))
        for n in range(40)
    ]
    (root / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    collect([str(root / "x.jsonl")], root / "out")
    return root / "out" / "permissive"


@pytest.fixture
def recipe_file(side: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"corpus": str(side), "output": str(tmp_path / "model"), **RECIPE}))
    return file


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show: name → step → value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)} for name in sorted(events.Tags()["scalars"])
    }


def test_tensorboard_is_told(recipe_file, tmp_path):
    """Loss, learning rate, gradient norm, routers and validation loss by tier and domain are logged at their steps, in
    a directory beside the model; and what is logged is what happened."""
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        summarize = training.loop.summarize
        patch.setattr(training.loop, "summarize", lambda run, *rest: losses.extend(run.losses) or summarize(run, *rest))
        summary = train(load_config(Recipe, recipe_file, ["trackers=[tensorboard]"]))
    found = scalars(tmp_path / "model-logs" / "model")
    assert found["loss"] == pytest.approx({step: sum(losses[step - 2 : step]) / 2 for step in (2, 4, 6, 8)})
    assert next(iter(found["learning rate"].values())) == pytest.approx(0.01, rel=0.1)
    assert found["tokens"] == {2: 128, 4: 256, 6: 384, 8: 512}
    assert all(value > 0 for value in found["gradient norm"].values())
    assert {name for name in found if name.startswith("validation/")} == {
        *("validation/tier/PD", "validation/tier/SW", "validation/domain/books", "validation/domain/code")
    }
    assert set(found["validation/tier/PD"]) == {4, 8}
    assert found["validation/tier/PD"][8] == pytest.approx(summary["validation"]["tier"]["PD"])
    for layer in (0, 1):
        for step in (2, 4, 6, 8):
            load = [found[f"router/{layer}/load/{expert}"][step] for expert in range(4)]
            assert sum(load) == pytest.approx(4)
            assert max(load) == found[f"router/{layer}/greatest load"][step]
            assert 0 < found[f"router/{layer}/entropy"][step] <= math.log(4) + 1e-5
            assert found[f"router/{layer}/dead"][step] == load.count(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-logs", "recipe.yaml"]


def test_watching_changes_nothing(recipe_file, tmp_path):
    """With trackers and validation the weights are, bit for bit, those without."""
    train(load_config(Recipe, recipe_file, ["trackers=[tensorboard]"]))
    train(load_config(Recipe, recipe_file, [f"output={tmp_path / 'unwatched'}", "validate_every=null"]))
    watched, unwatched = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "unwatched"))
    assert watched == unwatched


def test_a_resumed_run_logs_each_step_once(recipe_file, tmp_path, monkeypatch):
    """What a killed run had logged behind its last checkpoint is not shown beside what the resumed one logs."""
    step = Run.step

    def killed(self, sequences):
        if self.plan.step == 6:
            raise KeyboardInterrupt
        step(self, sequences)

    recipe = load_config(Recipe, recipe_file, ["trackers=[tensorboard]", "log_every=1"])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    train(recipe)
    assert list(scalars(tmp_path / "model-logs" / "model")["loss"]) == list(range(1, 9))


def test_an_unknown_tracker_is_wrong_use(recipe_file, monkeypatch):
    """A tracker that accelerate does not know, or whose package is missing, is an error and no silence."""
    with pytest.raises(UsageError, match=r"trackers is \['nothing'\]"):
        train(load_config(Recipe, recipe_file, ["trackers=[nothing]"]))
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(UsageError, match="not all of them are installed"):
        train(load_config(Recipe, recipe_file, ["trackers=[tensorboard]"]))


def test_routing_by_hand():
    """Four tokens, two of three experts each: loads, dead experts and entropy are those counted by hand."""
    measured = Routing([3])
    chosen, weight, inf = torch.tensor([[0, 1], [1, 0]]), torch.full((2, 2), 0.5), math.inf
    for logits in ([[0.0, 0.0, -inf], [1.0, 2.0, -inf]], [[0.0, 0.0, -inf], [0.0, 0.0, -inf]]):
        measured.add((silo.routing.Routing(chosen, weight, torch.tensor(logits)),))
    figures = measured.report(Accelerator())
    p = 1 / (1 + math.exp(-1))
    uneven = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert figures["router/0/dead"] == 1
    assert [figures[f"router/0/load/{expert}"] for expert in range(3)] == pytest.approx([1.5, 1.5, 0.0])
    assert figures["router/0/greatest load"] == pytest.approx(1.5)
    assert figures["router/0/entropy"] == pytest.approx((3 * math.log(2) + uneven) / 4)
    assert figures["router/0/unevenness"] == pytest.approx(math.log(3) - math.log(2))
    assert measured.report(Accelerator()) == {}
    measured.add(None)
    assert measured.report(Accelerator()) == {}


def test_validation_loss_is_that_of_the_tokens(recipe_file, side):
    """The loss of a domain is the mean over its learnt tokens of what the model's own probabilities say."""
    recipe = load_config(Recipe, recipe_file)
    train(recipe)
    _, _, tokens = training.loop.open_inputs(load_config(Recipe, recipe_file, ["output=another"]))
    mixture = Mixture(tokens, "val", by="source", length=16, seed=0)
    model = LanguageModel.load(recipe.output).model
    found = validation_loss(model, mixture, 9)
    assert set(found) == {"books", "code"}
    for name, loss in found.items():
        nats = []
        for each in mixture.first(name, 9):
            ids = torch.from_numpy(mixture.sequence(*each)[0])
            scores = model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
            nats += [-scores[at, ids[at + 1]].item() for at in range(15)]
        assert loss == pytest.approx(sum(nats) / len(nats), abs=1e-5)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_number_names_the_documents(recipe_file, tmp_path, monkeypatch, what):
    """A loss or gradient that is no number ends the run at its step with the documents of the pass to blame, and the
    checkpoint before it stands."""
    batches, blamed, passes = [], [], []
    batch = Mixture.batch

    def remembered(self, sequences):
        batches.append(self.documents(sequences))
        return batch(self, sequences)

    def spoilt(model, *_, **__):
        def hook(module, arguments, out):
            passes.append(1)
            if len(passes) == 8:  # the second of the fourth step
                blamed.extend(batches[-1] if what == "loss" else batches[-2] + batches[-1])
                if what == "loss":
                    return out * math.nan
                out.register_hook(lambda gradient: gradient * math.inf)
            return None

        model.get_input_embeddings().register_forward_hook(hook)
        return make(model, *_, **__)

    make = training.run.make_optimizer
    monkeypatch.setattr(training.run, "make_optimizer", spoilt)
    monkeypatch.setattr(Mixture, "batch", remembered)
    with pytest.raises(SiloError) as error:
        train(load_config(Recipe, recipe_file, ["micro_batch_size=2", "validate_every=null"]))
    said = {"loss": "the loss is nan", "gradient": "the gradient is not finite"}[what]
    assert str(error.value).startswith(f"{said} at step 4; lower learning_rate, or look at the batch's documents: ")
    named = str(error.value).partition("documents: ")[2].partition(" and ")[0]
    assert {name.strip("'") for name in named.split(", ")} <= set(blamed)
    assert ("more" in str(error.value)) == (len(set(blamed)) > 8)
    assert [path.name for path in (tmp_path / ".model.run").glob("step-*")] == ["step-000000003"]


def test_sparse_rows_are_trained_and_resumed(recipe_file, tmp_path, monkeypatch):
    """PEER's expert rows, whose gradients are sparse, go through clipping, the optimizer, checkpoints and the count of
    experts: killed and resumed, the weights are those of a run that went through."""
    peer = ["model.ffn=peer", "model.peer_num_experts=64", "model.peer_heads=2", "model.peer_experts_per_head=4"]
    peer += ["model.key_dim=8", "trackers=[tensorboard]", "validate_every=null"]
    step = Run.step

    def killed(self, sequences):
        if self.plan.step == 6:
            raise KeyboardInterrupt
        step(self, sequences)

    train(load_config(Recipe, recipe_file, [*peer, f"output={tmp_path / 'whole'}"]))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(load_config(Recipe, recipe_file, peer))
    train(load_config(Recipe, recipe_file, peer))
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "model"))
    assert whole == resumed
    found = scalars(tmp_path / "whole-logs" / "whole")
    assert 0 < found["router/0/unevenness"][8] < math.log(64)
    assert 0 <= found["router/0/dead"][8] < 64
    assert "router/0/entropy" not in found


def test_describing_is_free_of_the_output(recipe_file, tmp_path):
    """What a run would be is told without any of its directories being made."""
    describe(load_config(Recipe, recipe_file, ["trackers=[tensorboard]"]))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_experts_that_choose_are_validated_and_saved(recipe_file):
    """A model whose experts choose their tokens trains with validation, and is written with a router that evaluates."""
    recipe = load_config(Recipe, recipe_file, ["model.router=expert_choice", "reweight_every=4"])
    summary = train(recipe)
    assert set(summary["validation"]["tier"]) == {"PD", "SW"}
    model = LanguageModel.load(recipe.output).model
    assert model.config.router == "topk"
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_evaluating_ends():
    """After an error in the middle, a model is under training again, with its own router."""
    model = SiloForCausalLM(SiloConfig(**RECIPE["model"], router="expert_choice")).train()

    def fail() -> None:
        with evaluating(model):
            assert (model.training, model.config.router) == (False, "topk")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (model.training, model.config.router) == (True, "expert_choice")
