"""Two recorded runs, compared as ``--check`` compares a new one.

python scripts/bench compare BEFORE.json AFTER.json
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from bench.check import settle

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
def main(before: Path, after: Path) -> None:
    """Name what got worse between two recorded runs by more than the spread of both, with exit status 1."""
    settle(json.loads(before.read_text()), json.loads(after.read_text()))
