"""A learnt gate: λ and τ of each position from evidence that is there before the token is.

A small network reads how sure the model is, how near and how unanimous the neighbours are, how long and how common the
∞-gram's suffix is, how well the blocks fit, and how well each method has foretold the text so far; and says how much
each deserves. It is what lets one store of many owners answer without an oracle that knows whose text it is reading (He
2021 and Drozdov 2022 set λ by what was retrieved). It never sees which document or owner stands behind the evidence. It
is fitted on permissive text only (law 2); :mod:`eval.rehearsal` does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from silo.errors import UsageError
from silo.mixing import neighbour_weights
from silo.nearest import USUAL, Nearest
from silo.past import KNOWN, WINDOW
from silo.readings import Evidence, Temperature
from silo.weights import METHODS

HIDDEN = 32
"""Units of the network's one hidden layer."""
LEFT_OUT = ("ngram_class",)
"""Evidence that says nothing which other evidence does not."""
NOWHERE = 1e12
"""A squared distance that leaves a neighbour without any weight."""
WIDEST = 4.0
"""The gate multiplies τ by e to the power of minus to plus this, at most."""
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 3000, 2048, 3e-3, 1e-3
CHECKED_EVERY = 100


@dataclass(frozen=True)
class Gate:
    """What was learnt; a :class:`silo.weights.Weighing`."""

    methods: tuple[str, ...]
    features: tuple[str, ...]
    """Names of the evidence that is read, in order."""
    layers: tuple[torch.Tensor, ...]
    """Mean and scale of the features, (f,) each; weight (h, f) and bias (h,); weight (m + 1, h) and bias (m + 1,), of
    which the last row is for τ; all float64."""
    base_temperature: float
    nearest: Nearest = USUAL
    """As :attr:`silo.weights.Weighing.nearest`: of other neighbours the same evidence says something else."""

    @property
    def history(self) -> int:
        """As :attr:`silo.weights.Weighing.history`."""
        return WINDOW if KNOWN in self.features else 0

    def weigh(self, evidence: Evidence) -> dict[str, float | torch.Tensor]:
        """λ by method: (n,) float64 each."""
        weights = torch.softmax(self._out(evidence)[:, : len(self.methods)], dim=1)
        return dict(zip(self.methods, weights.unbind(dim=1), strict=True))

    def temperatures(self, evidence: Evidence) -> Temperature:
        """τ of each position, (n, 1) float64."""
        return self.base_temperature * self._out(evidence)[:, -1:].clamp(-WIDEST, WIDEST).exp()

    def _out(self, evidence: Evidence) -> torch.Tensor:
        missing = [name for name in self.features if name not in evidence]
        if missing:
            raise UsageError(
                f"the gate reads {', '.join(missing)}, which is not there; use the methods {', '.join(self.methods)}"
            )
        mean, scale, first, bias, second, last = self.layers
        features = torch.stack([evidence[name].double() for name in self.features], dim=1)
        return torch.tanh((features - mean) / scale @ first.T + bias) @ second.T + last

    def to_json(self) -> dict[str, Any]:
        """As a file holds it."""
        return {
            "kind": "gate",
            "methods": list(self.methods),
            "features": list(self.features),
            "layers": [each.tolist() for each in self.layers],
            "temperature": self.base_temperature,
            "nearest": self.nearest.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> Gate:
        """Read what :meth:`to_json` wrote. Raises :class:`UsageError` that begins with ``where``."""
        try:
            layers = tuple(torch.tensor(each, dtype=torch.float64) for each in value["layers"])
            tau, nearest = float(value["temperature"]), Nearest.from_json(value.get("nearest", {}))
            gate = cls(tuple(value["methods"]), tuple(value["features"]), layers, tau, nearest)
            f, h, m = len(gate.features), HIDDEN, len(gate.methods)
            fits = [tuple(each.shape) for each in layers] == [(f,), (f,), (h, f), (h,), (m + 1, h), (m + 1,)]
            sane = all(bool(each.isfinite().all()) for each in layers) and gate.base_temperature > 0
            known = "lm" in gate.methods and set(gate.methods) <= set(METHODS)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError):
            fits = sane = known = False
        if not (fits and sane and known):
            raise UsageError(f"{where} holds no gate; make one with `silo eval gate`")
        return gate


