"""A mixture read token by token: what it needs to remember of a text so that one more token costs one step.

The model keeps its keys and values, as transformers has it; retrieval in context those of its readings with blocks and
the blocks of its stride; the ∞-gram the length of its last match, since a context's longest known suffix is at most one
token longer than that of the context before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache

from silo.in_context import BlockReading, FoundBlocks, Readings, copy_states, find_blocks, read_blocks
from silo.mixture import Mixture, Parts
from silo.nearest import Asked
from silo.past import Past
from silo.readings import ModelReading, NgramReading

CHUNK = 64
"""Positions that are mixed at a time, since a distribution over the vocabulary is large."""


@dataclass
class Row:
    """One text as it is read on."""

    inputs: np.ndarray
    """(n,) int64: what the model is given, with the start token if there is one."""
    started: bool
    """Whether the first input is the start token, which is no token of the text."""
    begin: int = 0
    """Where the inputs begin that the model sees."""
    suffix: int | None = None
    """How long the ∞-gram's match of the last context was; None before any."""
    found: FoundBlocks | None = None
    """The blocks of the stride that was read last."""
    readings: Readings = field(default_factory=Readings)
    past: Past = field(default_factory=Past)
    """How well the methods have foretold it."""

    @property
    def tokens(self) -> np.ndarray:
        """The text, (n,) int64."""
        return self.inputs[1:] if self.started else self.inputs

    def position(self, index: int) -> int:
        """The position that is predicted after an input: how many tokens of the text stand before it."""
        return index if self.started else index + 1

    def copy(self) -> Row:
        """The same, to be read on in another way."""
        return replace(self, readings=self.readings.copy(), past=self.past.copy())

    def cut(self, length: int) -> None:
        """Forget all inputs but the first ``length``, and what hangs on the others."""
        self.inputs, self.begin = self.inputs[:length], 0
        self.suffix, self.found, self.readings = None, None, Readings()
        self.past = self.past.cut(self.position(length - 1))


