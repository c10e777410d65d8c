"""Routing: which experts a model uses, for whose text, how many are dead, and how alike they are.

Load is the summed weight that a layer's router gives each expert over all tokens read ("A closer look into mixture of
experts", Lo 2024, looks at the same for public models). That experts serve one kind of text shows as the information
between the expert and the text's licence or domain. Experts are alike as their weights are: the cosine of two experts'
weights, all matrices in one vector. Of a layer with a million neurons as experts (PEER) or values (PKM), only the most
used are compared, with every weight of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from eval.studies.figure import Panel, Series, Tiles, draw, draw_tiles
from eval.studies.subject import sampled
from silo.documents import Document
from silo.errors import UsageError
from silo.experts import MoeFFN
from silo.language_model import LanguageModel
from silo.product_keys import PeerFFN, PkmFFN
from silo.routing import Routing, unevenness

COMPARED = 512
"""Experts of a layer that are compared with each other, the most used ones."""
SHOWN = 64
"""Layers of at most so many experts are written out whole: loads by expert, and the matrix of cosines."""
Layer = MoeFFN | PeerFFN | PkmFFN


@dataclass(frozen=True)
class Load:
    """What one layer did, by kind of text."""

    weight: torch.Tensor
    """(kinds, experts) float64: summed weights."""
    taken: torch.Tensor
    """(experts,) int64: how often each was among the chosen."""

    def add(self, kind: int, routing: Routing) -> None:
        """Count one forward pass over text of one kind."""
        expert = routing.expert.flatten()
        self.weight[kind].index_add_(0, expert, routing.weight.double().flatten())
        self.taken.index_add_(0, expert, torch.ones_like(expert))


def routed_layers(model: nn.Module) -> dict[int, Layer]:
    """The layers that choose experts, by their numbers. Raises :class:`UsageError` if there is none."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    mlps = {number: getattr(layer, "mlp", None) for number, layer in enumerate(layers)}
    found = {number: mlp for number, mlp in mlps.items() if isinstance(mlp, Layer)}
    if not found:
        raise UsageError(
            f"a {type(model).__name__} has no layer of ours that chooses experts; expected a model with ffn moe, peer "
            "or pkm"
        )
    return found


def size_of(layer: Layer) -> int:
    """How many experts a layer has."""
    if isinstance(layer, MoeFFN):
        return len(layer.down_proj)
    return (layer.down if isinstance(layer, PeerFFN) else layer.values).num_embeddings


@torch.inference_mode()
def loads(model: LanguageModel, texts: Sequence[tuple[int, np.ndarray]], kinds: int) -> dict[int, Load]:
    """Read texts (kind, tokens) and count what each layer chooses. Each token is counted once, as an input of the last
    window that it is scored in."""
    layers = routed_layers(model.model)
    found = {
        number: Load(
            torch.zeros(kinds, size_of(layer), dtype=torch.float64), torch.zeros(size_of(layer), dtype=torch.int64)
        )
        for number, layer in layers.items()
    }
    for kind, tokens in texts:
        inputs = model.inputs(tokens)
        for window in model.cut(len(inputs)):
            out = model.model(inputs[window.begin : window.end].unsqueeze(0), use_cache=False, logits_to_keep=1)
            kept = slice(window.first - window.begin, None)
            for load, routing in zip(found.values(), out.routings, strict=True):
                load.add(kind, Routing(routing.expert[kept], routing.weight[kept]))
    return found


@torch.inference_mode()
def weights_of(layer: Layer, experts: torch.Tensor) -> torch.Tensor:
    """All weights of some experts as one vector each, (experts, weights) float32."""
    if isinstance(layer, MoeFFN):
        matrices = [layer.gate_up_proj[experts], layer.down_proj[experts]]
    elif isinstance(layer, PeerFFN):
        matrices = [layer.down.weight[experts], layer.up.weight[experts]]
    else:
        matrices = [layer.values.weight[experts]]
    return torch.cat([matrix.flatten(1).float() for matrix in matrices], dim=1)


