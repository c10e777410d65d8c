"""How much of a test text a store holds word for word, which a low perplexity must be read beside.

A run of tokens is in the store if a document of it has the whole run, with a token after it; so a match is found by
the same suffixes that the ∞-gram answers from, and a removal takes it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

LENGTHS = (13, 32, 50)
"""Runs of so many tokens count: what GPT-3 called contaminated (Brown 2020, appendix C), what Lee 2022 (section 4.2)
is near to, removing runs of 50, and one between."""


class Matcher(Protocol):
    """What is asked of an ∞-gram."""

    def match(self, sequences: Sequence[np.ndarray]) -> Any:
        """Matches with ``begins`` (sequences + 1,) and ``lengths`` (contexts,), as those of a store's."""
        ...


def leakage(ngrams: Matcher, texts: Sequence[np.ndarray]) -> dict[str, Any]:
    """Which share of the tokens of some texts, each (n,), is inside runs that the store has.

    Returns:
        ``tokens``, the ``longest`` run in tokens, and by length in ``shares`` the share of tokens inside such runs.
    """
    matches = ngrams.match(texts)
    inside = dict.fromkeys(LENGTHS, 0)
    for text, begin in zip(texts, matches.begins, strict=False):
        # The context before token e is followed by it; its match covers the `lengths` tokens up to e.
        lengths = np.asarray(matches.lengths[begin : begin + len(text) + 1])
        for least in LENGTHS:
            inside[least] += covered(lengths, least)
    total = sum(map(len, texts))
    longest = int(np.max(matches.lengths)) if len(matches.lengths) else 0
    shares = {str(least): count / total if total else 0.0 for least, count in inside.items()}
    return {"tokens": total, "longest": longest, "shares": shares}


def covered(lengths: np.ndarray, least: int) -> int:
    """How many tokens of a text are in matches of at least so many, by the length of the match that ends at each.

    Args:
        lengths: (n + 1,) of the matches that end before token 0 to n.
        least: shorter ones do not count.
    """
    ends = np.flatnonzero(lengths >= least)
    change = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.add.at(change, ends - lengths[ends], 1)
    np.add.at(change, ends, -1)
    return int(np.count_nonzero(np.cumsum(change)))
