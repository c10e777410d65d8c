"""What a token's probability would be without a document, told from what was found while it was there.

The other documents' neighbours, blocks and occurrences are weighed among themselves, and where a method has no other,
the model takes its weight. Of the ∞-gram that is exact for documents that matter to it at any of the positions: where
the longest known suffix is the document's alone, the longest that another has is looked up. Of neighbours it is exact
but for those that would come in place of the document's, of blocks but for what would be found in their place. λ and τ
are taken to stay as they are; a gate's move.

What happens in truth is what a view says that denies the document (:mod:`datastore.view`), at the price of reading the
text again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from silo.in_context import BlockReading
from silo.mixture import Parts
from silo.readings import NeighbourReading, NgramReading, Without
from silo.retrieval import SourceDocument
from silo.weights import Weighing


def concerned(read: Sequence[Parts], tokens: np.ndarray) -> np.ndarray:
    """The numbers of the documents that matter to the ∞-gram at any position of some parts of a text of tokens (n,)."""
    found = [np.zeros(0, dtype=np.int64)]
    for parts in read:
        if parts.ngram is not None:
            own = tokens[parts.begin : parts.end].tolist()
            found += [parts.ngram.concerned(index, token) for index, token in enumerate(own)]
    return np.unique(np.concatenate(found))


class Leaving:
    """The probabilities of a document's own tokens without each of the documents that a mixture found for them."""

    def __init__(self, parts: Parts, tokens: np.ndarray, weighing: Weighing, numbers: np.ndarray) -> None:
        """Weigh what was read.

        Args:
            parts: n positions.
            tokens: those of the whole text that the positions are of.
            weighing: of the mixture.
            numbers: what :func:`concerned` gives for these positions, or for more of the text.
        """
        self._numbers = numbers
        ngram = parts.ngram
        self._concerned = {} if ngram is None else dict.fromkeys(map(ngram.source.document, numbers.tolist()))
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
        found = {name: self._without(name, index) for name in self._weights if name != "ngram"}
        others = {document for of in found.values() for document in of} - self._concerned.keys()
        documents = [*self._concerned, *sorted(others, key=lambda document: document.id)]
        places = {document: place for place, document in enumerate(documents)}
        lm, out = float(self._given["lm"][index]), np.zeros(len(documents))
        for name, weights in self._weights.items():
            values = np.full(len(documents), self._given.get(name, self._given["lm"])[index])
            for document, (given, left) in found.get(name, {}).items():
                values[places[document]] = given + left * lm
            if name == "ngram" and self._parts.ngram is not None:
                values[: len(self._concerned)] = self._without_occurrences(self._parts.ngram, index, lm)
            out += float(weights[index]) * values
        return dict(zip(documents, out.tolist(), strict=True))

    def _without_occurrences(self, ngram: NgramReading, index: int, lm: float) -> np.ndarray:
        """What the ∞-gram says without each of these."""
        context = self._text[: self._parts.begin + index]
        given, left = ngram.without(index, self._tokens[index], context, self._numbers)
        return np.asarray(given + left * lm)

    def _without(self, method: str, index: int) -> Without:
        """What neighbours or blocks say; nothing where they found nothing."""
        reading, token = self._parts.readings.get(method), self._tokens[index]
        if reading is None or float(reading.left[index]) == 1.0:
            return {}
        if isinstance(reading, NeighbourReading):
            return reading.without(index, token, float(self._temperature[index]))
        if isinstance(reading, BlockReading):
            return reading.without(index, token)
        return {}
