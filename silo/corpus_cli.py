"""``silo corpus``: collect licensed text, and say what a corpus holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from silo.cli import STORE_TEXTS, named, reports
from silo.errors import UsageError
from silo.findings import OUTCOMES
from silo.licensing import DEFAULT_POLICY, load_policy

TITLES = {
    "restricted": "declared permissive, and restricted by what else is said of them",
    "cut": "passages cut out",
    "stricter": "in a stricter tier than was declared",
    "refused": "refused",
}


def render(summary: dict[str, Any]) -> None:
    """Show an audit to a person: what is there by tier and licence, and what was found on the way."""
    console = Console()
    names = ("documents", "pairs", "characters", "tokens", "tokenizer", "weights")
    counts = [name for name in names if name in _first(summary["licenses"])]
    table = Table(title=escape(summary["corpus"]), title_justify="left")
    for name in ("tier", "license", *counts, "owners"):
        table.add_column(name, justify="right" if name in counts else "left", overflow="fold")
    for line in summary["licenses"]:
        numbers = [f"{line[name]:,}" for name in counts]
        table.add_row(line["tier"], escape(line["license"]), *numbers, escape(_some(line["owners"])))
    console.print(table)
    for outcome in OUTCOMES:
        if summary.get(outcome):
            console.print(_findings(TITLES[outcome], summary[outcome]))
    if "repeated" in summary:
        console.print(_repeated(summary["repeated"]))


def _findings(title: str, groups: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("reason", "documents", "for example"):
        table.add_column(name, justify="right" if name == "documents" else "left", overflow="fold")
    for group in groups:
        example = group["examples"][0]
        table.add_row(group["reason"], f"{group['documents']:,}", escape(f"{example['id']}: {example['detail']}"))
    return table


def _repeated(found: dict[str, Any], shown: int = 20) -> Table:
    title = f"{found['documents']:,} permissive documents repeat text of {found['compared_with']:,} others"
    table = Table(title=title, title_justify="left")
    for name in ("document", "words", "of"):
        table.add_column(name, justify="right" if name == "words" else "left", overflow="fold")
    for row in sorted(found["rows"], key=lambda row: -row["words"])[:shown]:
        table.add_row(escape(row["id"]), f"{row['words']:,}", escape(f"{row['of']} ({row['license']})"))
    return table


def _first(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return lines[0] if lines else {}


def _some(owners: list[str], shown: int = 3) -> str:
    more = f" and {len(owners) - shown} more" if len(owners) > shown else ""
    return ", ".join(owner or "unknown" for owner in owners[:shown]) + more


@click.group()
def corpus() -> None:
    """Collect licensed text and audit it.

    A corpus has two sides: permissive text, which may train a model, and restricted text, which may only be read from a
    datastore. A document whose licence is unknown is restricted.
    """


PATH = click.Path(path_type=Path)


@corpus.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="Directory to make.")
@click.option(
    "--policy",
    type=PATH,
    help="YAML: tiers by licenses, owners or sources, and evidence; or `olc`, the reading of SILO's paper.",
)
@click.option("--recipe", type=PATH, help="YAML: fields and licences of hf: and Parquet sources.")
@click.option("--against", multiple=True, metavar="SOURCE", help="Evaluation text that training text must not repeat.")
@click.option("--pairs", is_flag=True, help="Add text pairs: signature and docstring, body.")
@click.option(
    "--diversify", type=PATH, metavar="MODEL", help="Drop training documents that mean what others mean (D4)."
)
@click.option("--keep", type=float, default=0.8, show_default=True, help="Share that --diversify keeps.")
@click.option("--downloads", type=PATH, help="Where archives from PyPI are kept and looked for.")
@reports(render)
def collect(
    sources: tuple[str, ...], out: Path, policy: Path | None, diversify: Path | None, keep: float, **options: Any
) -> dict[str, Any]:
    """Read each SOURCE and write its documents, sorted by licence, to --out.

    SOURCE is a .jsonl, .parquet or text file (plain, .gz or .zst), a directory of such files, hf:NAME or
    hf:NAME#CONFIG (a data set of the Hugging Face hub, or a directory), python:PKG (installed here) or
    pypi:PKG==VERSION#sha256=HEX (downloaded as data, never installed).

    A document whose own text, or a licence file beside it, states a stricter licence than is declared, goes by the
    stricter. Passages that a permissive document shares with restricted text are cut out of it. All is listed.

        silo corpus collect python:rich python:click notes.jsonl --out corpus
    """
    from silo.collect import collect as run

    if not 0 < keep <= 1:
        raise UsageError(f"--keep is {keep}; expected a share above 0 and at most 1")
    rules = load_policy(policy) if policy is not None else DEFAULT_POLICY
    options["diversify"] = None if diversify is None else (diversify, keep)
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,} documents"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {source: bars.add_task(escape(source), total=None, start=False) for source in sources}

        def progress(source: str, documents: int) -> None:
            if source not in tasks:
                tasks[source] = bars.add_task(escape(source), total=None, start=False)
            if documents == 1:
                bars.start_task(tasks[source])
            bars.update(tasks[source], completed=documents)

        summary = run(list(sources), out, policy=rules, progress=progress, **options)
    return {"corpus": str(out), **summary}


@corpus.command()
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--model", type=PATH, help="Directory with a tokenizer.json: count tokens too.")
@click.option(
    "--against", metavar="STORE|SOURCE", help="Look for its text in the permissive side: a store, or any source."
)
@click.option("--html", type=PATH, help="Write the audit as one self-contained page, with all evidence.")
@reports(render)
def audit(directory: Path, model: Path | None, against: str | None, html: Path | None) -> dict[str, Any]:
    """Read the corpus in DIR, check every checksum, and count documents by tier, licence and owner.

    Of a model of ours in DIR it lists the documents that taught it, by licence.

        silo corpus audit corpus --against store --html audit.html
    """
    from silo.audit import audit as run
    from silo.audit import repeated
    from silo.files import require_place
    from silo.sources import open_source

    if html is not None:
        require_place(html, "--html")
    summary = {"corpus": str(directory), **run(directory, _tokenizer(model) if model is not None else None)}
    if against is not None:
        is_store = (Path(against) / "store.json").is_file()
        others = named(STORE_TEXTS)(Path(against)) if is_store else open_source(against)
        summary["repeated"] = repeated(directory, others)
    if html is not None:
        _write_page(summary, directory, html)
    return summary


def _write_page(summary: dict[str, Any], directory: Path, html: Path) -> None:
    from silo.audit import read_findings
    from silo.audit_page import render_audit
    from silo.files import write_file

    if not (directory / "audit.json").is_file():
        raise UsageError(f"{directory} has no audit.json; --html wants the directory that `silo corpus collect` made")
    findings: dict[str, list[dict[str, str]]] = {}
    for finding in read_findings(directory):
        row = {"id": finding.id, "reason": finding.reason, "detail": finding.detail}
        findings.setdefault(finding.outcome, []).append(row)
    write_file(html, render_audit(summary, findings).encode())


def _tokenizer(model: Path) -> Any:
    path = model / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{path} does not exist; --model wants a directory with a tokenizer.json")
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path))
