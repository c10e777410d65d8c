"""Models made into others: the same function before and after, and training that goes on."""

import pytest
import torch

from silo.errors import UsageError
from silo.modeling import SiloConfig, SiloForCausalLM
from silo.surgery import averaged, grow, upcycle
from training.optimizer import RowAdamW

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "initializer_range": 0.1,
    "peer_num_experts": 256,
    "peer_heads": 3,
    "peer_experts_per_head": 8,
    "key_dim": 12,
}


def trained(ffn, steps: int = 5, **settings) -> SiloForCausalLM:
    """A model after a few steps, so that nothing in it is as it was initialised."""
    torch.manual_seed(0)
    model = SiloForCausalLM(SiloConfig(**SHAPE, ffn=ffn, **settings)).train()
    go_on(model, steps)
    return model.eval()


def go_on(model: SiloForCausalLM, steps: int) -> list[float]:
    """Losses of some steps on the same few tokens."""
    optimizer, losses = RowAdamW(model.parameters(), lr=3e-3), []
    tokens = torch.randint(60, (4, 40), generator=torch.Generator().manual_seed(7))
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: SiloForCausalLM) -> torch.Tensor:
    return model(torch.randint(60, (2, 30), generator=torch.Generator().manual_seed(3))).logits


@pytest.mark.parametrize("settings", [{}, {"shared_keys": False, "query_batch_norm": False}])
def test_growing_leaves_the_function_as_it_was(settings, tmp_path):
    """A grown model has four times the experts and, bit for bit, the same logits; grown again and saved, still."""
    model = trained(["dense", "peer", "dense"], **settings)
    grown = grow(model, 2)
    assert grown.config.peer_num_experts == 1024
    assert len(grown.model.layers[1].mlp.up.weight) == 1024
    assert torch.equal(logits(grown), logits(model))
    again = grow(grown, 3)
    assert again.config.peer_siblings == 6
    again.save_pretrained(tmp_path)
    assert torch.equal(logits(SiloForCausalLM.from_pretrained(tmp_path).eval()), logits(model))
    assert model.config.peer_num_experts == 256


def test_a_grown_model_learns_and_uses_its_new_experts():
    """Training breaks the ties: the loss falls, and soon experts are taken that the old model did not have."""
    grown = grow(trained("peer", steps=5), 2).train()
    losses = go_on(grown, 8)
    assert losses[-1] < losses[0]
    taken = grown(torch.randint(60, (4, 40))).routings[1].expert.unique()
    first, second = taken // 32, taken % 32
    new = (first % 2 == 1) | (second % 2 == 1)
    assert 0.2 < new.float().mean() < 1


def test_noise_uses_new_experts_at_once():
    """With noise siblings win from the start, and the function changes only a little."""
    model = trained("peer")
    grown = grow(model, 2, noise=0.01)
    found = grown(torch.randint(60, (4, 40))).routings[1].expert
    assert ((found // 32) % 2).float().mean() > 0.2
    change = (logits(grown) - logits(model)).abs().max()
    assert 0 < change < 0.3 * logits(model).std()


@pytest.mark.parametrize("layers", [None, [1]])
def test_upcycling_leaves_the_function_as_it_was(layers):
    """Mixtures of copies compute what the dense network did, and their experts then part ways."""
    model = trained("dense")
    cycled = upcycle(model, layers, num_experts=4, num_experts_per_tok=3)
    assert cycled.config.ffn == ("moe" if layers is None else ["dense", "moe", "dense"])
    torch.testing.assert_close(logits(cycled), logits(model), rtol=1e-4, atol=1e-5)
    go_on(cycled.train(), 2)
    gate = cycled.model.layers[1].mlp.gate_up_proj
    assert (gate[0] - gate[1]).abs().max() > 1e-3


def test_averaged_experts_become_one_network():
    """Tied experts, trained apart, compute in evaluation what the dense model made of them does."""
    model = trained("averaged")
    gate = model.model.layers[1].mlp.gate_up_proj
    assert (gate[0] - gate[1]).abs().max() > 1e-3
    dense = averaged(model)
    assert dense.config.ffn == "dense"
    assert sum(p.numel() for p in dense.parameters()) < sum(p.numel() for p in model.parameters()) / 2
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: grow(trained("dense", 0), 2), "ffn is 'dense'; expected a peer layer to grow"),
        (lambda: grow(trained("peer", 0), 1), "factor is 1; expected at least 2"),
        (lambda: upcycle(trained("peer", 0)), "layers to upcycle are []"),
        (lambda: upcycle(trained(["dense", "moe", "dense"], 0), [1]), "expected some of the dense ones: [0, 2]"),
        (lambda: upcycle(trained(["dense", "moe", "dense"], 0), num_experts=4), "layers of 8 experts already"),
        (lambda: upcycle(trained("dense", 0, moe_intermediate_size=8)), "expected 24, the width of the dense layers"),
        (lambda: averaged(trained("moe", 0)), "expected an averaged layer"),
    ],
)
def test_a_model_without_the_layer_is_refused(call, said):
    """What a function cannot be applied to is a UsageError that says what the model is."""
    with pytest.raises(UsageError) as error:
        call()
    assert said in str(error.value)
