"""What a token's probability would be without a document, told from what was found while it was there.

The other documents' neighbours, blocks and occurrences are weighed among themselves, and where a method has no other,
the model takes its weight. Of the ∞-gram that is exact for documents that it found for any token of what is read at a
time: where the longest known suffix is the document's alone, the longest that another has is looked up. Of neighbours
it is exact but for those that would come in place of the document's, of blocks but for what would be found in their
place. λ and τ are taken to stay as they are; a gate's move.

What happens in truth is what a view says that denies the document (:mod:`datastore.view`), at the price of reading the
text again.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from silo.mixture import Parts
from silo.readings import Without
from silo.retrieval import SourceDocument
from silo.weights import Weighing


class Leaving:
    """The probabilities of a document's own tokens without each of the documents that a mixture found for them."""

    def __init__(self, parts: Parts, tokens: np.ndarray, weighing: Weighing) -> None:
        """Weigh what was read.

        Args:
            parts: n positions.
            tokens: those of the whole text that the positions are of.
            weighing: of the mixture.
        """
        self._parts, self._text = parts, tokens
        self._tokens = tokens[parts.begin : parts.end].tolist()
        evidence = parts.evidence()
        temperature, size = weighing.temperatures(evidence), (len(self._tokens),)
        own = torch.tensor(self._tokens, dtype=torch.int64)
        self._given = {name: each.numpy() for name, each in parts.probabilities(own, temperature).items()}
        self._weights = {
            name: torch.as_tensor(weight, dtype=torch.float64).expand(size).numpy()
            for name, weight in weighing.weigh(evidence).items()
        }
        self._temperature = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1).expand(size).numpy()

    def at(self, index: int) -> dict[SourceDocument, float]:
        """The probability of the token at one of the positions without each document."""
        lm = float(self._given["lm"][index])
        by_method = {name: self._without(name, index) for name in self._weights}
        documents = {document for found in by_method.values() for document in found}
        out = dict.fromkeys(sorted(documents, key=lambda document: document.id), 0.0)
        for name, weights in self._weights.items():
            usual = float(self._given.get(name, self._given["lm"])[index]), 0.0
            for document in out:
                given, left = by_method[name].get(document, usual)
                out[document] += float(weights[index]) * (given + left * lm)
        return out

    @cached_property
    def _concerned(self) -> np.ndarray:
        """The documents that the ∞-gram has found for any of the positions."""
        ngram = self._parts.ngram
        if ngram is None:
            return np.zeros(0, dtype=np.int64)
        return np.unique(np.concatenate([ngram.concerned(index, token) for index, token in enumerate(self._tokens)]))

    def _without(self, method: str, index: int) -> Without:
        """What one method says; nothing where it found nothing."""
        parts, token = self._parts, self._tokens[index]
        reading = parts.readings.get(method)
        if reading is None or float(reading.left[index]) == 1.0:
            return {}
        if parts.knn is reading:
            return parts.knn.without(index, token, float(self._temperature[index]))
        if parts.ngram is reading:
            return parts.ngram.without(index, token, self._text[: parts.begin + index], self._concerned)
        return reading.without(index, token)  # type: ignore[call-arg]
