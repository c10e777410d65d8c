"""Perplexity by domain: one owner's held-out text each, and permissive text beside, every one with its own weights.

This is SILO's protocol (2023, section 5): the weights of a domain are fitted on that domain's validation text, which
is in neither the model nor the store, and reported on its test text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.perplexity import (
    Scores,
    Text,
    distribution_digest,
    fit_combinations,
    perplexities,
    require_disjoint,
    sample,
    score,
)
from silo.documents import Document
from silo.files import canonical_json, sha256
from silo.mixture import Mixture
from silo.weights import Weights

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Domain:
    """Held-out text of one owner, or of the permissive side."""

    name: str
    license: str
    permissive: bool
    validation: list[Text]
    test: list[Text]

    @classmethod
    def draw(
        cls, name: str, documents: tuple[list[Document], list[Document]], mixture: Mixture, budgets: tuple[int, int]
    ) -> Domain:
        """Sample validation and test text from (validation, test) documents, each up to its budget of tokens."""
        require_disjoint(documents[1], documents[0])
        validation, test = (sample(side, mixture, budget) for side, budget in zip(documents, budgets, strict=True))
        licenses = sorted({text.document.license for text in test})
        return cls(name, " AND ".join(licenses), False, validation, test)


@dataclass(frozen=True)
class Result:
    """What was measured on one domain."""

    domain: Domain
    scores: Scores
    """Of the test text."""
    weights: dict[str, Weights]
    """By mixture, fitted on the validation text."""
    perplexity: dict[str, float]
    """By mixture, on the test text."""


def measure(mixture: Mixture, domains: Sequence[Domain], *, progress: Progress | None = None) -> list[Result]:
    """Fit and report each domain."""
    results = []
    for done, domain in enumerate(domains, start=1):
        weights = fit_combinations(score(mixture, domain.validation), mixture.methods)
        scores = score(mixture, domain.test)
        results.append(Result(domain, scores, weights, perplexities(scores, weights)))
        if progress:
            progress(done, len(domains))
    return results


def together(results: Sequence[Result]) -> dict[str, float]:
    """Perplexity of each mixture over all tokens of some domains."""
    total = {}
    for name in results[0].perplexity:
        logs = torch.cat([result.scores.log_probabilities(result.weights[name]) for result in results])
        total[name] = math.exp(-logs.mean().item())
    return total


def digest(mixture: Mixture, results: Sequence[Result], name: str) -> str:
    """One hash over every bit of one mixture's distribution at every test position of some domains."""
    parts = {
        result.domain.name: distribution_digest(mixture, result.domain.test, result.weights[name]) for result in results
    }
    return sha256(canonical_json(parts))


def to_json(before: Result, after: Result, *, removed: bool) -> dict[str, Any]:
    """One row of a report."""
    return {
        "owner": before.domain.name,
        "license": before.domain.license,
        "permissive": before.domain.permissive,
        "removed": removed,
        "test_tokens": sum(len(text.tokens) for text in before.domain.test),
        "test_documents": len(before.domain.test),
        "before": before.perplexity,
        "after": after.perplexity,
        "weights_before": weights_json(before.weights),
        "weights_after": weights_json(after.weights),
    }


def weights_json(weights: dict[str, Weights]) -> dict[str, Any]:
    """Weights of each mixture, as JSON."""
    return {name: one.to_json() for name, one in weights.items()}
