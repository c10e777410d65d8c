"""How a mixture is weighed: λ of each method, the same at every position or by what the ∞-gram found there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from silo.errors import UsageError
from silo.files import read_json
from silo.nearest import Nearest
from silo.readings import Evidence, Temperature

METHODS = ("lm", "knn", "ric", "ngram")
"""What a mixture can consist of, in the order in which it is summed."""


class Weighing(Protocol):
    """Gives λ and τ by evidence."""

    @property
    def methods(self) -> tuple[str, ...]:
        """What is weighed, in the order of :data:`METHODS`."""
        ...

    @property
    def history(self) -> int:
        """How many tokens before a position its evidence hangs on, in any other way than as the methods' context."""
        ...

    @property
    def nearest(self) -> Nearest | None:
        """How the neighbours were looked up by which it was learnt; None if it does not say."""
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
    nearest: Nearest | None = None
    """As :attr:`Weighing.nearest`; of weights that someone chose, None."""

    @property
    def methods(self) -> tuple[str, ...]:
        """What is weighed."""
        return tuple(method for method in METHODS if method in self.by_method)

    @property
    def history(self) -> int:
        """As :attr:`Weighing.history`."""
        return 0

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
        if self.nearest is not None:
            out["nearest"] = self.nearest.to_json()
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
            nearest = Nearest.from_json(value["nearest"]) if "nearest" in value else None
            read = cls(by_method, tau, table or None, nearest)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError):
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
                and ("ngram" in weights or not table)
                and min(values) >= 0
                and abs(sum(values) - 1) <= 1e-9
                and read.temperature > 0
            ):
                raise UsageError(
                    f"{where} has weights {weights} and temperature {read.temperature}; expected weights from 0 "
                    f"of lm and some of {', '.join(METHODS[1:])} that sum to 1, a temperature above 0, and by_suffix "
                    "with ngram alone"
                )
        return read


def read_weights_file(path: Path) -> Any:
    """What a file of weights of any kind holds, not read yet. Raises :class:`UsageError` if that is no JSON."""
    return read_json(
        path,
        wanted="weights, as `silo eval perplexity --fit FILE --save-weights` writes, or a gate of `silo eval gate`",
    )


def read_weighing(
    value: Path | str | Mapping[str, Any],
    use: Sequence[str] | None = None,
    *,
    model: str | None = None,
    where: str = "weights",
) -> Weighing:
    """Read weights of any kind: chosen ones, those that were fitted on a file, or a learnt gate.

    Args:
        value: a JSON file, or what such a file holds: λ by method, such as ``{"knn": 0.3, "temperature": 8}``, where
            the model has what is left; what :meth:`Weights.to_json` gives; what ``silo eval perplexity
            --save-weights`` wrote, of which the mixture of most methods is taken; or a gate.
        use: the methods that are to be weighed, where the weights leave a choice.
        model: the fingerprint of the model that they must be made for, if they say for which they were.
        where: where a mapping comes from, for messages.

    Raises:
        UsageError: there are no such weights, or they are of other methods.
    """
    where = where if isinstance(value, Mapping) else str(value)
    content = value if isinstance(value, Mapping) else read_weights_file(Path(value))
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} holds a {type(content).__name__}; expected a mapping with weights or a gate")
    made_for = content.get("model") or (content.get("provenance") or {}).get("model")
    if model is not None and made_for is not None and made_for != model:
        raise UsageError(f"{where} was made for the model {made_for}, not {model}; make one for this model")
    found = _weighing(content, use, where)
    if use is not None and set(found.methods) != set(use):
        raise UsageError(f"{where} weighs {', '.join(found.methods)}; expected {', '.join(use)}")
    return found


def _weighing(content: Mapping[str, Any], use: Sequence[str] | None, where: str) -> Weighing:
    if content.get("kind") == "gate":
        from silo.gate import Gate  # which builds on this module

        return Gate.from_json(content, where=where)
    if isinstance(content.get("mixtures"), Mapping):
        read = [Weights.from_json(each, where=f"{where}: {name!r}") for name, each in content["mixtures"].items()]
        fit = [each for each in read if use is None or set(each.methods) == set(use)]
        if not fit:
            raise UsageError(f"{where} has no mixture of {', '.join(use or METHODS)}; fit it with --fit --save-weights")
        return max(fit, key=lambda each: len(each.methods))
    if content and set(content) <= {*METHODS, "temperature"}:
        given = {name: content[name] for name in METHODS if name in content}
        try:
            left = 1.0 - sum(given.values())
            given.setdefault("lm", left if abs(left) > 1e-9 else 0.0)  # as of 0.33 + 0.56 + 0.11
        except TypeError:
            raise UsageError(f"{where} has weights {dict(content)}; expected numbers") from None
        content = {"weights": given, "temperature": content.get("temperature", 1.0)}
    return Weights.from_json(content, where=where)
