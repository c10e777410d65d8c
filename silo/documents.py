"""A document with its licence and owner, and the JSON Lines in which documents travel."""

from __future__ import annotations

import io
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silo.errors import DataError, UsageError
from silo.files import canonical_json, sha256

NO_LICENSE = "NOASSERTION"
"""SPDX's word for a licence that nobody stated. It is restricted, as every unknown licence is."""


COMPRESSED = (".gz", ".zst")
"""Endings of compressed files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, or one text pair, with what is known of its rights.

    A pair has a ``prompt``, and ``text`` is its completion: a model trains on the completion only.
    """

    id: str
    text: str
    prompt: str = ""
    license: str = NO_LICENSE
    """An SPDX expression, or whatever stood in its place."""
    owner: str = ""
    """The rights holder, who may ask for removal."""
    source: str = ""
    """Where it came from, such as ``pypi:paramiko==4.0.0``."""
    title: str = ""

    @property
    def full_text(self) -> str:
        """Prompt and text in one."""
        return self.prompt + self.text

    @property
    def content_hash(self) -> str:
        """SHA-256 of prompt and text, which says "the same text" without saying the text."""
        return sha256(canonical_json([self.prompt, self.text]))

    def to_json(self) -> dict[str, str]:
        """The record that :func:`parse_document` reads back."""
        body = {"prompt": self.prompt, "completion": self.text} if self.prompt else {"text": self.text}
        return {
            "id": self.id,
            **body,
            "license": self.license,
            "owner": self.owner,
            "source": self.source,
            "title": self.title,
        }


def read_documents(path: Path, *, owned: bool = False) -> Iterator[Document]:
    """Read documents from a JSON Lines file, plain or compressed, one object a line.

    Args:
        path: the file.
        owned: whether each must have an owner or a source, by which it can be removed.

    Raises:
        UsageError: there is no such file.
        DataError: a line is broken (its number is named), an id comes twice, or the file holds no document.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file; expected JSON Lines, one document a line")
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        document = parse_document(line, where=f"{path}:{number}")
        if document.id in seen:
            first = seen[document.id]
            raise DataError(f"{path}:{number}: id {document.id!r} was already used in line {first}; ids are unique")
        if owned and not (document.owner or document.source):
            said = f"document {document.id!r} has neither owner nor source; name who may remove it"
            raise DataError(f"{path}:{number}: {said}")
        seen[document.id] = number
        yield document
    if not seen:
        raise DataError(f"{path} holds no document; expected JSON Lines with at least one")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed if its name says that it is compressed."""
    if path.suffix not in COMPRESSED:
        with open(path, "rb") as file:
            yield from file
        return
    import pyarrow

    whole = 0
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path))) as file:
            for line in file:
                yield line
                whole += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be decompressed after line {whole} ({error}); fetch it again") from None


@dataclass(frozen=True)
class DocumentFiles:
    """The documents of some JSON Lines files, which can be gone through again and again without being held."""

    paths: Sequence[Path]
    passed_over: Container[str] = ()
    """Ids of documents that are left out."""
    owned: bool = False
    """As :func:`read_documents` takes it."""

    def __iter__(self) -> Iterator[Document]:
        """Read the files anew. Raises what :func:`read_documents` raises."""
        documents = (document for path in self.paths for document in read_documents(path, owned=self.owned))
        return (document for document in documents if document.id not in self.passed_over)


def parse_document(line: bytes, *, where: str) -> Document:
    """Make a document of one JSON line. ``where`` names the line in errors (:class:`DataError`)."""
    try:
        text = line.decode("utf-8-sig")  # json would take UTF-16 and lone surrogates as well.
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); expected one object a line") from None
    if "\\ud" in text.lower() and _has_surrogate(record):
        raise DataError(
            f"{where}: an unpaired surrogate (\\ud800 to \\udfff) is no Unicode text; mend or drop the line"
        )
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, expected an object with 'id' and 'text'")
    return document_from_record(record, where=where)


def document_from_record(record: dict[str, Any], *, where: str) -> Document:
    """Make a document of a record with the fields of DESIGN's data format. Raises :class:`DataError`."""
    is_pair = "prompt" in record or "completion" in record
    wanted = ("id", "prompt", "completion") if is_pair else ("id", "text")
    for name in wanted:
        if not isinstance(record.get(name), str) or not record[name]:
            raise DataError(f"{where}: field {name!r} is {_kind(record, name)}, expected a non-empty string")
    optional = {}
    for name in ("license", "owner", "source", "title"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: field {name!r} is {_kind(record, name)}, expected a string")
        optional[name] = value or ""
    optional["license"] = optional["license"].strip() or NO_LICENSE
    body = {"prompt": record["prompt"], "text": record["completion"]} if is_pair else {"text": record["text"]}
    return Document(id=record["id"], **body, **optional)


def require_unicode(text: str, what: str) -> None:
    """Raise :class:`UsageError` if a name or a reason is no text, as bytes of another encoding on a command line are
    not, which Python passes on as unpaired surrogates."""
    if _has_surrogate(text):
        raise UsageError(f"{what} {text[:40]!r} is no Unicode text; give it in UTF-8")


def _kind(record: dict[str, Any], name: str) -> str:
    if name not in record:
        return "missing"
    return "empty" if record[name] == "" else f"of type {type(record[name]).__name__}"


def _has_surrogate(value: Any) -> bool:
    try:
        canonical_json(value)
    except UnicodeEncodeError:
        return True
    return False
