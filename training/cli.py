"""``silo train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from silo.cli import reports
from silo.config import load_config


def render(summary: dict[str, Any]) -> None:
    """Say in three lines what was trained, or in a few more what would be."""
    licenses = ", ".join(f"{name} ({count:,})" for name, count in summary["documents_by_license"].items())
    read = f"{summary['tokens']:,} tokens of {summary['documents']:,} documents"
    if "model" in summary:
        click.echo(f"model       {summary['model']} ({summary['parameters']:,} parameters)")
        click.echo(f"trained on  {read}, {summary['steps']:,} steps, loss {summary['loss']:.3f} nats a token")
        click.echo(f"licences    {licenses}")
        return
    click.echo(f"model       {summary['parameters']:,} parameters")
    steps = f"{summary['steps']:,} steps of {summary['tokens_a_step']:,}, {summary['warmup_steps']:,} of them warm-up"
    click.echo(f"would read  {read}, in {steps}")
    click.echo(f"licences    {licenses}")
    for name, domain in summary["domains"].items():
        has = f"{domain['tokens']:,} tokens, {domain['sequences']:,} sequences"
        click.echo(f"domain      {name}: {has}, weight {domain['weight']:.4f}, {domain['passes']:.2f} passes")
    click.echo("nothing was trained")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Tokenise, and say what would be trained; train nothing.")
@reports(render)
def train(config: Path, overrides: tuple[str, ...], dry_run: bool) -> dict[str, Any]:
    """Train tokenizer and model by the recipe CONFIG, a YAML file or the name of a recipe that comes with SILO.

    KEY=VALUE overrides one of its settings. A document that is not permissively licensed stops the run before any text
    is read. A run that was killed goes on where it stood when the same command is given again. The same module runs
    under accelerate:

        silo train nano corpus=corpus/permissive output=model

        accelerate launch -m silo train CONFIG.yaml
    """
    from training.recipe import Recipe, find_recipe

    recipe = load_config(Recipe, find_recipe(config), overrides)  # before what takes seconds to import

    if dry_run:
        from training.loop import describe

        return describe(recipe)

    from accelerate import PartialState

    from training.loop import train as run

    summary = run(recipe, note=lambda line: click.echo(line, err=True))
    if not PartialState().is_main_process:
        raise click.exceptions.Exit(0)  # One process speaks for all.
    return summary
