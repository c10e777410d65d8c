"""One trained model made into another that computes the same function, so that training goes on from there.

Each function gives a new model and leaves the old one as it is. Optimizers start anew, with a learning rate that warms
up again.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from silo.errors import UsageError
from silo.model_config import SiloConfig
from silo.modeling import SiloForCausalLM


def grow(model: SiloForCausalLM, factor: int, *, noise: float = 0.0) -> SiloForCausalLM:
    """A model whose PEER layers have ``factor``² times the experts, and the same function.

    Each half key becomes ``factor`` siblings with its value, and each expert the family of their pairs. Siblings
    compete: of each family one expert at most is retrieved, so what is found, its scores and outputs are those of
    before, bit for bit. Training moves the sibling that was found, others then win for other queries, and their experts
    part ways. A step goes on costing what it did, but for the scores of more half keys.

    Args:
        model: the trained model.
        factor: siblings of each half key, at least 2: 16 k experts become 65 k by 2.
        noise: standard deviation that is added to new half keys, as a share of the keys'. Above 0 siblings win for
            different queries from the first step on, and the function changes by as much.

    Raises:
        UsageError: the model has no PEER layer, or the factor is less than 2.
    """
    old = model.config
    if factor < 2:
        raise UsageError(f"factor is {factor}; expected at least 2, which makes four times the experts")
    layers = _layers(old, "peer")
    if not layers:
        raise UsageError(f"the model's ffn is {old.ffn!r}; expected a peer layer to grow")
    n, width, side = old.peer_num_experts * factor**2, old.hidden_size, isqrt(old.peer_num_experts)
    weights = model.state_dict()
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp."
        keys = weights[f"{prefix}retrieval.keys"].repeat_interleave(factor, dim=2)
        if noise:
            new = torch.arange(keys.shape[2], device=keys.device) % factor > 0
            keys[:, :, new] += noise * keys.std() * torch.randn_like(keys[:, :, new])
        weights[f"{prefix}retrieval.keys"] = keys
        for name in ("down", "up"):
            expert = weights[f"{prefix}{name}.weight"].view(side, 1, side, 1, width)
            weights[f"{prefix}{name}.weight"] = expert.expand(side, factor, side, factor, width).reshape(n, width)
    return _rebuilt(model, weights, peer_num_experts=n, peer_siblings=old.peer_siblings * factor)


def upcycle(
    model: SiloForCausalLM, layers: list[int] | None = None, *, num_experts: int = 8, num_experts_per_tok: int = 2
) -> SiloForCausalLM:
    """A model whose dense layers are mixtures of copies of themselves (Komatsuzaki 2022), and the same function: the
    weights of the chosen experts sum to 1.

    Args:
        model: the trained model.
        layers: numbers of the layers; all dense ones if absent.
        num_experts: copies of each network.
        num_experts_per_tok: how many of them a token takes; the routers start at random.

    Raises:
        UsageError: a layer is not dense, or there is none; or the model has moe layers of another shape.
    """
    old = model.config
    dense = _layers(old, "dense")
    layers = dense if layers is None else layers
    if not layers or not set(layers) <= set(dense):
        raise UsageError(f"layers to upcycle are {layers}; expected some of the dense ones: {dense}")
    shape = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    if _layers(old, "moe", "averaged") and any(getattr(old, name) != value for name, value in shape.items()):
        raise UsageError(f"the model has layers of {old.num_experts} experts already; expected the same for new ones")
    if old.moe_intermediate_size not in (None, old.intermediate_size):
        raise UsageError(
            f"moe_intermediate_size is {old.moe_intermediate_size}; expected {old.intermediate_size}, the width of the "
            "dense layers that become experts"
        )
    weights = model.state_dict()
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp."
        for name in ("gate_up_proj", "down_proj"):
            weight = weights.pop(f"{prefix}{name}.weight").t()
            weights[prefix + name] = weight.expand(num_experts, *weight.shape)
    return _rebuilt(model, weights, ffn=_with(old, layers, "moe"), **shape)


def averaged(model: SiloForCausalLM) -> SiloForCausalLM:
    """A model whose ``averaged`` layers are dense, with the mean of their experts (Huang 2023): what they compute in
    evaluation.

    Raises:
        UsageError: the model has no such layer.
    """
    layers = _layers(model.config, "averaged")
    if not layers:
        raise UsageError(f"the model's ffn is {model.config.ffn!r}; expected an averaged layer")
    weights = model.state_dict()
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp."
        for name in ("gate_up_proj", "down_proj"):
            weights[f"{prefix}{name}.weight"] = weights.pop(prefix + name).mean(0).t()
    return _rebuilt(model, weights, ffn=_with(model.config, layers, "dense"))


def _layers(config: SiloConfig, *kinds: str) -> list[int]:
    """Numbers of the layers of some kinds."""
    return [layer for layer in range(config.num_hidden_layers) if config.ffn_of(layer) in kinds]


def _with(config: SiloConfig, layers: list[int], kind: str) -> str | list[str]:
    """The configuration's ``ffn`` with a kind in some layers; one name if it is that of all."""
    kinds = [kind if layer in layers else config.ffn_of(layer) for layer in range(config.num_hidden_layers)]
    return kinds if len(set(kinds)) > 1 else kinds[0]


def _rebuilt(model: SiloForCausalLM, weights: dict[str, torch.Tensor], **changes: Any) -> SiloForCausalLM:
    """A model of another shape with these weights; what they lack (routers) stays as it was initialised."""
    settings = {**model.config.to_dict(), **changes}
    new: Any = SiloForCausalLM(SiloConfig.from_dict(settings))
    new.to(device=model.device, dtype=model.dtype)
    missing, unexpected = new.load_state_dict(weights, strict=False)
    if unexpected or not all(".router" in name for name in missing):
        raise UsageError(f"weights do not fit the new model: {missing} are missing, {unexpected} are too many")
    return new.train(model.training)
