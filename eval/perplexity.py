"""Perplexity of the language model and of its mixtures with a store.

Protocol: each document stands alone, every token is scored once, the first from the start token, each with the fullest
context that the windows give. Weights are fitted on validation documents and reported on others; a document in both is
refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from silo.documents import Document
from silo.errors import DataError, SiloError, UsageError
from silo.files import canonical_json, sha256
from silo.gate import Gate, Lessons
from silo.language_model import LanguageModel
from silo.mixing import fit_weights, interpolate, neighbour_weights, perplexity
from silo.mixture import Mixture
from silo.nearest import USUAL, Nearest
from silo.readings import Evidence, Temperature
from silo.weights import Weighing, Weights, read_weighing

TEMPERATURES = tuple(2.0**power for power in range(-5, 7))
"""τ is chosen among these, on validation text; and beyond them, by doubling or halving on, where the last is the best:
a model's distances may be of any size."""
GREATEST_TEMPERATURE = 2.0**30
CLASS_TOKENS = 200
"""Weights are fitted for a class of suffixes apart if so many tokens of validation text are in it."""
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
    """What each method gives to each token of some texts; tensors of shape (n,) float64, one text after the other."""

    given: dict[str, torch.Tensor]
    """The token's probability by ``lm``, and by ``ric`` and ``ngram`` where they were used."""
    distances: torch.Tensor | None
    """(n, k) float32 squared distances of the neighbours."""
    hits: torch.Tensor | None
    """(n, k) bool: which neighbours are followed by the token."""
    evidence: Evidence
    """What was known before the token was."""
    lengths: list[int]
    """Tokens of each text."""
    nearest: Nearest = USUAL
    """How the neighbours were looked up."""

    def __len__(self) -> int:
        return len(self.given["lm"])

    @property
    def lm(self) -> torch.Tensor:
        """(n,) float64 probabilities by the model alone."""
        return self.given["lm"]

    @property
    def lessons(self) -> Lessons:
        """The same, as a gate learns from it."""
        return Lessons(self.evidence, self.given, self.distances, self.hits)

    def rows(self, which: torch.Tensor, lengths: list[int]) -> Scores:
        """Some of the tokens, by a mask or by their numbers, which are texts of these lengths."""
        chosen = self.lessons.rows(which)
        return Scores(dict(chosen.given), chosen.distances, chosen.hits, chosen.evidence, lengths, self.nearest)

    def knn(self, temperature: Temperature) -> torch.Tensor:
        """(n,) float64 probabilities by the neighbours; the model's where there are none."""
        if self.distances is None or self.hits is None:
            raise UsageError("these texts were scored without neighbours; use knn")
        given = (neighbour_weights(self.distances, temperature) * self.hits).sum(dim=1)
        return torch.where(torch.isfinite(self.distances[:, 0]), given, self.lm)

    def parts(self, methods: Sequence[str], temperature: Temperature) -> dict[str, torch.Tensor]:
        """The probabilities of some methods, in the order of ``methods``."""
        return {name: self.knn(temperature) if name == "knn" else self.given[name] for name in methods}

    def log_probabilities(self, weighing: Weighing) -> torch.Tensor:
        """log p of each token under a mixture, (n,) float64. Raises :class:`UsageError` if that was made for neighbours
        that are looked up in another way."""
        require_nearest(weighing, self.nearest)
        parts = self.parts(weighing.methods, weighing.temperatures(self.evidence))
        return interpolate(parts, weighing.weigh(self.evidence)).clamp_min(1e-300).log()


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
    """Score every token of some texts by every method of a mixture.

    Raises :class:`SiloError` if the model gives what is no number.
    """
    given: dict[str, list[torch.Tensor]] = {}
    evidence: dict[str, list[torch.Tensor]] = {}
    distances, hits = [], []
    for number, parts in mixture.read([text.tokens for text in texts]):
        tokens = torch.from_numpy(texts[number].tokens[parts.begin : parts.end].astype(np.int64))
        for name, value in replace(parts, knn=None).probabilities(tokens, 1.0).items():
            given.setdefault(name, []).append(value)
        for name, value in parts.evidence().items():
            evidence.setdefault(name, []).append(value)
        if parts.knn is not None:
            distances.append(torch.from_numpy(parts.knn.neighbours.distances))
            hits.append(torch.from_numpy(parts.knn.neighbours.values) == tokens.unsqueeze(1))
        if progress and parts.end == len(texts[number].tokens):
            progress(number + 1, len(texts))
    lm = torch.cat(given["lm"])
    if not lm.isfinite().all():
        bounds = np.cumsum([len(text.tokens) for text in texts])
        first = int(np.searchsorted(bounds, int((~lm.isfinite()).nonzero()[0]), side="right"))
        raise SiloError(
            f"the model gives no number to tokens of document {texts[first].document.id!r}; its weights hold such as "
            "are none, or overflow: restore or train it again"
        )
    return Scores(
        {name: torch.cat(values) for name, values in given.items()},
        torch.cat(distances) if distances else None,
        torch.cat(hits) if hits else None,
        {name: torch.cat(values) for name, values in evidence.items()},
        [len(text.tokens) for text in texts],
        mixture.nearest,
    )


