"""AdamW that works by rows where a gradient is sparse, so that a step costs what it touches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.optim.adamw import adamw

from silo.compiling import compiled
from silo.errors import UsageError
from silo.product_keys import PeerFFN, PkmFFN
from silo.rows import coalesced

COMPILED = (torch.float32, torch.float64)
"""Types of matrices whose rows a compiled loop updates in place, on the CPU. Those of others are copied, updated by
torch and put back."""
ROWS_AT_ONCE = 512
"""Rows that are copied in one go: they, their gradients and their moments fit into a core's cache."""
ALONE = 1 << 16
"""So many values are updated by a thread sooner than another is started."""


class RowAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov 2019) for dense gradients, and lazily for the rows of sparse ones.

    A row's moments decay, and its weights move and decay, in the steps that give it a gradient; else it stands still.
    Bias correction counts all steps, as ``torch.optim.SparseAdam`` does, so that a row which is first chosen late
    starts with smaller steps. When every row has a gradient in every step, this is AdamW. Unlike SparseAdam it takes
    coalesced gradients as they are, and reads and writes a row, its moments and its gradient once.

    Args:
        params: parameters or groups, as for any optimizer.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, in units of the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {
                "beta1": group["betas"][0],
                "beta2": group["betas"][1],
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "eps": group["eps"],
            }
            dense: list[torch.Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if parameter.grad.is_sparse:
                    update_rows(parameter, coalesced(parameter.grad), state, settings)
                else:
                    dense.append(parameter)
            if dense:
                first, second, steps = (
                    [self.state[parameter][name] for parameter in dense] for name in ("exp_avg", "exp_avg_sq", "step")
                )
                update(dense, [parameter.grad for parameter in dense], first, second, steps, settings)
        return loss


def update(
    weights: list[torch.Tensor],
    gradients: list[Any],
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    steps: list[torch.Tensor],
    settings: dict[str, Any],
) -> None:
    """torch's fused AdamW on tensors; weights, moments and steps change in place."""
    adamw(weights, gradients, first, second, [], steps, fused=True, amsgrad=False, maximize=False, **settings)


def update_rows(
    weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], settings: dict[str, Any]
) -> None:
    """AdamW on the rows of a coalesced gradient, in place."""
    rows, values = gradient.indices()[0], gradient.values()
    whole = (weight, state["exp_avg"], state["exp_avg_sq"])
    if weight.device.type == "cpu" and weight.dtype in COMPILED and weight.dim() == 2:
        _update_in_place(whole, rows, values, state["step"].item() + 1, settings)
    else:
        for some, gradients in zip(rows.split(ROWS_AT_ONCE), values.split(ROWS_AT_ONCE), strict=True):
            part = [tensor.index_select(0, some) for tensor in whole]
            update([part[0]], [gradients], [part[1]], [part[2]], [state["step"].clone()], settings)
            for tensor, changed in zip(whole, part, strict=True):
                tensor.index_copy_(0, some, changed)
    state["step"] += 1


def _update_in_place(
    whole: tuple[torch.Tensor, ...], rows: torch.Tensor, values: torch.Tensor, step: float, settings: dict[str, Any]
) -> None:
    """The same by the compiled loop, in as many threads as torch uses: rows are independent, so that bits are the same
    for any number."""
    beta1, beta2, lr = settings["beta1"], settings["beta2"], settings["lr"]
    step_size, correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    factors = [1 - lr * settings["weight_decay"], 1 - beta1, beta2, 1 - beta2, step_size, correction, settings["eps"]]
    weight, first, second = (tensor.detach().numpy() for tensor in whole)
    threads = min(torch.get_num_threads(), 1 + values.numel() // ALONE)

    def run(some: torch.Tensor, gradients: torch.Tensor) -> None:
        _adamw(weight, first, second, some.numpy(), gradients.numpy(), np.asarray(factors, dtype=weight.dtype))

    mine, *others = zip(rows.tensor_split(threads), values.tensor_split(threads), strict=True)
    with ThreadPoolExecutor(threads) as pool:  # which starts a thread when it is given work
        working = [pool.submit(run, *part) for part in others]
        run(*mine)
        for each in working:
            each.result()


@partial(compiled, error_model="numpy")
def _adamw(
    weight: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    rows: np.ndarray,
    gradient: np.ndarray,
    factors: np.ndarray,
) -> None:
    """Some rows' step, as torch's fused kernel has it (Loshchilov 2019, algorithm 2).

    Args:
        weight: (n, width), changed in place, as are the moments.
        first: moment, likewise.
        second: moment, likewise.
        rows: (m,) int64, different ones.
        gradient: (m, width) theirs.
        factors: (7,) of the same type: what decay leaves of a weight; by how much the first moment goes towards the
            gradient; decay of the second, and one less that; the learning rate over the first's bias correction; the
            root of the second's; what is added to its root.
    """
    kept, nearer, decay, fresh = factors[0], factors[1], factors[2], factors[3]
    step_size, correction, eps = factors[4], factors[5], factors[6]
    for at in range(len(rows)):
        row = rows[at]
        for column in range(weight.shape[1]):
            slope = gradient[at, column]
            mean = first[row, column] + nearer * (slope - first[row, column])
            square = decay * second[row, column] + fresh * slope * slope
            first[row, column], second[row, column] = mean, square
            moved = step_size * mean / (np.sqrt(square) / correction + eps)
            weight[row, column] = kept * weight[row, column] - moved


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients, dense and sparse, in place so that their norm together is at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` does the same for dense gradients only.

    Returns:
        The norm before, a scalar.

    Raises:
        UsageError: ``max_norm`` is negative.
    """
    if max_norm < 0:
        raise UsageError(f"max_norm is {max_norm}; expected at least 0")
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    if not values:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in values]))
    torch._foreach_mul_(values, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, expert_learning_rate: float | None = None
) -> RowAdamW:
    """The optimizer of a run, each group with its peak as ``initial_lr``. Experts and values that are retrieved by keys
    may have a peak of their own; they stand last."""
    layers = [layer for layer in model.modules() if isinstance(layer, PeerFFN | PkmFFN)]
    experts = [each.weight for layer in layers for each in layer.children() if isinstance(each, torch.nn.Embedding)]
    if expert_learning_rate is None or not experts:
        groups = parameter_groups(model.parameters(), weight_decay)
    else:
        apart = {id(expert) for expert in experts}
        groups = parameter_groups((each for each in model.parameters() if id(each) not in apart), weight_decay)
        groups.append({"params": experts, "weight_decay": weight_decay, "lr": expert_learning_rate})
    optimizer = RowAdamW(groups, lr=learning_rate)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def parameter_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, gains do not."""
    parameters = list(parameters)
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def set_learning_rate(optimizer: Any, factor: float) -> None:
    """Set every group's learning rate to a share of its ``initial_lr``, the one that it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
