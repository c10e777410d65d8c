"""Where documents come from: files, directories, the Hugging Face loader, and Python distributions.

What a source cannot give as a document is noted with a reason, never dropped in silence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from silo.documents import COMPRESSED, NO_LICENSE, Document, read_documents
from silo.errors import DataError, UsageError
from silo.findings import Finding, Note
from silo.hub import Recipe, document_of_row, hub_documents, load_recipe

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".adoc", ".tex", ".html", ".py", ".c", ".h", ".js", ".go", ".rs", ".java")
"""Endings of files that are one document each."""
_LICENSE_NAMES = re.compile(r"(?:un)?(?:licen[sc]e|copying|copyright)(?:[.-][\w.-]*)?", re.IGNORECASE)


def _ignore(finding: Finding) -> None:
    """What becomes of findings that nobody asked for."""


def open_source(
    spec: str, *, downloads: Path | None = None, findings: Note = _ignore, recipe: Path | None = None
) -> Iterator[Document]:
    """Read the documents of one SOURCE.

    Args:
        spec: a file (``.jsonl``, ``.parquet`` or text, plain or ``.gz`` or ``.zst``), a directory of such files,
            ``hf:NAME`` or ``hf:NAME#CONFIG``, ``python:PKG``, or ``pypi:PKG==VERSION``, better with ``#sha256=HEX``.
        downloads: where archives from PyPI are kept, and looked for before the registry is asked.
        findings: takes what was refused, while the documents are read.
        recipe: how rows of Parquet files and data sets become documents; see :mod:`silo.hub`.

    Raises:
        UsageError: no such source.
        DataError: the source is there, and cannot be read as what it should be.
    """
    kind, colon, name = spec.partition(":")
    if colon and kind == "hf":
        return hub_documents(name, load_recipe(recipe, name), findings)
    if colon and kind in ("python", "pypi"):
        from silo.distributions import distribution_documents, installed, published

        found = installed(name) if kind == "python" else published(name, downloads)
        return distribution_documents(kind, found, findings)
    path = Path(spec)
    rows = load_recipe(recipe, "")
    return _directory_documents(path, rows, findings) if path.is_dir() else _file_documents(path, rows, findings)


def with_source(document: Document, spec: str) -> Document:
    """A document that says neither owner nor source, under the name of the file or directory that it came from, so that
    it can be removed by it. Where that lies must not matter: the same file gives the same corpus."""
    if document.owner or document.source:
        return document
    name = os.path.basename(os.path.abspath(spec))  # of "." too
    return replace(document, source=name.encode(errors="backslashreplace").decode())


def _directory_documents(root: Path, recipe: Recipe, findings: Note) -> Iterator[Document]:
    """Every file below a directory that is of a kind we read, in the order of their names, licence files included."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.endswith(".license")]
    known = [path for path in files if _kind(path) or _LICENSE_NAMES.fullmatch(path.name)]
    for path in files:
        if path not in known:
            findings(
                Finding(str(path.relative_to(root)), f"a file of a kind that is not read: {path.suffix or 'none'}")
            )
    if not known:
        raise DataError(f"{root} holds no file that can be read; expected .jsonl, .parquet or text files")
    for path in known:
        name = path.relative_to(root).as_posix()
        if not _is_unicode(name):
            findings(Finding(name, "its name is not UTF-8"))
        elif _kind(path) == ".parquet":
            yield from _parquet_documents(path, name, recipe)
        elif _kind(path) == ".jsonl":
            yield from _file_documents(path, recipe, findings)
        else:
            yield from _text_document(path, name, str(root), findings)


def _is_unicode(name: str) -> bool:
    """Whether the name of a file is one that a document's id can hold: a file system takes any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    """The ending of a file, with the compression taken off, if it is one of those that are read."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name
    suffix = Path(name).suffix
    return suffix if suffix in (".jsonl", ".parquet", *TEXT_SUFFIXES) else ""


