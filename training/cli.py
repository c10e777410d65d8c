"""``silo train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from silo.cli import reports
from silo.config import load_config


def render(summary: dict[str, Any]) -> None:
    """Say in three lines what was trained."""
    click.echo(f"model       {summary['model']} ({summary['parameters']:,} parameters)")
    read = f"{summary['tokens']:,} tokens of {summary['documents']:,} documents"
    click.echo(f"trained on  {read}, {summary['steps']:,} steps, loss {summary['loss']:.3f} nats a token")
    licenses = [f"{name} ({count})" for name, count in summary["documents_by_license"].items()]
    click.echo(f"licences    {', '.join(licenses)}")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@reports(render)
def train(config: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train tokenizer and model by the recipe CONFIG, a YAML file; KEY=VALUE overrides one of its settings.

    A document that is not permissively licensed stops the run before any text is read. The same module runs under
    accelerate:

        accelerate launch -m silo train CONFIG.yaml
    """
    from training.recipe import Recipe

    recipe = load_config(Recipe, config, overrides)  # before what takes seconds to import

    from accelerate import PartialState

    from training.loop import train as run

    summary = run(recipe)
    if not PartialState().is_main_process:
        raise click.exceptions.Exit(0)  # One process speaks for all.
    return summary
