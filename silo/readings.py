"""What each method of a mixture says about some positions of a document, before anything is weighed.

A reading gives the probability of one token a position, the whole distribution, the documents behind a probability,
and evidence: numbers that are known before the token is, by which a gate judges how far to trust the method. Where a
method found nothing, or does not trust what it found, it says how much is left, and the mixture gives that to the
model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from silo.mixing import discounted, neighbour_distribution, neighbour_probability, neighbour_weights
from silo.retrieval import Neighbours, NeighbourSource, NgramCounts, NgramMatches, NgramSource, SourceDocument

FIRST_NEIGHBOURS = 8
"""How many of the nearest neighbours are asked whether they agree."""
SUFFIX_BOUNDS = (1, 2, 3, 4, 6, 9, 16)
"""Where the classes of suffix lengths begin."""
SHORTER = (1, 2, 3)
"""Lengths of the suffixes that are counted beside the longest. A fourth, or all, make perplexity no lower (LOG.md)."""
DISCOUNT = 0.75
"""D of :func:`silo.mixing.discounted`: the best on permissive validation text, where 0.7 and 0.8 are hardly worse
(LOG.md)."""
MATTERS = 0.1
"""A document that has a smaller part of what an ∞-gram counts, at every position, is not asked what it would change."""

CHUNK_NUMBERS = 1 << 18
"""Logits that are normalised at a time."""

Evidence = dict[str, torch.Tensor]
"""Numbers about each position, (n,) float64 by name."""
Temperature = float | torch.Tensor
"""τ of kNN-LM, in units of squared distance: one for all positions, or (n, 1)."""
Shares = list[tuple[float, SourceDocument]]
"""Parts of one token's probability, and the documents that they come from."""
Without = dict[SourceDocument, tuple[float, float]]
"""What a method would give to one token without each of the documents that it found, and what it would leave to the
model."""


