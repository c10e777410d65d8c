"""Retrieval of a few of many by product keys, and the feed-forward layers that rest on it: PEER and PKM.

n keys are all pairs of √n first and √n second halves (Lample 2019, section 3.2), so the k best of n are found by
looking at 2 · √n halves.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from silo.model_config import SiloConfig
from silo.products import Linear, by_onednn, product
from silo.routing import Routing
from silo.rows import Choice, bag, dot_rows, sum_rows

ROWS_AT_ONCE = 1024
"""Queries whose scores are held at once: what is never read again should not leave the cache."""


class ProductKeys(nn.Module):
    """Finds the ``k`` of ``n`` keys whose dot product with a query is greatest, for each of some heads.

    A query is one linear map of the token. The paper's batch norm of queries (Lample 2019, section 3.1; PEER, section
    4.2.3) is an option: in training it divides by the spread of each feature over the batch, so a token sees of later
    ones two numbers a feature, averaged over the whole batch, as in the paper and no more; in evaluation it uses the
    running averages, so that a token sees nothing of later ones. (Under gradient checkpointing a batch enters the
    running averages twice.)

    With ``siblings`` f > 1, neighbouring half keys form groups of f that compete: only the best of a group can be
    retrieved. That is how a trained layer grows without changing its function (:func:`silo.surgery.grow`).
    """

    def __init__(self, config: SiloConfig, n: int, heads: int, k: int, siblings: int = 1) -> None:
        super().__init__()
        self.heads, self.k, self.siblings = heads, k, siblings
        half = config.key_dim // 2
        self.query = Linear(config.hidden_size, heads * config.key_dim)
        self.norm = nn.BatchNorm1d(heads * config.key_dim) if config.query_batch_norm else nn.Identity()
        self.keys = nn.Parameter(torch.empty(1 if config.shared_keys else heads, 2, isqrt(n), half))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers of the keys found, each (tokens, heads, k), for ``rows`` (tokens, hidden)."""
        query = self.norm(self.query(rows)).view(len(rows), self.heads, 2, -1).to(self.keys.dtype)
        with torch.autocast(rows.device.type, enabled=False):  # Among a million, near ties are many.
            return _Retrieve.apply(query, self.keys, self.k, self.siblings)


class _Retrieve(torch.autograd.Function):
    """The k best pairs of half keys. Only scores of the pairs found have a gradient, so the backward pass reads k
    half keys a query, where the forward pass scored √n."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, keys: torch.Tensor, k: int, siblings: int) -> tuple[torch.Tensor, ...]:
        tokens, heads, _, _ = query.shape
        shared = len(keys) == 1
        parts = []
        step = max(1, ROWS_AT_ONCE // heads)
        for at in range(0, tokens, step):
            part = query[at : at + step]
            part = part.reshape(1, -1, *part.shape[2:]) if shared else part.transpose(0, 1)
            # (key sets, 2, queries, √n): one matrix product for each set of half keys
            halves = half_scores(part.transpose(1, 2).contiguous(), keys)
            score, first, second = best_pairs(halves, k, siblings)
            if not shared:
                score, first, second = (each.transpose(0, 1) for each in (score, first, second))
            parts.append(tuple(each.reshape(-1, heads, k) for each in (score, first, second)))
        score, first, second = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(query, keys, first, second)
        index = first * keys.shape[2] + second
        ctx.mark_non_differentiable(index)
        return score, index

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, first, second = ctx.saved_tensors
        tokens, heads, _, width = query.shape
        weight = grads[0].reshape(tokens * heads, -1).contiguous()
        flat = keys.view(-1, width)
        grad_query, grad_keys = torch.empty_like(query), torch.zeros_like(flat)
        side = keys.shape[2]
        sets = torch.arange(heads, device=query.device).view(1, heads, 1) if len(keys) > 1 else 0
        for half, number in enumerate((first, second)):
            choice = Choice((number + (2 * sets + half) * side).view(tokens * heads, -1))
            x = query[:, :, half].reshape(tokens * heads, width)
            grad_query[:, :, half] = bag(weight, flat, choice.index).view(tokens, heads, width)
            grad_keys[choice.by_row[0]] = choice.row_sums(weight, x)
        return grad_query, grad_keys.view_as(keys), None, None


def half_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Dot products of (sets, 2, queries, width) with (sets, 2, √n, width): (sets, 2, queries, √n)."""
    if not by_onednn(query[0, 0], keys):
        return query @ keys.transpose(2, 3)
    pairs = zip(query.flatten(0, 1), keys.flatten(0, 1), strict=True)
    return torch.stack([product(each, half) for each, half in pairs]).unflatten(0, keys.shape[:2])


