"""``silo eval study``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from eval.options import parse_methods, require_options
from silo.cli import reports

if TYPE_CHECKING:
    from eval.studies.subject import Subject

OUT = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The record, NAME.json; the figure is NAME.svg."
)
MODEL = click.option("--model", required=True, type=click.Path(path_type=Path), help="Directory of the model.")
DATA = click.option(
    "--data", required=True, multiple=True, type=click.Path(path_type=Path), help="JSON Lines to report on."
)
MAX_TOKENS = click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Read a sample of so many tokens, one passage a document."
)
STORE = click.option("--store", required=True, type=click.Path(path_type=Path), help="The store; it is not changed.")


def subject_options(use: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that choose a :class:`Subject`, with the methods that are used if none are named."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = [
            MODEL,
            STORE,
            click.option("--use", "methods", default=use, callback=parse_methods, show_default=True, help="Methods."),
            DATA,
            click.option(
                "--fit", "fit_on", multiple=True, type=click.Path(path_type=Path), help="Other text, to fit on."
            ),
            click.option("--weights", type=click.Path(path_type=Path), help="A gate or fitted weights, without --fit."),
            MAX_TOKENS,
            OUT,
        ]
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def open_subject(
    model: Path,
    store: Path,
    methods: list[str],
    data: tuple[Path, ...],
    fit_on: tuple[Path, ...],
    weights: Path | None,
    max_tokens: int | None,
    out: Path,
) -> Subject:
    """Check the options and open what they name."""
    from eval.studies.record import require_record_name
    from eval.studies.subject import Subject

    require_record_name(out)
    require_options(methods, store, fit_on[0] if fit_on else None, weights)
    return Subject.open(model, store, methods, data, fit_on=fit_on, weights=weights, budget=max_tokens)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, the first column to the left and numbers to the right."""
    table = Table(title=title)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@click.group()
def study() -> None:
    """Ask one question of a model beside its store: a record and a figure each."""


def render_opt_out(value: dict[str, Any]) -> None:
    """Show each owner's perplexities and whether the last two are equal."""
    from eval.studies.opt_out import most

    rows = []
    for row in value["result"]["owners"]:
        of, best = row["perplexity"], most(list(row["perplexity"]["before"]))
        numbers = [of["before"]["lm"], *(of[moment][best] for moment in ("before", "after", "never"))]
        rows.append([row["owner"], f"{row['store_tokens']:,}", *(f"{each[0]:.2f}" for each in numbers)])
        rows[-1].append("equal" if row["equal"] else "DIFFER")
    columns = ["owner", "tokens in store", "model alone", "before", "after", "never held", "last two, bit for bit"]
    show("perplexity of held-out text", columns, rows)


@study.command("opt-out")
@subject_options("lm,knn,ngram")
@click.option("--owners", "count", default=10, show_default=True, type=click.IntRange(min=1), help="So many of them.")
@click.option("--owner", "names", multiple=True, help="This one in place of the largest; may be given again.")
@reports(render_opt_out)
def opt_out(out: Path, count: int, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Take owners out, one at a time: perplexity before, after, and with a store that never held them.

    The owners are the largest of the store that have held-out text in --data. Removals are of a copy. The last two must
    be equal in every bit; if they are not, the record is written and the command fails.

    Example: silo eval study opt-out --model MODEL --store STORE --data test.jsonl --fit val.jsonl --out opt-out.json
    """
    from eval.studies import opt_out as study
    from eval.studies.record import write_study
    from silo.errors import StoreError
    from silo.progress import progress_bar

    subject = open_subject(out=out, **options)
    with progress_bar("owners") as progress:
        result = study.study(subject, study.owners_of(subject, names, count), progress)
    record = write_study(out, "opt-out", subject.described(), result, study.figure(result))
    if not result["equal"]:
        unequal = [row["owner"] for row in result["owners"] if not row["equal"]]
        raise StoreError(
            f"after the removal of {', '.join(unequal)} the store does not answer as one that never held them; "
            f"{out} says where"
        )
    return record
