"""How a document is cut into model inputs: never across its end, every token predicted exactly once.

A document of n tokens is read as n inputs, a start token and its first n - 1 tokens; input i predicts token i. So
"position i" everywhere means the prediction of token i from all that stands before it.
"""

from __future__ import annotations

from typing import NamedTuple

from silo.errors import UsageError


class Window(NamedTuple):
    """Inputs ``begin`` to ``end`` go through the model; positions ``first`` to ``end`` are kept of what comes out."""

    begin: int
    first: int
    end: int


def windows(length: int, *, context: int, stride: int) -> list[Window]:
    """Cover ``length`` positions with windows of ``context`` inputs that advance by ``stride``.

    Each position is kept exactly once, and after the first window with at least ``context - stride`` inputs before it.
    The last window is moved back instead of cut short, so all windows of a document have one length and can share a
    batch.

    >>> windows(10, context=4, stride=3)
    [Window(begin=0, first=0, end=4), Window(begin=3, first=4, end=7), Window(begin=6, first=7, end=10)]

    Raises:
        UsageError: windows would not advance.
    """
    if stride < 1:
        raise UsageError(f"windows that advance by {stride} tokens; expected at least 1")
    result: list[Window] = []
    first, end = 0, min(context, length)
    while first < length:
        result.append(Window(max(0, end - context), first, end))
        first, end = end, min(end + stride, length)
    return result
