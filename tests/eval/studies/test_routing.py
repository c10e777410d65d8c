"""Routing: loads add up to the tokens, dead experts are found, and alike is what has equal weights."""

import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eval.studies import routing
from silo.cli import main
from silo.errors import UsageError
from silo.files import read_sealed
from silo.language_model import LanguageModel
from silo.model_config import SiloConfig
from silo.modeling import SiloForCausalLM

KINDS = {"moe": {"num_experts": 4}, "peer": {"peer_num_experts": 64}, "pkm": {"pkm_num_values": 64}}


def with_ffn(model: LanguageModel, ffn: str) -> LanguageModel:
    """A random model with the tokenizer of another, and layers of one kind."""
    torch.manual_seed(0)
    config = SiloConfig(
        vocab_size=model.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, ffn=ffn, max_position_embeddings=64, peer_heads=2, peer_experts_per_head=4, pkm_heads=2,
        pkm_values_per_head=4, key_dim=8, **KINDS.get(ffn, {}),
    )  # fmt: skip
    return LanguageModel(SiloForCausalLM(config), model.tokenizer, "random")


@pytest.fixture(scope="module")
def domains(subject) -> dict:
    return {owner: [each for each in subject.test if each.owner == owner] for owner in ("Ada", "Grace", "Mary")}


@pytest.mark.parametrize("ffn", ["moe", "peer", "pkm"])
def test_loads_add_up(model, domains, ffn):
    """Every token gives each layer a load of one a head, and counts for as many experts as it takes."""
    lm = with_ffn(model, ffn)
    texts = [(number, lm.tokenize(of[0])) for number, of in enumerate(domains.values())]
    heads, choices = (1, lm.model.config.num_experts_per_tok) if ffn == "moe" else (2, 8)
    for load in routing.loads(lm, texts, 3).values():
        assert load.weight.sum(dim=1).tolist() == pytest.approx([heads * len(tokens) for _, tokens in texts], rel=1e-5)
        assert int(load.taken.sum()) == choices * sum(len(tokens) for _, tokens in texts)


def test_loads_are_those_of_the_windows_that_are_scored(model, domains):
    """A token beyond the first window is counted with the context in which it is scored, and once."""
    lm = with_ffn(model, "moe")
    tokens = np.tile(lm.tokenize(domains["Ada"][0]), 2)[:90]
    assert len(lm.cut(len(tokens))) > 1
    counted = routing.loads(lm, [(0, tokens)], 1)[1].taken
    inputs, expected = lm.inputs(tokens), torch.zeros(4, dtype=torch.int64)
    for window in lm.cut(len(tokens)):
        with torch.inference_mode():
            chosen = lm.model(inputs[window.begin : window.end].unsqueeze(0)).routings[1].expert
        for position in range(window.first, window.end):
            expected += torch.bincount(chosen[position - window.begin], minlength=4)
    assert counted.equal(expected)


def test_dead_experts_are_counted(model, domains):
    """An expert that the router never chooses is dead, and only that one."""
    lm = with_ffn(model, "moe")
    layer = lm.model.model.layers[0].mlp
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1:] = torch.randn_like(layer.router.weight[1:])
        lm.model.model.layers[0].post_attention_layernorm.weight[:] = 0.0
    row = routing.study(lm, domains, 100)["layers"][0]
    assert row["dead"] == 2, "all logits are equal, so that the first two of four experts take every token"
    assert row["unevenness"] == pytest.approx(math.log(2))
    assert row["information"]["domain"] == pytest.approx(0, abs=1e-9)


def test_alike_is_what_has_equal_weights(model, domains):
    """Two experts with the same weights have cosine 1, one with the negated weights has -1."""
    lm = with_ffn(model, "moe")
    layer = lm.model.model.layers[1].mlp
    with torch.no_grad():
        for weight in (layer.gate_up_proj, layer.down_proj):
            weight[1] = 2 * weight[0]
            weight[2] = -weight[0]
    alike = routing.study(lm, domains, 60)["layers"][1]["alike"]
    assert np.asarray(alike["cosines"])[0][:3] == pytest.approx([1, 1, -1])
    assert abs(alike["cosines"][0][3]) < 0.2
    assert alike["greatest"] == pytest.approx(1)


def test_information():
    """Kinds of text with experts of their own tell all of the kind; those with the same loads nothing."""
    apart = torch.tensor([[3.0, 0, 0], [0, 1.0, 1.0]], dtype=torch.float64)
    assert routing.information(apart) == pytest.approx(math.log(2))
    assert routing.information(torch.tensor([[1.0, 2], [10, 20]], dtype=torch.float64)) == pytest.approx(0, abs=1e-12)


def test_dense_models_are_refused(model):
    """A model without experts is an error of use."""
    with pytest.raises(UsageError, match="no layer of ours that chooses experts"):
        routing.routed_layers(with_ffn(model, "dense").model)


def test_the_command(place, tmp_path):
    """Files are domains; of small layers the loads are written out."""
    out = tmp_path / "routing.json"
    data = [word for name in ("test", "val") for word in ("--data", str(place / f"{name}.jsonl"))]
    command = ["eval", "study", "routing", "--model", str(place / "model"), *data, "--max-tokens", "300"]
    done = CliRunner().invoke(main, [*command, "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    [first, second] = read_sealed(out, 1)["result"]["layers"]
    assert first["kind"] == second["kind"] == "moe"
    assert list(first["by_domain"]) == ["test", "val"]
    assert sum(first["by_domain"]["val"]["load"]) == pytest.approx(1)
    assert list(first["by_license"]) == ["CC-BY-4.0", "CC-BY-NC-4.0", "GPL-3.0-only"]
    assert "share of the load" in out.with_suffix(".svg").read_text()