def taught_by(value: Any) -> list[str]:
    """The content hashes of the documents that a file of weights learnt from, as far as it says, sorted; a gate's file
    names its teachers, one of fitted weights its texts."""
    found = value if isinstance(value, dict) else {}
    teachers = found.get("provenance", {}).get("teachers", ())
    return sorted({row["content_hash"] for row in teachers} | set(found.get("texts", ())))


def require_unfitted(
    value: Any, documents: Iterable[Document], texts: Sequence[Text], *, where: str, whose: str = "text of --data"
) -> None:
    """Raise :class:`UsageError` if weights learnt from what is to be reported on.

    Args:
        value: a file of weights.
        documents: that are reported on.
        texts: what is read of them. Older files of weights name the hash of what was read, and no document.
        where: the file, for the message.
        whose: text it is, for the message.
    """
    fitted_on = value.get("fitted_on") if isinstance(value, dict) else None
    if fitted_on == data_hash(texts) or set(taught_by(value)) & {each.content_hash for each in documents}:
        raise UsageError(f"{where} was fitted on {whose}; fit on validation text and report on other text")


def require_nearest(weighing: Weighing, nearest: Nearest, *, where: str = "the weights") -> None:
    """Raise :class:`UsageError` if something was made for neighbours that are looked up in another way: of others the
    same evidence says something else."""
    if "knn" in weighing.methods and weighing.nearest not in (None, nearest):
        raise UsageError(
            f"{where} were made with {weighing.nearest}, and neighbours are looked up with {nearest}; look them up as "
            "then, or make weights for these"
        )


def looked_up_by(weighings: Iterable[Weighing], asked: Nearest | None, *, where: str) -> Nearest | None:
    """How neighbours are to be looked up for weights that were given: as they were when these were made.

    Args:
        weighings: of several mixtures.
        asked: how they shall be looked up, if that was said.
        where: whose weights they are, for messages.

    Returns:
        None if nobody says.

    Raises:
        UsageError: it is not the same for all.
    """
    for weighing in weighings:
        if "knn" in weighing.methods and weighing.nearest is not None:
            asked = asked or weighing.nearest
            require_nearest(weighing, asked, where=where)
    return asked


def fit(scores: Scores, methods: Sequence[str]) -> Weights:
    """The weights and the temperature that give validation text the highest probability.

    With an ∞-gram the weights are fitted for each class of its suffix apart, as far as there are tokens enough: what
    followed eight known words is worth more than what followed one (Liu 2024 tells sparse from dense).
    """
    if list(methods) == ["lm"]:
        return Weights({"lm": 1.0})
    best: tuple[float, Weights] | None = None
    left = list(TEMPERATURES if "knn" in methods else (1.0,))
    low, high = left[0], left[-1]
    while left:
        temperature = left.pop(0)
        value, weights = _fit_at(scores, methods, temperature)
        if best is None or value > best[0]:
            best = value, weights
        if not left and "knn" in methods:
            reached = best[1].temperature
            if reached == high and high < GREATEST_TEMPERATURE:
                left = [high := high * 2]
            elif reached == low and low > 1 / GREATEST_TEMPERATURE:
                left = [low := low / 2]
    return best[1]  # type: ignore[index]