def cosines(vectors: torch.Tensor) -> torch.Tensor:
    """The cosine of each pair of (n, width) vectors, (n, n) float64."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).clamp(-1, 1)


def information(weight: torch.Tensor) -> float:
    """Nats that the expert tells of the kind of text, of (kinds, experts) summed weights: 0 if every kind uses experts
    alike. Kinds count alike, however much text there is of each."""
    there = weight[weight.sum(dim=1) > 0]
    share = there / there.sum(dim=1, keepdim=True) / max(1, len(there))
    independent = share.sum(dim=1, keepdim=True) * share.sum(dim=0, keepdim=True)
    ratio = share / independent.where(independent > 0, torch.ones_like(independent))
    return float(torch.special.xlogy(share, ratio).sum())


def study(model: LanguageModel, domains: Mapping[str, Sequence[Document]], budget: int | None) -> dict[str, Any]:
    """Read test text and look at every layer with experts.

    Args:
        model: one of ours, with ``moe``, ``peer`` or ``pkm`` layers.
        domains: documents by the name of their domain.
        budget: tokens of each domain.

    Returns:
        ``layers``, each with its ``kind``, ``experts``, ``dead`` ones, ``unevenness`` of the load in nats, the
        ``information`` in nats between expert and domain, and expert and licence; by domain and licence the loads'
        unevenness, and of small layers the loads; and how alike the experts are.
    """
    texts = {name: sampled(model, documents, budget) for name, documents in domains.items()}
    pairs = sorted({(name, text.document.license) for name, of in texts.items() for text in of})
    number_of = {pair: number for number, pair in enumerate(pairs)}
    read = [(number_of[name, text.document.license], text.tokens) for name, of in texts.items() for text in of]
    found = loads(model, read, len(pairs))
    layers = routed_layers(model.model)
    return {
        "tokens": {name: sum(len(text.tokens) for text in of) for name, of in texts.items()},
        "layers": [_row(number, layers[number], load, pairs) for number, load in found.items()],
    }


def _row(number: int, layer: Layer, load: Load, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    total = load.weight.sum(dim=0)
    row: dict[str, Any] = {
        "layer": number,
        "kind": {MoeFFN: "moe", PeerFFN: "peer", PkmFFN: "pkm"}[type(layer)],
        "experts": len(total),
        "dead": int((load.taken == 0).sum()),
        "unevenness": unevenness(total),
        "information": {},
    }
    for place, kind in enumerate(("domain", "license")):
        names = sorted({pair[place] for pair in pairs})
        weight = torch.stack([load.weight[[pair[place] == name for pair in pairs]].sum(dim=0) for name in names])
        row["information"][kind] = information(weight)
        row[f"by_{kind}"] = dict(_by_kind(names, weight))
    return {**row, "alike": _alike(layer, load.taken)}


def _by_kind(names: Sequence[str], weight: torch.Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each kind of text how uneven its load is, how many experts it used, and in a small layer each one's share."""
    for name, own in zip(names, weight, strict=True):
        row: dict[str, Any] = {"unevenness": unevenness(own), "used": int((own > 0).sum())}
        yield name, {**row, "load": (own / own.sum()).tolist()} if len(own) <= SHOWN else row


def _alike(layer: Layer, taken: torch.Tensor) -> dict[str, Any]:
    """Cosines between the most used experts: quantiles over pairs, each one's nearest, and of a small layer all."""
    count = min(COMPARED, len(taken))
    experts = taken.argsort(descending=True, stable=True)[:count].sort().values
    matrix = cosines(weights_of(layer, experts))
    pairs = matrix[torch.triu(torch.ones(count, count, dtype=torch.bool), diagonal=1)]
    others = matrix.masked_fill(torch.eye(count, dtype=torch.bool), -1.0)
    out: dict[str, Any] = {"compared": count, "mean": None, "least": None, "greatest": None, "nearest": None}
    if len(pairs):
        out |= {"mean": float(pairs.mean()), "least": float(pairs.min()), "greatest": float(pairs.max())}
        out["nearest"] = float(others.amax(dim=1).mean())
    return {**out, "cosines": matrix.tolist()} if count <= SHOWN else out


def figure(result: dict[str, Any]) -> str:
    """Of small layers the load by domain, and the cosines of their experts; of large ones how uneven the load is."""
    small = [row for row in result["layers"] if "cosines" in row["alike"]]
    if not small:
        return draw("Experts: how unevenly they are used", [load_panel(result)])
    tiles = []
    for row in small:
        names = list(row["by_domain"])
        load = [row["by_domain"][name]["load"] for name in names]
        tiles.append(Tiles(f"layer {row['layer']}: share of the load", load, 0.0, max(map(max, load)), names))
        tiles.append(Tiles(f"layer {row['layer']}: cosine of the experts", row["alike"]["cosines"], -0.2, 1.0))
    return draw_tiles("Experts: whose text they serve, and how alike they are", tiles)


def load_panel(result: dict[str, Any]) -> Panel:
    """Unevenness of each layer's load, by domain."""
    layers = [row["layer"] for row in result["layers"]]
    series = [
        Series(name, layers, [row["by_domain"][name]["unevenness"] for row in result["layers"]])
        for name in result["layers"][0]["by_domain"]
    ]
    return Panel("layer", "unevenness of the load, nats", series)
