"""What is measured while a model trains: its loss on validation text, and how its routers use their experts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch.nn import functional as F

import silo.routing
from silo.model_config import SiloConfig
from training.data import Mixture

BATCH = 8
"""Validation sequences that go through the model at once."""
NAMED_EXPERTS = 64
"""Up to so many experts a layer, the load of each is told; of more, only the greatest."""


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A model as it evaluates, while the context lasts, and under training again afterwards.

    Experts that choose their tokens would choose among later ones too; so tokens choose their experts then, by the same
    weights.
    """
    config = extract_model_from_parallel(model).config
    router = config.router
    model.eval()
    if router == "expert_choice":
        config.router = "topk"
    try:
        yield
    finally:
        config.router = router
        model.train()


@torch.no_grad()
def validation_loss(model: Any, mixture: Mixture, sequences: int) -> dict[str, float]:
    """The mean loss on the first validation sequences of each domain that has a whole one, in nats a token.

    Only the language-model loss counts: what routers add to balance their experts is no property of the text.
    """
    with evaluating(model):
        found = {name: _loss(model, mixture, mixture.first(name, sequences)) for name in mixture.domains}
    return {name: total / count for name, (total, count) in found.items() if count}


def _loss(model: Any, mixture: Mixture, chosen: Sequence[tuple[str, int]]) -> tuple[float, int]:
    """The sum of the losses of some sequences, and how many tokens they are of."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for at in range(0, len(chosen), BATCH):
        batch = {key: value.to(device) for key, value in mixture.batch(chosen[at : at + BATCH]).items()}
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    return total, count


EXPERTS = {"moe": "num_experts", "averaged": "num_experts", "peer": "peer_num_experts", "pkm": "pkm_num_values"}
"""Kind of a feed-forward layer → the field with its number of experts."""


def experts_by_layer(config: SiloConfig) -> list[int]:
    """How many experts each layer has that has any."""
    kinds = [config.ffn_of(layer) for layer in range(config.num_hidden_layers)]
    return [getattr(config, EXPERTS[kind]) for kind in kinds if kind in EXPERTS]


class Routing:
    """How routers spread tokens over experts, counted over the steps between two reports.

    It reads the ``routings`` of a model's output, one a layer with experts. A model without has nothing to report.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        """Args: how many experts each layer has that has any."""
        self._experts = experts
        self._counts: list[torch.Tensor] = []
        self._entropy: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, routings: Sequence[silo.routing.Routing] | None) -> None:
        """Count one forward pass."""
        for layer, routing in enumerate(routings or ()):
            if layer == len(self._counts):
                self._counts.append(torch.zeros(self._experts[layer], device=routing.expert.device))
                self._entropy.append(torch.zeros(2, device=routing.expert.device))
            self._counts[layer] += torch.bincount(routing.expert.flatten(), minlength=self._experts[layer])
            if routing.logits is not None:
                entropy = torch.special.entr(routing.logits.float().softmax(dim=-1)).sum()
                self._entropy[layer] += torch.stack((entropy, entropy.new_tensor(len(routing.logits))))

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures of all processes since the last report, by layer among those with routers.

        ``entropy`` is the mean entropy of a token's routing distribution, in nats, where a router has one; ``dead`` the
        number of experts that no token reached; ``load`` an expert's share of the choices times the number of experts,
        1 when all is even; ``unevenness`` the divergence of those shares from even ones, in nats (PEER, He 2024).
        """
        figures: dict[str, float] = {}
        for layer, (counts, entropy) in enumerate(zip(self._counts, self._entropy, strict=True)):
            counts, (total, tokens) = accelerator.reduce(counts, "sum"), accelerator.reduce(entropy, "sum")
            load = counts / counts.mean()
            if tokens:
                figures[f"router/{layer}/entropy"] = float(total / tokens)
            figures[f"router/{layer}/unevenness"] = math.log(len(load)) - float(
                torch.special.entr(load / load.sum()).sum()
            )
            figures[f"router/{layer}/dead"] = int((counts == 0).sum())
            figures[f"router/{layer}/greatest load"] = float(load.max())
            if len(load) <= NAMED_EXPERTS:
                figures |= {f"router/{layer}/load/{expert}": float(share) for expert, share in enumerate(load)}
        self._counts, self._entropy = [], []
        return figures
