"""The mixture p(w | c) = Σ_s λ_s(c) p_s(w | c) of a language model and what a datastore gives it, position by position.

Nothing here knows how neighbours, blocks or n-grams are found: a datastore hands in sources (:mod:`silo.retrieval`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch

from silo.in_context import BlockReading, InContext, read_in_context
from silo.language_model import LanguageModel, Unread
from silo.mixing import interpolate
from silo.nearest import USUAL, Asked, Nearest, read_neighbours
from silo.past import Past
from silo.readings import Evidence, ModelReading, NeighbourReading, NgramReading, Temperature
from silo.retrieval import BlockSource, NeighbourSource, NgramMatches, NgramSource, SourceDocument
from silo.weights import METHODS, Weighing

MATCHED_TOKENS = 1 << 16
"""Documents of so many tokens together are matched in one pass of the ∞-gram."""
AHEAD = 1 << 14
"""Positions that are read before their neighbours are looked up. The more are asked for at a time, the less each costs;
so many are searched for at once (:mod:`datastore.knn`)."""
AHEAD_NUMBERS = 1 << 27
"""What waits of them meanwhile, in float32, at most: 512 MB. That is states, or logits where these decide about a
search or the model's head is no plain one."""


@dataclass(frozen=True)
class Parts:
    """What each method says about the positions ``begin`` to ``end`` of one document."""

    begin: int
    end: int
    lm: ModelReading
    knn: NeighbourReading | None = None
    ric: BlockReading | None = None
    ngram: NgramReading | None = None
    past: Evidence = field(default_factory=dict)
    """How well the methods have foretold the text up to each position (:mod:`silo.past`)."""

    @property
    def readings(self) -> dict[str, NeighbourReading | BlockReading | NgramReading]:
        """Those that there are, by ``knn``, ``ric`` and ``ngram``."""
        readings = {"knn": self.knn, "ric": self.ric, "ngram": self.ngram}
        return {name: reading for name, reading in readings.items() if reading is not None}

    def evidence(self) -> Evidence:
        """What all methods know of themselves, (n,) float64 by name."""
        found = self.lm.evidence() | self.past
        if self.knn is not None:
            found.update(self.knn.evidence(self.lm))
        if self.ric is not None:
            found["ric_found"] = torch.from_numpy(self.ric.found).double()
            found.update({f"ric_{name}": torch.from_numpy(of) for name, of in self.ric.evidence().items()})
        if self.ngram is not None:
            found.update(self.ngram.evidence(self.lm))
        return found

    def probabilities(self, tokens: torch.Tensor, temperature: Temperature) -> dict[str, torch.Tensor]:
        """What each method gives to one token a position: (n,) int64 → method → (n,) float64.

        What a method leaves is the model's, which is everything where it found nothing.
        """
        lm = self.lm.probability(tokens)
        return self._mapped(
            lm,
            lambda knn: knn.probability(tokens, temperature),
            lambda ric: ric.probability(tokens),
            lambda ngram: ngram.probability(tokens),
        )

    def given(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same without a temperature: of the neighbours, how many go on with the token."""
        lm = self.lm.probability(tokens)
        return self._mapped(
            lm,
            lambda knn: knn.share(tokens),
            lambda ric: ric.probability(tokens),
            lambda ngram: ngram.probability(tokens),
        )

    def distribution(self, weighing: Weighing) -> torch.Tensor:
        """The whole mixture at each position, (n, vocabulary) float64."""
        evidence = self.evidence()
        lm = self.lm.distribution()
        temperature, vocab_size = weighing.temperatures(evidence), lm.shape[1]
        given = self._mapped(
            lm,
            lambda knn: knn.distribution(temperature, vocab_size),
            lambda ric: ric.distribution(),
            lambda ngram: ngram.distribution(vocab_size),
            weighing.methods,
        )
        return interpolate({name: given[name] for name in weighing.methods}, weighing.weigh(evidence))

    def _mapped(
        self,
        lm: torch.Tensor,
        knn: Callable[[NeighbourReading], torch.Tensor],
        ric: Callable[[BlockReading], torch.Tensor],
        ngram: Callable[[NgramReading], torch.Tensor],
        methods: Sequence[str] = ("knn", "ric", "ngram"),
    ) -> dict[str, torch.Tensor]:
        """A function of each method's reading, with the model's part of it."""
        given, functions = {"lm": lm}, {"knn": knn, "ric": ric, "ngram": ngram}
        for name, reading in self.readings.items():
            if name in methods:
                value, left = functions[name](reading), reading.left  # type: ignore[operator]
                given[name] = value + (left.unsqueeze(1) if value.dim() == 2 else left) * lm
        return given


@dataclass(frozen=True)
class _Piece:
    """Some positions of a document, read by model and ∞-gram: what there is before neighbours are looked up."""

    document: int
    begin: int
    numbers: int
    """In float32, that wait with it."""
    asked: Asked


@dataclass(frozen=True)
class Share:
    """A part of one token's probability and the document that it came from; no document for the model's own."""

    probability: float
    method: str
    document: SourceDocument | None


class Mixture:
    """A language model beside the sources of one store; each may be left out."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        neighbours: NeighbourSource | None = None,
        blocks: BlockSource | None = None,
        ngrams: NgramSource | None = None,
        in_context: InContext | None = None,
        nearest: Nearest | None = None,
    ) -> None:
        """``in_context`` says how blocks are looked up and read, ``nearest`` how neighbours are."""
        self.model = model
        self.neighbours = neighbours
        self.blocks = blocks
        self.ngrams = ngrams
        self.in_context = in_context or InContext()
        self.nearest = nearest or USUAL

    @property
    def methods(self) -> list[str]:
        """``lm``, and ``knn``, ``ric`` and ``ngram`` if their sources are there."""
        sources = {"knn": self.neighbours, "ric": self.blocks, "ngram": self.ngrams}
        return ["lm", *(name for name, source in sources.items() if source is not None)]

    def parts(self, tokens: np.ndarray) -> Iterator[Parts]:
        """Read one document (n,), in order, each position once."""
        for _, parts in self.read([tokens]):
            yield parts

    def read(self, documents: Sequence[np.ndarray]) -> Iterator[tuple[int, Parts]]:
        """Read documents of (n,) tokens in order, each position once; with the number of the document.

        Neighbours and ∞-grams are looked up for many documents at a time, which is faster than one by one and gives the
        same. Blocks are read when their turn comes, since what they say takes as much memory as what the model says.
        """
        current, past = -1, Past()
        for pieces in self._ahead(documents):
            readings = self.read_neighbours([piece.asked for piece in pieces])
            for knn in readings:
                piece = pieces.popleft()  # and with it goes what its model says
                if piece.document != current:
                    current, past = piece.document, Past()
                asked, begin, end = piece.asked, piece.begin, piece.begin + len(piece.asked.keys)
                ric = self._read_blocks(documents[current], begin, end)
                yield current, past.join(Parts(begin, end, asked.lm(), knn, ric, asked.ngram), documents[current])

    def _read_blocks(self, tokens: np.ndarray, begin: int, end: int) -> BlockReading | None:
        if self.blocks is None:
            return None
        return read_in_context(self.model, self.blocks, tokens, begin, end, self.in_context)

    def _ahead(self, documents: Sequence[np.ndarray]) -> Iterator[deque[_Piece]]:
        """Read by model and ∞-gram, as far ahead as is of use and memory allows."""
        ahead: deque[_Piece] = deque()
        positions = numbers = 0
        for piece in self._pieces(documents):
            ahead.append(piece)
            positions += len(piece.asked.keys)
            numbers += piece.numbers
            if self.neighbours is None or positions >= AHEAD or numbers >= AHEAD_NUMBERS:
                yield ahead
                ahead, positions, numbers = deque(), 0, 0
        if ahead:
            yield ahead

    def _pieces(self, documents: Sequence[np.ndarray]) -> Iterator[_Piece]:
        """Read by model and ∞-gram."""
        start = 0
        while start < len(documents):
            stop, size = start, 0
            while stop < len(documents) and (stop == start or size + len(documents[stop]) <= MATCHED_TOKENS):
                size += len(documents[stop])
                stop += 1
            matches = self.ngrams.match(documents[start:stop]) if self.ngrams is not None else None
            for number in range(start, stop):
                first = int(matches.begins[number - start]) if matches is not None else 0
                yield from self._of_document(number, documents[number], matches, first)
            start = stop

    def _of_document(
        self, number: int, tokens: np.ndarray, matches: NgramMatches | None, first: int
    ) -> Iterator[_Piece]:
        """The same for one document, whose contexts begin with number ``first`` of the matches."""
        begin = 0
        for keys, unread in self.model.ahead(tokens):
            end = begin + len(keys)
            ngram, own = None, tokens[begin:end]
            if matches is not None and self.ngrams is not None:
                contexts = np.arange(first + begin, first + end)
                ngram = NgramReading(matches, self.ngrams, contexts, torch.from_numpy(own.astype(np.int64)))
            lm = cache(partial(_read, unread))
            numbers = keys.size + len(keys) * (self.model.vocab_size if self._early else unread.states.shape[1])
            yield _Piece(number, begin, numbers, Asked(keys, own, lm, ngram))
            begin = end

    @property
    def _early(self) -> bool:
        """Whether what the model says is asked for before the neighbours are, and so waits for them."""
        return self.nearest.spare is not None and self.nearest.spare.asks_the_model

    def read_neighbours(self, pieces: Sequence[Asked]) -> Sequence[NeighbourReading | None]:
        """What the neighbours say of some pieces; None of each if neighbours are not used."""
        if self.neighbours is None:
            return [None] * len(pieces)
        return read_neighbours(self.neighbours, pieces, self.nearest)

    def attribute(self, parts: Parts, index: int, token: int, weighing: Weighing) -> list[Share]:
        """Split p(token) at one position exactly into the model's share and one a document and method, largest first.

        The shares sum to the mixture's probability; what a method leaves is the model's.
        """
        return attribute(parts, index, token, weighing, parts.evidence())


