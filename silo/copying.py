"""A limit on how much is written in a row that a store has word for word.

MemFree decoding (Ippolito 2023): a token that would make a run too long is not written. There a Bloom filter of n-grams
tells what would, and now and then forbids what is no copy; here the store's own suffixes do, so that nothing is
forbidden for nothing, and nothing is overlooked. What is written in other tokens than the store has is not seen as the
same text.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor

from silo.errors import UsageError
from silo.retrieval import NgramSource


class CopyLimit(LogitsProcessor):
    """Forbids tokens that would make a run of more than so many written tokens stand in a document of a store.

    Give it to ``generate``::

        lm.generate(ids, logits_processor=LogitsProcessorList([CopyLimit(store.ngrams(), 12, ids.shape[1])]))
    """

    def __init__(self, source: NgramSource, longest: int, prompt: int) -> None:
        """Limit what is written.

        Args:
            source: the ∞-gram of what is not to be copied.
            longest: tokens in a row that may stand there.
            prompt: tokens that come before what is written, and are nobody's copy; padding among them.

        Raises:
            UsageError: no run would be short enough.
        """
        if longest < 1:
            raise UsageError(f"a longest copy of {longest} tokens; expected at least 1")
        self._source, self._longest, self._prompt = source, longest, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (batch, vocabulary) after inputs (batch, time), those of forbidden tokens negative infinity."""
        if input_ids.shape[1] - self._prompt < self._longest:
            return scores
        matches = self._source.match(list(input_ids[:, -self._longest :].numpy().astype(np.int64)))
        ends = matches.begins[: len(input_ids)] + self._longest
        copied = np.flatnonzero(matches.lengths[ends] == self._longest)
        following = matches.following(ends[copied])
        rows = np.repeat(copied, np.diff(following.begins))
        out = scores.clone()
        out[rows, following.tokens] = -torch.inf
        return out  # type: ignore[return-value]
