"""Routers and their losses: against the papers' equations, computed with a pencil's means."""

import math

import pytest
import torch
from torch.nn import functional as F

from silo import routing
from silo.errors import UsageError
from silo.experts import MIN_SPREAD, AveragedFFN, MoeFFN, grouped, share_experts
from silo.modeling import SiloConfig, SiloForCausalLM

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "num_experts": 6,
}


def random_layer(kind=MoeFFN, **settings):
    """A float64 layer whose weights are all of order 1."""
    torch.manual_seed(0)
    layer = kind(SiloConfig(**SHAPE, **settings)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.train()


def test_balance_by_hand():
    """Two tokens, two experts, one choice each: 2 · Σ share · mean probability is what a pencil says."""
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    # Both choose expert 1, so its share is 1 and the other's 0.
    assert routing.balance_loss(logits, 1).item() == pytest.approx(first + second, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_even_load_costs_k(k: int):
    """When every expert is chosen equally often with equal probability, the loss is the number of choices a token."""
    step = torch.arange(12).unsqueeze(1) + torch.arange(6)
    logits = (step % 6 < k).float() * 3
    assert routing.balance_loss(logits, k).item() == pytest.approx(k, rel=1e-6)


def test_z_loss_by_hand():
    """The mean of (log Σ exp)² over tokens."""
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    by_hand = (math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2
    assert routing.z_loss(logits).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_noisy_gates_are_the_papers(k: int):
    """Gates, importance and load losses are equations 3 to 11 of Shazeer (2017), one token and expert at a time."""
    layer = random_layer(router="noisy_topk", num_experts_per_tok=k, router_z_loss_coef=0.0)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    torch.manual_seed(5)
    _, found = layer(x)
    torch.manual_seed(5)
    noise = torch.randn(9, 6, dtype=torch.float64)
    clean = x[0] @ layer.router.weight.T
    spread = torch.log1p(torch.exp(x[0] @ layer.router_noise.weight.T)) + MIN_SPREAD
    noisy = clean + noise * spread
    gates, load = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for t in range(9):
        order = sorted(range(6), key=lambda e: -noisy[t, e])
        total = sum(math.exp(float(noisy[t, e].detach())) for e in order[:k])
        assert found.expert[t].tolist() == order[:k]
        for place, expert in enumerate(order[:k]):
            gate = math.exp(float(noisy[t, expert].detach())) / total
            assert found.weight[t, place].item() == pytest.approx(gate, rel=1e-12)
            gates[expert] += gate
        for expert in range(6):
            if k < 6:
                threshold = sorted((noisy[t, e] for e in range(6) if e != expert), reverse=True)[k - 1]
                z = (clean[t, expert] - threshold) / spread[t, expert]
                load[expert] += 0.5 * (1 + math.erf(z.detach() / math.sqrt(2)))
    expected = 0.1 * gates.var(correction=0) / gates.mean() ** 2
    if k < 6:
        expected = expected + 0.1 * load.var(correction=0) / load.mean() ** 2
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-8)


def test_losses_have_the_gradients_of_finite_differences():
    """Every loss is differentiable in its logits, and the load loss in the noise's spread too."""
    torch.manual_seed(0)
    clean, noisy = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    spread = (torch.rand(5, 4, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: routing.load_loss(*x, 2), (clean, noisy, spread))
    assert torch.autograd.gradcheck(routing.z_loss, (clean,))
    assert torch.autograd.gradcheck(lambda x: routing.balance_loss(x, 2), (clean,))
    expert = torch.tensor([[0, 1], [1, 2], [0, 3], [1, 3], [0, 2]])
    weight = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: routing.importance_loss(expert, x, 4), (weight,))


def test_there_is_no_noise_in_evaluation():
    """The noisy router is deterministic and has no loss in evaluation."""
    layer = random_layer(router="noisy_topk").eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    first, second = layer(x), layer(x)
    assert torch.equal(first[0], second[0])
    assert first[1].loss is None


def test_a_noisy_router_starts_even():
    """Its weights start at zero, so that in training every expert is chosen about equally often."""
    torch.manual_seed(0)
    model = SiloForCausalLM(SiloConfig(**SHAPE, ffn="moe", router="noisy_topk")).train()
    assert model.model.layers[0].mlp.router.weight.abs().max() == 0
    with torch.no_grad():
        out = model(torch.randint(50, (8, 100)))
    load = torch.bincount(out.routings[0].expert.flatten(), minlength=6)
    assert load.min() > 0.8 * load.max()


def test_experts_choose_by_the_paper():
    """Each expert takes tokens · k / experts tokens, those with its greatest probabilities, and weighs them so."""
    layer = random_layer(router="expert_choice", num_experts_per_tok=2)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    out, found = layer(x)
    probability = F.softmax(x[0] @ layer.router.weight.T, dim=1)
    expected = torch.zeros(12, 16, dtype=torch.float64)
    for expert in range(6):
        for token in sorted(range(12), key=lambda t: -probability[t, expert])[:4]:
            gate, up = (x[0, token] @ layer.gate_up_proj[expert]).chunk(2)
            inner = F.silu(gate) * up
            expected[token] += probability[token, expert] * (inner @ layer.down_proj[expert])
    torch.testing.assert_close(out[0], expected)
    assert torch.bincount(found.expert.flatten()).tolist() == [4] * 6


def test_expert_choice_is_refused_where_it_looks_ahead():
    """In evaluation experts may not choose tokens; the same weights evaluate by top-k once the router says so."""
    torch.manual_seed(0)
    model = SiloForCausalLM(SiloConfig(**SHAPE, ffn="moe", router="expert_choice"))
    tokens = torch.randint(50, (1, 9))
    model.train()(tokens, labels=tokens).loss.backward()
    with pytest.raises(UsageError, match=r"'expert_choice' in evaluation.*expected topk or noisy_topk"):
        model.eval()(tokens)
    model.config.router = "topk"
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 7])
def test_grouped_products_are_products(kind, width):
    """A grouped product and its gradients are those of each run by itself, runs without rows included."""
    torch.manual_seed(0)
    rows, weight = torch.randn(10, 16).to(kind).requires_grad_(), torch.randn(4, 16, width).to(kind).requires_grad_()
    ends = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    out = grouped(rows, weight, ends)
    expected = torch.cat([rows[:0] @ weight[0], rows[:3] @ weight[1], rows[3:3] @ weight[2], rows[3:] @ weight[3]])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if kind == torch.bfloat16 else {}
    torch.testing.assert_close(out, expected, **tolerance)
    ours = torch.autograd.grad(out.square().sum(), (rows, weight))
    theirs = torch.autograd.grad(expected.square().sum(), (rows, weight))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **({"rtol": 5e-2, "atol": 0.5} if kind == torch.bfloat16 else {}))


