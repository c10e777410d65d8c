"""Feed-forward layers of whole SwiGLU networks: one, a routed mixture of several, or several that are averaged."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from silo.errors import UsageError
from silo.model_config import SiloConfig
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
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map (batch, time, hidden) to the same shape. There are no experts, so no routing."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up), None


class Experts(nn.Module):
    """Several SwiGLU networks; the rows of each are two grouped matrix products over a contiguous run."""

    def __init__(self, config: SiloConfig) -> None:
        super().__init__()
        shape = (config.num_experts, config.hidden_size, config.intermediate_size)
        self.gate_proj = nn.Parameter(torch.empty(shape))
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape).transpose(1, 2).contiguous())

    def apply_experts(self, rows: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """Each expert on its rows: ``rows`` (rows, hidden) are sorted by expert, ``load`` (experts,) counts them."""
        ends = load.cumsum(0).to(torch.int32)
        inner = F.silu(grouped(rows, self.gate_proj, ends)) * grouped(rows, self.up_proj, ends)
        return grouped(inner, self.down_proj, ends)


def grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """One matrix product for each run of rows that ends at ``ends``; no run is padded or cut, and one may be empty."""
    if torch.is_autocast_enabled(rows.device.type):  # grouped_mm is none of the operations that autocast casts.
        kind = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(kind), weight.to(kind)
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if len(rows) and aligned and weight.dtype != torch.float64:
        return F.grouped_mm(rows, weight, offs=ends)
    runs = rows.tensor_split(ends.tolist()[:-1])
    return torch.cat([run @ each for run, each in zip(runs, weight.unbind(), strict=True)])


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
        self.config = config
        super().__init__(config)
        self.experts_per_token = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        if config.router == "noisy_topk":
            self.router_noise = nn.Linear(config.hidden_size, config.num_experts, bias=False)

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
        k = expert.shape[1]
        by_expert = expert.flatten().argsort(stable=True)
        load = torch.bincount(expert.flatten(), minlength=len(self.gate_proj))
        # Undoing the sort by a gather, not by index_add, keeps the order of summation fixed.
        back = torch.empty_like(by_expert)
        back[by_expert] = torch.arange(len(by_expert), device=rows.device)
        out = self.apply_experts(_Spread.apply(rows, by_expert, back, k), load)
        out = _Permute.apply(out, back, by_expert).view(len(rows), k, -1)
        return (out * weight.unsqueeze(-1)).sum(dim=1)

    def _experts_choose(self, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        if not self.training:
            raise UsageError(
                "router is 'expert_choice' in evaluation, where experts would choose among later tokens too; expected "
                "topk or noisy_topk: set model.config.router = 'topk', the weights are the same"
            )
        token, weight = expert_choice(logits, self.experts_per_token)
        load = torch.full((len(token),), token.shape[1], device=rows.device)
        out = self.apply_experts(rows[token.flatten()], load) * weight.to(rows.dtype).flatten().unsqueeze(-1)
        taken = torch.zeros_like(rows).index_add(0, token.flatten(), out.to(rows.dtype))
        expert = torch.arange(len(token), device=rows.device).unsqueeze(1).expand_as(token)
        loss = self._z_loss(logits)
        return taken, Routing(
            expert.reshape(-1, 1), weight.reshape(-1, 1), logits, loss if isinstance(loss, torch.Tensor) else None
        )


class _Spread(torch.autograd.Function):
    """Each row k times, sorted by expert. Backward is a gather and a sum over k, where torch would scatter."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows: torch.Tensor,
        by_expert: torch.Tensor,
        back: torch.Tensor,
        k: int,
    ) -> torch.Tensor:
        ctx.back, ctx.k = back, k  # type: ignore[attr-defined]
        return rows[by_expert // k]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back, k = ctx.back, ctx.k  # type: ignore[attr-defined]
        return grads[0][back].view(len(back) // k, k, -1).sum(dim=1), None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order, and gradients back by the inverse order."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.inverse = inverse  # type: ignore[attr-defined]
        return rows[order]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0][ctx.inverse], None, None  # type: ignore[attr-defined]


class AveragedFFN(Experts):
    """Experts without a router, one network in the end (Experts Weights Averaging, Huang 2023).

    In training a random partition gives every expert an equal share of the tokens; after each step experts move
    towards their mean (:func:`share_experts`). In evaluation the layer is one SwiGLU of the mean weights, which
    :func:`silo.surgery.averaged` turns into a dense layer.
    """

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing | None]:
        """Map (batch, time, hidden) to the same shape, and in training say which experts were drawn."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.training:
            gate, up, down = self.mean()
            return ((F.silu(rows @ gate) * (rows @ up)) @ down).view_as(x), None
        experts = len(self.gate_proj)
        order = torch.randperm(len(rows), device=x.device)
        load = torch.full((experts,), len(rows) // experts, device=x.device)
        load[: len(rows) % experts] += 1
        back = torch.empty_like(order)
        back[order] = torch.arange(len(rows), device=x.device)
        out = _Permute.apply(self.apply_experts(_Permute.apply(rows, order, back), load), back, order)
        expert = torch.arange(experts, device=x.device).repeat_interleave(load)[back].unsqueeze(1)
        return out.view_as(x), Routing(expert, torch.ones_like(expert, dtype=x.dtype))

    def mean(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean of the experts: gate and up (hidden, intermediate), down (intermediate, hidden)."""
        return self.gate_proj.mean(0), self.up_proj.mean(0), self.down_proj.mean(0)


@torch.no_grad()
def share_experts(model: nn.Module, rate: float) -> None:
    """Move each expert of every ``averaged`` layer by ``rate`` (0 to 1) towards the mean of the others, in place: call
    it after each optimizer step (Huang 2023, equation 4)."""
    for layer in model.modules():
        if isinstance(layer, AveragedFFN) and len(layer.gate_proj) > 1:
            for weight in (layer.gate_proj, layer.up_proj, layer.down_proj):
                others = (weight.sum(0) - weight) / (len(weight) - 1)
                weight.lerp_(others, rate)
