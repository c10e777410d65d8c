"""What changes the weights: AdamW, and beside it whatever a model brings for parameters that want another treatment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

BETAS = (0.9, 0.95)
"""As SILO (2023) and LLaMA."""


def make_optimizers(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> list[Optimizer]:
    """AdamW first, then the model's own optimizers.

    A model may have a method ``own_optimizers(learning_rate, weight_decay)`` that gives a list of optimizers, for
    parameters that AdamW should not touch: expert rows of which a step reads few, say. The loop treats them as it
    treats AdamW: it steps them, scales the ``lr`` of each of their groups by the schedule, and keeps their state in
    checkpoints. Clipping is left to them: the gradient's norm is that of AdamW's parameters.
    """
    hook = getattr(model, "own_optimizers", None)
    own: list[Optimizer] = list(hook(learning_rate, weight_decay)) if hook else []
    taken = {id(parameter) for optimizer in own for parameter in parameters_of(optimizer)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    optimizers = [torch.optim.AdamW(parameter_groups(rest, weight_decay), lr=learning_rate, betas=BETAS), *own]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def parameter_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, gains do not."""
    parameters = list(parameters)
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def parameters_of(optimizer: Any) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer, or accelerate's wrapper of one, changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_learning_rate(optimizers: Iterable[Any], factor: float) -> None:
    """Set every group's learning rate to a share of its ``initial_lr``, the one that it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
