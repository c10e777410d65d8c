"""Products with a few rows of a large matrix: what retrieval among a million experts costs is the rows it takes.

Both products give a *sparse* gradient of the matrix: one row for each row taken, summed over the tokens that took it,
in the order of the rows. Nothing of the size of the matrix is formed, forward or backward; only an optimizer that works
by rows (``training.optimizer``) is needed to keep it so.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

TOKENS_AT_ONCE = 32
"""Tokens whose rows are copied side by side where no kernel reads them in place; the copy stays in the cache."""


class Choice:
    """Which rows each token takes, ``index`` (tokens, k) int64; the order by rows is computed once, when asked for.

    Gradients are ``sparse`` unless an optimizer or a parallel mode knows dense ones only.
    """

    def __init__(self, index: torch.Tensor, *, sparse: bool = True) -> None:
        self.index = index
        self.sparse = sparse

    @cached_property
    def by_row(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(rows, starts, order, tokens): the rows taken, ascending and each once; where each one's run begins in
        ``order``, which sorts the flattened index stably; and the token of each entry of ``order``."""
        values, order = stably_sorted(self.index.flatten())
        rows, counts = torch.unique_consecutive(values, return_counts=True)
        return rows, counts.cumsum(0) - counts, order, order // self.index.shape[1]

    def row_sums(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """For each row taken Σ weight[t, j] · x[t] over the places (t, j) that took it, (rows, width).

        ``weight`` is (tokens, k) and ``x`` (tokens, width).
        """
        _, starts, order, tokens = self.by_row
        return F.embedding_bag(
            tokens, x.detach(), starts, mode="sum", per_sample_weights=weight.detach().flatten()[order]
        )

    def gradient(self, weight: torch.Tensor, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """:meth:`row_sums` as a matrix of a shape, coalesced if sparse."""
        if not self.sparse:
            return x.new_zeros(shape).index_copy_(0, self.by_row[0], self.row_sums(weight, x))
        return torch.sparse_coo_tensor(
            self.by_row[0].unsqueeze(0), self.row_sums(weight, x), shape, is_coalesced=True, check_invariants=False
        )


def stably_sorted(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (n,) int64 in order, and where each stood, as ``sort(stable=True)`` gives them; none is negative, and n
    of the largest would be below 2 ^ 62.

    On the CPU a number and its place are sorted as one, by numpy and one thread: the threads of torch's sort wait for
    each other, which takes long where other programs run.
    """
    if numbers.device.type != "cpu":
        return numbers.sort(stable=True)
    bits = len(numbers).bit_length()
    both = torch.from_numpy(np.sort((numbers << bits | torch.arange(len(numbers))).numpy()))
    return both >> bits, both & (1 << bits) - 1


def coalesced(gradient: torch.Tensor) -> torch.Tensor:
    """A sparse gradient with ascending rows, each once.

    Autograd forgets that a gradient was coalesced when it hands it to a parameter, and puts several one behind the
    other. Looking is much cheaper than torch's ``coalesce``, and so is adding up by rows where it is needed.
    """
    rows, values = gradient._indices()[0], gradient._values()
    if not gradient.is_coalesced() and not bool((rows[1:] > rows[:-1]).all()):
        choice = Choice(rows.unsqueeze(1))
        rows, values = choice.by_row[0], choice.row_sums(values.new_ones(len(rows), 1), values)
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, gradient.shape, is_coalesced=True, check_invariants=False)


def dot_rows(x: torch.Tensor, matrix: torch.Tensor, choice: Choice) -> torch.Tensor:
    """⟨x[t], matrix[index[t, j]]⟩, (tokens, k); ``x`` is (tokens, width), ``matrix`` (rows, width)."""
    return _DotRows.apply(x.to(matrix.dtype), matrix, choice)


def sum_rows(weight: torch.Tensor, matrix: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Σ_j weight[t, j] · matrix[index[t, j]], (tokens, width); ``weight`` is (tokens, k)."""
    return _SumRows.apply(weight.to(matrix.dtype), matrix, choice)


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: torch.Tensor, choice: Choice) -> torch.Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.choice = choice
        return dots(x, matrix, choice.index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, matrix), choice, weight = ctx.saved_tensors, ctx.choice, grads[0].contiguous()
        grad_x = bag(weight, matrix, choice.index) if ctx.needs_input_grad[0] else None
        grad_matrix = choice.gradient(weight, x, matrix.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_matrix, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, matrix: torch.Tensor, choice: Choice) -> torch.Tensor:
        ctx.save_for_backward(weight, matrix)
        ctx.choice = choice
        return bag(weight, matrix, choice.index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight, matrix), choice, grad = ctx.saved_tensors, ctx.choice, grads[0].contiguous()
        grad_weight = dots(grad, matrix, choice.index) if ctx.needs_input_grad[0] else None
        grad_matrix = choice.gradient(weight, grad, matrix.shape) if ctx.needs_input_grad[1] else None
        return grad_weight, grad_matrix, None


def bag(weight: torch.Tensor, matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows, (tokens, width), without copying the rows."""
    # Of a matrix that asks for a gradient torch would note whose row is whose, which only its own backward pass needs.
    return F.embedding_bag(index, matrix.detach(), mode="sum", per_sample_weights=weight.detach())


def dots(x: torch.Tensor, matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Dot products with rows, (tokens, k): by torch's sampled matrix product where it reads rows in place."""
    tokens, k = index.shape
    kernel = matrix.device.type == "cpu" and matrix.dtype in (torch.float32, torch.float64)
    if kernel and k <= len(matrix):  # Of more entries than the full product has, the kernel makes no result.
        starts = torch.arange(0, tokens * k + 1, k)
        with warnings.catch_warnings():  # torch announces once that this layout is in beta.
            warnings.simplefilter("ignore", UserWarning)
            wanted = torch.sparse_csr_tensor(
                starts, index.flatten(), x.new_zeros(tokens * k), (tokens, len(matrix)), check_invariants=False
            )
        return torch.sparse.sampled_addmm(wanted, x, matrix.t(), beta=0.0).values().view(tokens, k)
    parts = [
        torch.bmm(matrix[index[at : at + TOKENS_AT_ONCE]], x[at : at + TOKENS_AT_ONCE].unsqueeze(2)).squeeze(2)
        for at in range(0, tokens, TOKENS_AT_ONCE)
    ]
    return torch.cat(parts) if parts else x.new_empty(0, k)
