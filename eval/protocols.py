"""What stands before a token when it is scored: our protocol, and SILO's.

Perplexity depends on it as much as on the model. Ours reads each document alone, as a store does (law 3). SILO's (Min
2023, section 5) puts all documents of a domain into one stream and reads windows of 1,024 tokens that advance by 512,
so that most documents begin with another's end before them. Both score every token exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from silo.errors import UsageError
from silo.windows import Window, windows

KINDS = ("alone", "stream")


@dataclass(frozen=True)
class Reading:
    """A run of tokens that is read together: one document, or a stream of several.

    Input i is the token before position i, and the start token before the first; see :mod:`silo.windows`.
    """

    tokens: np.ndarray
    """(n,) ids."""
    windows: list[Window]
    lengths: list[int]
    """Tokens of each document in it."""


@dataclass(frozen=True)
class Protocol:
    """How texts are read."""

    kind: str = "alone"
    """``alone``: each document by itself, with the fullest context that the windows give. ``stream``: SILO's."""
    context: int = 1024
    """Inputs a window at most, in tokens."""
    stride: int = 512
    """Inputs by which windows advance, in tokens; the less, the more context, and the more work."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"protocol: kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if not 1 <= self.stride <= self.context:
            raise UsageError(f"protocol: stride is {self.stride}; expected 1 to the context of {self.context} tokens")

    def cut(self, length: int) -> list[Window]:
        """The windows of a reading of so many tokens."""
        return (windows if self.kind == "alone" else stream_windows)(length, context=self.context, stride=self.stride)

    def readings(self, texts: Sequence[np.ndarray]) -> list[Reading]:
        """Cut the tokens (n,) of some texts into readings; the texts follow each other in them."""
        if self.kind == "alone":
            return [Reading(tokens, self.cut(len(tokens)), [len(tokens)]) for tokens in texts]
        if not texts:
            return []
        stream = np.concatenate(texts)
        return [Reading(stream, self.cut(len(stream)), [len(tokens) for tokens in texts])]

    def require_context(self, available: int) -> None:
        """Raise :class:`UsageError` unless a model that reads ``available`` tokens can read these windows."""
        if self.context > available:
            raise UsageError(
                f"the protocol has windows of {self.context} tokens, the model reads {available}; choose another "
                "model, or another context"
            )


def stream_windows(length: int, *, context: int, stride: int) -> list[Window]:
    """Cover ``length`` positions as SILO's code does (``batch_merged``), and its first token besides.

    There the first token of the stream is only read, so a window's inputs are ``context`` tokens from a multiple of
    ``stride`` on, and the last window is cut short. Here that token is scored too, from the start token alone; all
    others have exactly SILO's context.

    >>> stream_windows(8, context=4, stride=2)
    [Window(begin=0, first=0, end=1), Window(begin=1, first=1, end=5), Window(begin=3, first=5, end=7), \
Window(begin=5, first=7, end=8)]
    """
    result = [Window(0, 0, 1)] if length else []
    first = 1
    for begin in range(1, length, stride):
        if first == length:
            break
        end = min(begin + context, length)
        result.append(Window(begin, first, end))
        first = end
    return result
