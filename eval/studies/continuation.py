"""What a mixture writes after a prompt, and how much of it is another text word for word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from silo.causal_lm import MixtureForCausalLM
from silo.mixture import Mixture
from silo.weights import Weighing


def continued(
    mixture: Mixture,
    weighing: Weighing,
    prompts: np.ndarray,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    limit: Callable[[int], LogitsProcessor] | None = None,
) -> np.ndarray:
    """Write on after some prompts.

    Args:
        mixture: of the model and a store.
        weighing: of its methods, or of some.
        prompts: (n, time) tokens, without the start token.
        tokens: so many are written after each, never fewer.
        temperature: of drawing; 0 takes the likeliest token.
        seed: of drawing.
        limit: of what may be written after inputs of so many tokens, if not everything.

    Returns:
        (n, tokens) int64.
    """
    start = np.full((len(prompts), 1), mixture.model.start_token)
    ids = torch.from_numpy(np.concatenate([start, prompts], axis=1).astype(np.int64))
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    out: Any = MixtureForCausalLM(mixture, weighing).generate(  # type: ignore[misc]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([limit(ids.shape[1])] if limit else []),
        **drawing,
    )
    return out[:, ids.shape[1] :].numpy()


def longest_subsequence(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts have in common in the same order, at most: what ROUGE-L counts (Lin 2004, section 3.1).

    >>> longest_subsequence([1, 2, 3, 4], [2, 9, 4])
    2
    """
    row = [0] * (len(other) + 1)
    for token in one:
        before = row
        row = [0]
        for place, also in enumerate(other):
            row.append(before[place] + 1 if token == also else max(before[place + 1], row[-1]))
    return row[-1]


def longest_run(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens in a row that two texts have in common, at most.

    >>> longest_run([1, 2, 3, 4], [9, 2, 3, 9, 4])
    2
    """
    best, row = 0, [0] * (len(other) + 1)
    for token in one:
        row = [0, *(row[place] + 1 if token == also else 0 for place, also in enumerate(other))]
        best = max(best, *row)
    return best
