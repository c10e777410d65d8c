"""The model: against transformers' own Llama and Mixtral where they do the same, and by property where none does."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from silo.errors import UsageError
from silo.experts import DenseFFN, MoeFFN
from silo.modeling import SiloConfig, SiloForCausalLM
from silo.routing import balance_loss
from silo.rows import coalesced

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
KEYS = {
    "peer_num_experts": 144,
    "peer_heads": 2,
    "peer_experts_per_head": 4,
    "pkm_num_values": 100,
    "pkm_heads": 3,
    "pkm_values_per_head": 5,
    "key_dim": 12,
}
KINDS = ("dense", "moe", "peer", "pkm", "averaged", ["dense", "moe", "dense"], ["peer", "dense", "pkm"])


def random_model(ffn="moe", seed: int = 0, **settings) -> SiloForCausalLM:
    """A model with weights large enough that every part of it moves the logits."""
    torch.manual_seed(seed)
    model = SiloForCausalLM(SiloConfig(**SHAPE, **KEYS, ffn=ffn, initializer_range=0.2, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith(("up.weight", "values.weight")):
                parameter.mul_(8)
    return model


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [{}, {"router": "noisy_topk"}, {"query_batch_norm": False, "shared_keys": False}])
@pytest.mark.parametrize("ffn", KINDS, ids=str)
def test_the_past_does_not_see_the_future(ffn, settings):
    """Changing token t changes the logits and keys from t on, and none before it."""
    model = random_model(ffn, **settings).double()
    tokens = random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % VOCABULARY
    before, after = (model(ids, output_keys=True) for ids in (tokens, changed))
    for name in ("logits", "retrieval_keys"):
        moved = (before[name] - after[name]).abs().amax(dim=(0, 2))
        assert moved[:13].max() < 1e-13, name
        assert moved[13:].min() > 1e-6, name


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_experts_equal_a_plain_loop(kind):
    """The sorted, grouped mixture of experts is what a loop over tokens and their chosen experts computes."""
    torch.manual_seed(0)
    ffn = MoeFFN(SiloConfig(**SHAPE, num_experts=5, num_experts_per_tok=3)).to(kind)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(2, 7, 32, dtype=kind)
    ours, routing = ffn(x)
    for row, our_row, our_logits in zip(x.view(-1, 32), ours.view(-1, 32), routing.logits, strict=True):
        logits = ffn.router.weight @ row
        chosen = sorted(range(5), key=lambda expert: -logits[expert])[:3]
        weights = F.softmax(logits[chosen], dim=0)
        theirs = torch.zeros(32, dtype=kind)
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = (row @ ffn.gate_up_proj[expert]).chunk(2)
            inner = F.silu(gate) * up
            theirs += weight * (inner @ ffn.down_proj[expert])
        torch.testing.assert_close(our_logits, logits)
        torch.testing.assert_close(our_row, theirs)


def test_an_expert_that_nobody_chose_adds_nothing():
    """With every token on one expert the mixture is that expert, however uneven the load."""
    torch.manual_seed(0)
    ffn = MoeFFN(SiloConfig(**SHAPE, num_experts=4, num_experts_per_tok=1))
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_()
        ffn.router.weight.zero_()
        ffn.router.weight[2] = 1.0
    x = torch.rand(1, 6, 32)
    out, _ = ffn(x)
    gate, up = (x[0] @ ffn.gate_up_proj[2]).chunk(2, dim=-1)
    inner = F.silu(gate) * up
    torch.testing.assert_close(out[0], inner @ ffn.down_proj[2])


def as_transformers(model: SiloForCausalLM, kind: str) -> dict[str, torch.Tensor]:
    """Our weights under the names and in the layout of transformers' Llama or Mixtral."""
    theirs = {"lm_head.weight": model.lm_head.weight}
    for name, value in model.model.state_dict().items():
        theirs[f"model.{name}"] = value
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}.mlp."
        if isinstance(layer.mlp, DenseFFN):
            gate, up = theirs.pop(prefix + "gate_up_proj.weight").chunk(2)
            theirs |= {prefix + "gate_proj.weight": gate, prefix + "up_proj.weight": up}
        else:
            gate_up, down = (theirs.pop(prefix + name) for name in ("gate_up_proj", "down_proj"))
            theirs[prefix + "gate.weight"] = theirs.pop(prefix + "router.weight")
            theirs[prefix + "experts.gate_up_proj"] = gate_up.transpose(1, 2).contiguous()
            theirs[prefix + "experts.down_proj"] = down.transpose(1, 2).contiguous()
    return theirs


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    ("kind", "their_config", "their_class", "settings"),
    [
        ("dense", LlamaConfig, LlamaForCausalLM, {}),
        ("moe", MixtralConfig, MixtralForCausalLM, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ],
)
def test_logits_are_those_of_transformers(kind, their_config, their_class, settings, theta):
    """With the same weights a dense model is transformers' Llama and a mixture of experts is its Mixtral."""
    ours = random_model(kind, rope_theta=theta)
    rope = {"rope_type": "default", "rope_theta": theta}
    config = their_config(**SHAPE, **settings, rope_parameters=rope, tie_word_embeddings=True, sliding_window=None)
    theirs = their_class(config).eval()
    theirs.load_state_dict(as_transformers(ours, kind), strict=True)
    tokens = random_tokens(3, 40)
    ours_logits, theirs_logits = ours(tokens).logits, theirs(tokens).logits
    assert theirs_logits.std() > 0.1
    torch.testing.assert_close(ours_logits, theirs_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_loss_is_that_of_transformers(kind):
    """The loss is the next token's mean NLL over labels that are not -100, to which experts add their balance in
    training and nothing in evaluation."""
    model = random_model(kind, router_z_loss_coef=0.5)
    tokens = random_tokens(2, 12)
    labels = tokens.masked_fill(torch.arange(12) % 3 == 0, -100)
    out = model(tokens, labels=labels)
    nll = -model(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    expected = nll[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(out.loss, expected)
    out = model.train()(tokens, labels=labels)
    if kind == "moe":
        for logits in out.router_logits:
            expected = expected + (0.01 * balance_loss(logits, 2) + 0.5 * logits.logsumexp(1).square().mean()) / 3
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("ffn", KINDS, ids=str)
def test_a_saved_model_comes_back_bit_for_bit(ffn, tmp_path):
    """AutoModelForCausalLM loads what was saved: the class, the configuration, and logits equal in every bit."""
    model = random_model(ffn, num_experts=4, rope_theta=5_000.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, SiloForCausalLM)
    assert again.config.ffn == ffn
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    tokens = random_tokens(2, 15)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("ffn", KINDS, ids=str)
def test_generation_with_a_cache_is_generation_without(ffn):
    """Greedy text from the key-value cache is the text that reading everything anew for each token gives."""
    model = random_model(ffn).double()
    model.generation_config.eos_token_id = None
    prompt = random_tokens(2, 5, seed=29)  # whose texts do not soon repeat one token
    cached = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0)
    slow = prompt
    for _ in range(12):
        slow = torch.cat((slow, model(slow).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert len(set(slow[0, 5:].tolist())) > 3
    assert torch.equal(cached, slow)


def test_reading_on_from_a_cache_is_reading_at_once():
    """A sequence read in two pieces, the second from the first's cache, has the logits of one reading."""
    model = random_model("moe").double()
    tokens = random_tokens(2, 20)
    first = model(tokens[:, :13], use_cache=True)
    second = model(tokens[:, 13:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), model(tokens).logits)


def test_padding_on_the_left_changes_nothing():
    """A short prompt in a padded batch continues as it does alone."""
    model = random_model("moe").double()
    model.generation_config.eos_token_id = None
    short, long = random_tokens(1, 4), random_tokens(1, 9, seed=2)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(short, **settings)
    batch = torch.cat((F.pad(short, (5, 0)), long))
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    padded = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(padded[0, 5:], alone[0])


@pytest.mark.parametrize("ffn", KINDS, ids=str)
def test_gradients_reach_every_parameter(ffn):
    """With tokens enough for every expert, no parameter has a zero gradient."""
    model = random_model(ffn).train()
    tokens = random_tokens(16, 60)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if parameter.grad.is_sparse:
            assert len(coalesced(parameter.grad).values()) > 60, name
            continue
        rows = parameter.grad.flatten(1) if parameter.dim() == 3 else parameter.grad.flatten().unsqueeze(0)
        assert (rows.abs().sum(dim=1) > 0).all(), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("ffn", ["moe", "peer", "pkm"])
def test_checkpointing_gives_the_same_gradients(ffn):
    """Layers are computed again in the backward pass instead of being kept, and no gradient changes by it."""
    plain = random_model(ffn).train()
    thrifty = copy.deepcopy(plain)
    thrifty.gradient_checkpointing_enable()
    calls = []
    thrifty.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = random_tokens(2, 16)
    for model in (plain, thrifty):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    for (name, ours), theirs in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(ours.grad.to_dense(), theirs.grad.to_dense()), name
    assert len(calls) == 2


@pytest.mark.parametrize("ffn", ["dense", "moe", "peer"])
def test_keys_are_the_last_ffn_input(ffn):
    """The datastore's key is the last feed-forward layer's input after its norm, and is given only when asked for."""
    model = random_model(ffn)
    seen = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = random_tokens(2, 9)
    out = model(tokens, output_keys=True)
    assert torch.equal(out.retrieval_keys, seen[0])
    assert model(tokens).retrieval_keys is None


def test_the_output_is_a_mapping():
    """What forward gives can be read as the mapping that transformers and torch take it for."""
    model = random_model("moe")
    out = model(random_tokens(2, 9), output_keys=True)
    assert list(dict(out)) == ["logits", "retrieval_keys", "router_logits", "routings"]
    assert out.to_tuple()[0] is out.logits


def test_attention_by_another_name():
    """The attention that transformers calls eager gives the logits of the default one, padding and all."""
    model = random_model("dense")
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(tokens, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[mask == 1], expected[mask == 1])


def test_only_the_last_logits():
    """logits_to_keep leaves out logits, and changes none."""
    model = random_model("dense")
    tokens = random_tokens(2, 9)
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, model(tokens).logits[:, -3:])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ffn": "mo"}, "ffn is 'mo'; expected one of dense, moe"),
        ({"ffn": ["dense", "moe"]}, "with 3 entries"),
        ({"ffn": ["dense", "moe", "peeer"]}, "peeer"),
        ({"ffn": []}, "ffn is []"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "even"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3; expected 1 to num_experts (2)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"router": "top"}, "router is 'top'; expected one of topk, noisy_topk, expert_choice"),
        (
            {"ffn": "peer", "peer_num_experts": 150},
            "peer_num_experts is 150; expected a square",
        ),
        ({"ffn": "peer", "peer_num_experts": 144, "peer_experts_per_head": 13}, "at most 12"),
        ({"ffn": "peer", "peer_num_experts": 144, "peer_siblings": 5}, "expected a divisor of 12"),
        ({"ffn": ["dense", "pkm", "dense"], "pkm_num_values": 99}, "pkm_num_values is 99"),
        ({"ffn": "pkm", "key_dim": 7}, "key_dim is 7; expected an even number"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(settings, said):
    """A configuration that makes no model is a UsageError that names the field, its value and what was expected."""
    with pytest.raises(UsageError) as error:
        SiloConfig(**{**SHAPE, **settings})
    assert said in str(error.value)