def test_experts_work_under_autocast():
    """Mixed precision reaches the experts' products, and the output stays close to full precision's."""
    torch.manual_seed(0)
    model = SiloForCausalLM(SiloConfig(**SHAPE, ffn="moe", initializer_range=0.1))
    tokens = torch.randint(50, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens, labels=tokens)
    half.loss.backward()
    torch.testing.assert_close(half.loss, model(tokens, labels=tokens).loss, rtol=2e-2, atol=2e-2)


def test_gradients_of_experts_are_those_of_finite_differences():
    """The layer's gradients in its input and in each weight pass gradcheck."""
    layer = random_layer(num_experts_per_tok=2)
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        out, found = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        return out, found.loss

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_tied_experts_share_the_tokens_evenly():
    """In training every expert gets an equal random share of the tokens, and each token exactly its expert's output."""
    layer = random_layer(AveragedFFN)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    out, found = layer(x)
    assert torch.bincount(found.expert.flatten()).tolist() == [3] * 6
    assert not torch.equal(layer(x)[1].expert, found.expert)
    for row, our, expert in zip(x.view(-1, 16), out.view(-1, 16), found.expert.flatten(), strict=True):
        gate, up = (row @ layer.gate_up_proj[expert]).chunk(2)
        inner = F.silu(gate) * up
        torch.testing.assert_close(our, inner @ layer.down_proj[expert])


def test_sharing_moves_experts_together():
    """Sharing keeps the mean of the experts and shrinks their spread by 1 - rate · n / (n - 1); they begin as one."""
    model = SiloForCausalLM(SiloConfig(**SHAPE, ffn="averaged"))
    weight = model.model.layers[0].mlp.gate_up_proj
    assert torch.equal(weight, weight[:1].expand_as(weight))
    with torch.no_grad():
        weight.normal_()
    before = weight.detach().clone()
    share_experts(model, 0.3)
    torch.testing.assert_close(weight.mean(0), before.mean(0))
    spread = (1 - 0.3 * 6 / 5) * (before - before.mean(0))
    torch.testing.assert_close(weight - weight.mean(0), spread, rtol=1e-4, atol=1e-5)


def test_usage_by_hand():
    """Load sums the weights of each expert; an even load has unevenness 0, and one of n experts alone log n."""
    found = routing.Routing(torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    assert routing.load_of(found, 4).tolist() == [0.25, 1.25, 0.0, 0.5]
    assert routing.unevenness(torch.ones(8)) == pytest.approx(0)
    assert routing.unevenness(torch.tensor([0.0, 3.0, 0.0, 0.0])) == pytest.approx(math.log(4))
