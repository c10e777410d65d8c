"""Matrix products by either library: the same numbers and gradients, and the right one chosen."""

import pytest
import torch
from torch.nn import functional as F

from silo import products
from silo.experts import MoeFFN
from silo.modeling import SiloConfig
from silo.products import FEWEST_ROWS, Linear, by_onednn, linear


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, FEWEST_ROWS, 301])
def test_a_linear_map_is_a_matrix_product(rows, transposed):
    """Output and both gradients are those of float64, whichever library multiplies and however weights lie."""
    torch.manual_seed(0)
    x = torch.randn(2, rows, 48, requires_grad=True)
    weight = (torch.randn(48, 40).t() if transposed else torch.randn(40, 48)).requires_grad_()
    toward = torch.randn(2, rows, 40)
    out = linear(x, weight)
    ours = torch.autograd.grad((out * toward).sum(), (x, weight))
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    expected = F.linear(*exact)
    theirs = torch.autograd.grad((expected * toward.double()).sum(), exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-3)


def test_the_library_is_chosen_by_what_it_is_faster_for():
    """oneDNN multiplies float32 of enough rows; few rows, other types and autocast are torch's."""
    x, weight = torch.randn(3, FEWEST_ROWS, 8), torch.randn(4, 8)
    assert by_onednn(x, weight) is (products.ONEDNN is not None)
    assert not by_onednn(x[0, 1:], weight)
    assert not by_onednn(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, weight)
        assert Linear(8, 4)(x).dtype == torch.bfloat16
    assert linear(x[:, :0], weight).shape == (3, 0, 4)


def test_without_onednn_the_model_is_the_same(monkeypatch):
    """Where torch has no oneDNN, or not this function of it, experts compute the same without it."""
    torch.manual_seed(0)
    layer = MoeFFN(SiloConfig(hidden_size=32, num_attention_heads=2, intermediate_size=24, num_experts=4))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(1, 200, 32)
    results = []
    for each in (products.ONEDNN, None):
        monkeypatch.setattr(products, "ONEDNN", each)
        out, _ = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-3)