def _read(unread: Unread) -> ModelReading:
    return ModelReading.of(unread.logits())


def attribute(parts: Parts, index: int, token: int, weighing: Weighing, evidence: Evidence) -> list[Share]:
    """As :meth:`Mixture.attribute`, with the parts' evidence."""
    lm = parts.lm.probability(torch.full((len(parts.lm),), token))[index].item()
    return _split(parts, index, token, lm, weighing.weigh(evidence), weighing.temperatures(evidence))


def attribute_all(parts: Parts, tokens: torch.Tensor, weighing: Weighing) -> list[list[Share]]:
    """The same for one token (n,) at each position."""
    evidence, lm = parts.evidence(), parts.lm.probability(tokens).tolist()
    weights, temperature = weighing.weigh(evidence), weighing.temperatures(evidence)
    return [_split(parts, index, token, lm[index], weights, temperature) for index, token in enumerate(tokens.tolist())]


def _largest_first(share: Share) -> tuple[float, int, str]:
    """The order of shares; of equal ones by method and document, however a store has put these in groups."""
    return -share.probability, METHODS.index(share.method), share.document.id if share.document else ""


def _split(
    parts: Parts,
    index: int,
    token: int,
    lm: float,
    weights: Mapping[str, float | torch.Tensor],
    temperature: Temperature,
) -> list[Share]:
    """Split p(token) at one position, where the model gives it ``lm``."""
    tau = float(temperature[index]) if isinstance(temperature, torch.Tensor) else temperature
    shares: dict[tuple[str, SourceDocument | None], float] = defaultdict(float)
    for method, given in weights.items():
        weight = float(given[index]) if isinstance(given, torch.Tensor) else given
        reading = parts.readings.get(method)
        left = 1.0 if reading is None else float(reading.left[index])
        shares["lm", None] += weight * left * lm
        if reading is None or left == 1.0:
            continue
        found = reading.shares(index, token, tau) if method == "knn" else reading.shares(index, token)  # type: ignore
        for part, document in found:
            shares[method, document] += weight * part
    found_shares = [Share(probability, method, document) for (method, document), probability in shares.items()]
    return sorted(found_shares, key=_largest_first)