def best_pairs(halves: torch.Tensor, k: int, siblings: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k pairs (i, j) with the greatest sum of scores, and their numbers i and j, each (sets, queries, k).

    ``halves`` is (sets, 2, queries, √n). A pair that is among the k best consists of halves of which the a-th and the
    b-th best have a · b ≤ k, since all a · b pairs of no worse halves are at least as good.
    """
    if siblings > 1:
        halves, sibling = halves.unflatten(-1, (-1, siblings)).max(dim=-1)
    value, number = halves.topk(k, dim=-1)
    ranks = [(a, b) for a in range(k) for b in range(k) if (a + 1) * (b + 1) <= k]
    a, b = torch.tensor(ranks, device=halves.device).unbind(1)
    score, found = (value[:, 0][..., a] + value[:, 1][..., b]).topk(k, dim=-1)
    if siblings > 1:
        number = number * siblings + sibling.gather(-1, number)
    return score, number[:, 0].gather(-1, a[found]), number[:, 1].gather(-1, b[found])


class PeerFFN(nn.Module):
    """Parameter-efficient expert retrieval (PEER, He 2024, algorithm 1): Σ over heads and experts found of
    ``softmax(scores of the head) · gelu(⟨down, x⟩) · up``, where an expert is one neuron.

    Heads share the experts. The cost of a step depends on the tokens, the heads and ``k``, and through the half keys
    on √n: never on n.
    """

    def __init__(self, config: SiloConfig) -> None:
        super().__init__()
        n = config.peer_num_experts
        self.retrieval = ProductKeys(config, n, config.peer_heads, config.peer_experts_per_head, config.peer_siblings)
        # As embeddings with sparse gradients, since DistributedDataParallel learns of them by this class.
        self.down = nn.Embedding(n, config.hidden_size, sparse=config.sparse_gradients)
        self.up = nn.Embedding(n, config.hidden_size, sparse=config.sparse_gradients)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Map (batch, time, hidden) to the same shape, and say which experts were taken."""
        rows = x.reshape(-1, x.shape[-1])
        score, expert = self.retrieval(rows)
        weight = score.softmax(dim=-1).flatten(1)
        choice = Choice(expert.flatten(1), sparse=self.up.sparse)
        inner = F.gelu(dot_rows(rows, self.down.weight, choice))
        out = sum_rows(inner * weight, self.up.weight, choice)
        return out.to(x.dtype).view_as(x), Routing(choice.index, weight)


class PkmFFN(nn.Module):
    """Product-key memory (Lample 2019): Σ over heads and values found of ``softmax(scores of the head) · value``."""

    def __init__(self, config: SiloConfig) -> None:
        super().__init__()
        n = config.pkm_num_values
        self.retrieval = ProductKeys(config, n, config.pkm_heads, config.pkm_values_per_head)
        self.values = nn.Embedding(n, config.hidden_size, sparse=config.sparse_gradients)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Map (batch, time, hidden) to the same shape, and say which values were taken."""
        score, value = self.retrieval(x.reshape(-1, x.shape[-1]))
        weight = score.softmax(dim=-1).flatten(1)
        choice = Choice(value.flatten(1), sparse=self.values.sparse)
        out = sum_rows(weight, self.values.weight, choice)
        return out.to(x.dtype).view_as(x), Routing(choice.index, weight)
