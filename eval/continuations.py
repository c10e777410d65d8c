"""How probable mixtures find a text after another: what zero-shot tasks are scored by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from silo.errors import UsageError
from silo.mixture import Mixture
from silo.streaming import Reader, Row
from silo.weights import Weighing

Progress = Callable[[int, int], None]


class Pair(NamedTuple):
    """Tokens to be scored, and those before them; the start token stands before both and is in neither."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scored(NamedTuple):
    """What one mixture says of a continuation."""

    log_probability: float
    """Summed over its tokens, in nats; 0 of no token."""
    greedy: bool
    """Whether each of its tokens is the likeliest after those before it."""


def score_pairs(
    mixture: Mixture,
    weighings: Mapping[str, Weighing],
    pairs: Sequence[Pair],
    *,
    progress: Progress | None = None,
) -> list[dict[str, Scored]]:
    """Score continuations by several weighings of one mixture, each as a document that begins with its context.

    Continuations that differ in their last token only, such as the letters of options, are read once; so is a pair
    that is asked for twice. A text longer than the model's context is read in the windows in which documents are.

    Args:
        mixture: with every method that is weighed.
        weighings: by name.
        pairs: in any order.
        progress: is told how many readings are done, and how many there are.

    Returns:
        For each pair, by the name of the weighing.

    Raises:
        UsageError: something is weighed that the mixture lacks.
    """
    for name, weighing in weighings.items():
        missing = sorted(set(weighing.methods) - set(mixture.methods))
        if missing:
            raise UsageError(f"{name!r} weighs {', '.join(missing)}, which the mixture lacks; open a store, and use it")
    read: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    found: list[dict[str, Scored]] = [dict.fromkeys(weighings, Scored(0.0, True)) for _ in pairs]
    for number, (context, continuation) in enumerate(pairs):
        if continuation:
            read[context + continuation[:-1], len(context)].append(number)
    reader = Reader(mixture, max(weighing.history for weighing in weighings.values()))
    for done, ((tokens, first), numbers) in enumerate(read.items(), start=1):
        asked = torch.tensor([pairs[number].continuation for number in numbers])
        row = Row(np.asarray([mixture.model.start_token, *tokens], dtype=np.int64), started=True)
        for name, scored in _score(reader, row, first, asked, weighings).items():
            for number, each in zip(numbers, scored, strict=True):
                found[number][name] = each
        if progress:
            progress(done, len(read))
    return found


@torch.inference_mode()
def _score(
    reader: Reader, row: Row, first: int, asked: torch.Tensor, weighings: Mapping[str, Weighing]
) -> dict[str, list[Scored]]:
    """Score continuations (some, tokens) that follow the first inputs of one reading."""
    sums = {name: torch.zeros(len(asked), dtype=torch.float64) for name in weighings}
    greedy = {name: torch.ones(len(asked), dtype=torch.bool) for name in weighings}
    for parts in reader.read(row, first):
        own = asked[:, parts.begin - first : parts.end - first]
        for name, weighing in weighings.items():
            given = parts.distribution(weighing)
            sums[name] += given.expand(len(own), -1, -1).gather(2, own.unsqueeze(2)).clamp_min(1e-300).log().sum((1, 2))
            greedy[name] &= (given.argmax(dim=1) == own).all(dim=1)
    return {
        name: [Scored(float(value), bool(best)) for value, best in zip(sums[name], greedy[name], strict=True)]
        for name in weighings
    }
