"""Record two runs of the quickstart with one seed: what they measured, what they needed, and whether they agree.

    silo quickstart --out first > first.log
    silo quickstart --out second > second.log
    python scripts/record_quickstart.py first.log second.log > scripts/results/quickstart.json

Prints one JSON document: machine, command, seed, data hash, result. Exit status 1 if the two ``report.json`` differ in
anything but times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from recording import commit, machine


@click.command()
@click.argument("logs", nargs=2, type=click.Path(path_type=Path, exists=True))
def main(logs: tuple[Path, Path]) -> None:
    """Compare two runs by what they printed; the last line names the report."""
    lines = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    reports = [json.loads(Path(line["report"]).with_name("report.json").read_text()) for line in lines]
    times = [report.pop("times") for report in reports]
    report, equal = reports[0], reports[0] == reports[1]
    result = {
        "machine": machine(),
        "command": f"silo quickstart --seed {report['seed']}",
        "commit": commit(),
        "seed": report["seed"],
        "data": {"permissive": report["training"]["corpus"], "store": report["store"]["hash"]},
        "result": {
            "reports_equal_but_for_times": equal,
            "seconds": times,
            "peak_memory_bytes": [line["peak_memory_bytes"] for line in lines],
            "perplexity": report["perplexity"],
            "owners": {row["owner"]: [row["before"], row["after"]] for row in report["owners"]},
            "removal": report["removal"],
        },
    }
    print(json.dumps(result, indent=1))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
