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


@pytest.mark.parametrize(
    ("vectors", "maker", "faster"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_onednn_is_chosen_by_processor(vectors, maker, faster, monkeypatch, tmp_path):
    """It is the faster one where vectors are wide and MKL does not use them; what cannot be read is MKL's."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    assert not products.onednn_is_faster()
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    assert products.onednn_is_faster() is faster


def test_without_onednn_the_model_is_the_same(monkeypatch):
    """Where oneDNN does not multiply, experts compute the same as where it does, whichever this processor's is."""
    torch.manual_seed(0)
    layer = MoeFFN(SiloConfig(hidden_size=32, num_attention_heads=2, intermediate_size=24, num_experts=4))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(1, 200, 32)
    results = []
    for each in (torch.ops.mkldnn._linear_pointwise, None):
        monkeypatch.setattr(products, "ONEDNN", each)
        out, _ = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-3)
