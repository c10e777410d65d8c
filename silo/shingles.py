"""Hashes of runs of words, with which shared text is found: fast, and blind to case, punctuation and line breaks.

A word is a run of letters and digits, without case, without accents, and without what is not seen, such as soft
hyphens: so it is the same in all of Unicode's forms. A character of a script that is written without spaces (Chinese,
Japanese) is a word of its own. A shingle is a run of :data:`SHINGLE_WORDS` words. Everything is done on whole arrays of
bytes, many documents at a time, because a loop over words would cost more than tokenising them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE_WORDS = 6
"""Words a shingle. Eight in a row are a 13-gram, the usual measure of copied text (GPT-3, appendix C); but single ones
survive an edit in every sixth word, of which 13-grams leave nothing."""

_PRIME = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2**64
_INVERSE = pow(_PRIME, -1, 1 << 64)
_SHINGLE_PRIME = 0xD6E8FEB86659FD93
_SHINGLE_INVERSE = pow(_SHINGLE_PRIME, -1, 1 << 64)
_IDEOGRAPH = 0xE3
"""The UTF-8 lead bytes from here on stand for the scripts without spaces, for symbols and for emoji."""


def _fold_table() -> np.ndarray:
    """Byte → byte of a word, lower case; 0 for what stands between words."""
    table = np.zeros(256, dtype=np.uint8)
    table[0x80:] = np.arange(0x80, 0x100)
    for low, high in ((b"0", b"9"), (b"a", b"z"), (b"A", b"Z")):
        table[low[0] : high[0] + 1] = np.arange(low[0], high[0] + 1)
    table[ord("A") : ord("Z") + 1] += 32
    return table


_FOLD = _fold_table()


_FOLDED = re.compile(r"[\xaa\xad\xb2-\u200f\u202a-\u202e\u2060-\U0010ffff]+")
"""Runs of characters that :class:`_Folds` may change: outside ASCII, all but the usual punctuation."""


class _Folds(dict[int, str]):
    """Character → what it counts as: decomposed, in lower case, without accents and what is not seen."""

    def __missing__(self, code: int) -> str:
        parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        self[code] = kept = "".join(each for each in parts if unicodedata.category(each) not in ("Mn", "Me", "Cf"))
        return kept


_FOLDS = _Folds()


def _folded(text: bytes) -> bytes:
    """A UTF-8 text with its characters folded; ASCII is left to :data:`_FOLD`."""
    if text.isascii():
        return text
    return _FOLDED.sub(lambda run: run[0].translate(_FOLDS), text.decode()).encode()


@dataclass(frozen=True, slots=True)
class Shingles:
    """The shingles of some documents, in the order of their text."""

    hashes: np.ndarray
    """(n,) uint64."""
    documents: np.ndarray
    """(n,) uint32: which of the given documents each belongs to."""
    positions: np.ndarray
    """(n,) uint32: the word of its document at which each begins."""
    words: np.ndarray
    """(documents,) int64: how many words each document has."""


def shingles(texts: Sequence[bytes]) -> Shingles:
    """The shingles of some UTF-8 texts; none crosses from one text to the next, and a text of fewer words has none."""
    texts = [_folded(text) for text in texts]
    data = np.frombuffer(b"\n".join(texts) + b"\n", dtype=np.uint8)
    begins, ends = _word_bounds(data)
    ends_of_texts = np.cumsum([len(text) + 1 for text in texts]) - 1
    last = np.searchsorted(begins, ends_of_texts)  # words up to each text's end
    words = np.diff(last, prepend=0)
    hashes = _runs(_word_hashes(data, begins, ends), SHINGLE_WORDS)
    document = np.repeat(np.arange(len(texts), dtype=np.uint32), words)
    position = np.arange(len(begins), dtype=np.int64) - np.repeat(last - words, words)
    whole = document[: len(hashes)] == document[SHINGLE_WORDS - 1 :]
    return Shingles(
        hashes[whole], document[: len(hashes)][whole], position[: len(hashes)][whole].astype(np.uint32), words
    )


def word_spans(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each word of a UTF-8 text begins and ends, in bytes: two arrays (words,) int64.

    What a character is folded to is where the character is; of one that is two words (½), the first is empty.
    """
    begins, ends = _word_bounds(np.frombuffer(_folded(text) + b"\n", dtype=np.uint8))
    if text.isascii():
        return begins, ends
    characters = text.decode()
    lengths = [len(_folded(each.encode())) for each in characters]
    places = np.cumsum([0, *(len(each.encode()) for each in characters)])
    origin = np.append(np.repeat(places[:-1], lengths), places[-1])
    return origin[begins], origin[ends]


def _word_bounds(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of every word; ``data`` ends with a separator."""
    inside = _FOLD[data] != 0
    if data.max(initial=0) >= 0x80:
        _set_apart_punctuation(data, inside)
    change = np.empty(len(data), dtype=bool)
    change[0] = inside[0]
    np.not_equal(inside[1:], inside[:-1], out=change[1:])
    begins = change & inside
    ends = change & ~inside
    alone = np.flatnonzero(inside & (data >= _IDEOGRAPH))
    if len(alone):
        begins[alone] = True
        ends[alone[(alone > 0)]] |= inside[alone[alone > 0] - 1]
    return np.flatnonzero(begins), np.flatnonzero(ends)


def _set_apart_punctuation(data: np.ndarray, inside: np.ndarray) -> None:
    """Take curly quotes, dashes, no-break spaces and the like (U+0080–00BF, U+2000–207F) out of words, in place."""
    two = np.flatnonzero(data == 0xC2)
    three = np.flatnonzero((data[:-1] == 0xE2) & (data[1:] <= 0x81) & (data[1:] >= 0x80))
    for begin, width in ((two, 2), (three, 3)):
        for offset in range(width):
            inside[np.minimum(begin + offset, len(data) - 1)] = False


def _word_hashes(data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A polynomial hash of each word, from differences of one running sum, and mixed."""
    powers, inverses = _powers(_PRIME, len(data)), _powers(_INVERSE, len(data))
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(_FOLD[data] * powers, out=sums[1:])
    return _mixed((sums[ends] - sums[begins]) * inverses[begins])


def _runs(words: np.ndarray, length: int) -> np.ndarray:
    """The hash of every run of ``length`` words: (n - length + 1,) of (n,)."""
    if len(words) < length:
        return np.zeros(0, dtype=np.uint64)
    sums = np.zeros(len(words) + 1, dtype=np.uint64)
    np.cumsum(words * _powers(_SHINGLE_PRIME, len(words)), out=sums[1:])
    count = len(words) - length + 1
    return _mixed((sums[length:] - sums[:count]) * _powers(_SHINGLE_INVERSE, len(words))[:count])


_TABLES: dict[int, np.ndarray] = {}


def _powers(base: int, count: int) -> np.ndarray:
    """base**i modulo 2**64 for i below ``count``, kept for the next call."""
    table = _TABLES.get(base)
    if table is None or len(table) < count:
        table = np.full(max(count, 1 << 16), base, dtype=np.uint64)
        table[0] = 1
        np.cumprod(table, out=table)
        _TABLES[base] = table
    return table[:count]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all (the finalizer of SplitMix64), since parts of the hashes serve as bucket numbers."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
