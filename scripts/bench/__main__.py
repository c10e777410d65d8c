"""python scripts/bench SUBJECT …: each subject is a module, and loaded when it is asked for."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # from which scripts import each other

SUBJECTS = {
    "bm25": "BM25 beside Pyserini and bm25s.",
    "ceiling": "What the machine can do at best.",
    "growth": "How cost grows with tokens and owners.",
    "opening": "Opening a store beside FAISS alone.",
    "compare": "Two recorded runs: what got worse.",
}


class Subjects(click.Group):
    """Commands that are modules of this package."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All, in the order of the table."""
        return list(SUBJECTS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Load one."""
        return importlib.import_module(f"bench.{name}").main if name in SUBJECTS else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without loading them."""
        with formatter.section("Subjects"):
            formatter.write_dl(list(SUBJECTS.items()))


@click.command(cls=Subjects)
def main() -> None:
    """Ours beside its peers: each subject prints one JSON document on stdout, and its progress on stderr."""


if __name__ == "__main__":
    main(prog_name="python scripts/bench")
