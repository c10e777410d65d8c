"""Retrieval in context: the model reads on with retrieved blocks before the text (In-Context RALM, Ram 2023,
https://arxiv.org/abs/2302.00083), one at a time and averaged (REPLUG, Shi 2023, https://arxiv.org/abs/2301.12652) or
all at once.

Every ``stride`` positions the last ``query_tokens`` tokens are looked up. So that a position's distribution does not
hang on how the work is split, all places are counted from the start of the document: text is read in windows of at
most ``text_tokens`` inputs that advance by three quarters of it, and a window is read once for each block that any of
its strides found. A position sees a block, then its window's text up to itself; nothing after it, not even where the
document ends, changes what is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache

from silo.errors import UsageError
from silo.language_model import LanguageModel
from silo.readings import Without
from silo.retrieval import Block, BlockSource, SourceDocument

CANDIDATES = 3
"""For each block that is wanted so many are looked up, since blocks that overlap a better one are passed over."""
COMBINATIONS = ("ensemble", "concatenate")


@dataclass(frozen=True)
class InContext:
    """How blocks are looked up and read."""

    query_tokens: int = 32
    """A block is looked up by so many tokens before the position."""
    stride: int = 64
    """Positions that share one look-up, half of the text that is read at most. In-Context RALM's was 4; SILO had one
    look-up a window."""
    blocks: int = 2
    """Blocks a look-up, none of which overlaps another. Two were much better than one, measured, four little more."""
    combine: Literal["ensemble", "concatenate"] = "ensemble"
    """Read each block apart and average what the model says, or read all of them in a row, the best nearest to the
    text."""
    block_tokens: int = 128
    """A block goes so far from where it begins, at most; and all that are read at once take half the model's context
    at most."""
    text_tokens: int | None = None
    """Inputs of the text that are read with a block, at most; None for as many as the context has room for."""
    temperature: float = 8.0
    """Blocks weigh softmax(BM25 score / temperature). At 1 the best nearly stands alone, which was worse, measured, and
    so was it to let the model choose or weigh them by how well they explain the last tokens before the position."""
    min_score_per_word: float = 0.0
    """Blocks are read where the best one's BM25 score by the different words of the query is at least this. Most of
    what blocks are good for, measured, they are where it is high, and reading is what costs."""

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("query_tokens", "stride", "blocks", "block_tokens")}
        for name, value in {**counts, "text_tokens": 1 if self.text_tokens is None else self.text_tokens}.items():
            if value < 1:
                raise UsageError(f"retrieval in context with {name} = {value}; expected at least 1")
        if self.combine not in COMBINATIONS:
            raise UsageError(f"blocks combined by {self.combine!r}; expected one of {', '.join(COMBINATIONS)}")
        if not self.temperature > 0:
            raise UsageError(f"retrieval in context with temperature = {self.temperature}; expected more than 0")
        if not self.min_score_per_word >= 0:
            raise UsageError(
                f"retrieval in context with min_score_per_word = {self.min_score_per_word}; expected 0 or more"
            )


class Layout(NamedTuple):
    """Where the windows and strides of any text lie, which the settings and the model's context decide."""

    at_once: int
    """Blocks that are read in a row."""
    block: int
    """Tokens of each, at most."""
    stride: int
    text: int
    """Inputs of a window, a multiple of the stride."""
    hop: int
    """Inputs by which windows advance, a multiple of the stride."""

    @classmethod
    def of(cls, settings: InContext, context: int) -> Layout:
        """Fit settings into a context. Raises :class:`UsageError` if it has no room for a block beside a text."""
        if context < 4:
            raise UsageError(f"the model reads {context} tokens at once; retrieval in context takes at least 4")
        half = context // 2 - 1  # The other half of the context, and the start token, are not for blocks.
        at_once = min(settings.blocks, half) if settings.combine == "concatenate" else 1
        block = min(settings.block_tokens, half // at_once)
        room = context - 1 - at_once * block
        text = min(room, settings.text_tokens or room)
        stride = min(settings.stride, max(1, text // 2))
        strides = text // stride
        return cls(at_once, block, stride, strides * stride, max(1, strides * 3 // 4) * stride)

    def window(self, start: int) -> int:
        """Where the window begins in which the stride from ``start`` on is read."""
        return max(0, -(-(start + self.stride - self.text) // self.hop) * self.hop)


@dataclass(frozen=True)
class FoundBlocks:
    """The blocks for the strides that cover the positions ``begin`` to ``end`` of one document."""

    begin: int
    end: int
    settings: InContext
    layout: Layout
    starts: list[int]
    """Where each stride begins; the first may begin before ``begin``."""
    blocks: list[list[Block]]
    """Best first, none overlapping another; empty where nothing was found, or nothing good enough."""
    of_stride: dict[str, np.ndarray]
    """What tells of each look-up how good it is, (strides,) float64."""

    @property
    def stride_of(self) -> np.ndarray:
        """The stride of each position, (n,) int64."""
        return np.arange(self.begin, self.end) // self.layout.stride - self.begin // self.layout.stride

    def last_stride(self) -> FoundBlocks:
        """The last stride's alone, with those of its positions that are covered."""
        begin = max(self.begin, self.starts[-1])
        of_stride = {name: values[-1:] for name, values in self.of_stride.items()}
        return replace(self, begin=begin, starts=self.starts[-1:], blocks=self.blocks[-1:], of_stride=of_stride)

    def evidence(self) -> dict[str, np.ndarray]:
        """What tells how good a look-up is, known before any block is read; zero where no block matched.

        Returns:
            For each position (n,) float64: ``score``, the best block's BM25 score; ``score_per_word``, the same by the
            different words of the query; ``gap``, by which part of the best score the second best is lower, from 0 to
            1; ``overlap``, the part of the query's different tokens that the best block has.
        """
        return {name: values[self.stride_of] for name, values in self.of_stride.items()}


@dataclass(frozen=True)
class BlockReading:
    """What the model says of some positions of one document with blocks before their context."""

    found: np.ndarray
    """(n,) bool: where a block was read."""
    blocks: list[list[Block]]
    """Those read at each position, (n,)."""
    weights: torch.Tensor
    """(n, blocks) float64, summing to 1 where a block was read, else zero."""
    rows: torch.Tensor
    """(n, blocks) int64, for each block its row of ``log_probabilities``; blocks that are read at once share one."""
    log_probabilities: torch.Tensor
    """(rows, vocabulary) float32."""
    features: dict[str, np.ndarray]

    @property
    def left(self) -> torch.Tensor:
        """(n,) float64: what is left to the model, which is all or nothing."""
        return torch.from_numpy(~self.found).double()

    def probability(self, targets: torch.Tensor) -> torch.Tensor:
        """What the blocks give to one token a position: targets (n,) → (n,) float64, zero where none was read."""
        return (self.weights * self._of_blocks(targets)).sum(dim=1)

    def distribution(self) -> torch.Tensor:
        """The same for every token, (n, vocabulary) float64."""
        out = torch.zeros(len(self.found), self.log_probabilities.shape[1], dtype=torch.float64)
        for weights, rows in zip(self.weights.T, self.rows.T, strict=True):
            there = weights > 0
            out[there] += weights[there].unsqueeze(1) * self.log_probabilities[rows[there]].double().exp()
        return out

    def shares(self, index: int, token: int) -> list[tuple[float, SourceDocument]]:
        """Split one token's probability at one position among the blocks' documents, best block first.

        A block of an ensemble has what it adds to the sum. Blocks that are read at once share by their weights, since
        what the model took from which of them cannot be told from one reading. A document comes once a block.
        """
        given = self.weights[index] * self._of_blocks(torch.full((len(self.found),), token))[index]
        return [(part, block.document) for part, block in zip(given.tolist(), self.blocks[index], strict=False)]

    def without(self, index: int, token: int) -> Without:
        """What the others' blocks give to one token at one position, weighed among themselves. Blocks that were read at
        once say what they said, since what the model had said without one cannot be told."""
        given = self._of_blocks(torch.full((len(self.found),), token))[index]
        own = [block.document for block in self.blocks[index]]
        found: Without = {}
        for document in dict.fromkeys(own):
            others = [number for number, each in enumerate(own) if each != document]
            rest = float(self.weights[index][others].sum())
            given_by_others = float((self.weights[index] * given)[others].sum())
            found[document] = (given_by_others / rest, 0.0) if rest else (0.0, 1.0)
        return found

    def evidence(self) -> dict[str, np.ndarray]:
        """As :meth:`FoundBlocks.evidence`."""
        return self.features

    def _of_blocks(self, targets: torch.Tensor) -> torch.Tensor:
        """What each block gives to one token a position, (n, blocks) float64."""
        if not len(self.log_probabilities):
            return torch.zeros(self.weights.shape, dtype=torch.float64)
        return self.log_probabilities[self.rows, targets.unsqueeze(1)].double().exp()


def read_in_context(
    model: LanguageModel,
    source: BlockSource,
    tokens: np.ndarray,
    begin: int,
    end: int,
    settings: InContext,
    *,
    exclude: str | None = None,
) -> BlockReading:
    """Look up blocks for the positions ``begin`` to ``end`` of a document's tokens (n,), and read on with them.

    ``exclude`` is the id of a document whose blocks are passed over: the one that is read, if the store has it.
    Memory is that of (positions, blocks, vocabulary) float32.
    """
    return read_blocks(model, tokens, find_blocks(model, source, tokens, begin, end, settings, exclude=exclude))


def find_blocks(
    model: LanguageModel,
    source: BlockSource,
    tokens: np.ndarray,
    begin: int,
    end: int,
    settings: InContext,
    *,
    exclude: str | None = None,
) -> FoundBlocks:
    """The first half of :func:`read_in_context`, which costs no reading."""
    layout = Layout.of(settings, model.key_spec.context)
    starts = list(range(begin // layout.stride * layout.stride, end, layout.stride))
    asked = [tokens[max(0, start - settings.query_tokens) : start] for start in starts]
    queries = [str(model.tokenizer.decode(each.tolist())) for each in asked]
    wanted = settings.blocks if settings.combine == "ensemble" else layout.at_once
    depth = max(2, wanted * CANDIDATES) if wanted > 1 else 2 * CANDIDATES
    hits = source.search(queries, depth, tokens=layout.block, exclude=exclude)
    apart = [without_overlaps(each) for each in hits]
    features = [_features(*each) for each in zip(queries, asked, apart, strict=True)]
    of_stride = {name: np.asarray([each[name] for each in features]) for name in _features("", tokens[:0], [])}
    enough = of_stride["score_per_word"] >= settings.min_score_per_word
    blocks = [each[:wanted] if good else [] for each, good in zip(apart, enough, strict=True)]
    return FoundBlocks(begin, end, settings, layout, starts, blocks, of_stride)


def without_overlaps(blocks: list[Block]) -> list[Block]:
    """Blocks, best first, without those that share a token with a better one."""
    kept: list[Block] = []
    for block in blocks:
        if not any(
            block.document.id == other.document.id
            and block.start < other.start + len(other.tokens)
            and other.start < block.start + len(block.tokens)
            for other in kept
        ):
            kept.append(block)
    return kept


def _features(query: str, tokens: np.ndarray, blocks: list[Block]) -> dict[str, float]:
    """The evidence of one look-up, see :meth:`FoundBlocks.evidence`."""
    if not blocks:
        return {"score": 0.0, "score_per_word": 0.0, "gap": 0.0, "overlap": 0.0}
    best = blocks[0]
    second = blocks[1].score if len(blocks) > 1 else 0.0
    return {
        "score": best.score,
        "score_per_word": best.score / max(1, len(set(re.findall(r"\w+", query.lower())))),
        "gap": (best.score - second) / best.score if best.score > 0 else 0.0,
        "overlap": float(np.isin(np.unique(tokens), best.tokens).mean()) if len(tokens) else 0.0,
    }


@dataclass(frozen=True)
class _Pass:
    """One reading of a window's text after one block, or after several in a row."""

    name: object
    """Equal for readings that begin alike."""

    window: int
    blocks: list[Block]
    """Best first."""
    strides: list[int]
    """The strides, by number, that want it."""
    slots: list[list[int]]
    """Where among the blocks of each of them those of this reading stand."""


def _passes(found: FoundBlocks, blocks: list[list[Block]]) -> list[_Pass]:
    """The readings that the strides' blocks take, each once however many strides share it."""
    passes: dict[object, _Pass] = {}
    for number, (start, row) in enumerate(zip(found.starts, blocks, strict=True)):
        window = found.layout.window(start)
        together = found.settings.combine == "concatenate"
        for slots in [list(range(len(row)))] if together else [[slot] for slot in range(len(row))]:
            if slots:
                read = [row[slot] for slot in slots]
                name = window, *((block.document.id, block.start) for block in read)
                each = passes.setdefault(name, _Pass(name, window, read, [], []))
                each.strides.append(number)
                each.slots.append(slots)
    return list(passes.values())


class Readings:
    """What the model keeps of a text that it reads on with blocks, so that a further position costs one step."""

    def __init__(self, of: Mapping[object, tuple[Cache, int]] | None = None) -> None:
        self._of = dict(of or {})

    def take(self, each: _Pass, first: int, model: LanguageModel) -> tuple[Cache, int]:
        """The states of a pass and how many inputs of the text they hold, at most ``first``; none if it is new."""
        states, done = self._of.pop(each.name, (None, 0))
        return (model.states(), each.window) if states is None or done > first else (states, done)

    def keep(self, each: _Pass, states: Cache, done: int) -> None:
        """Remember a pass that may be read on."""
        self._of[each.name] = states, done

    def copy(self) -> Readings:
        """The same, to be read on in another way. Tensors are shared: states are made longer by new ones."""
        return Readings({name: (copy_states(states), done) for name, (states, done) in self._of.items()})

    def retain(self, passes: Iterable[_Pass]) -> None:
        """Forget all others."""
        names = {each.name for each in passes}
        self._of = {name: value for name, value in self._of.items() if name in names}


def copy_states(states: Cache) -> Cache:
    """A copy of a model's states that grows apart from them."""
    made = copy.copy(states)
    made.layers = [copy.copy(layer) for layer in states.layers]
    return made


@torch.inference_mode()
def read_blocks(
    model: LanguageModel,
    tokens: np.ndarray,
    found: FoundBlocks,
    where: np.ndarray | None = None,
    *,
    readings: Readings | None = None,
) -> BlockReading:
    """The second half of :func:`read_in_context`.

    ``where`` (n,) bool says at which positions blocks are of use; strides without any are not read, and have no block.
    ``readings`` of the positions before these are read on.
    """
    stride_of = found.stride_of
    wanted = np.ones(len(stride_of), dtype=bool) if where is None else where
    used = np.bincount(stride_of, wanted, minlength=len(found.starts)) > 0
    blocks = [each if use else [] for each, use in zip(found.blocks, used, strict=True)]
    most = max([1, *map(len, blocks)])
    rows = torch.zeros(len(stride_of), most, dtype=torch.int64)
    read, count = [torch.empty(0, model.vocab_size)], 0
    inputs = model.inputs(tokens)
    passes = _passes(found, blocks)
    for each in passes:
        at = [np.flatnonzero(stride_of == number) for number in each.strides]
        positions = np.concatenate(at) + found.begin
        for places, slots in zip(at, each.slots, strict=True):
            rows[places[:, None], slots] = (count + torch.arange(len(places))).unsqueeze(1)
            count += len(places)
        read.append(_read(model, inputs, each, positions, readings))
    if readings is not None:
        readings.retain(each for each in passes if len(found.starts) - 1 in each.strides)
    weights = torch.stack([_weights(each, most, found.settings.temperature) for each in blocks])
    of_position = [blocks[number] for number in stride_of.tolist()]
    there = np.asarray([len(each) > 0 for each in of_position], dtype=bool)
    return BlockReading(there, of_position, weights[stride_of], rows, torch.cat(read), found.evidence())


def _read(
    model: LanguageModel, inputs: torch.Tensor, each: _Pass, positions: np.ndarray, readings: Readings | None
) -> torch.Tensor:
    """Log-probabilities (positions, vocabulary) of a pass at some positions, ascending."""
    tokens = [model.start_token, *np.concatenate([block.tokens for block in reversed(each.blocks)]).tolist()]
    first, end = int(positions[0]), int(positions[-1]) + 1
    states, done = readings.take(each, first, model) if readings is not None else (None, each.window)
    sequence = inputs[done:end] if done > each.window else torch.cat([torch.tensor(tokens), inputs[done:end]])
    scores = model.log_probabilities(sequence.unsqueeze(0), end - first, states)[0]
    if readings is not None and states is not None:
        readings.keep(each, states, end)
    return scores if len(positions) == len(scores) else scores[torch.from_numpy(positions - first)]


def _weights(blocks: list[Block], most: int, temperature: float) -> torch.Tensor:
    """What each block weighs in an ensemble (most,) float64, the surplus zero."""
    weights = torch.zeros(most, dtype=torch.float64)
    scores = torch.tensor([block.score for block in blocks], dtype=torch.float64)
    weights[: len(blocks)] = torch.softmax(scores / temperature, dim=0)
    return weights