@dataclass(frozen=True)
class ModelReading:
    """What the language model says about n positions."""

    logits: torch.Tensor
    """(n, vocabulary) float32, not normalised."""
    normaliser: torch.Tensor
    """(n,) float64: the logarithm of the sum of the exponents of each row."""
    entropy: torch.Tensor
    """(n,) float64, in nats."""
    top: torch.Tensor
    """(n,) float64: the logarithm of the highest probability."""

    @classmethod
    def of(cls, logits: torch.Tensor) -> ModelReading:
        """Normalise the (n, vocabulary) logits that a model gave.

        Sums are of float32 exponents, the final addition is in float64: with it, probabilities sum to 1 within 1e-6.
        """
        logits = logits.float()
        rows = max(1, CHUNK_NUMBERS // logits.shape[1])  # that is, while they are in the cache
        found = [cls._normalise(logits[at : at + rows]) for at in range(0, len(logits), rows)]
        return cls(logits, *(torch.cat(each) for each in zip(*found, strict=True)))

    @staticmethod
    def _normalise(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normaliser, entropy and highest log-probability of some rows."""
        top = logits.amax(dim=1, keepdim=True)
        shifted = logits - top
        exponents = shifted.exp()
        total = exponents.sum(dim=1).double()
        entropy = total.log() - exponents.mul_(shifted).sum(dim=1).double() / total
        if entropy.isnan().any():  # 0 · ∞, of what a model rules out
            entropy = total.log() - exponents.nan_to_num_(nan=0.0).sum(dim=1).double() / total
        return top.squeeze(1).double() + total.log(), entropy, -total.log()

    def __len__(self) -> int:
        return len(self.logits)

    def log_probability(self, tokens: torch.Tensor) -> torch.Tensor:
        """log p of one token a position: (n,) int64 gives (n,) float64."""
        return self.logits.gather(1, tokens.unsqueeze(1)).squeeze(1).double() - self.normaliser

    def probability(self, tokens: torch.Tensor) -> torch.Tensor:
        """p of one token a position: (n,) int64 gives (n,) float64."""
        return self.log_probability(tokens).exp()

    def distribution(self) -> torch.Tensor:
        """(n, vocabulary) float64."""
        return (self.logits.double() - self.normaliser.unsqueeze(1)).exp_()

    def evidence(self) -> Evidence:
        """Entropy in nats, and the logarithm of the highest probability."""
        return {"lm_entropy": self.entropy, "lm_top": self.top}


@dataclass(frozen=True)
class NeighbourReading:
    """What the nearest neighbours say about n positions (kNN-LM, Khandelwal 2020)."""

    neighbours: Neighbours
    source: NeighbourSource

    @property
    def found(self) -> torch.Tensor:
        """(n,) bool: where there is any neighbour."""
        return torch.from_numpy(np.isfinite(self.neighbours.distances[:, 0]))

    @property
    def left(self) -> torch.Tensor:
        """(n,) float64: what is left to the model, which is all or nothing."""
        return (~self.found).double()

    def weights(self, temperature: Temperature) -> torch.Tensor:
        """(n, k) float64, summing to 1 a row where there is any neighbour."""
        return neighbour_weights(torch.from_numpy(self.neighbours.distances), temperature)

    def probability(self, tokens: torch.Tensor, temperature: Temperature) -> torch.Tensor:
        """p of one token a position: (n,) int64 gives (n,) float64."""
        return neighbour_probability(self.weights(temperature), torch.from_numpy(self.neighbours.values), tokens)

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the neighbours of each position the part that goes on with a token, however far: (n,) int64 gives (n,)
        float64."""
        there = np.isfinite(self.neighbours.distances)
        hits = (self.neighbours.values == tokens.numpy()[:, None]) & there
        return torch.from_numpy(hits.sum(axis=1) / np.maximum(1, there.sum(axis=1)))

    def distribution(self, temperature: Temperature, vocab_size: int) -> torch.Tensor:
        """(n, vocabulary) float64; zeros where nothing was found."""
        return neighbour_distribution(self.weights(temperature), torch.from_numpy(self.neighbours.values), vocab_size)

    def shares(self, index: int, token: int, temperature: float) -> Shares:
        """What each document's neighbours give to one token at one position."""
        one = slice(index, index + 1)
        weights = neighbour_weights(torch.from_numpy(self.neighbours.distances[one]), temperature)[0].tolist()
        shares: dict[int, float] = defaultdict(float)
        rows = zip(weights, self.neighbours.values[index], self.neighbours.documents[index], strict=True)
        for weight, value, document in rows:
            if value == token and document >= 0:
                shares[int(document)] += weight
        return [(share, self.source.document(document)) for document, share in shares.items()]

    def without(self, index: int, token: int, temperature: float) -> Without:
        """What the others' neighbours give to one token at one position; those that would come next are not known."""
        values, documents = self.neighbours.values[index], self.neighbours.documents[index]
        numbers = np.unique(documents[documents >= 0])
        left = np.where(documents == numbers[:, None], np.inf, self.neighbours.distances[index])
        weights = neighbour_weights(torch.from_numpy(left), temperature).numpy()
        given = (weights * (values == token)).sum(axis=1)
        alone = np.isinf(np.min(left, axis=1))
        return {
            self.source.document(int(number)): (float(given[row]), float(alone[row]))
            for row, number in enumerate(numbers)
        }

    def evidence(self, lm: ModelReading) -> Evidence:
        """How near the first and the last neighbour are, whether the others agree with the first, and whether the
        model does."""
        found, values = self.found, torch.from_numpy(self.neighbours.values)
        distances = torch.from_numpy(self.neighbours.distances).double()
        last = torch.where(torch.isfinite(distances), distances, 0.0).amax(dim=1)
        same = values == values[:, :1]
        finite = torch.isfinite(distances)
        out = {
            "knn_nearest": distances[:, 0].clamp_min(1e-6).log(),
            "knn_farthest": last.clamp_min(1e-6).log(),
            "knn_first": same[:, :FIRST_NEIGHBOURS].double().mean(dim=1),
            "knn_all": (same & finite).double().sum(dim=1) / finite.double().sum(dim=1).clamp_min(1.0),
            "knn_lm": lm.log_probability(values[:, 0]),
        }
        return {"knn_found": found.double(), **{name: torch.where(found, each, 0.0) for name, each in out.items()}}


@dataclass(frozen=True)
class NgramReading:
    """What came after the longest known suffix of the context of n positions (∞-gram, Liu 2024), and after its last
    one, two and three tokens, to which it leaves what rare suffixes are not to be trusted with.

    What these do not trust themselves with either is left to the model (:func:`silo.mixing.discounted`).
    """

    matches: NgramMatches
    source: NgramSource
    contexts: np.ndarray
    """(n,) int64: the numbers of the positions' contexts among the matches."""
    tokens: torch.Tensor
    """(n,) int64: the tokens that the document has there."""

    @cached_property
    def orders(self) -> list[NgramCounts]:
        """The suffixes of each length, the longest last."""
        return [*(self.matches.shorter(length) for length in SHORTER), self.matches]

    @cached_property
    def _totals(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each length how often each position's suffix occurs, and how many tokens come after it; (n,) each."""
        found = []
        for order in self.orders:
            known = order.lengths[self.contexts] > 0  # what comes after nothing is not looked for
            counts, kinds = np.where(known, order.counts[self.contexts], 0), np.zeros(len(known), dtype=np.int64)
            kinds[known] = order.kinds(self.contexts[known])
            found.append((counts, kinds))
        return found

    @property
    def found(self) -> torch.Tensor:
        """(n,) bool: where at least one token of context is known with a token after it."""
        return torch.from_numpy(self._totals[-1][0] > 0)

    @cached_property
    def left(self) -> torch.Tensor:
        """(n,) float64: what is left to the model."""
        nothing = np.zeros(len(self.contexts), dtype=np.int64)
        return torch.from_numpy(discounted([(nothing, *totals) for totals in self._totals], DISCOUNT)[1])

    def probability(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is given to one token a position, (n,) int64 → (n,) float64; with what is left, it makes p.

        Tokens of the document itself were counted when it was matched; others are looked up.
        """
        other = np.flatnonzero((tokens != self.tokens).numpy())
        orders = []
        for order, totals in zip(self.orders, self._totals, strict=True):
            hits = order.hits[self.contexts]
            if len(other):
                hits[other] = order.occurrences(self.contexts[other], tokens.numpy()[other])
            orders.append((np.where(totals[0] > 0, hits, 0), *totals))
        return torch.from_numpy(discounted(orders, DISCOUNT)[0])

    def distribution(self, vocab_size: int) -> torch.Tensor:
        """The same for every token, (n, vocabulary) float64."""
        out = np.zeros((len(self.contexts), vocab_size))
        for order, (counts, kinds) in zip(self.orders, self._totals, strict=True):
            some = np.flatnonzero(counts)
            following = order.following(self.contexts[some])
            of = np.repeat(some, np.diff(following.begins))
            out[some] *= (DISCOUNT * kinds[some] / counts[some])[:, None]
            out[of, following.tokens] += (following.counts - DISCOUNT) / counts[of]
        return torch.from_numpy(out)

    def shares(self, index: int, token: int) -> Shares:
        """What each document's occurrences give to one token at one position; what is taken off a count is taken off
        all of them alike."""
        documents, given = self._shares(index, token)
        return [
            (share, self.source.document(document))
            for document, share in zip(documents.tolist(), given.tolist(), strict=True)
        ]

    def _shares(self, index: int, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents (d,), and what each gives, (d,) float64."""
        context, wanted = self.contexts[index : index + 1], np.asarray([token], dtype=np.int64)
        found, passed = [], 1.0
        for order, (counts, kinds) in zip(self.orders[::-1], self._totals[::-1], strict=True):
            count = int(counts[index])
            if count:
                origins = order.origins(context, wanted)
                hits = max(1, int(origins.counts.sum()))
                found.append((origins.documents, origins.counts * (passed * (hits - DISCOUNT) / count / hits)))
                passed *= DISCOUNT * int(kinds[index]) / count
        if not found:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        documents, of = np.unique(np.concatenate([each for each, _ in found]), return_inverse=True)
        return documents, np.bincount(of, weights=np.concatenate([given for _, given in found]))

    def concerned(self, index: int, token: int) -> np.ndarray:
        """The documents that matter at one position: those that give :data:`MATTERS` of what is given to the token, or
        have as much of the longest suffix's occurrences, where that is a suffix of many tokens."""
        documents, given = self._shares(index, token)
        found = [documents[given >= MATTERS * given.sum()]]
        if self.found[index] and self.matches.lengths[self.contexts[index]] > SHORTER[-1]:
            spread = self.matches.spread(int(self.contexts[index]))
            found.append(spread.documents[spread.counts >= MATTERS * spread.counts.sum()])
        return np.unique(np.concatenate(found))

    def without(
        self, index: int, token: int, context: np.ndarray, documents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the others' occurrences give to one token after a context (m,), which is the one of this position,
        without each of some documents (d,), and what they leave; (d,) each.

        Where the longest suffix is one document's alone, the longest that another has is looked up for it.
        """
        orders = [
            _without(order, int(self.contexts[index]), token, documents, bool(counts[index]))
            for order, (counts, _) in zip(self.orders, self._totals, strict=True)
        ]
        hits, counts, kinds = orders[-1]
        if self.found[index]:
            for row in np.flatnonzero(counts == 0).tolist():
                hits[row], counts[row], kinds[row] = self._of_others(int(documents[row]), token, context, index)
        return discounted(orders, DISCOUNT)

    def _of_others(self, document: int, token: int, context: np.ndarray, index: int) -> tuple[int, int, int]:
        """Of the longest suffix that another document has, if it is longer than those that are counted anyway: how
        often it occurs with a token after it, how often in all, and how many tokens come after it."""

        @cache
        def of_length(length: int) -> tuple[int, int, int]:
            shorter = self.source.match([context[len(context) - length :]])
            one = np.asarray([document])
            return tuple(int(each[0]) for each in _without(shorter, length, token, one, True))  # type: ignore[return-value]

        lengths = range(SHORTER[-1] + 1, int(self.matches.lengths[self.contexts[index]]))
        longest = lengths.start - 1 + bisect_left(lengths, True, key=lambda length: not of_length(length)[1])
        return of_length(longest) if longest >= lengths.start else (0, 0, 0)

    def evidence(self, lm: ModelReading) -> Evidence:
        """Length and count of the longest suffix, whether one token always follows it, what the model gives to that;
        and how much is left to the model."""
        found = self.found
        single = torch.from_numpy(self.matches.single[self.contexts])
        sparse = found & (single >= 0)
        out = {
            "ngram_length": torch.from_numpy(np.log1p(self.matches.lengths[self.contexts])),
            "ngram_count": torch.from_numpy(np.log1p(self.matches.counts[self.contexts])),
            "ngram_single": sparse.double(),
            "ngram_left": self.left,
            "ngram_lm": torch.where(sparse, lm.log_probability(single.clamp_min(0)), 0.0),
            "ngram_class": torch.from_numpy(suffix_class(self.matches.lengths[self.contexts])) * 2 + sparse.double(),
        }
        return {"ngram_found": found.double(), **{name: torch.where(found, each, 0.0) for name, each in out.items()}}


def _without(
    order: NgramCounts, context: int, token: int, documents: np.ndarray, known: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c(w), c and N of one context's suffix, as :func:`silo.mixing.discounted` has them, without each of some documents
    (m,); zeros if it is not ``known``. (m,) each."""
    if not known:
        return (np.zeros_like(documents), np.zeros_like(documents), np.zeros_like(documents))
    one, spread = np.asarray([context]), order.spread(context)
    origins = order.origins(one, np.asarray([token], dtype=np.int64))
    hits = origins.counts.sum() - _at(documents, origins.documents, origins.counts)
    counts = spread.counts.sum() - _at(documents, spread.documents, spread.counts)
    return hits, counts, order.kinds(one)[0] - _at(documents, spread.documents, spread.only)


def _at(documents: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values (k,) of documents (m,) among known ones (k,); 0 for others."""
    found = np.zeros_like(documents)
    order = np.argsort(known)
    places = np.searchsorted(known[order], documents)
    there = np.flatnonzero(places < len(known))
    there = there[known[order][places[there]] == documents[there]]
    found[there] = values[order][places[there]]
    return found


def suffix_class(lengths: np.ndarray) -> np.ndarray:
    """The class of (n,) suffix lengths: 0 for none, then by :data:`SUFFIX_BOUNDS`. (n,) float64.

    >>> suffix_class(np.asarray([0, 1, 5, 100])).tolist()
    [0.0, 1.0, 4.0, 7.0]
    """
    return np.searchsorted(SUFFIX_BOUNDS, lengths, side="right").astype(np.float64)
