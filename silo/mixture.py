"""The mixture p(w | c) = Σ_s λ_s p_s(w | c) of a language model and what a datastore gives it, position by position.

Nothing here knows how neighbours or blocks are found: a datastore hands in sources (:mod:`silo.retrieval`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from silo.language_model import LanguageModel
from silo.mixing import interpolate, neighbour_distribution, neighbour_probability, neighbour_weights
from silo.retrieval import Block, BlockSource, Neighbours, NeighbourSource, SourceDocument

NEIGHBOURS = 256
"""k of kNN-LM."""
QUERY_TOKENS = 64
"""A block is looked up by this many tokens before the position."""
RIC_STRIDE = 64
"""Positions that share one block (In-Context RALM's retrieval stride, Ram 2023, has 4 with a larger model)."""


@dataclass(frozen=True)
class Weights:
    """How a mixture is weighed."""

    by_method: Mapping[str, float]
    """λ of ``lm``, ``knn`` and ``ric``, as far as they are used, summing to 1."""
    temperature: float
    """τ of kNN-LM, in units of squared distance."""


@dataclass(frozen=True)
class Parts:
    """What each method says about the positions ``begin`` to ``end`` of one document."""

    begin: int
    end: int
    lm: torch.Tensor
    """(n, vocabulary) float32 log-probabilities."""
    neighbours: Neighbours | None
    ric: torch.Tensor | None
    """As ``lm``, with a block before the context; equal to ``lm`` where no block was found."""
    blocks: list[Block | None]
    """The block behind each position, (n,)."""

    def probabilities(self, targets: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
        """What each method gives to one token a position: targets (n,) → method → (n,) float64."""
        column = targets.unsqueeze(1)
        out = {"lm": self.lm.gather(1, column).squeeze(1).double().exp()}
        if self.neighbours is not None:
            weights = neighbour_weights(torch.from_numpy(self.neighbours.squared_l2), temperature)
            knn = neighbour_probability(weights, torch.from_numpy(self.neighbours.values), targets)
            out["knn"] = torch.where(weights.sum(dim=1) > 0, knn, out["lm"])
        if self.ric is not None:
            out["ric"] = self.ric.gather(1, column).squeeze(1).double().exp()
        return out

    def distribution(self, weights: Weights) -> torch.Tensor:
        """The whole mixture at each position, (n, vocabulary) float64."""
        lm = self.lm.double().exp()
        out = {"lm": lm}
        if self.neighbours is not None:
            of_neighbour = neighbour_weights(torch.from_numpy(self.neighbours.squared_l2), weights.temperature)
            values = torch.from_numpy(self.neighbours.values)
            found = of_neighbour.sum(dim=1, keepdim=True) > 0
            out["knn"] = torch.where(found, neighbour_distribution(of_neighbour, values, lm.shape[1]), lm)
        if self.ric is not None:
            out["ric"] = self.ric.double().exp()
        return interpolate({name: out[name] for name in weights.by_method}, weights.by_method)


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
    ) -> None:
        self.model = model
        self.neighbours = neighbours
        self.blocks = blocks

    @property
    def methods(self) -> list[str]:
        """``lm``, and ``knn`` and ``ric`` if their sources are there."""
        return ["lm", *(["knn"] if self.neighbours is not None else []), *(["ric"] if self.blocks is not None else [])]

    def parts(self, tokens: np.ndarray) -> Iterator[Parts]:
        """Read one document (n,), in order, each position once."""
        begin = 0
        for keys, lm in self.model.score(tokens):
            end = begin + len(lm)
            neighbours = self.neighbours.search(keys, NEIGHBOURS) if self.neighbours is not None else None
            ric: torch.Tensor | None = None
            blocks: list[Block | None] = [None] * len(lm)
            if self.blocks is not None:
                ric, blocks = self._read_with_blocks(tokens, begin, lm)
            yield Parts(begin, end, lm, neighbours, ric, blocks)
            begin = end

    def _read_with_blocks(
        self, tokens: np.ndarray, begin: int, lm: torch.Tensor
    ) -> tuple[torch.Tensor, list[Block | None]]:
        """Retrieve in context: look up a block every :data:`RIC_STRIDE` positions and read on with it in front."""
        context = self.model.key_spec.context
        stride = min(RIC_STRIDE, context - context // 2)  # A short context has no room for more beside a block.
        starts = range(begin, begin + len(lm), stride)
        segments = [(start, min(start + stride, begin + len(lm))) for start in starts]
        queries = [self._query(tokens, start) for start, _ in segments]
        found = [hits[0] if hits else None for hits in self.blocks.search(queries, 1)]  # type: ignore[union-attr]
        ric = lm.clone()
        batches: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = defaultdict(list)
        inputs = self.model.inputs(tokens)
        for (start, end), block in zip(segments, found, strict=True):
            if block is not None:
                sequence = self._with_block(inputs, block, end)
                batches[len(sequence), end - start].append((start - begin, sequence))
        for (_, keep), batch in batches.items():
            scores = self.model.log_probabilities(torch.stack([sequence for _, sequence in batch]), keep)
            for (at, _), score in zip(batch, scores, strict=True):
                ric[at : at + keep] = score
        return ric, [block for (start, end), block in zip(segments, found, strict=True) for _ in range(start, end)]

    def _query(self, tokens: np.ndarray, start: int) -> str:
        return str(self.model.tokenizer.decode(tokens[max(0, start - QUERY_TOKENS) : start].tolist()))

    def _with_block(self, inputs: torch.Tensor, block: Block, end: int) -> torch.Tensor:
        """Start token, block (at most half of the model's context), then as much of the text as there is room for."""
        context = self.model.key_spec.context
        head = torch.cat(
            [torch.tensor([self.model.start_token]), torch.from_numpy(block.tokens[: max(0, context // 2 - 1)])]
        )
        return torch.cat([head, inputs[max(0, end - context + len(head)) : end]])

    def attribute(self, parts: Parts, index: int, token: int, weights: Weights) -> list[Share]:
        """Split p(token) at one position exactly into the model's share and one a document and method, largest first.

        The shares sum to the mixture's probability; where a source found nothing, its weight is the model's.
        """
        targets = torch.full((parts.end - parts.begin,), token)
        given = {name: p[index].item() for name, p in parts.probabilities(targets, weights.temperature).items()}
        shares: dict[tuple[str, SourceDocument | None], float] = defaultdict(float)
        for method, weight in weights.by_method.items():
            block = parts.blocks[index]
            if method == "knn" and parts.neighbours is not None and (parts.neighbours.documents[index] >= 0).any():
                for document, part in neighbour_shares(parts.neighbours, index, token, weights.temperature).items():
                    shares["knn", self.neighbours.document(document)] += weight * part  # type: ignore[union-attr]
            elif method == "ric" and block is not None:
                shares["ric", block.document] += weight * given["ric"]
            else:
                shares["lm", None] += weight * given[method]
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        return [Share(probability, method, document) for (method, document), probability in ordered]


def neighbour_shares(neighbours: Neighbours, index: int, token: int, temperature: float) -> dict[int, float]:
    """What each document's neighbours give to one token at one position, by the document's index."""
    weights = neighbour_weights(torch.from_numpy(neighbours.squared_l2[index : index + 1]), temperature)[0].tolist()
    shares: dict[int, float] = defaultdict(float)
    for weight, value, document in zip(weights, neighbours.values[index], neighbours.documents[index], strict=True):
        if value == token and document >= 0:
            shares[int(document)] += weight
    return shares