def _fit_at(scores: Scores, methods: Sequence[str], temperature: float) -> tuple[float, Weights]:
    """The best weights at one temperature, and the log-probability of the text under them."""
    parts = scores.parts(methods, temperature)
    by_method = dict(zip(methods, fit_weights(list(parts.values())), strict=True))
    by_suffix = _fit_by_suffix(scores.evidence["ngram_class"], parts) if "ngram" in methods else None
    weights = Weights(by_method, temperature, by_suffix, scores.nearest if "knn" in methods else None)
    return interpolate(parts, weights.weigh(scores.evidence)).clamp_min(1e-300).log().sum().item(), weights


def _fit_by_suffix(classes: torch.Tensor, parts: dict[str, torch.Tensor]) -> dict[int, dict[str, float]]:
    """Weights for each class of suffix that has tokens enough."""
    found = {}
    for number in classes.unique().long().tolist():
        own = classes == number
        if int(own.sum()) >= CLASS_TOKENS:
            fitted = fit_weights([part[own] for part in parts.values()])
            found[number] = dict(zip(parts, fitted, strict=True))
    return found


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


def perplexities(scores: Scores, weights: Mapping[str, Weighing]) -> dict[str, float]:
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


def distributions(mixture: Mixture, texts: Sequence[Text], weights: Weighing) -> Iterator[torch.Tensor]:
    """The whole next-token distribution at every position of some texts, in pieces (n, vocabulary) float64."""
    for text in texts:
        for parts in mixture.parts(text.tokens):
            yield parts.distribution(weights)


def distribution_digest(mixture: Mixture, texts: Sequence[Text], weights: Weighing) -> str:
    """SHA-256 over every bit of every distribution: equal digests mean equal answers at every position."""
    digest = hashlib.sha256()
    for piece in distributions(mixture, texts, weights):
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def weighings_from_json(
    value: Any, methods: Sequence[str], model: LanguageModel, *, where: str
) -> Mapping[str, Weights | Gate]:
    """Read a file of weights, or a gate, for ``methods``. Raises :class:`UsageError` if it does not fit."""
    if not isinstance(value, dict) or not value or "mixtures" in value:
        return weights_from_json(value, methods, where=where)
    if value.get("kind") != "gate":
        chosen = read_weighing(value, model=model.fingerprint, where=where)
        _require_used(chosen, methods, where)
        return {"lm": Weights({"lm": 1.0}), list(combinations(chosen.methods))[-1]: chosen}  # type: ignore[dict-item]
    gate = Gate.from_json(value, where=where)
    made_for = value.get("provenance", {}).get("model")
    if made_for != model.fingerprint:
        raise UsageError(f"{where} was made for the model {made_for}, not {model.fingerprint}; make one for this model")
    _require_used(gate, methods, where)
    return {"lm": Weights({"lm": 1.0}), "gate": gate}


def _require_used(weighing: Weighing, methods: Sequence[str], where: str) -> None:
    if not set(weighing.methods) <= set(methods):
        raise UsageError(f"{where} weighs {', '.join(weighing.methods)}; give --use {','.join(weighing.methods)}")


def described(weighing: Weights | Gate, evidence: Evidence) -> dict[str, Any]:
    """Weights as JSON; of a gate, the means of what it gave to some positions."""
    if isinstance(weighing, Weights):
        return weighing.to_json()
    weights = {name: float(torch.as_tensor(each).mean()) for name, each in weighing.weigh(evidence).items()}
    return {"weights": weights, "temperature": float(torch.as_tensor(weighing.temperatures(evidence)).mean())}


def weights_from_json(value: Any, methods: Sequence[str], *, where: str) -> dict[str, Weights]:
    """Read weights back for the mixtures of ``methods``. Raises :class:`UsageError` if one is missing or broken."""
    found = {}
    for name, members in combinations(methods).items():
        try:
            entry = value["mixtures"][name]
        except (KeyError, TypeError):
            raise UsageError(
                f"{where} holds no weights for {', '.join(combinations(methods))}; make it with --fit and "
                "--save-weights"
            ) from None
        found[name] = Weights.from_json(entry, where=f"{where}: mixture {name!r}")
        if set(found[name].methods) != set(members):
            raise UsageError(
                f"{where}: mixture {name!r} weighs {', '.join(found[name].methods)}; expected {', '.join(members)}"
            )
    return found


def data_hash(texts: Sequence[Text]) -> str:
    """SHA-256 of which documents were scored and how far."""
    return sha256(canonical_json([[text.document.content_hash, text.begin, len(text.tokens)] for text in texts]))
