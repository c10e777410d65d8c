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
    click.echo(f"trained on  {summary['tokens']:,} tokens of {summary['documents']:,} documents, "
               f"{summary['steps']:,} steps, loss {summary['loss']:.3f} nats a token")
    click.echo(f"licences    {', '.join(f'{name} ({count})' for name, count in summary['documents_by_license'].items())}")


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
    from training.loop import train as run
    from training.recipe import Recipe

    return run(load_config(Recipe, config, overrides))
