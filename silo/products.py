"""Matrix products of linear layers, by the faster of two libraries.

In float32 on a CPU torch multiplies by MKL, which uses the widest instructions of its own maker's processors alone;
oneDNN, which torch carries as well, uses everyone's: 240 against 100 GFLOP/s on one core of an AMD EPYC with AVX-512,
at the same precision. On Intel's, and where there are none wider than AVX2, MKL is the faster one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CPUINFO = Path("/proc/cpuinfo")


def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 and is not of MKL's maker; where that cannot be read it counts as his."""
    by_intel = "GenuineIntel" in CPUINFO.read_text() if CPUINFO.exists() else True
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not by_intel


ONEDNN: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn_is_faster() and torch.backends.mkldnn.is_available()
    else None
)
FEWEST_ROWS = 32
"""With fewer rows there is nothing to gain, and oneDNN makes a program for every new number of rows."""


def by_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies these: both float32 on a CPU, outside autocast and compilers, and enough rows."""
    return (
        ONEDNN is not None
        and bool(torch.backends.mkldnn.enabled)
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() >= FEWEST_ROWS * rows.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T``, (..., out), with its gradients; ``x`` is (..., in), ``weight`` (out, in)."""
    if not by_onednn(x, weight):
        return F.linear(x, weight)
    return _OneDnn.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), grad = ctx.saved_tensors, grads[0].contiguous()
        return (
            product(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            product(grad.t(), x.t()) if ctx.needs_input_grad[1] else None,
        )


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` by oneDNN, without a gradient of its own; both are float32 matrices on a CPU."""
    return ONEDNN(x, weight, None, "none", [], "")


class Linear(nn.Linear):
    """A linear map without a bias, multiplied by :func:`linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return linear(input, self.weight)
