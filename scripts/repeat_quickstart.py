"""Run the quickstart twice with one seed, and say how long it took, what it needed, and whether it repeats.

    python scripts/repeat_quickstart.py --out DIR [--downloads DIR] [--seed N]

The last line of stdout is one JSON document: machine, command, seed, data hash, result. Exit status 1 if the two
``report.json`` differ in anything but times.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

PACKAGES = ("torch", "transformers", "accelerate", "faiss-cpu", "pyserini", "numpy", "tokenizers")


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A directory for both runs.")
@click.option("--downloads", type=click.Path(path_type=Path), help="Where the wheels are or go.")
@click.option("--seed", default=0)
def main(out: Path, downloads: Path | None, seed: int) -> None:
    """Compare two runs of the quickstart."""
    runs = [run(out / name, (downloads or out / "downloads").resolve(), seed) for name in ("first", "second")]
    reports = [json.loads((out / name / "report.json").read_text()) for name in ("first", "second")]
    times = [report.pop("times") for report in reports]
    report, equal = reports[0], reports[0] == reports[1]
    result = {
        "machine": machine(),
        "command": f"silo quickstart --seed {seed}",
        "commit": commit(),
        "seed": seed,
        "data": {"permissive": report["training"]["corpus"], "store": report["store"]["hash"]},
        "result": {
            "reports_equal_but_for_times": equal,
            "wall_seconds": [one["wall_seconds"] for one in runs],
            "seconds_by_step": times,
            "peak_memory_bytes": [one["peak_memory_bytes"] for one in runs],
            "perplexity": report["perplexity"],
            "owners": {row["owner"]: [row["before"], row["after"]] for row in report["owners"]},
            "removal": report["removal"],
        },
    }
    print(json.dumps(result))
    sys.exit(0 if equal else 1)


def run(out: Path, downloads: Path, seed: int) -> dict[str, Any]:
    """One quickstart in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "silo", "quickstart", "--out", str(out), "--downloads", str(downloads)]
    done = subprocess.run([*command, "--seed", str(seed)], stdout=subprocess.PIPE, check=True, text=True)
    seconds = time.perf_counter() - start
    return {
        "wall_seconds": round(seconds, 1),
        "peak_memory_bytes": json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"],
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: version(name) for name in PACKAGES}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "versions": versions,
    }


def commit() -> str:
    """The commit that is checked out, with a plus if the tree differs from it."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


if __name__ == "__main__":
    main()
