"""Routers: which experts each token gets, with which weight, and the losses that keep experts in use.

Every function takes the router's logits, (tokens, experts); a *loss* is a scalar in the logits' units, unweighted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """What a feed-forward layer with experts did, for losses and logs."""

    expert: torch.Tensor
    """Numbers of the experts (or values) that each token got, (tokens, choices), int64."""
    weight: torch.Tensor
    """With which weight, (tokens, choices)."""
    logits: torch.Tensor | None = None
    """The router's logits, (tokens, experts); none where experts are retrieved by keys."""
    loss: torch.Tensor | None = None
    """The layer's auxiliary losses, weighted and summed; none in evaluation and for kinds that have none."""


def topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights (tokens, k): a softmax over the k greatest logits (Mixtral, Jiang 2024, section 2.1; Shazeer
    2017, equations 3 and 5), computed in float32 at least."""
    best, expert = at_least_float32(logits).topk(k, dim=-1)
    return expert, best.softmax(dim=-1)


def noisy_logits(clean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Logits with normal noise of each token's and expert's own spread (Shazeer 2017, equation 4); ``spread`` is
    Softplus(x · W_noise), (tokens, experts)."""
    return clean + torch.randn_like(clean) * spread


def importance_loss(expert: torch.Tensor, weight: torch.Tensor, experts: int) -> torch.Tensor:
    """CV² of each expert's summed gates (Shazeer 2017, equations 6 and 7)."""
    return squared_variation(weight.new_zeros(experts).index_add(0, expert.flatten(), weight.flatten()))


def load_loss(clean: torch.Tensor, noisy: torch.Tensor, spread: torch.Tensor, k: int) -> torch.Tensor:
    """CV² of each expert's expected number of tokens (Shazeer 2017, appendix A, equations 8 to 11).

    A token counts for an expert by the probability that it would be among the k if its noise, and no other expert's,
    were drawn again. With as many experts as choices every expert is certain, and the loss is 0.
    """
    clean, noisy, spread = (at_least_float32(each) for each in (clean, noisy, spread))
    if k == clean.shape[1]:
        return clean.sum() * 0.0
    best = noisy.topk(k + 1, dim=-1).values
    # The k-th greatest of the others: an expert that is among the k itself is left out of the count.
    threshold = torch.where(noisy >= best[:, k - 1 : k], best[:, k : k + 1], best[:, k - 1 : k])
    probability = torch.special.ndtr((clean - threshold) / spread)
    return squared_variation(probability.sum(dim=0))


def squared_variation(x: torch.Tensor) -> torch.Tensor:
    """Variance over squared mean of a vector: 0 when all entries are equal."""
    return x.var(unbiased=False) / (x.mean().square() + 1e-10)


def balance_loss(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Experts · Σ_e (share of choices) · (mean probability): k when the load is even (Fedus 2021, equation 4, with k
    choices a token)."""
    probability = at_least_float32(logits).softmax(dim=-1)
    chosen = probability.topk(k, dim=-1).indices
    share = torch.zeros_like(probability).scatter_(1, chosen, 1.0).mean(dim=0)
    return logits.shape[-1] * (share * probability.mean(dim=0)).sum()


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean squared log of the softmax's denominator, which keeps logits small (ST-MoE, Zoph 2022, equation 5)."""
    return at_least_float32(logits).logsumexp(dim=-1).square().mean()


def expert_choice(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert takes the tokens that it scores highest, k of them a token on average (Zhou 2022, section 3.2).

    Returns:
        Tokens and weights, each (experts, capacity); a weight is the token's softmax over experts.
    """
    tokens, experts = logits.shape
    capacity = min(tokens, max(1, tokens * k // experts))
    weight, token = at_least_float32(logits).softmax(dim=-1).t().topk(capacity, dim=-1)
    return token, weight


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision widened, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unevenness(load: torch.Tensor) -> float:
    """Kullback-Leibler divergence, in nats, of the load's distribution over experts from the even one: 0 when all are
    used alike (PEER, He 2024, section 4.2.2)."""
    share = load.double() / load.sum()
    return float(torch.special.xlogy(share, share * len(share)).sum())


def load_of(routing: Routing, experts: int) -> torch.Tensor:
    """Summed weight of each expert in one forward pass, (experts,) float64."""
    load = torch.zeros(experts, dtype=torch.float64, device=routing.weight.device)
    return load.index_add_(0, routing.expert.flatten(), routing.weight.detach().double().flatten())
