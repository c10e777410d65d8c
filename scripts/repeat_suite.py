"""Does a suite give the same numbers on another processor?

    python scripts/repeat_suite.py pypi --base QUICKSTART > scripts/results/suite_repeated.json

`silo eval suite` is run again and again on the same model and store, in processes that are told to use fewer threads or
older instructions of this processor than it has, so that sums are added up in another order: what another machine would
do. Every number is compared with that of the first run. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from experiment import say
from recording import command, commit, machine

PROCESSORS = {
    "as it is": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "no vectors wider than SSE": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "FAISS_OPT_LEVEL": "generic",
    },
}
"""What torch, MKL, oneDNN and FAISS are told, by what stands for it in the record."""

ASKED = ("model", "domain", "mixture", "tokens")


@click.command()
@click.argument("suite")
@click.option("--base", required=True, type=click.Path(path_type=Path, exists=True), help="What its paths start from.")
def main(suite: str, base: Path) -> None:
    """Run a suite on each, and print one JSON document."""
    with tempfile.TemporaryDirectory(prefix="silo-repeated-") as scratch:
        runs = {}
        for name, settings in PROCESSORS.items():
            out = Path(scratch) / name
            asked = [sys.executable, "-m", "silo", "eval", "suite", suite, "--base", str(base), "--out", str(out)]
            subprocess.run(asked, env={**os.environ, **settings}, check=True, stdout=subprocess.DEVNULL)
            runs[name] = json.loads((out / "result.json").read_bytes())
            say(name)(f"{len(runs[name]['rows'])} numbers")
    first, *others = runs.values()
    for run in others:
        require_same_questions(first, run)
    report = {
        "machine": machine(),
        "command": command(),
        "commit": commit(),
        "data": first["suite"]["digest"],
        "result": {
            "suite": first["suite"],
            "settings": PROCESSORS,
            "rows": [
                {
                    **{key: row[key] for key in ASKED},
                    "perplexity": [row["perplexity"][0], *(run["rows"][number]["perplexity"][0] for run in others)],
                }
                for number, row in enumerate(first["rows"])
            ],
        },
    }
    print(json.dumps(report, indent=1))


def require_same_questions(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise :class:`click.ClickException` if two runs did not answer the same."""
    asked = [[[row[key] for key in ASKED] for row in run["rows"]] for run in (one, other)]
    if asked[0] != asked[1]:
        raise click.ClickException("the runs answered other questions than the first; nothing was compared")


if __name__ == "__main__":
    main()
