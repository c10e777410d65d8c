"""``silo generate``, and the options by which a command is told what it may use of a store."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from silo.cli import Finite, reports
from silo.errors import DataError, UsageError

if TYPE_CHECKING:
    from datastore.policy import QueryPolicy

PATH = click.Path(path_type=Path)
SHOWN_SOURCES = 12
PURPOSES = ("commercial", "research")


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a policy at query time; it gets ``policy``."""

    @functools.wraps(function)
    def command(*args: Any, purpose: str | None, **kwargs: Any) -> Any:
        from datastore.policy import QueryPolicy

        named: dict[str, dict[str, tuple[str, ...]] | None] = {}
        for way in ("allow", "deny"):
            kinds = {kind: kwargs.pop(f"{way}_{kind}") for kind in ("licenses", "owners", "sources")}
            named[way] = kinds if any(kinds.values()) else None
        return function(*args, policy=QueryPolicy.of(**named, purpose=purpose), **kwargs)

    options = [
        click.option("--allow", "allow_licenses", multiple=True, metavar="SPDX", help="Use only such: 'CC-BY-*'."),
        click.option("--allow-owner", "allow_owners", multiple=True, metavar="NAME", help="Use an owner's too."),
        click.option("--allow-source", "allow_sources", multiple=True, metavar="S", help="Use a source's too."),
        click.option("--deny", "deny_licenses", multiple=True, metavar="SPDX", help="Use none of such: '*-NC-*'."),
        click.option("--deny-owner", "deny_owners", multiple=True, metavar="NAME", help="Use none of an owner's."),
        click.option("--deny-source", "deny_sources", multiple=True, metavar="S", help="Use none of a source's."),
        click.option("--purpose", type=click.Choice(PURPOSES), help="Use only what its licence permits for this."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def render(value: dict[str, Any]) -> None:
    """Show the text, and what it rests on."""
    click.echo(value["text"])
    if not value["documents"]:
        return
    table = Table(title=f"Of {len(value['tokens'])} tokens, {value['lm']['tokens']:.1f} come from the model itself")
    for column in ("tokens", "document", "owner", "licence", "source"):
        table.add_column(column, justify="right" if column == "tokens" else "left", overflow="fold")
    for row in value["documents"][:SHOWN_SOURCES]:
        named = (row["title"] or row["document"], row["owner"], row["license"], row["source"])
        table.add_row(f"{row['tokens']:.2f}", *map(escape, named))
    rest = value["documents"][SHOWN_SOURCES:]
    if rest:
        table.add_row(f"{sum(row['tokens'] for row in rest):.2f}", f"{len(rest):,} others", "", "", "")
    Console().print(table)
    if value["notice"]:
        click.echo(value["notice"])


@click.command()
@click.argument("prompt")
@click.option("--model", required=True, type=PATH, help="Directory of the model.")
@click.option("--store", type=PATH, help="The store; without one the model writes alone.")
@click.option("--use", metavar="METHODS", help="Such as lm,knn,ngram. Default: what is weighed.")
@click.option(
    "--weights",
    metavar="FILE",
    help='JSON: a gate, weights that --save-weights wrote, or such as {"knn": 0.3}. Default: the store\'s gate.',
)
@click.option(
    "--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="So many tokens at most."
)
@click.option("--temperature", default=1.0, show_default=True, type=Finite(min=0), help="0: the likeliest.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of the drawing of tokens."
)
@click.option(
    "--longest-copy",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Write at most so many tokens in a row that stand in a document of the store.",
)
@reports(render)
@policy_options
def generate(
    prompt: str,
    model: Path,
    store: Path | None,
    use: str | None,
    weights: str | None,
    policy: QueryPolicy,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    longest_copy: int | None,
) -> dict[str, Any]:
    """Write on from PROMPT (- for standard input), and say which documents the text comes from.

    --allow names what may be used, and --deny what may not, by licence (SPDX, with *), owner or source; --purpose
    leaves out what its licence does not permit for it. What is left out enters no probability.

    Example: silo generate --model MODEL --store STORE --weights gate.json --deny-owner 'Ada' 'def main('
    """
    from datastore.loading import load_by
    from silo.progress import progress_bar

    text = read_prompt(prompt)
    lm = load_by(policy, model, store=store, use=use, weights=weights)
    with progress_bar("generate") as progress:
        answer = lm.generate_with_sources(
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            longest_copy=longest_copy,
            progress=progress,
        )
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        **answer.explanation.to_json(),
        "model": lm.mixture.model.fingerprint,
        "methods": list(lm.weighing.methods),
        "policy": policy.to_json(),
        "longest_copy": longest_copy,
    }


def read_prompt(prompt: str) -> str:
    """The prompt that is meant. Raises :class:`DataError` or :class:`UsageError` if it is no text."""
    try:
        text = io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()), "utf-8").read() if prompt == "-" else prompt
        text.encode()  # bytes that are none come in arguments as lone surrogates
    except UnicodeError as error:
        if prompt == "-":
            raise DataError(f"standard input is not UTF-8 ({error}); expected a text to go on from") from None
        raise UsageError("PROMPT is not UTF-8; expected a text to go on from, or - for standard input") from None
    return text
