"""The licence of every distribution in this environment, how it was read, and what could not be.

    python scripts/licences_of_distributions.py [--sample 40 --seed 0]

Prints one JSON document: a row a distribution, with each place that says something of its licence.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections import Counter

import click
from recording import command, commit, machine

from silo.distributions import Distribution, installed
from silo.errors import SiloError
from silo.licensing import NO_LICENSE, tier_of


@click.command()
@click.option("--sample", type=int, help="Only so many, drawn by the seed, for a check by hand.")
@click.option("--seed", default=0, show_default=True)
def main(sample: int | None, seed: int) -> None:
    """Read them all."""
    names = sorted({str(each.metadata["Name"]) for each in importlib.metadata.distributions()}, key=str.lower)
    rows = [row(name) for name in names]
    tiers = Counter(str(each["tier"]) for each in rows)
    unread = [each["name"] for each in rows if each["license"] == NO_LICENSE]
    shown = sorted(random.Random(seed).sample(rows, sample), key=lambda each: str(each["name"])) if sample else rows
    report = {
        "machine": machine(),
        "command": command(),
        "commit": commit(),
        "seed": seed,
        "result": {"distributions": len(rows), "tiers": dict(sorted(tiers.items())), "unread": unread, "rows": shown},
    }
    print(json.dumps(report, indent=1))


def row(name: str) -> dict[str, object]:
    """One distribution."""
    try:
        found: Distribution = installed(name)
    except SiloError as error:
        return {"name": name, "tier": "none", "license": "", "said": [], "why": str(error)}
    said = [{"place": s.place, "raw": s.raw[:120], "read": s.license} for s in found.statements()]
    return {"name": name, "tier": tier_of(found.license).value, "license": found.license, "said": said}


if __name__ == "__main__":
    main()
