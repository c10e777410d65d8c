"""Everything by which a document could still be found in a store's files, and the search for it in every byte.

Sought are the traces that a document alone has, that no other document of the store shares: runs of eight tokens as
16-bit and 32-bit numbers in both byte orders; their text and that of eight words in UTF-8 and UTF-16; its title; its
long words, as bytes from the third letter on (Lucene shares the beginnings of words) and by Lucene's own interface; the
hashes of its shingles; its codes; its keys in single and half precision. It knows no file's name or layout.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from datastore.jvm import java_cast, java_class
from datastore.shard import Encoded
from datastore.sketches import sample
from silo.documents import Document

RUN = 8
"""Tokens, or words, in a row."""
SHORTEST = 6
"""Bytes of the shortest trace that is sought."""
LONG_WORD = 11
"""Letters. Lucene writes the ends of words without a gap, so that the end of a shorter one may come of two others."""
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")
CHUNK = 1 << 22
_LUCENE = "org.apache.lucene."


class Unique:
    """What some documents have and others do not, each thing that can be told apart as bytes, by its kind."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        going: Sequence[tuple[Document, Encoded, np.ndarray]],
        staying: Sequence[tuple[Document, Encoded, np.ndarray]],
        store: Path,
    ) -> None:
        """Documents come with what a shard holds of them and with their keys, (n, dimension) float32.

        ``store`` tells which words are names of fields in the store's own JSON.
        """
        self._tokenizer = tokenizer
        of_others = "\n".join(each.full_text for each, _, _ in staying)
        # Receipts and log may hold ids, owners and sources for ever, also of what went.
        known = [
            tokenizer.to_str(),
            *_field_names(store),
            *(f"{each.id} {each.owner} {each.source}" for each, _, _ in going),
        ]
        self._kept = "\n".join([of_others, *(each.title for each, _, _ in staying), *known]).lower()
        self.words = self._words(going)
        self.needles: dict[str, set[bytes]] = {}
        for kind, needles in self._kinds(going, staying):
            self.needles.setdefault(kind, set()).update(each for each in needles if len(each) >= SHORTEST)

    def _words(self, going: Sequence[tuple[Document, Encoded, np.ndarray]]) -> list[str]:
        """Words that stand between spaces, so that every way to cut words agrees on them."""
        found = {word for each, _, _ in going for word in re.findall(r"(?<!\S)[a-z]{5,24}(?!\S)", each.full_text)}
        return sorted(word for word in found if word not in self._kept)

    def _kinds(
        self,
        going: Sequence[tuple[Document, Encoded, np.ndarray]],
        staying: Sequence[tuple[Document, Encoded, np.ndarray]],
    ) -> Iterator[tuple[str, Iterable[bytes]]]:
        runs = _minus((_runs(each.tokens) for _, each, _ in going), (_runs(each.tokens) for _, each, _ in staying))
        for name in ("<u2", ">u2", "<u4", ">u4"):
            yield f"tokens {name}", [np.asarray(run).astype(name).tobytes() for run in runs if max(run) < 1 << 16]
        phrases = [self._tokenizer.decode(list(run), skip_special_tokens=False) for run in runs]
        words = [
            " ".join(pieces[at : at + RUN])
            for each, _, _ in going
            for pieces in [each.full_text.split()]
            for at in range(0, len(pieces) - RUN + 1, 3)
        ]
        for encoding in ENCODINGS:
            whole = [phrase for phrase in phrases if "\ufffd" not in phrase and phrase.lower() not in self._kept]
            yield f"text of tokens {encoding}", [each.encode(encoding) for each in whole]
            yield f"words {encoding}", [each.encode(encoding) for each in words if each.lower() not in self._kept]
        yield "title", [each.title.encode() for each, _, _ in going if each.title.lower() not in self._kept]
        ends = [word[2:] for word in self.words if len(word) >= LONG_WORD]
        yield "a word's end", [end.encode() for end in ends if end not in self._kept]
        kinds = {
            "shingles": lambda document, encoded, keys: sample(document.full_text).astype("<u8"),
            "codes": lambda document, encoded, keys: encoded.codes,
            "keys float32": lambda document, encoded, keys: keys.astype("<f4"),
            "keys float16": lambda document, encoded, keys: keys.astype("<f2"),
        }
        for name, of in kinds.items():
            yield name, _minus(*(([row.tobytes() for row in of(*each)] for each in side) for side in (going, staying)))

    def in_files(self, root: Path) -> dict[str, set[str]]:
        """Kind → the files below a directory that hold such a trace, by their names there."""
        kind_of = {needle: kind for kind, needles in self.needles.items() for needle in needles}
        search = _Search(kind_of)
        found: dict[str, set[str]] = {}
        for path in sorted(root.rglob("*")):
            if path.is_file():
                for needle in search(path):
                    found.setdefault(kind_of[needle], set()).add(path.relative_to(root).as_posix())
        return found

    def in_lucene(self, root: Path) -> Counter[str]:
        """How many blocks have each of the words, by every Lucene index below a directory; deleted ones count."""
        found: Counter[str] = Counter()
        for directory in sorted({path.parent for path in root.rglob("segments_*")}):
            path = java_class("java.nio.file.Paths").get(str(directory.absolute()))
            files = java_class(f"{_LUCENE}store.FSDirectory").open(path)
            reader = java_class(f"{_LUCENE}index.DirectoryReader").open(files)
            plain = java_cast(f"{_LUCENE}index.IndexReader", reader)
            fields = java_class(f"{_LUCENE}index.FieldInfos").getIndexedFields(plain).toArray()
            for field in fields:
                for word in self.words:
                    found[word] += reader.docFreq(java_class(f"{_LUCENE}index.Term")(str(field), word))
            reader.close()
            files.close()
        return +found


