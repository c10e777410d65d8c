"""python scripts/bench SUBJECT …: each subject is a module, and loaded when it is asked for."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # from which scripts import each other

SUBJECTS = {
    "ceiling": "What the machine can do at best.",
    "model": "Training steps of layers: transformers' Llama and Mixtral, PEER-pytorch.",
    "training_step": "The trainer's step: the bare one.",
    "store": "Adding, searching and removing, by owners: FAISS, Lucene, the forward pass.",
    "opening": "Opening a store: FAISS.",
    "bm25": "Building and searching an index of blocks: Pyserini, bm25s.",
    "ngram": "The ∞-gram, by owners: infini-gram, one suffix array.",
    "mixing": "Scoring by mixtures: the model alone, SILO's and knn-transformers' loops.",
    "evaluation": "Scoring by the model alone: lm-evaluation-harness.",
    "collect": "Collecting, auditing and tokenising: tokenizers.",
    "laundering": "Planted passages, and how many are found.",
    "control": "Codes fitted on permissive or the store's own text.",
    "scale": "Bytes, memory and time of a store that grows.",
    "growth": "Exponents of searching, opening, removing and encoding.",
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
    """Ours in turns with its peers, named after the colon; each subject prints one JSON document on stdout. Peers that
    SILO itself does not need come with ``pip install '.[bench]'``."""


if __name__ == "__main__":
    main(prog_name="python scripts/bench")
