"""What a study leaves behind: one sealed JSON record, and its figure beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.suite_report import origin
from silo.errors import UsageError
from silo.files import sealed, write_file, write_json

FORMAT = 1


def write_study(
    path: Path, name: str, described: dict[str, Any], result: dict[str, Any], figure: str
) -> dict[str, Any]:
    """Write the record to ``path`` and the figure to the same name with the ending ``.svg``.

    Args:
        path: ends in ``.json``.
        name: of the study.
        described: what it was made on.
        result: what was found.
        figure: SVG.

    Returns:
        The record, which holds its own digest, the command, and the commit.
    """
    record = sealed({"format": FORMAT, "study": name, "made": origin(), "subject": described, "result": result})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path.with_suffix(".svg"), figure.encode())
    write_json(path, record)
    return record


def require_record_name(path: Path) -> None:
    """Raise :class:`UsageError` unless a record can have this name, before anything is measured."""
    if path.suffix != ".json":
        raise UsageError(f"--out is {path}; expected a name that ends in .json, beside which the figure ends in .svg")
    if path.is_dir():
        raise UsageError(f"{path} is a directory; --out wants the name of a file")
    if path.exists():
        raise UsageError(f"{path} is there already; choose another --out, or delete it")
