"""``silo corpus``: collect licensed text, and say what a corpus holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from silo import corpus as corpora
from silo.cli import reports
from silo.errors import UsageError
from silo.licensing import DEFAULT_POLICY, load_policy


def render(summary: dict[str, Any]) -> None:
    """Show an audit to a person: what is there by tier and licence, and what was refused."""
    console = Console()
    counts = [name for name in ("documents", "pairs", "characters", "tokens") if name in _first(summary["licenses"])]
    table = Table(title=escape(summary["corpus"]), title_justify="left")
    for name in ("tier", "license", *counts, "owners"):
        table.add_column(name, justify="right" if name in counts else "left", overflow="fold")
    for line in summary["licenses"]:
        numbers = [f"{line[name]:,}" for name in counts]
        table.add_row(line["tier"], escape(line["license"]), *numbers, escape(_some(line["owners"])))
    console.print(table)
    if not summary["refused"]:
        return
    refused = Table(title="refused", title_justify="left")
    for name in ("reason", "documents", "for example"):
        refused.add_column(name, justify="right" if name == "documents" else "left", overflow="fold")
    for group in summary["refused"]:
        example = group["examples"][0]
        refused.add_row(group["reason"], f"{group['documents']:,}", escape(f"{example['id']}: {example['detail']}"))
    console.print(refused)


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


@corpus.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to make.")
@click.option("--policy", type=click.Path(path_type=Path), help="YAML with tiers by licenses, owners or sources.")
@click.option("--pairs", is_flag=True, help="Add text pairs: signature and docstring, body.")
@click.option("--downloads", type=click.Path(path_type=Path), help="Where archives from PyPI are kept and looked for.")
@reports(render)
def collect(
    sources: tuple[str, ...], out: Path, policy: Path | None, pairs: bool, downloads: Path | None
) -> dict[str, Any]:
    """Read each SOURCE and write its documents, sorted by licence, to --out.

    SOURCE is a .jsonl, .jsonl.gz or .jsonl.zst file, hf:NAME (a data set of the Hugging Face hub, or a directory),
    python:PKG (installed here) or pypi:PKG==VERSION#sha256=HEX (downloaded as data, never installed).

        silo corpus collect python:rich python:click notes.jsonl --out corpus
    """
    rules = load_policy(policy) if policy is not None else DEFAULT_POLICY
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,} documents"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {source: bars.add_task(escape(source), total=None, start=False) for source in sources}

        def progress(source: str, documents: int) -> None:
            if documents == 1:
                bars.start_task(tasks[source])
            bars.update(tasks[source], completed=documents)

        summary = corpora.collect(list(sources), out, policy=rules, pairs=pairs, downloads=downloads, progress=progress)
    return {"corpus": str(out), **summary}


@corpus.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="Directory with a tokenizer.json: count tokens too.")
@reports(render)
def audit(directory: Path, model: Path | None) -> dict[str, Any]:
    """Read the corpus in DIR, check every checksum, and count documents by tier and licence.

    silo corpus audit corpus --model model
    """
    return {"corpus": str(directory), **corpora.audit(directory, _tokenizer(model) if model is not None else None)}


def _tokenizer(model: Path) -> Any:
    path = model / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{path} does not exist; --model wants a directory with a tokenizer.json")
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path))
