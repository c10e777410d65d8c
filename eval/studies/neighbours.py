"""k, λ and τ of kNN-LM: how many neighbours it takes, how much they weigh, and how sharply the near ones count.

One search at the largest k answers for all smaller ones, since neighbours come nearest first in an order without ties.
The grid is read on validation text only; of the test text nothing is reported but what validation chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from datastore.knn import NeighbourIndex
from eval.perplexity import TEMPERATURES, Text
from eval.studies.figure import Panel, Series, draw
from eval.studies.subject import Progress, Subject
from silo.language_model import LanguageModel
from silo.mixing import fit_weights, neighbour_weights
from silo.readings import ModelReading

LAMBDAS = tuple(step / 20 for step in range(20))
"""Weights of the neighbours on the grid."""


@dataclass(frozen=True)
class Reading:
    """What the model and its nearest neighbours say of n tokens."""

    lm: torch.Tensor
    """(n,) float64 probabilities by the model."""
    distances: torch.Tensor
    """(n, k) float32 squared distances."""
    hits: torch.Tensor
    """(n, k) bool: which neighbours are followed by the token."""

    def knn(self, k: int, temperature: float) -> torch.Tensor:
        """(n,) float64 probabilities by the nearest k alone; the model's where there are none."""
        distances = self.distances[:, :k]
        given = (neighbour_weights(distances, temperature) * self.hits[:, :k]).sum(dim=1)
        return torch.where(torch.isfinite(distances[:, 0]), given, self.lm)

    def nats(self, k: int, temperature: float, weights: Sequence[float]) -> torch.Tensor:
        """Mean negative log-probability of a token for each weight of the neighbours, (weights,) float64."""
        knn, of_neighbours = self.knn(k, temperature), torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
        mixed = (1 - of_neighbours) * self.lm + of_neighbours * knn
        return -mixed.clamp_min(1e-300).log().mean(dim=1)


def read(model: LanguageModel, index: NeighbourIndex, texts: Sequence[Text], k: int) -> Reading:
    """Read some texts, and look up the ``k`` nearest neighbours of every position."""
    lm, distances, hits = [], [], []
    for text in texts:
        begin = 0
        for keys, logits in model.logits(text.tokens):
            own = torch.from_numpy(text.tokens[begin : begin + len(logits)].astype(np.int64))
            found = index.search(keys, k)
            lm.append(ModelReading.of(logits).probability(own))
            distances.append(torch.from_numpy(found.distances))
            hits.append(torch.from_numpy(found.values) == own.unsqueeze(1))
            begin += len(logits)
    return Reading(torch.cat(lm), torch.cat(distances), torch.cat(hits))


def powers(largest: int) -> list[int]:
    """1, 2, 4 and so on up to ``largest``, which comes last.

    >>> powers(6)
    [1, 2, 4, 6]
    """
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]


def study(subject: Subject, largest: int, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the grid.

    Args:
        subject: its validation text chooses.
        largest: neighbours that are looked up.
        progress: is told of each k.

    Returns:
        ``validation``: perplexity of the whole grid, (k, τ, λ) nested, and its axes. ``by_k`` and ``by_lambda``: for
        each k, and for each λ, the others that validation text likes best, its perplexity, and that of the test text
        with them. ``chosen``: the same for the best k of all, with λ fitted exactly. ``lm``: the model alone.
    """
    index = subject.store.select(deny=subject.left_out).neighbours()
    validation, test = (
        read(subject.model, index, subject.texts(side), largest) for side in (subject.validation, subject.test)
    )
    ks = powers(largest)
    grid = np.empty((len(ks), len(TEMPERATURES), len(LAMBDAS)))
    for number, k in enumerate(ks, start=1):
        for place, temperature in enumerate(TEMPERATURES):
            grid[number - 1, place] = validation.nats(k, temperature, LAMBDAS).numpy()
        if progress:
            progress(number, len(ks))

    def point(k: int, temperature: int, weight: int) -> dict[str, float]:
        setting = (ks[k], TEMPERATURES[temperature], [LAMBDAS[weight]])
        return {
            "k": ks[k],
            "temperature": TEMPERATURES[temperature],
            "lambda": LAMBDAS[weight],
            "validation": float(np.exp(grid[k, temperature, weight])),
            "test": float(test.nats(*setting).exp()),
        }

    by_k = [point(k, *_lowest(grid[k])) for k in range(len(ks))]
    by_lambda = [point(*_lowest(grid[:, :, weight]), weight) for weight in range(len(LAMBDAS))]
    best = min(by_k, key=lambda each: each["validation"])
    return {
        "test_tokens": len(test.lm),
        "validation_tokens": len(validation.lm),
        "keys": index.num_keys,
        "lm": {
            "validation": float(validation.nats(1, 1.0, [0.0]).exp()),
            "test": float(test.nats(1, 1.0, [0.0]).exp()),
        },
        "chosen": _exactly(best, validation, test),
        "by_k": by_k,
        "by_lambda": by_lambda,
        "validation": {
            "k": ks,
            "temperature": list(TEMPERATURES),
            "lambda": list(LAMBDAS),
            "perplexity": np.exp(grid).tolist(),
        },
    }


def _lowest(grid: np.ndarray) -> tuple[int, int]:
    """Row and column of the lowest value."""
    row, column = np.unravel_index(int(np.argmin(grid)), grid.shape)
    return int(row), int(column)


def _exactly(best: dict[str, float], validation: Reading, test: Reading) -> dict[str, float]:
    """The best point of the grid with the λ that lies between its points."""
    k, temperature = int(best["k"]), best["temperature"]
    weight = fit_weights([validation.lm, validation.knn(k, temperature)])[1]
    return {
        **best,
        "lambda": weight,
        "validation": float(validation.nats(k, temperature, [weight]).exp()),
        "test": float(test.nats(k, temperature, [weight]).exp()),
    }


def figure(result: dict[str, Any]) -> str:
    """Perplexity against k and against λ, the others as validation text likes them best."""
    panels = []
    for rows, name, label in ((result["by_k"], "k", "neighbours, k"), (result["by_lambda"], "lambda", "weight, λ")):
        x = [row[name] for row in rows]
        series = [
            Series("validation text, which chooses τ and " + ("λ" if name == "k" else "k"), x, _of(rows, "validation")),
            Series("test text", x, _of(rows, "test")),
            Series("test text, model alone", [x[0], x[-1]], [result["lm"]["test"]] * 2, line_only=True),
        ]
        panels.append(Panel(label, "perplexity", series, x_scale="log" if name == "k" else "linear", y_scale="log"))
    return draw("Neighbours: how many, and how much they weigh", panels)


def _of(rows: Sequence[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]
