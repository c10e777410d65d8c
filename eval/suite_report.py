"""What a suite found, as one value: numbers with intervals, gaps, leakage, and what made each; and as tables."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from rich.table import Table

from eval.leakage import LENGTHS
from eval.metrics import LEVEL, Sums, Trio, Unit, difference, documents_needed, gap_closed, interval
from eval.suite import Suite
from eval.suite_run import Cell
from silo.errors import DataError, UsageError
from silo.files import read_json, read_sealed, sealed, write_file, write_json
from silo.markup import number

FORMAT = 1
RESULT = "result.json"
EXACT = 0.01
"""What is called exact: an interval that reaches so far to both sides, as a share of the perplexity."""
HALF_WIDTH = NormalDist().inv_cdf((1 + LEVEL) / 2)
NO_GAP = {"unit": None, "arithmetic": None, "geometric": None}


def result(suite: Suite, cells: Sequence[Cell]) -> dict[str, Any]:
    """All that a report shows, and the sums of each document, by which two results can be compared."""
    return sealed(
        {
            "format": FORMAT,
            "suite": {"name": suite.name, "version": suite.version, "digest": suite.digest},
            "made": origin(),
            "rows": [row(cell, name) for cell in cells for name in cell.mixtures],
            "gap": gaps(suite, cells),
            "exactness": exactness(cells),
            "cells": [
                {"name": cell.model, "domain": cell.domain, "permissive": cell.permissive, **cell.record}
                for cell in cells
            ],
        }
    )


def origin() -> dict[str, Any]:
    """Version, commit and command of this run; files are named without the directories above them."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    here = Path(__file__).parent
    asked = ["git", "log", "-1", "--format=%H", "--", "."]
    found = subprocess.run(asked, cwd=here, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    commit = head.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.stdout.strip() else None
    return {"version": version("silo-lm"), "commit": commit, "command": shlex.join(["silo", *words])}


def row(cell: Cell, mixture: str) -> dict[str, Any]:
    """One number of the table, with its interval where there are documents enough for one."""
    sums = cell.sums(mixture)
    weights = cell.record["mixtures"][mixture]
    return {
        "model": cell.model,
        "domain": cell.domain,
        "mixture": mixture,
        "permissive": cell.permissive,
        "documents": sums.documents,
        "tokens": int(sums.tokens.sum()),
        "perplexity": with_interval(sums, "perplexity"),
        "bits_per_byte": with_interval(sums, "bits_per_byte"),
        "weights": weights["weights"],
        "temperature": weights["temperature"],
        "leakage": cell.record["leakage"],
    }


def with_interval(sums: Sums, measure: Any) -> list[float | None]:
    """Value and the ends of its interval; of one document no interval is known."""
    if sums.documents < 2:
        return [getattr(sums, measure), None, None]
    return list(interval(sums, measure))


def gaps(suite: Suite, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Which share of the way to the reference each mixture goes, over the domains that are not permissive."""
    if suite.reference is None:
        return []
    found = {(cell.model, cell.domain): cell for cell in cells if not cell.permissive}
    names = [name for name in suite.models if name != suite.reference]
    rows = []
    for model in names:
        own = [cell for (name, _), cell in found.items() if name == model]
        for mixture in own[0].mixtures[1:] if own else []:
            trios = [
                Trio(cell.sums("lm"), cell.sums(mixture), found[suite.reference, cell.domain].sums("lm"))
                for cell in own
            ]
            rows.append({"model": model, "mixture": mixture, "domains": len(trios), **gap_row(trios)})
    return rows


def gap_row(trios: Sequence[Trio]) -> dict[str, Any]:
    """The gap of some domains by both means, in perplexity of a token if the tokens are the same, else of a byte."""
    same = all(np.array_equal(each.tokens, trio.restricted.tokens) for trio in trios for each in trio)
    unit: Unit = "token" if same else "byte"
    if sum(trio.restricted.nats("byte") - trio.reference.nats("byte") for trio in trios) <= 0:
        return {**NO_GAP, "why": "the reference is not better than the model alone"}
    try:
        gap = gap_closed(trios, unit=unit)
    except DataError as error:
        return {**NO_GAP, "why": str(error)}
    return {"unit": unit, "arithmetic": list(gap.arithmetic), "geometric": list(gap.geometric), "why": None}


def exactness(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """How exact the perplexities of each domain are at worst, and the smallest sample for ± 1 % of every one of them.

    A domain's documents are the pilot: with as many tokens as ``tokens_needed`` in the suite, no interval is wider.
    """
    found = []
    for domain in dict.fromkeys(cell.domain for cell in cells):
        sums = [cell.sums(mixture) for cell in cells if cell.domain == domain for mixture in cell.mixtures]
        fewest = min(each.documents for each in sums)
        row: dict[str, Any] = {"domain": domain, "documents": fewest, "relative_error": None}
        row |= {"documents_needed": None, "tokens_needed": None}
        if fewest > 1:
            worst = max(sums, key=Sums.standard_error)
            needed = documents_needed(worst, relative_error=EXACT)
            row |= {"relative_error": HALF_WIDTH * worst.standard_error(), "documents_needed": needed}
            row["tokens_needed"] = math.ceil(needed * float(worst.tokens.mean()))
        found.append(row)
    return found


def read_result(path: Path) -> dict[str, Any]:
    """The result in a directory that a suite wrote to, or in a file. Raises :class:`UsageError` if there is none."""
    file = path / RESULT if path.is_dir() else path
    wanted = "the directory of results that `silo eval suite --out` writes"
    value = read_json(file, wanted=wanted)
    if not isinstance(value, dict) or "cells" not in value:
        raise UsageError(f"{file} is no result of a suite; expected {wanted}")
    return read_sealed(file, FORMAT)


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Paired differences of what two results have in common: model, domain and mixture of the same names.

    Raises:
        UsageError: they have nothing in common.
    """
    both = [{(cell["name"], cell["domain"]): as_cell(cell) for cell in each["cells"]} for each in (first, second)]
    rows = []
    for key, cell in both[0].items():
        other = both[1].get(key)
        for mixture in cell.mixtures:
            if other is not None and mixture in other.mixtures:
                rows.append(paired(cell, other, mixture))
    if not rows:
        raise UsageError("the two results have no model, domain and mixture of the same names; expected some in common")
    return {"first": first["suite"], "second": second["suite"], "made": [first["made"], second["made"]], "rows": rows}


def as_cell(value: dict[str, Any]) -> Cell:
    """A cell of a result, as it was measured."""
    return Cell(value["name"], value["domain"], value["permissive"], value)


def paired(cell: Cell, other: Cell, mixture: str) -> dict[str, Any]:
    """How one mixture of two results differs on the same documents; without numbers where the documents differ."""
    named: dict[str, Any] = {"model": cell.model, "domain": cell.domain, "mixture": mixture}
    if cell.record["documents"] != other.record["documents"] or cell.record["bytes"] != other.record["bytes"]:
        return {**named, "why": "measured on different text"}
    if len(cell.record["documents"]) < 2:
        return {**named, "why": "one document has no interval"}
    found = difference(cell.sums(mixture), other.sums(mixture))
    return {
        **named,
        "why": None,
        "documents": len(cell.record["documents"]),
        "bits_per_byte": list(found.bits_per_byte),
        "perplexity_ratio": list(found.perplexity_ratio) if found.perplexity_ratio is not None else None,
        "better": found.better,
    }


# Tables

HEADINGS = ("domain", "model", "mixture", "perplexity", "bits per byte", "in the store")


def cells_of(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        row["domain"],
        row["model"],
        row["mixture"],
        spread(row["perplexity"], 2),
        spread(row["bits_per_byte"], 3),
        leaked(row["leakage"]),
    ]


def spread(value: Sequence[float | None] | None, digits: int) -> str:
    """A value and its interval.

    >>> spread([2.0, 1.5, 2.52], 1), spread([2.0, None, None], 1), spread(None, 1)
    ('2.0 [1.5, 2.5]', '2.0', '—')
    """
    if value is None:
        return "—"
    middle, low, high = value
    return number(middle, digits) + (f" [{number(low, digits)}, {number(high, digits)}]" if low is not None else "")


def leaked(value: dict[str, Any] | None) -> str:
    """The shares of the test text that the store has word for word."""
    if value is None:
        return "—"
    shares = " / ".join(f"{100 * value['shares'][str(least)]:.1f}" for least in LENGTHS)
    return f"{shares} %, longest {value['longest']:,}"


def gap_cells(row: dict[str, Any]) -> list[str]:
    """One line of the table of gaps."""
    return [
        row["model"],
        row["mixture"],
        f"{row['domains']}",
        spread(row["geometric"], 2),
        spread(row["arithmetic"], 2),
    ]


def exact_cells(row: dict[str, Any]) -> list[str]:
    """One line of the table of samples."""
    if row["relative_error"] is None:
        return [row["domain"], f"{row['documents']}", *["—"] * 3]
    return [
        row["domain"],
        f"{row['documents']:,}",
        f"{100 * row['relative_error']:.1f} %",
        f"{row['documents_needed']:,}",
        f"{row['tokens_needed']:,}",
    ]


def compared_cells(row: dict[str, Any]) -> list[str]:
    """One line of a comparison."""
    names = [row["domain"], row["model"], row["mixture"]]
    if row["why"]:
        return [*names, row["why"], "", ""]
    ratio, bits = spread(row["perplexity_ratio"], 4), spread(row["bits_per_byte"], 4)
    return [*names, ratio, bits, f"{100 * row['better']:.0f} %"]


COMPARED = ("domain", "model", "mixture", "perplexity, first / second", "bits per byte, first − second", "first better")
EXACTNESS = ("domain", "documents", "perplexities are exact to ±", "documents for ± 1 %", "tokens for ± 1 %")
GAPS = ("model", "mixture", "domains", "gap closed, geometric", "gap closed, arithmetic")


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal."""
    made = Table(title=title)
    for heading in headings:
        made.add_column(heading)
    for cells in rows:
        made.add_row(*cells)
    return made


def markdown(value: dict[str, Any]) -> str:
    """The result as Markdown, with what it was made with below."""
    suite, made = value["suite"], value["made"]
    parts = [
        f"# Suite {suite['name']}, version {suite['version']}",
        markdown_table(HEADINGS, map(cells_of, value["rows"])),
    ]
    if value["gap"]:
        parts.append(markdown_table(GAPS, map(gap_cells, value["gap"])))
    parts += [markdown_table(EXACTNESS, map(exact_cells, value["exactness"])), notes()]
    identified = {(cell["name"], cell["model"], cell["store"]) for cell in value["cells"]}
    lines = [f"- Command: `{made['command']}`", f"- Version {made['version']}, commit `{made['commit']}`"]
    lines.append(f"- Suite `{suite['digest']}`")
    lines += [
        f"- {name}: model `{model}`" + (f", store `{store}`" if store else "")
        for name, model, store in sorted(identified, key=str)
    ]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def notes() -> str:
    """How to read the table."""
    lengths = " / ".join(map(str, LENGTHS))
    return (
        "In brackets: 95 % bootstrap intervals over documents. In the store: the share of the test tokens inside runs "
        f"of at least {lengths} tokens that the store has word for word, and the longest run."
    )


def markdown_table(headings: Sequence[str], rows: Any) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(value: dict[str, Any], out: Path) -> None:
    """Write ``result.json`` and ``result.md``."""
    write_json(out / RESULT, value)
    write_file(out / "result.md", markdown(value).encode())
