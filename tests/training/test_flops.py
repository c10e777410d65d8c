"""Operations are counted as they run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from silo.modeling import SiloConfig, SiloForCausalLM
from training.flops import flops_per_token

WIDTH, TIME, WORDS = 16, 8, 64
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "num_experts": 4,
    "moe_intermediate_size": 12,
    "peer_num_experts": 64,
    "peer_heads": 2,
    "peer_experts_per_head": 3,
    "pkm_num_values": 64,
    "pkm_heads": 2,
    "pkm_values_per_head": 5,
    "key_dim": 8,
}
ATTENTION = 2 * WIDTH * (WIDTH + 8 + 8 + WIDTH) + 2 * 2 * TIME * WIDTH
"""Four products (two heads share a key), scores and weighted sums."""
REST = ATTENTION + 2 * WIDTH * WORDS
RETRIEVAL = 2 * WIDTH * 2 * 8 + 2 * 2 * 8 * 8
"""Queries of two heads, and each one's scores of 8 half keys and 8 more."""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dense", 2 * 3 * WIDTH * 24),
        ("moe", 2 * WIDTH * 4 + 2 * (2 * 3 * WIDTH * 12)),
        ("peer", RETRIEVAL + 2 * 2 * (2 * 3) * WIDTH),
        ("pkm", RETRIEVAL + 2 * (2 * 5) * WIDTH),
    ],
)
def test_the_count_is_that_of_the_layer_s_formula(kind, expected):
    """A feed-forward layer costs two operations for each multiplication of its definition, whatever computes it."""
    model = SiloForCausalLM(SiloConfig(**SHAPE, ffn=kind))
    assert flops_per_token(model, TIME) == REST + expected


def test_a_dense_layer_counts_as_torch_s_own_counter_has_it():
    """Of a dense layer torch's counter, which knows matrix products alone, counts the same."""
    layer = SiloForCausalLM(SiloConfig(**SHAPE, ffn="dense")).model.layers[0].mlp
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 100, WIDTH))
    assert counter.get_total_flops() == 100 * 2 * 3 * WIDTH * 24


def test_counting_changes_nothing():
    """A model that is training goes on training, and the random state is as before."""
    model = SiloForCausalLM(SiloConfig(**SHAPE, ffn="peer")).train()
    state = torch.get_rng_state()
    flops_per_token(model, TIME)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
