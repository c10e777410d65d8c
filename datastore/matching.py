"""The inner loops of the ∞-gram, compiled (:mod:`silo.compiling`).

What all of them are given of a group's suffixes: ``rows`` (suffixes,) where each begins and ``lengths`` (suffixes,)
uint8 how many tokens it has, as :mod:`datastore.suffix_arrays` writes both; ``begins`` (documents + 1,) int64 and
``tokens`` (rows,), the documents that they are of. ``query`` is (n,) int64.
"""

from __future__ import annotations

import numpy as np

from silo.compiling import compiled


@compiled
def heads(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, bits: int, into: np.ndarray) -> None:
    """Write the first eight bytes of some strings as numbers that have the order of the strings; what is beyond a
    string's end counts as zero.

    Args:
        tokens: what the strings are of, each below 2 to the power of ``bits``.
        starts: (n,) where each starts.
        lengths: (n,) how many tokens it has.
        bits: of a token.
        into: (n,) uint64.
    """
    for at in range(len(starts)):
        head, held = np.uint64(0), min(np.int64(lengths[at]), len(tokens) - starts[at])
        for number in range(64 // bits):
            token = np.uint64(tokens[starts[at] + number]) if number < held else np.uint64(0)
            head = head << np.uint64(bits) | token
        into[at] = head


@compiled
def _length(place: int, needed: int, rows: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> np.int64:
    """How many tokens a suffix has. A number above ``needed`` may be too small, but is not below ``needed``.

    No suffix goes beyond the tokens, whatever damaged files say: nobody looks while they are read.
    """
    held, row, long = np.int64(lengths[place]), np.int64(rows[place]), np.iinfo(lengths.dtype).max
    if held >= long and needed > long:
        held = begins[min(int(np.searchsorted(begins, row, side="right")), len(begins) - 1)] - row
    return min(held, begins[-1] - row)


@compiled
def _in_common(row: np.int64, tokens: np.ndarray, start: int, query: np.ndarray, known: int, most: int) -> int:
    """How many tokens two strings have in common, of which ``known`` are, up to so many."""
    while known < most and np.int64(tokens[row + known]) == query[start + known]:
        known += 1
    return known


@compiled
def find_between(
    rows: np.ndarray,
    lengths: np.ndarray,
    begins: np.ndarray,
    tokens: np.ndarray,
    query: np.ndarray,
    starts: np.ndarray,
    wanted: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    followed: np.ndarray,
) -> None:
    """Find strings between a suffix that comes before each and one that does not, or -1 and the number of suffixes.

    A binary search (Manber and Myers 1993): what a string has in common with both ends of the range that is left, it
    has in common with all between them, so it is compared from there on only.

    Args:
        rows: this and what follows up to ``query`` as all of these loops have it.
        lengths: likewise.
        begins: likewise.
        tokens: likewise.
        query: likewise.
        starts: (n,) where each string starts.
        wanted: (n,) how many tokens it has.
        low: (n,) int64; becomes the last suffix that comes before the string or equals it.
        high: (n,) int64; becomes the next.
        left: (n,) int64, written: how many tokens the string has in common with the first of these.
        right: (n,) int64, written: how many with the second.
        followed: (n,) int64, written: the longest beginning of the string that occurs with any token after it.
    """
    for at in range(len(starts)):
        start, most = starts[at], wanted[at]
        before, after, known_before, known_after = low[at], high[at], 0, 0
        while after - before > 1:
            middle = (before + after) >> 1
            row, held = np.int64(rows[middle]), _length(middle, most + 1, rows, lengths, begins)
            known = _in_common(row, tokens, start, query, min(known_before, known_after), min(most, held))
            # One that equals the string comes before it, so that those that go on from it are the string's neighbours.
            if held <= known or (known < most and np.int64(tokens[row + known]) < query[start + known]):
                before, known_before = middle, known
            else:
                after, known_after = middle, known
        longest = 0
        for place, known in ((before, known_before), (after, known_after)):
            if 0 <= place < len(rows):
                held = _length(place, most + 1, rows, lengths, begins)
                common = _in_common(np.int64(rows[place]), tokens, start, query, known, min(most, held))
                longest = max(longest, min(common, int(held) - 1))
                if place == before:
                    known_before = common
                else:
                    known_after = common
        low[at], high[at], left[at], right[at], followed[at] = before, after, known_before, known_after, longest


@compiled
def width(
    rows: np.ndarray,
    lengths: np.ndarray,
    begins: np.ndarray,
    tokens: np.ndarray,
    query: np.ndarray,
    firsts: np.ndarray,
    steps: np.ndarray,
    limits: np.ndarray,
    starts: np.ndarray,
    wanted: np.ndarray,
    into: np.ndarray,
) -> None:
    """Write how many suffixes in a row, from given ones on, begin with given strings, as the first of each row does.

    Steps are doubled until one does not, since most rows are short.

    Args:
        rows: this and what follows up to ``query`` as all of these loops have it.
        lengths: likewise.
        begins: likewise.
        tokens: likewise.
        query: likewise.
        firsts: (n,) the suffix that each row begins with.
        steps: (n,) 1 to go up the order, -1 to go down.
        limits: (n,) how many suffixes each row could have at the most, at least 1.
        starts: (n,) where each string starts.
        wanted: (n,) how many tokens it has.
        into: (n,) int64.
    """
    for at in range(len(firsts)):
        start, most, have, lack = starts[at], wanted[at], 0, limits[at]
        while lack - have > 1:
            middle = min(2 * have + 1, (have + lack) >> 1)
            place = firsts[at] + steps[at] * middle
            held = min(most, _length(place, most, rows, lengths, begins))
            if _in_common(np.int64(rows[place]), tokens, start, query, 0, held) == most:
                have = middle
            else:
                lack = middle
        into[at] = have + 1


@compiled
def exact(
    rows: np.ndarray,
    lengths: np.ndarray,
    begins: np.ndarray,
    firsts: np.ndarray,
    limits: np.ndarray,
    wanted: np.ndarray,
    into: np.ndarray,
) -> None:
    """Write how many suffixes in a row, from given ones up and up to ``limits``, have given lengths.

    Args:
        rows: this, ``lengths`` and ``begins`` as all of these loops have them.
        lengths: likewise.
        begins: likewise.
        firsts: (n,) the suffix that each row begins with.
        limits: (n,) how many suffixes each row could have at the most.
        wanted: (n,) the length.
        into: (n,) int64.
    """
    for at in range(len(firsts)):
        first, needed, have, lack = firsts[at], wanted[at] + 1, -1, limits[at]
        while lack - have > 1:
            middle = min(2 * have + 1, (have + lack) >> 1) if have >= 0 else 0
            if _length(first + middle, needed, rows, lengths, begins) == wanted[at]:
                have = middle
            else:
                lack = middle
        into[at] = have + 1


@compiled
def _token(place: int, depth: int, rows: np.ndarray, tokens: np.ndarray) -> np.int64:
    return np.int64(tokens[min(int(np.int64(rows[place])) + depth, len(tokens) - 1)])


@compiled
def runs(
    rows: np.ndarray, tokens: np.ndarray, firsts: np.ndarray, counts: np.ndarray, depths: np.ndarray
) -> np.ndarray:
    """Runs of one next token in spans of suffixes, which are in the order of their next tokens.

    Args:
        rows: this and ``tokens`` as all of these loops have them.
        tokens: likewise.
        firsts: (n,) where each span begins.
        counts: (n,) how many suffixes it has, each with a next token.
        depths: (n,) where the next token of its suffixes is.

    Returns:
        (3, runs) int64: which span, token, how many.
    """
    found, end = np.empty((3, 2 * len(firsts) + 16), dtype=np.int64), 0
    for span in range(len(firsts)):
        place, stop, depth = firsts[span], firsts[span] + counts[span], depths[span]
        while place < stop:
            token, have, lack = _token(place, depth, rows, tokens), 0, stop - place
            while lack - have > 1:
                middle = min(2 * have + 1, (have + lack) >> 1)
                if _token(place + middle, depth, rows, tokens) == token:
                    have = middle
                else:
                    lack = middle
            if end == found.shape[1]:
                more = np.empty((3, 2 * end), dtype=np.int64)
                for part in range(3):
                    for run in range(end):  # to assign a slice takes seconds to compile
                        more[part, run] = found[part, run]
                found = more
            found[0, end], found[1, end], found[2, end] = span, token, have + 1
            place, end = place + have + 1, end + 1
    return found[:, :end]
