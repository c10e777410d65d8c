"""Perplexity of the language model and of its mixtures with a store.

Protocol: each document stands alone, every token is scored once, the first from the start token, each with the fullest
context that the windows give. Weights are fitted on validation documents and reported on others; a document in both is
refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from silo.documents import Document
from silo.errors import DataError, UsageError
from silo.files import canonical_json, sha256
from silo.mixing import fit_weights, interpolate, perplexity
from silo.mixture import Mixture, Weights

TEMPERATURES = tuple(2.0**power for power in range(-5, 7))
"""τ is chosen among these, on validation text."""
PASSAGE_TOKENS = 384
"""A sample takes at most this many tokens of one document, all of them in a row."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Text:
    """Tokens to be scored by themselves: a document, or one passage of it."""

    document: Document
    tokens: np.ndarray
    begin: int = 0
    """Where in its document the passage begins."""


@dataclass(frozen=True)
class Scores:
    """What each method gives to each token of some texts."""

    lm: torch.Tensor
    """(n,) float64 probabilities."""
    ric: torch.Tensor | None
    knn: dict[float, torch.Tensor]
    """By temperature; empty without a neighbour source."""

    def parts(self, methods: Sequence[str], temperature: float) -> dict[str, torch.Tensor]:
        """The probabilities of some methods, in the order of ``methods``."""
        every = {"lm": self.lm, "ric": self.ric, "knn": self.knn.get(temperature)}
        return {name: every[name] for name in methods}  # type: ignore[misc]

    def log_probabilities(self, weights: Weights) -> torch.Tensor:
        """log p of each token under a mixture, (n,) float64."""
        parts = self.parts(list(weights.by_method), weights.temperature)
        return interpolate(parts, weights.by_method).clamp_min(1e-300).log()


def sample(documents: Iterable[Document], mixture: Mixture, budget: int | None) -> list[Text]:
    """Whole documents, or with a budget one passage of each until ``budget`` tokens are there.

    Documents come in the order of their hashed ids, and the place of a passage hangs on the id too, so that a sample
    needs no seed. Many short passages say more about a domain than a few long documents (Perlitz 2023, Flash-HELM).
    """
    texts: list[Text] = []
    left = budget
    for document in sorted(documents, key=lambda document: sha256(document.id.encode())):
        tokens, begin = mixture.model.tokenize(document), 0
        if left is not None:
            length = min(len(tokens), PASSAGE_TOKENS, left)
            begin = int(sha256(document.id.encode())[:8], 16) % (len(tokens) - length + 1)
            tokens = tokens[begin : begin + length]
            left -= length
        texts.append(Text(document, tokens, begin))
        if left == 0:
            break
    return texts


def score(mixture: Mixture, texts: Sequence[Text], *, progress: Progress | None = None) -> Scores:
    """Score every token of some texts by every method of a mixture."""
    lm, ric = [], []
    knn: dict[float, list[torch.Tensor]] = {temperature: [] for temperature in TEMPERATURES}
    for done, text in enumerate(texts, start=1):
        for parts in mixture.parts(text.tokens):
            targets = torch.from_numpy(text.tokens[parts.begin : parts.end].astype(np.int64))
            for temperature in TEMPERATURES if parts.neighbours is not None else TEMPERATURES[:1]:
                given = parts.probabilities(targets, temperature)
                if "knn" in given:
                    knn[temperature].append(given["knn"])
            lm.append(given["lm"])
            if "ric" in given:
                ric.append(given["ric"])
        if progress:
            progress(done, len(texts))
    return Scores(
        torch.cat(lm),
        torch.cat(ric) if ric else None,
        {temperature: torch.cat(parts) for temperature, parts in knn.items() if parts},
    )


