"""``silo quickstart``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from silo.cli import reports


def render(value: dict[str, Any]) -> None:
    """Show the tables, and end with one line of JSON."""
    report, console = value.pop("details"), Console()
    console.print(audit_table(report["audit"]))
    console.print(perplexity_table(report["owners"], report["perplexity"]))
    removal = report["removal"]
    same = "equals" if removal["equal"] else "DIFFERS FROM"
    console.print(
        f"{removal['owner']} removed: {removal['documents']} documents, {removal['tokens']:,} tokens. "
        f"At {removal['positions']:,} test positions every distribution {same} that of a store built without them, "
        "bit for bit."
    )
    click.echo(json.dumps(value))


def audit_table(audit: dict[str, Any]) -> Table:
    """Documents and tokens by tier and licence."""
    table = Table(title="What was collected")
    for column in ("tier", "licence", "documents", "pairs", "tokens"):
        table.add_column(column, justify="left" if column in ("tier", "licence") else "right", overflow="fold")
    for row in [*audit["permissive"], *audit["restricted"]]:
        table.add_row(row["tier"], row["license"], *(f"{row[name]:,}" for name in ("documents", "pairs", "tokens")))
    return table


def perplexity_table(owners: list[dict[str, Any]], total: dict[str, Any]) -> Table:
    """Test perplexity of each mixture, and of the last one after the removal."""
    mixtures = list(total["restricted"])
    table = Table(title="Perplexity of held-out text")
    for column in ("owner", *mixtures, f"{mixtures[-1]}, after removal"):
        table.add_column(column, justify="left" if column == "owner" else "right", overflow="fold")
    for row in owners:
        mark = " (removed)" if row["removed"] else ""
        numbers = [*row["before"].values(), row["after"][mixtures[-1]]]
        table.add_row(row["owner"] + mark, *(f"{number:.1f}" for number in numbers))
    table.add_section()
    numbers = [*total["restricted"].values(), total["after_removal"][mixtures[-1]]]
    table.add_row("all owners", *(f"{number:.1f}" for number in numbers))
    return table


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("quickstart"), help="Directory for all results.")
@click.option("--downloads", type=click.Path(path_type=Path), help="Where the wheels are or go; default OUT/downloads.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seeds the model and the order of its text.")
@reports(render)
def quickstart(out: Path, downloads: Path | None, seed: int) -> dict[str, Any]:
    """Run the whole of SILO on real packages, in minutes.

    Trains a small mixture-of-experts model on permissively licensed packages that are installed here, puts five
    copyleft packages from PyPI into a store, measures perplexity with and without it, removes one owner, and proves
    that nothing of theirs is left. Writes OUT/report.html and OUT/report.json.
    """
    from eval.quickstart import last_line
    from eval.quickstart import quickstart as run

    report = run(out, downloads, seed)
    return {**last_line(report, out), "details": report}