def _file_documents(path: Path, recipe: Recipe, findings: Note) -> Iterator[Document]:
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet_documents(path, path.name, recipe)
    if kind == ".jsonl":
        return read_documents(path)
    if kind:
        _require_file(path, "a text file")
        return _text_document(path, path.name, str(path), findings)
    raise UsageError(
        f"{path} is no source; expected a .jsonl[.gz|.zst], .parquet or text file, a directory of them, hf:NAME, "
        "python:PKG or pypi:PKG==V"
    )


def _require_file(path: Path, wanted: str) -> None:
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file; expected {wanted}")


def _parquet_documents(path: Path, called: str, recipe: Recipe) -> Iterator[Document]:
    """The rows of a file, which is called so in their ids."""
    import pyarrow
    import pyarrow.parquet

    _require_file(path, "a Parquet file")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield document_of_row(row, recipe, name=called, default_id=str(number))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); fetch it again") from None


# --- text files -------------------------------------------------------------------------------------------------------

_REUSE_TAG = re.compile(
    r"^[ \t]*(?:#+|//+|/?\*+|--+|;+|%+|<!--+|\.\.|\"{3}|'{3})?[ \t]*"
    r"SPDX-(License-Identifier|FileCopyrightText):[ \t]*([^\r\n]*?)[ \t]*(?:\*/|-->|[\"']{3}|\r|$)",
    re.MULTILINE,
)
"""A tag at the beginning of a line, or of a comment."""
_TEXT_HEAD = re.compile(
    r"(?:---[ \t]*\r?\n(?:.*\r?\n)*?---[ \t]*\r?\n)?"
    r"(?:[ \t]*\r?\n|<!--(?:[^-]|-(?!->))*-->"
    r"|[ ]{0,3}(?:SPDX-|#|//|/?\*|--|;|%|<!|\.\.|copyright\b|\(c\)|©).*(?:\r?\n|$))*",
    re.IGNORECASE,
)
"""Front matter, and comments, titles and tags at the top: where a text speaks of itself, and does not show how to."""
_CODE_SUFFIXES = (".py", ".c", ".h", ".js", ".go", ".rs", ".java")
_YEARS = re.compile(r"^(?:copyright|©|\(c\)|[\d\s,-])+|\s*<[^>]*>", re.IGNORECASE)


def _text_document(path: Path, id: str, source: str, findings: Note) -> Iterator[Document]:
    """A file as one document. Licence and owner are those of its SPDX tags, or of a ``.license`` file beside it, as the
    REUSE specification has it; without them it is of unknown licence, and restricted."""
    import pyarrow

    try:
        data = pyarrow.input_stream(str(path)).read() if path.suffix in COMPRESSED else path.read_bytes()
        text = data.decode("utf-8-sig")
        sidecar = path.with_name(path.name + ".license")
        tags = _tags(sidecar.read_text("utf-8") if sidecar.is_file() else _own_head(text, _kind(path)))
    except UnicodeDecodeError as error:
        findings(Finding(id, "not UTF-8", str(error)))
        return
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from None
    if not text.strip():
        findings(Finding(id, "an empty file"))
        return
    licenses = tags.get("License-Identifier", [])
    license = " AND ".join(f"({each})" for each in licenses) if len(licenses) > 1 else "".join(licenses)
    owner = ", ".join(dict.fromkeys(_YEARS.sub("", each).strip() for each in tags.get("FileCopyrightText", [])))
    yield Document(id=id, text=text, license=license or NO_LICENSE, owner=owner, source=source, title=path.name)


def _own_head(text: str, kind: str) -> str:
    """The part of a file whose tags are its own."""
    head = text[:3000].partition("REUSE-IgnoreStart")[0]
    if kind in _CODE_SUFFIXES:
        return head
    found = _TEXT_HEAD.match(head)
    return found[0] if found else ""


def _tags(text: str) -> dict[str, list[str]]:
    """The different values of each SPDX tag, in order. Of several licences, all hold."""
    tags: dict[str, list[str]] = {}
    for name, value in ((name, value.strip()) for name, value in _REUSE_TAG.findall(text)):
        if value and value not in tags.setdefault(name, []):
            tags[name].append(value)
    return tags
