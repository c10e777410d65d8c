"""How probable a language model alone finds given tokens, as fast as the model goes.

A harness that takes logits of every position, normalises them and looks for the best token writes the vocabulary's
width three times a token, pads what it batches to the longest, and multiplies by the library that torch prefers. Here
windows of all texts are batched by their length, positions that are not scored have no logits, the others' stay in the
processor's cache, and oneDNN multiplies where it is the faster library (:mod:`silo.products`).

Batches depend on the lengths of all texts, so a text's last bits may depend on which others are scored with it. The
same texts give the same bits. A store's keys need more than that (law 3) and do not come from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from eval.protocols import Protocol, Reading
from silo.language_model import has_plain_head
from silo.products import linear
from silo.windows import Window

TOKENS_PER_BATCH = 1024
"""Inputs a batch. Larger ones fall out of the processor's cache and are slower."""
LENGTH_UNIT = 16
"""Windows are filled up to a multiple of this, since oneDNN makes a program for every new shape."""
VOCABULARY_BLOCK = 4096
"""Logits of so many tokens are made at once."""

Progress = Callable[[int, int], None]


class _Placed(NamedTuple):
    reading: int
    window: Window


class Scorer:
    """Scores tokens by a causal language model of transformers."""

    def __init__(self, model: Any, start_token: int) -> None:
        """Take a model of transformers, in evaluation mode.

        Args:
            model: its logits need not be normalised.
            start_token: what stands before the first token of a reading.
        """
        self.model = model.eval()
        self.start_token = start_token
        self.plain_head = has_plain_head(model)

    def score(
        self, texts: Sequence[np.ndarray], protocol: Protocol, *, progress: Progress | None = None
    ) -> list[np.ndarray]:
        """log p of each token of some texts, each (n,), as (n,) float64 in nats."""
        readings = protocol.readings(texts)
        scored = self.score_readings(readings, progress=progress)
        return [
            part
            for reading, whole in zip(readings, scored, strict=True)
            for part in np.split(whole, np.cumsum(reading.lengths)[:-1])
        ]

    @torch.inference_mode()
    def score_readings(self, readings: Sequence[Reading], *, progress: Progress | None = None) -> list[np.ndarray]:
        """The same for readings that are cut already."""
        out = [np.full(len(reading.tokens), np.nan) for reading in readings]
        tokens = [reading.tokens.astype(np.int64) for reading in readings]
        inputs = [np.concatenate([[self.start_token], ids[:-1]]) for ids in tokens]
        placed = [_Placed(number, window) for number, reading in enumerate(readings) for window in reading.windows]
        total, done = sum(map(len, out)), 0
        with onednn_products(self.model):
            for batch in _batches(placed):
                kept = [slice(window.first, window.end) for _, window in batch]
                rows = np.zeros((len(batch), _filled(batch[0])), dtype=np.int64)
                for row, (number, window) in zip(rows, batch, strict=True):
                    row[: window.end - window.begin] = inputs[number][window.begin : window.end]
                targets = [tokens[number][keep] for (number, _), keep in zip(batch, kept, strict=True)]
                scored = self._score_batch(rows, batch, np.concatenate(targets))
                for (number, _), keep, part in zip(batch, kept, _split(scored, targets), strict=True):
                    out[number][keep] = part
                done += len(scored)
                if progress:
                    progress(done, total)
        return out

    def _score_batch(self, rows: np.ndarray, batch: Sequence[_Placed], targets: np.ndarray) -> np.ndarray:
        """log p of targets (kept positions of all windows,) after inputs (windows, time)."""
        ids = torch.from_numpy(rows)
        if self.plain_head:
            states = self.model.base_model(ids, use_cache=False)[0]
            blocks = self.model.get_output_embeddings().weight.split(VOCABULARY_BLOCK)
        else:
            states = self.model(ids, use_cache=False).logits
            blocks = [None]
        keep = [slice(window.first - window.begin, window.end - window.begin) for _, window in batch]
        kept = torch.cat([row[each] for row, each in zip(states, keep, strict=True)]).float()
        return log_probability(kept, blocks, torch.from_numpy(targets)).numpy()


def log_probability(states: torch.Tensor, blocks: Sequence[torch.Tensor | None], targets: torch.Tensor) -> torch.Tensor:
    """log p of one token a row, without a distribution ever being written.

    Args:
        states: (n, hidden) states before the head, or (n, vocabulary) logits.
        blocks: the head's weight (vocabulary, hidden) in pieces, or one None if ``states`` are logits.
        targets: (n,) tokens.

    Returns:
        (n,) float64, in nats.
    """
    normaliser = torch.full((len(states),), -torch.inf, dtype=torch.float64)
    chosen = torch.zeros(len(states), dtype=torch.float64)
    begin = 0
    for block in blocks:
        logits = states if block is None else linear(states, block)
        normaliser = torch.logaddexp(normaliser, torch.logsumexp(logits, dim=1).double())
        here = torch.nonzero((targets >= begin) & (targets < begin + logits.shape[1])).squeeze(1)
        chosen[here] = logits[here, targets[here] - begin].double()
        begin += logits.shape[1]
    return chosen - normaliser


class _SharedLinear(nn.Module):
    """A linear layer with another's parameters, multiplied by :func:`silo.products.linear`."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = other.weight, other.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = linear(x, self.weight)
        return out if self.bias is None else out + self.bias


@contextlib.contextmanager
def onednn_products(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers multiply as ours do, while the context lasts; afterwards it is what it was."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    try:
        for parent, name, child in found:
            setattr(parent, name, _SharedLinear(child))
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def _batches(placed: Sequence[_Placed]) -> Iterator[list[_Placed]]:
    """Windows of about one length together, the longest first, as many as fit."""
    order = sorted(placed, key=lambda each: -_filled(each))
    at = 0
    while at < len(order):
        count = max(1, TOKENS_PER_BATCH // _filled(order[at]))
        yield order[at : at + count]
        at += count


def _filled(placed: _Placed) -> int:
    """Inputs of a window, with those that fill it up."""
    return -(-(placed.window.end - placed.window.begin) // LENGTH_UNIT) * LENGTH_UNIT


def _split(scored: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(scored, np.cumsum([len(each) for each in like])[:-1])