def fit(scores: Scores, methods: Sequence[str]) -> Weights:
    """The weights and the temperature that give validation text the highest probability."""
    if list(methods) == ["lm"]:
        return Weights({"lm": 1.0}, TEMPERATURES[0])
    best: tuple[float, Weights] | None = None
    for temperature in scores.knn if "knn" in methods else TEMPERATURES[:1]:
        parts = scores.parts(methods, temperature)
        weights = Weights(dict(zip(methods, fit_weights(list(parts.values())), strict=True)), temperature)
        value = scores.log_probabilities(weights).sum().item()
        if best is None or value > best[0]:
            best = value, weights
    return best[1]  # type: ignore[index]


def combinations(methods: Sequence[str]) -> dict[str, list[str]]:
    """The mixtures that are reported: the model alone, with each method, and with all.

    >>> list(combinations(["lm", "knn", "ric"]))
    ['lm', 'lm+knn', 'lm+ric', 'all']
    """
    named = {"lm": ["lm"], **{f"lm+{method}": ["lm", method] for method in methods if method != "lm"}}
    return {**named, "all": list(methods)} if len(methods) > 2 else named


def fit_combinations(scores: Scores, methods: Sequence[str]) -> dict[str, Weights]:
    """Weights for each reported mixture."""
    return {name: fit(scores, members) for name, members in combinations(methods).items()}


def perplexities(scores: Scores, weights: dict[str, Weights]) -> dict[str, float]:
    """Perplexity of each reported mixture."""
    return {name: perplexity(scores.log_probabilities(of_mixture)) for name, of_mixture in weights.items()}


def require_disjoint(data: Iterable[Document], fitted_on: Iterable[Document]) -> None:
    """Raise :class:`DataError` if a document to be reported on is among those that the weights are fitted on."""
    seen = {document.content_hash: document.id for document in fitted_on}
    for document in data:
        if document.content_hash in seen:
            raise DataError(
                f"document {document.id!r} is also in the file that weights are fitted on (as "
                f"{seen[document.content_hash]!r}); fit on validation text and report on other text"
            )


def distributions(mixture: Mixture, texts: Sequence[Text], weights: Weights) -> Iterator[torch.Tensor]:
    """The whole next-token distribution at every position of some texts, in pieces (n, vocabulary) float64."""
    for text in texts:
        for parts in mixture.parts(text.tokens):
            yield parts.distribution(weights)


def distribution_digest(mixture: Mixture, texts: Sequence[Text], weights: Weights) -> str:
    """SHA-256 over every bit of every distribution: equal digests mean equal answers at every position."""
    digest = hashlib.sha256()
    for piece in distributions(mixture, texts, weights):
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def weights_to_json(weights: dict[str, Weights], provenance: dict[str, Any]) -> dict[str, Any]:
    """What a file of fitted weights holds; ``provenance`` says on what they were fitted."""
    mixtures = {
        name: {"weights": dict(of_mixture.by_method), "temperature": of_mixture.temperature}
        for name, of_mixture in weights.items()
    }
    return {"mixtures": mixtures, **provenance}


def weights_from_json(value: Any, methods: Sequence[str], *, where: str) -> dict[str, Weights]:
    """Read weights back for the mixtures of ``methods``. Raises :class:`UsageError` if one is missing or broken."""
    try:
        found = {
            name: Weights({method: float(entry["weights"][method]) for method in members}, float(entry["temperature"]))
            for name, members in combinations(methods).items()
            for entry in [value["mixtures"][name]]
        }
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"{where} holds no weights for {', '.join(combinations(methods))}; make it with --fit and --save-weights"
        ) from None
    for name, one in found.items():
        values = list(one.by_method.values())
        # Written so that a nan, which compares false with all, is refused too.
        if not (min(values) >= 0 and abs(sum(values) - 1) <= 1e-9 and one.temperature > 0):
            raise UsageError(
                f"{where}: mixture {name!r} has weights {dict(one.by_method)} and temperature {one.temperature}; "
                "expected weights from 0 that sum to 1, and a temperature above 0"
            )
    return found


def data_hash(texts: Sequence[Text]) -> str:
    """SHA-256 of which documents were scored and how far."""
    return sha256(canonical_json([[text.document.content_hash, text.begin, len(text.tokens)] for text in texts]))
