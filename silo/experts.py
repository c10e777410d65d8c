"""Feed-forward layers of whole SwiGLU networks: one, a routed mixture of several, or several that are averaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from silo.errors import UsageError
from silo.model_config import SiloConfig
from silo.products import FEWEST_ROWS, Linear, by_onednn, linear
from silo.routing import (
    Routing,
    balance_loss,
    expert_choice,
    importance_loss,
    load_loss,
    noisy_logits,
    topk,
    z_loss,
)

MIN_SPREAD = 1e-2
"""Least spread of a router's noise, without which the load loss would divide by zero."""


class DenseFFN(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) · up(x))``."""

    def __init__(self, config: SiloConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map (batch, time, hidden) to the same shape. There are no experts, so no routing."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up), None


class Experts(nn.Module):
    """Several SwiGLU networks; the rows of each are two grouped matrix products over a contiguous run.

    ``gate_up_proj`` is (experts, hidden, 2 · intermediate), the gate first; ``down_proj`` (experts, intermediate,
    hidden).
    """

    def __init__(self, config: SiloConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, 2 * intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, intermediate_size, config.hidden_size))

    def apply_experts(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Each expert on its run of ``rows`` (rows, hidden), which stops before the expert's entry of ``ends``."""
        gate, up = grouped(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        return grouped(F.silu(gate) * up, self.down_proj, ends)

    def each(self, rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """What each row's experts make of it, (rows, k, hidden); ``rows`` is (rows, hidden), ``expert`` (rows, k)."""
        load = torch.bincount(expert.flatten(), minlength=len(self.down_proj))
        # oneDNN makes a program for each new number of rows, so runs are filled up to a few lengths.
        unit = FEWEST_ROWS if by_onednn(rows, self.down_proj) else 1
        ends = ((load + unit - 1) // unit * unit).cumsum(0)
        order = expert.flatten().argsort(stable=True)
        # Where a run starts, less how many entries of ``order`` are before it: what shifts its entries.
        shift = (ends - load.cumsum(0)) - ((load + unit - 1) // unit * unit - load)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=rows.device) + shift.repeat_interleave(load)
        source = place.new_zeros(int(ends[-1]))
        source[place] = torch.arange(len(order), device=rows.device) // expert.shape[1]
        out = self.apply_experts(_Spread.apply(rows, source, place), ends.to(torch.int32))
        return _Gather.apply(out, place).view(*expert.shape, -1)


def grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """One matrix product for each run of rows that ends at ``ends``; none is cut, and one may be empty."""
    if torch.is_autocast_enabled(rows.device.type):  # grouped_mm is none of the operations that autocast casts.
        kind = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(kind), weight.to(kind)
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if len(rows) and aligned and weight.dtype != torch.float64 and not by_onednn(rows, weight):
        return F.grouped_mm(rows, weight, offs=ends)
    runs = rows.tensor_split(ends.tolist()[:-1])
    return torch.cat([linear(run, each.t()) for run, each in zip(runs, weight.unbind(), strict=True)])


class MoeFFN(Experts):
    """Some of n SwiGLU experts for each token, by one of three routers.

    Dropless: every token reaches its k experts, however uneven the load.

    - ``topk``: the k greatest logits, with the balance loss (Mixtral; Fedus 2021).
    - ``noisy_topk``: in training noise is added to the logits first, with the importance and load losses (Shazeer
      2017). Router and noise start at zero, which is an even load.
    - ``expert_choice``: in training each expert takes the tokens that it likes best (Zhou 2022). That depends on
      later tokens and on other sequences, so evaluation refuses it: ``model.config.router = "topk"`` evaluates, and
      goes on training, the same weights.
    """

    def __init__(self, config: SiloConfig) -> None:
        super().__init__(config, config.moe_intermediate_size or config.intermediate_size)
        self.config = config
        self.experts_per_token = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_experts)
        if config.router == "noisy_topk":
            self.router_noise = Linear(config.hidden_size, config.num_experts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Map (batch, time, hidden) to the same shape, and say which experts were taken.

        Raises:
            UsageError: experts would choose tokens in evaluation, and so look ahead.
        """
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        if self.config.router == "expert_choice":
            out, routing = self._experts_choose(rows, logits)
        else:
            expert, weight, loss = self._tokens_choose(rows, logits)
            out, routing = self._mix(rows, expert, weight.to(x.dtype)), Routing(expert, weight, logits, loss)
        return out.view_as(x), routing

    def _tokens_choose(
        self, rows: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Experts and weights, each (tokens, k), and in training the loss."""
        config, k = self.config, self.experts_per_token
        if not self.training:
            return *topk(logits, k), None
        if config.router == "topk":
            return *topk(logits, k), config.router_aux_loss_coef * balance_loss(logits, k) + self._z_loss(logits)
        spread = F.softplus(self.router_noise(rows)) + MIN_SPREAD
        noisy = noisy_logits(logits, spread)
        expert, weight = topk(noisy, k)
        loss = config.router_importance_loss_coef * importance_loss(expert, weight, logits.shape[1])
        loss = loss + config.router_load_loss_coef * load_loss(logits, noisy, spread, k)
        return expert, weight, loss + self._z_loss(logits)

    def _z_loss(self, logits: torch.Tensor) -> torch.Tensor | float:
        coefficient = self.config.router_z_loss_coef
        return coefficient * z_loss(logits) if coefficient else 0.0

    def _mix(self, rows: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Σ_j weight[t, j] · expert[t, j](rows[t]), (tokens, hidden)."""
        return (self.each(rows, expert) * weight.unsqueeze(-1)).sum(dim=1)

    def _experts_choose(self, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        if not self.training:
            raise UsageError(
                "router is 'expert_choice' in evaluation, where experts would choose among later tokens too; expected "
                "topk or noisy_topk: set model.config.router = 'topk', the weights are the same"
            )
        token, weight = expert_choice(logits, self.experts_per_token)
        ends = torch.arange(1, len(token) + 1, dtype=torch.int32, device=rows.device) * token.shape[1]
        out = self.apply_experts(rows[token.flatten()], ends) * weight.to(rows.dtype).flatten().unsqueeze(-1)
        taken = torch.zeros_like(rows).index_add(0, token.flatten(), out.to(rows.dtype))
        expert = torch.arange(len(token), device=rows.device).unsqueeze(1).expand_as(token)
        loss = self._z_loss(logits)
        return taken, Routing(
            expert.reshape(-1, 1), weight.reshape(-1, 1), logits, loss if isinstance(loss, torch.Tensor) else None
        )


class _Spread(torch.autograd.Function):
    """Row ``source[i]`` at place i. ``place`` holds the places of each row's k copies, so that the backward pass is a
    gather and a sum in a fixed order, where torch would scatter."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, source: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.place, ctx.tokens = place, len(rows)
        return rows.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0].index_select(0, ctx.place)
        return grad.view(ctx.tokens, -1, grad.shape[1]).sum(dim=1), None, None


class _Gather(torch.autograd.Function):
    """The rows at some places, all different; others get no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.place, ctx.rows = place, len(rows)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0].new_zeros(ctx.rows, grads[0].shape[1])
        return grad.index_copy_(0, ctx.place, grads[0]), None


class AveragedFFN(Experts):
    """Experts without a router, one network in the end (Experts Weights Averaging, Huang 2023).

    In training a random partition gives every expert an equal share of the tokens; after each step experts move
    towards their mean (:func:`share_experts`). In evaluation the layer is one SwiGLU of the mean weights, which
    :func:`silo.surgery.averaged` turns into a dense layer.
    """

    def __init__(self, config: SiloConfig) -> None:
        super().__init__(config, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing | None]:
        """Map (batch, time, hidden) to the same shape, and in training say which experts were drawn."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.training:
            gate_up, down = self.mean()
            gate, up = linear(rows, gate_up.t()).chunk(2, dim=-1)
            return linear(F.silu(gate) * up, down.t()).view_as(x), None
        expert = torch.arange(len(rows), device=x.device) % len(self.down_proj)
        expert = expert[torch.randperm(len(rows), device=x.device)].unsqueeze(1)
        out = self.each(rows, expert).squeeze(1)
        return out.view_as(x), Routing(expert, torch.ones_like(expert, dtype=x.dtype))

    def mean(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of the experts: gate and up (hidden, 2 · intermediate), down (intermediate, hidden)."""
        return self.gate_up_proj.mean(0), self.down_proj.mean(0)


@torch.no_grad()
def share_experts(model: nn.Module, rate: float) -> None:
    """Move each expert of every ``averaged`` layer by ``rate`` (0 to 1) towards the mean of the others, in place: call
    it after each optimizer step (Huang 2023, equation 4)."""
    for layer in model.modules():
        if isinstance(layer, AveragedFFN) and len(layer.down_proj) > 1:
            for weight in (layer.gate_up_proj, layer.down_proj):
                others = (weight.sum(0) - weight) / (len(weight) - 1)
                weight.lerp_(others, rate)
