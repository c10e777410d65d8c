"""Reliance: whether a model that reads a retrieved block takes its answer from there, or from its weights.

Attention is knocked out as in "From RAGs to rich parameters" (Wadhwa 2024, https://arxiv.org/abs/2406.12824): at one
position, the model reads the best block that BM25 finds, then the text, four times in one batch, each time with other
pairs of positions that cannot see each other, in every layer:

- ``all``: none;
- ``last``: the last position does not see the block, though what the text before it took from there remains;
- ``text``: no position of the text sees the block, so that all there is comes from the weights and the text;
- ``context``: the last position sees the block and itself, but not the text between.

What the probability of the token loses is what the path that was cut gave. Without retrieved text before it, the model
``alone`` is the measure beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from eval.metrics import bootstrap
from eval.perplexity import Text
from eval.studies.figure import Panel, Series, draw
from eval.studies.subject import Progress, Subject
from silo.errors import UsageError
from silo.in_context import FoundBlocks, InContext, find_blocks

CUTS = ("all", "last", "text", "context")
EVERY = 8
"""Of so many positions of a text with a block one is read."""
GROUPS = ("every token", "token in the block", "token not in the block")


class Place(NamedTuple):
    """One position that is read after a block."""

    inputs: torch.Tensor
    """(time,) int64: the start token, the block, the text up to the position."""
    block: int
    """Tokens of the block, which stand after the start token."""
    token: int
    """What comes there in truth."""
    known: bool
    """Whether the block has that token."""


def places(subject: Subject, text: Text, found: FoundBlocks) -> Iterator[tuple[int, Place]]:
    """The positions of a text that are read, with their numbers."""
    inputs = subject.model.inputs(text.tokens)
    for position in range(0, len(text.tokens), EVERY):
        stride = int(found.stride_of[position])
        if found.blocks[stride]:
            block = found.blocks[stride][0]
            window = found.layout.window(found.starts[stride])
            head = torch.tensor([subject.model.start_token, *block.tokens.tolist()])
            token = int(text.tokens[position])
            read = torch.cat([head, inputs[window : position + 1]])
            yield position, Place(read, len(block.tokens), token, token in block.tokens)


def masks(time: int, block: int) -> torch.Tensor:
    """What each position may see in each of :data:`CUTS`, (cuts, 1, time, time) bool."""
    causal = torch.ones(time, time, dtype=torch.bool).tril()
    seen = causal.expand(len(CUTS), time, time).clone()
    of_block, of_text = slice(1, 1 + block), slice(1 + block, time)
    seen[CUTS.index("last"), -1, of_block] = False
    seen[CUTS.index("text"), of_text, of_block] = False
    seen[CUTS.index("context"), -1, 1 + block : time - 1] = False
    return seen.unsqueeze(1)


@torch.inference_mode()
def read(subject: Subject, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the token in each of :data:`CUTS`, (cuts,) float64, and the likeliest token in each."""
    seen = masks(len(place.inputs), place.block)
    model: Any = subject.model.model
    refused = torch.finfo(torch.float32).min
    given = torch.zeros(seen.shape).masked_fill(~seen, refused)
    batch = place.inputs.expand(len(CUTS), -1)
    logits = model(batch, attention_mask=given, use_cache=False, logits_to_keep=1).logits[:, -1].double()
    return torch.log_softmax(logits, dim=1)[:, place.token], logits.argmax(dim=1)


def study(subject: Subject, progress: Progress | None = None) -> dict[str, Any]:
    """Read some positions of the test text after their best block, with attention cut in four ways.

    Returns:
        By group of tokens (all, in the block, not in the block): ``positions``; ``log_probability`` of the model
        alone and of each cut; ``lost``, by each cut against none, in nats, with its interval over documents; and
        ``changed``, the share of positions where another token becomes the likeliest.

    Raises:
        UsageError: BM25 finds no block for any position.
    """
    texts, blocks = subject.texts(subject.test), subject.store.select(deny=subject.left_out).blocks()
    rows, changed, owner, known = [], [], [], []
    for number, text in enumerate(texts):
        found = find_blocks(subject.model, blocks, text.tokens, 0, len(text.tokens), InContext())
        alone = torch.cat([scores for _, scores in subject.model.score(text.tokens)])
        for position, place in places(subject, text, found):
            logs, best = read(subject, place)
            rows.append([float(alone[position, place.token]), *logs.tolist()])
            changed.append((best != best[0]).tolist())
            owner.append(number)
            known.append(place.known)
        if progress:
            progress(number + 1, len(texts))
    if not rows:
        raise UsageError("no position of --data has a block in the store; give text of which the store has some words")
    said, moved, has = np.asarray(rows), np.asarray(changed), np.asarray(known)
    chosen = dict(zip(GROUPS, (np.ones_like(has), has, ~has), strict=True))
    groups = {name: _group(said[which], moved[which], np.asarray(owner)[which]) for name, which in chosen.items()}
    return {"every": EVERY, "documents": len(set(owner)), "groups": {name: of for name, of in groups.items() if of}}


def _group(logs: np.ndarray, changed: np.ndarray, owner: np.ndarray) -> dict[str, Any] | None:
    """What is reported of some positions: (n, 1 + cuts) log-probabilities, (n, cuts) bool, (n,) texts."""
    if not len(logs):
        return None
    lost = logs[:, 1:2] - logs[:, 1:]
    return {
        "positions": len(logs),
        "log_probability": dict(zip(("alone", *CUTS), logs.mean(axis=0).tolist(), strict=True)),
        "lost": {cut: _mean(lost[:, place], owner) for place, cut in enumerate(CUTS) if place},
        "changed": {cut: float(changed[:, place].mean()) for place, cut in enumerate(CUTS) if place},
    }


def _mean(values: np.ndarray, owner: np.ndarray) -> list[float | None]:
    """Mean and the ends of its interval over texts, where there are two."""
    sums = np.asarray([[values[owner == text].sum(), (owner == text).sum()] for text in np.unique(owner)])
    if len(sums) < 2:
        return [float(values.mean()), None, None]
    return list(bootstrap([sums], lambda drawn: drawn[0][..., 0] / drawn[0][..., 1]))


def figure(result: dict[str, Any]) -> str:
    """Nats that each cut costs, by group of tokens."""
    groups = result["groups"]
    names = {"last": "last position\nto block", "text": "all text\nto block", "context": "last position\nto text"}
    series = [
        Series(f"{name}, n = {of['positions']:,}", [0, 1, 2], [of["lost"][cut][0] for cut in names], marks_only=True)
        for name, of in groups.items()
    ]
    panel = Panel("attention knocked out", "nats lost a token", series, x_names=list(names.values()))
    return draw("Reliance on retrieved text", [panel])
