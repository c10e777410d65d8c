"""How a mixture is weighed: λ of each method, the same at every position or by what the ∞-gram found there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from silo.errors import UsageError
from silo.readings import Evidence, Temperature

METHODS = ("lm", "knn", "ric", "ngram")
"""What a mixture can consist of, in the order in which it is summed."""


class Weighing(Protocol):
    """Gives λ and τ by evidence."""

    @property
    def methods(self) -> tuple[str, ...]:
        """What is weighed, in the order of :data:`METHODS`."""
        ...

    def weigh(self, evidence: Evidence) -> dict[str, float | torch.Tensor]:
        """λ by method, summing to 1: one for all positions, or (n,) float64."""
        ...

    def temperatures(self, evidence: Evidence) -> Temperature:
        """τ of kNN-LM: one for all positions, or (n, 1) float64."""
        ...


@dataclass(frozen=True)
class Weights:
    """Weights that someone chose, or fitted on validation text."""

    by_method: Mapping[str, float]
    """λ of the methods that are used, summing to 1."""
    temperature: float = 1.0
    """τ of kNN-LM, in units of squared distance."""
    by_suffix: Mapping[int, Mapping[str, float]] | None = None
    """λ by the class of the ∞-gram's suffix (``ngram_class``), in place of :attr:`by_method` where it has the class."""

    @property
    def methods(self) -> tuple[str, ...]:
        """What is weighed."""
        return tuple(method for method in METHODS if method in self.by_method)

    def weigh(self, evidence: Evidence) -> dict[str, float | torch.Tensor]:
        """As :meth:`Weighing.weigh`."""
        if not self.by_suffix:
            return {method: self.by_method[method] for method in self.methods}
        classes = evidence["ngram_class"].long()
        out: dict[str, float | torch.Tensor] = {}
        for method in self.methods:
            size = int(classes.max()) + 1 if len(classes) else 1
            table = torch.full((size,), self.by_method[method], dtype=torch.float64)
            for number, weights in self.by_suffix.items():
                if number < len(table):
                    table[number] = weights[method]
            out[method] = table[classes]
        return out

    def temperatures(self, evidence: Evidence) -> Temperature:
        """As :meth:`Weighing.temperatures`."""
        return self.temperature

    def to_json(self) -> dict[str, Any]:
        """As a file of weights holds them."""
        out: dict[str, Any] = {"weights": dict(self.by_method), "temperature": self.temperature}
        if self.by_suffix:
            out["by_suffix"] = {str(number): dict(weights) for number, weights in sorted(self.by_suffix.items())}
        return out

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> Weights:
        """Read what :meth:`to_json` wrote. Raises :class:`UsageError` that begins with ``where``."""
        try:
            table = {
                int(number): {str(method): float(weight) for method, weight in weights.items()}
                for number, weights in (value.get("by_suffix") or {}).items()
            }
            by_method = {str(method): float(weight) for method, weight in value["weights"].items()}
            tau = float(value["temperature"]) if "knn" in by_method else 1.0
            read = cls(by_method, tau, table or None)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(
                f'{where} holds no weights; expected {{"weights": {{"lm": …}}, "temperature": …}}; '
                "make it with --fit and --save-weights"
            ) from None
        for weights in (by_method, *table.values()):
            # Written so that a nan, which compares false with all, is refused too.
            values = list(weights.values())
            if not (
                set(weights) == set(by_method) <= set(METHODS)
                and "lm" in weights
                and min(values) >= 0
                and abs(sum(values) - 1) <= 1e-9
                and read.temperature > 0
            ):
                raise UsageError(
                    f"{where} has weights {weights} and temperature {read.temperature}; expected weights from 0 "
                    f"of lm and some of {', '.join(METHODS[1:])} that sum to 1, and a temperature above 0"
                )
        return read