def _field_names(root: Path) -> set[str]:
    """What stands before a colon in quotation marks, in any file."""
    data = (path.read_bytes() for path in root.rglob("*") if path.is_file())
    return {name.decode() for each in data for name in re.findall(rb'"([a-z_0-9]+)":', each)}


def _runs(tokens: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(run) for run in np.lib.stride_tricks.sliding_window_view(tokens, min(RUN, len(tokens))).tolist()}


def _minus(going: Iterable[Iterable], staying: Iterable[Iterable]) -> list:
    """What some have that others have not, in a fixed order."""
    left = {each for one in going for each in one}
    for one in staying:
        left.difference_update(one)
    return sorted(left)


class _Search:
    """Finds many byte strings in a file at once: their first six bytes by look-ups of all places, then exactly."""

    def __init__(self, needles: Mapping[bytes, str]) -> None:
        self._longest = max(map(len, needles), default=SHORTEST)
        self._by_head: dict[bytes, list[bytes]] = {}
        self._tables = np.zeros((SHORTEST // 2, 1 << 16), dtype=bool)
        for needle in needles:
            self._by_head.setdefault(needle[:SHORTEST], []).append(needle)
        for head in self._by_head:
            for table, pair in zip(self._tables, np.frombuffer(head, "<u2"), strict=True):
                table[pair] = True

    def __call__(self, path: Path) -> set[bytes]:
        """Those that the file holds."""
        found: set[bytes] = set()
        with open(path, "rb") as file:
            before = b""
            while chunk := file.read(CHUNK):
                data = before + chunk
                found |= self._in(data)
                before = data[-self._longest :]
        return found

    def _in(self, data: bytes) -> set[bytes]:
        if len(data) < SHORTEST:
            return set()
        single = np.frombuffer(data, np.uint8).astype(np.uint16)
        pairs = single[:-1] | single[1:] << 8
        places = len(data) - SHORTEST + 1
        hits = self._tables[0][pairs[:places]]
        for number, table in enumerate(self._tables[1:], start=1):
            hits &= table[pairs[2 * number : 2 * number + places]]
        return {
            needle
            for at in np.flatnonzero(hits).tolist()
            for needle in self._by_head.get(data[at : at + SHORTEST], ())
            if data.startswith(needle, at)
        }
