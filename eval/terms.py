"""What the reports call methods, mixtures and owners."""

from __future__ import annotations

from typing import Any

from silo.markup import number

METHODS = {"lm": "model", "knn": "kNN", "ric": "RIC", "ngram": "∞-gram"}


def ratio(values: dict[str, float], best: str) -> str:
    """The perplexity of a mixture as a multiple of that of the model alone."""
    return f"{number(values[best] / values['lm'], 3)} ×" if values.get("lm") and values.get(best) else "—"


def mixtures(report: dict[str, Any]) -> list[str]:
    """The mixtures that were measured, the model alone first and all methods together last."""
    measured = report["perplexity"]["restricted"]
    return [name for name in ("lm", *(f"lm+{method}" for method in METHODS), "all") if name in measured]


def methods(report: dict[str, Any]) -> list[str]:
    """The methods that were used, the model first."""
    return [method for method in METHODS if method == "lm" or f"lm+{method}" in mixtures(report)]


def mixture_title(name: str) -> str:
    """What a mixture is called on the page."""
    method = name.removeprefix("lm+")
    return {"lm": "Model alone", "all": "All together"}.get(name, f"+\N{NO-BREAK SPACE}{METHODS.get(method, method)}")


def owners(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the rights holders, without that of the permissive test text."""
    return [each for each in report["owners"] if not each.get("permissive")]
