"""What each method of a mixture says about some positions of a document, before anything is weighed.

A reading gives the probability of one token a position, the whole distribution, the documents behind a probability,
and evidence: numbers that are known before the token is, by which a gate judges how far to trust the method. Where a
method found nothing it says so, and the mixture gives its weight to the model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from silo.mixing import neighbour_distribution, neighbour_probability, neighbour_weights
from silo.retrieval import Neighbours, NeighbourSource, NgramMatches, NgramSource, SourceDocument

FIRST_NEIGHBOURS = 8
"""How many of the nearest neighbours are asked whether they agree."""
SUFFIX_BOUNDS = (1, 2, 3, 4, 6, 9, 16)
"""Where the classes of suffix lengths begin."""

CHUNK_NUMBERS = 1 << 18
"""Logits that are normalised at a time."""

Evidence = dict[str, torch.Tensor]
"""Numbers about each position, (n,) float64 by name."""
Temperature = float | torch.Tensor
"""τ of kNN-LM, in units of squared distance: one for all positions, or (n, 1)."""
Shares = list[tuple[float, SourceDocument]]
"""Parts of one token's probability, and the documents that they come from."""
Without = dict[SourceDocument, float | None]
"""What a method would give to one token without each of the documents that it found; None where it has no other."""


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
        others = np.isfinite(np.min(left, axis=1))
        return {
            self.source.document(int(number)): float(given[row]) if others[row] else None
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
    """What came after the longest known suffix of the context of n positions (∞-gram, Liu 2024)."""

    matches: NgramMatches
    source: NgramSource
    contexts: np.ndarray
    """(n,) int64: the numbers of the positions' contexts among the matches."""
    tokens: torch.Tensor
    """(n,) int64: the tokens that the document has there."""

    @property
    def found(self) -> torch.Tensor:
        """(n,) bool: where at least one token of context is known with a token after it."""
        known = (self.matches.lengths[self.contexts] > 0) & (self.matches.counts[self.contexts] > 0)
        return torch.from_numpy(known)

    def probability(self, tokens: torch.Tensor) -> torch.Tensor:
        """p of one token a position, (n,) int64: the share of the suffix's occurrences that go on with it, float64.

        Tokens of the document itself were counted when it was matched; others are looked up.
        """
        counts = np.maximum(self.matches.counts[self.contexts], 1)
        found = self.matches.hits[self.contexts] / counts
        other = np.flatnonzero((tokens != self.tokens).numpy())
        if len(other):
            following = self.matches.following(self.contexts[other])
            of = np.repeat(np.arange(len(other)), np.diff(following.begins))
            hit = following.tokens == tokens.numpy()[other][of]
            found[other] = np.bincount(of[hit], weights=following.counts[hit], minlength=len(other)) / counts[other]
        return torch.where(self.found, torch.from_numpy(found), 0.0)

    def distribution(self, vocab_size: int) -> torch.Tensor:
        """(n, vocabulary) float64; zeros where nothing was found."""
        out = torch.zeros(len(self.contexts), vocab_size, dtype=torch.float64)
        some = np.flatnonzero(self.found.numpy())
        following = self.matches.following(self.contexts[some])
        of = np.repeat(some, np.diff(following.begins))
        share = following.counts / self.matches.counts[self.contexts[of]]
        out[torch.from_numpy(of), torch.from_numpy(following.tokens)] = torch.from_numpy(share)
        return out

    def shares(self, index: int, token: int) -> Shares:
        """What each document's occurrences give to one token at one position."""
        context = self.contexts[index : index + 1]
        origins = self.matches.origins(context, np.asarray([token], dtype=np.int64))
        count = int(self.matches.counts[context[0]])
        pairs = zip(origins.documents.tolist(), origins.counts.tolist(), strict=True)
        return [(times / count, self.source.document(document)) for document, times in pairs]

    def without(self, index: int, token: int, context: np.ndarray) -> Without:
        """What the others' occurrences give to one token after a context (m,), which is the one of this position.

        Where the suffix is one document's alone, that is what comes after the longest one that another has.
        """
        documents, counts, hits = _by_document(self.matches, int(self.contexts[index]), token)
        others, other_hits = counts.sum() - counts, hits.sum() - hits
        if len(documents) == 1:
            others[0], other_hits[0] = self._of_others(int(documents[0]), token, context, index)
        return {
            self.source.document(number): hit / count if count else None
            for number, count, hit in zip(documents.tolist(), others.tolist(), other_hits.tolist(), strict=True)
        }

    def _of_others(self, document: int, token: int, context: np.ndarray, index: int) -> tuple[int, int]:
        """How often the longest suffix occurs that another document has, and how often with a token after it."""

        @cache
        def of_length(length: int) -> tuple[int, int]:
            shorter = self.source.match([context[len(context) - length :]])
            documents, counts, hits = _by_document(shorter, length, token)
            other = documents != document
            return int(counts[other].sum()), int(hits[other].sum())

        lengths = range(1, int(self.matches.lengths[self.contexts[index]]))
        longest = bisect_left(lengths, True, key=lambda length: not of_length(length)[0])
        return of_length(longest) if longest else (0, 0)

    def evidence(self, lm: ModelReading) -> Evidence:
        """Length and count of the suffix, whether one token always follows it, and what the model gives to that."""
        found = self.found
        single = torch.from_numpy(self.matches.single[self.contexts])
        sparse = found & (single >= 0)
        out = {
            "ngram_length": torch.from_numpy(np.log1p(self.matches.lengths[self.contexts])),
            "ngram_count": torch.from_numpy(np.log1p(self.matches.counts[self.contexts])),
            "ngram_single": sparse.double(),
            "ngram_lm": torch.where(sparse, lm.log_probability(single.clamp_min(0)), 0.0),
            "ngram_class": torch.from_numpy(suffix_class(self.matches.lengths[self.contexts])) * 2 + sparse.double(),
        }
        return {"ngram_found": found.double(), **{name: torch.where(found, each, 0.0) for name, each in out.items()}}


def _by_document(matches: NgramMatches, context: int, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents that have the suffix of a context, how often, and how often with a token after it; each (n,)."""
    one = np.asarray([context])
    following = matches.following(one)
    origins = matches.origins(np.repeat(one, len(following.tokens)), following.tokens)
    hits = origins.counts * np.repeat(following.tokens == token, np.diff(origins.begins))
    documents, of = np.unique(origins.documents, return_inverse=True)
    counts, hits = (np.bincount(of, weights=each, minlength=len(documents)) for each in (origins.counts, hits))
    return documents, counts.astype(np.int64), hits.astype(np.int64)


def suffix_class(lengths: np.ndarray) -> np.ndarray:
    """The class of (n,) suffix lengths: 0 for none, then by :data:`SUFFIX_BOUNDS`. (n,) float64.

    >>> suffix_class(np.asarray([0, 1, 5, 100])).tolist()
    [0.0, 1.0, 4.0, 7.0]
    """
    return np.searchsorted(SUFFIX_BOUNDS, lengths, side="right").astype(np.float64)
