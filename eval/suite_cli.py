"""``silo eval suite`` and ``silo eval compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from silo.cli import reports


def render_suite(value: dict[str, Any]) -> None:
    """Show the tables, and say where the rest is."""
    from eval import suite_report as report

    console = Console()
    title = f"suite {value['suite']['name']}, version {value['suite']['version']}"
    console.print(report.table(title, report.HEADINGS, [report.cells_of(row) for row in value["rows"]]))
    if value["gap"]:
        console.print(report.table("gap closed", report.GAPS, [report.gap_cells(row) for row in value["gap"]]))
    console.print(report.notes())


@click.command()
@click.argument("suite", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of cells, weights and results.")
@click.option(
    "--base", default=Path("."), type=click.Path(path_type=Path), help="The suite's paths are relative to it."
)
@reports(render_suite)
def suite(suite: Path, overrides: tuple[str, ...], out: Path, base: Path) -> dict[str, Any]:
    """Measure the models of SUITE on its domains, and write result.json, result.md and result.html to --out.

    SUITE is a YAML file, or the name of one that comes with SILO: quickstart, pypi or silo14. Settings can be changed
    by key=value. What --out already holds is not measured again.

    Example: silo eval suite quickstart --base QUICKSTART --out results
    """
    from eval import suite_report as report
    from eval.suite import load_suite
    from eval.suite_page import write_page
    from eval.suite_run import run
    from silo.progress import progress_bar

    loaded = load_suite(suite, overrides)
    with progress_bar("suite") as progress:
        cells = run(loaded, out, base, progress)
    value = report.result(loaded, cells)
    report.write_result(value, out)
    write_page(value, out)
    return value


def render_comparison(value: dict[str, Any]) -> None:
    """Show the differences."""
    from eval import suite_report as report

    rows = [report.compared_cells(row) for row in value["rows"]]
    Console().print(report.table("first against second", report.COMPARED, rows))


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write the comparison as a page to this file too.")
@reports(render_comparison)
def compare(first: Path, second: Path, html: Path | None) -> dict[str, Any]:
    """Compare two results of suites, document by document, with intervals of the differences.

    Example: silo eval compare results-before results-after
    """
    from eval import suite_report as report
    from eval.suite_page import render_comparison_page
    from silo.files import require_place, write_file

    if html is not None:
        require_place(html, "--html")
    value = report.compare(report.read_result(first), report.read_result(second))
    if html is not None:
        write_file(html, render_comparison_page(value).encode())
    return value