@dataclass(frozen=True)
class Lessons:
    """Tokens to learn from; tensors of n rows, some texts one after the other."""

    evidence: Evidence
    given: Mapping[str, torch.Tensor]
    """(n,) float64: the token's probability by each method but ``knn``."""
    distances: torch.Tensor | None
    """(n, k) float32 squared distances of the neighbours."""
    hits: torch.Tensor | None
    """(n, k) bool: which neighbours are followed by the token."""

    def __len__(self) -> int:
        return len(self.given["lm"])

    def rows(self, which: torch.Tensor) -> Lessons:
        """Some of the tokens, by a mask or by their numbers."""
        return Lessons(
            {name: each[which] for name, each in self.evidence.items()},
            {name: each[which] for name, each in self.given.items()},
            None if self.distances is None else self.distances[which],
            None if self.hits is None else self.hits[which],
        )

    def log_probability(self, out: torch.Tensor, methods: Sequence[str], temperature: float) -> torch.Tensor:
        """(n,) log p under what a gate's network gave, (n, m + 1)."""
        log_weights = torch.log_softmax(out[:, : len(methods)], dim=1)
        parts = []
        for method in methods:
            if method == "knn" and self.distances is not None and self.hits is not None:
                tau = temperature * out[:, -1:].clamp(-WIDEST, WIDEST).exp()
                finite = torch.isfinite(self.distances)
                # An infinite distance would make a gradient that is no number, also where it is not used.
                knn = (neighbour_weights(torch.where(finite, self.distances, NOWHERE), tau) * self.hits).sum(dim=1)
                parts.append(torch.where(finite[:, 0], knn, self.given["lm"]))
            else:
                parts.append(self.given[method])
        return torch.logsumexp(log_weights + torch.stack(parts, dim=1).clamp_min(1e-30).log(), dim=1)


def fit_gate(
    lessons: Lessons, held_out: Lessons, methods: Sequence[str], *, nearest: Nearest | None = None, seed: int = 0
) -> Gate:
    """Learn to give the next token the highest probability (Adam; the best step on held-out texts is kept).

    Args:
        lessons: what is learnt from.
        held_out: other texts, by which it is judged when to stop.
        methods: what to weigh, the model first.
        nearest: how the neighbours of both were looked up.
        seed: of the network's first weights and of the order of the tokens.
    """
    features = tuple(name for name in lessons.evidence if name not in LEFT_OUT and _belongs(name, methods))
    inputs = [torch.stack([each.evidence[name] for name in features], dim=1).double() for each in (lessons, held_out)]
    mean, scale = inputs[0].mean(dim=0), inputs[0].std(dim=0, correction=0)
    scale = torch.where(scale > 1e-6, scale, 1.0)  # of what never varied, no multiple of nothing
    generator = torch.Generator().manual_seed(seed)
    network = _network(len(features), len(methods), generator)
    tau = _middle(lessons.distances)
    train, check = ((each - mean) / scale for each in inputs)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best: tuple[float, dict[str, torch.Tensor]] = (-math.inf, {})
    for step in range(STEPS):
        chosen = torch.randint(len(train), (min(BATCH, len(train)),), generator=generator)
        loss = -lessons.rows(chosen).log_probability(network(train[chosen]), methods, tau).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECKED_EVERY == 0:
            with torch.no_grad():
                value = held_out.log_probability(network(check), methods, tau).mean().item()
            if value > best[0]:
                best = value, {name: each.detach().clone() for name, each in network.state_dict().items()}
    learnt = best[1] or network.state_dict()
    layers = (mean, scale, learnt["0.weight"], learnt["0.bias"], learnt["2.weight"], learnt["2.bias"])
    return Gate(tuple(methods), features, tuple(each.detach() for each in layers), tau, nearest or USUAL)


def _belongs(name: str, methods: Sequence[str]) -> bool:
    """Whether evidence is of one of some methods."""
    return name.split("_")[0] in methods


def _network(features: int, methods: int, generator: torch.Generator) -> nn.Sequential:
    """A network that trusts the model at first."""
    first, last = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, methods + 1)
    network = nn.Sequential(first, nn.Tanh(), last).double()
    with torch.no_grad():
        first.weight.normal_(0, features**-0.5, generator=generator)
        first.bias.zero_()
        last.weight.normal_(0, 0.01, generator=generator)
        last.bias.zero_()
        last.bias[0] = 1.0
    return network


def _middle(distances: torch.Tensor | None) -> float:
    """A τ to begin with: a tenth of the mean squared distance of the neighbours."""
    if distances is None or not bool(torch.isfinite(distances).any()):
        return 1.0
    return max(distances[torch.isfinite(distances)].double().mean().item() / 10, 1e-6)