class MixtureCache(DynamicCache):
    """What a mixture remembers of the texts of a batch; ``past_key_values`` in transformers' words."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.states: Cache | None = None
        """The model's own, or None where all has to be read again."""
        self.mask = torch.zeros(0, 0, dtype=torch.int64)
        """(batch, inputs that the states hold), 0 for padding."""
        self.width = 0
        """Inputs so far with their padding."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Inputs so far, with padding."""
        return self.width

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some texts, given by their (n,) numbers, any of them more than once."""
        taken: set[int] = set()
        rows = []
        for number in indices.tolist():
            rows.append(self.rows[number].copy() if number in taken else self.rows[number])
            taken.add(number)
        self.rows, self.mask = rows, self.mask[indices]
        if self.states is not None:
            self.states = copy_states(self.states)
            self.states.batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """The same, as beam search calls it."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each text so many times in a row."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last inputs, as many as a negative number says; all but as many as a positive one says, which is
        how earlier versions of transformers ask. Reading on from there costs a reading of all."""
        left = min(tokens_to_remove, self.width) if tokens_to_remove > 0 else max(0, self.width + tokens_to_remove)
        if left == self.width:
            return
        for row in self.rows:
            row.cut(len(row.inputs) - (self.width - left))
        self.states, self.width = None, left
        if not left:  # as new: what comes next begins the texts
            self.rows = []


class Reader:
    """Reads texts by a mixture, all at once or token by token.

    Where a text is longer than the model's context, the model sees a window of it: read at once the windows of
    :mod:`silo.windows`, as when a document is scored; token by token, a window that is full is followed by one that
    begins with its last quarter.
    """

    def __init__(self, mixture: Mixture, history: int = 0) -> None:
        """``history`` is that of the weighing (:attr:`silo.weights.Weighing.history`): so many inputs more are read
        with all methods, unless they have been."""
        self.mixture = mixture
        self.model = mixture.model
        self.history = history

    def read(self, row: Row, first: int = 0) -> Iterator[Parts]:
        """Read a text at once; give what is said after each input from number ``first`` on."""
        at = max(0, first - self.history)
        for keys, logits in self.model.read(torch.from_numpy(row.inputs), at):
            yield from self._parts(row, at, keys, logits, first)
            at += len(keys)

    def start(self, cache: MixtureCache, keep: int) -> list[Iterator[Parts]]:
        """Read the texts of a new batch; for each, give what is said after its last ``keep`` inputs, or after all."""
        context = self.model.key_spec.context
        if max(len(row.inputs) for row in cache.rows) <= context:
            return self._mixed(cache, *self._read_anew(cache, keep + self.history), keep)
        for row in cache.rows:
            row.begin = max(0, len(row.inputs) - context)
        return [self.read(row, max(0, len(row.inputs) - keep)) for row in cache.rows]

    def read_on(self, cache: MixtureCache, inputs: torch.Tensor, keep: int) -> list[Iterator[Parts]]:
        """Read some more inputs (batch, n); for each text give what is said after the last ``keep`` of them."""
        spec = self.model.key_spec
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        before = max(0 if row.past.end is None else row.position(len(row.inputs)) - row.past.end for row in cache.rows)
        for piece in inputs.split(spec.stride, dim=1):
            for row, more in zip(cache.rows, piece, strict=True):
                row.inputs = np.concatenate([row.inputs, more.numpy()])
                if len(row.inputs) - row.begin > spec.context:
                    row.begin = len(row.inputs) - piece.shape[1] - (spec.context - spec.stride)
                    cache.states = None
            cache.width += piece.shape[1]
            if cache.states is None:
                found.append(self._read_anew(cache, piece.shape[1] + (0 if found else before)))  # after a cut, one more
            else:
                cache.mask = torch.cat([cache.mask, torch.ones_like(piece)], dim=1)
                found.append(self.model.read_on(piece, cache.states, cache.mask, piece.shape[1]))
        keys, logits = (torch.cat(each, dim=1)[:, -(keep + self.history) :] for each in zip(*found, strict=True))
        return self._mixed(cache, keys, logits, keep)

    def _read_anew(self, cache: MixtureCache, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and logits of the last inputs (batch, keep, …) of windows that the model has no states of."""
        windows = [torch.from_numpy(row.inputs[row.begin :]) for row in cache.rows]
        longest = max(map(len, windows))
        batch, cache.mask = torch.zeros(2, len(windows), longest, dtype=torch.int64).unbind()
        for number, window in enumerate(windows):
            batch[number, longest - len(window) :] = window
            cache.mask[number, longest - len(window) :] = 1
        cache.states = self.model.states()
        return self.model.read_on(batch, cache.states, cache.mask, min(keep, longest))

    def _mixed(self, cache: MixtureCache, keys: torch.Tensor, logits: torch.Tensor, keep: int) -> list[Iterator[Parts]]:
        """What is said after the last ``keep`` inputs of each text, where there are keys and logits (batch, n, …) of
        those and of some before."""
        found = []
        for row, of_keys, of_logits in zip(cache.rows, keys, logits, strict=True):
            count = min(len(of_keys), len(row.inputs))
            at, first = len(row.inputs) - count, max(0, len(row.inputs) - keep)
            found.append(self._parts(row, at, of_keys[-count:].numpy(), of_logits[-count:], first))
        return found

    def _parts(self, row: Row, at: int, keys: np.ndarray, logits: torch.Tensor, first: int) -> Iterator[Parts]:
        """What is said after the inputs in a row from number ``first`` on, where there are keys and logits (n, …) of
        those from number ``at`` on; what comes before is for the past alone."""
        cuts = [*range(at, min(first, at + len(keys)), CHUNK), *range(max(at, first), at + len(keys), CHUNK)]
        spans = list(itertools.pairwise([*cuts, at + len(keys)]))
        pieces = [
            self._asked(row, start, keys[start - at : stop - at], logits[start - at : stop - at])
            for start, stop in spans
        ]
        for (start, _), asked, knn in zip(spans, pieces, self.mixture.read_neighbours(pieces), strict=True):
            begin = row.position(start)
            end = begin + len(asked.keys)
            parts = Parts(begin, end, asked.lm(), knn, self._blocks(row, begin, end), asked.ngram)
            if self.history:
                parts = row.past.join(parts, row.tokens)
            if start >= first:
                yield parts

    def _asked(self, row: Row, start: int, keys: np.ndarray, logits: torch.Tensor) -> Asked:
        """What is known of the positions after the inputs from number ``start`` on before their neighbours are."""
        begin = row.position(start)
        end = begin + len(keys)
        tokens = np.append(row.tokens[begin : end - 1], 0)  # the last may not be there yet
        lm = ModelReading.of(logits)
        return Asked(keys, tokens, lambda: lm, self._ngrams(row, begin, end))

    def _ngrams(self, row: Row, begin: int, end: int) -> NgramReading | None:
        """Match the contexts of some positions, which come after those that were matched before."""
        source = self.mixture.ngrams
        if source is None:
            return None
        start = 0 if row.suffix is None else max(0, begin - 1 - row.suffix)
        matches = source.match([row.tokens[start : end - 1]])
        contexts = np.arange(begin - start, end - start)
        row.suffix = int(matches.lengths[contexts[-1]])
        own = torch.from_numpy(np.append(row.tokens[begin : end - 1], -1).astype(np.int64))  # the last was not matched
        return NgramReading(matches, source, contexts, own)

    def _blocks(self, row: Row, begin: int, end: int) -> BlockReading | None:
        """Read some positions with blocks, which are looked up where a stride begins."""
        source = self.mixture.blocks
        if source is None:
            return None
        tokens = np.append(row.tokens[: end - 1], 0)  # the last is predicted
        found = row.found
        if found is not None and found.starts[0] <= begin and end <= found.starts[0] + found.layout.stride:
            found = replace(found, begin=begin, end=end)
        else:
            found = find_blocks(self.model, source, tokens, begin, end, self.mixture.in_context)
        reading = read_blocks(self.model, tokens, found, readings=row.readings)
        row.found = found.last_stride()
        return reading
