"""The section of RESULTS.md that tells of the reference experiment."""

from __future__ import annotations

import math
import statistics
from typing import Any

from recording import provenance
from render_model import columns, curves
from where_loss_lies import table

from silo.nearest import USUAL

TITLES = {"permissive": "permissive", "everything": "everything"}


def reference(record: dict[str, Any]) -> str:
    """Two models and their stores on all domains."""
    result = record["result"]
    runs, ratios = result["runs"], result["ratios"]
    one = runs["permissive"]
    restricted = {name: of for name, of in ratios.items() if not of["permissive"]}
    free = {name: of for name, of in ratios.items() if of["permissive"]}
    best = next(row for row in result["gap"] if row["model"] == "permissive" and row["mixture"] == "all")
    return f"""## Does a store make up for what the weights may not learn from?

Two models of one shape ({one["parameters"]:,} parameters, top-2 of 8 experts), with one tokenizer, the same first \
weights and {one["tokens"]:,} tokens in {one["steps"]:,} steps each: one taught by the permissive domains only, the \
other by all nine. Each then has a store of the same {result["store"]["tokens"]:,} tokens of restricted text, of \
{result["store"]["owners"]} owners, of the corpus that the second one's training text was drawn from. Test perplexity, \
each document alone; {neighbours(result)} and ∞-gram, λ and τ fitted on each domain's validation text; "gate" is \
learnt from permissive text and the same for all. Goals: c / b at most 0.6, c / d at most 1.05.

{provenance(record)}
- Before it: `python scripts/reference_experiment.py train permissive … --tokens {one["tokens"]}` and `… train \
everything …`, at commit `{one["commit"]}`

{_domains(result["rows"], restricted)}

Geometric mean of c / b: {_mean(restricted, "c / b"):.3f}; of c / d: {_mean(restricted, "c / d"):.3f}. Of the gap \
between (a) and (b) the store closes {_gap(best)}.

Permissive text beside the same store:

{_domains(result["rows"], free)}

Where the loss of (c) lies on restricted text: tokens by the longest suffix of their context that the store knows, and \
mean nats a token.

{table(result["remaining"], {name: f"({name})" for name in "abdc" if name in result["remaining"][0]})}

Loss in training, nats a token of all nine domains' validation text, which count alike:

{curves({side: [run] for side, run in runs.items()}, TITLES, one["tokens"] // one["steps"])}
"""


def neighbours(result: dict[str, Any]) -> str:
    """Which neighbours a record is of."""
    way = result.get("nearest", USUAL.to_json())
    return f"{way['k']:,} neighbours of {way['probes']} lists"


def _domains(rows: list[dict[str, Any]], domains: dict[str, Any]) -> str:
    """The four perplexities, with the intervals of (b) and (c), and their ratios."""
    intervals = {(row["model"], row["domain"], row["mixture"]): row["perplexity"] for row in rows}

    def of(model: str, name: str, mixture: str) -> str:
        value, low, high = intervals[model, name, mixture]
        return f"{value:.1f}" if low is None else f"{value:.1f} ({low:.1f} to {high:.1f})"

    head = columns(
        "domain", "(a) permissive", "(b) everything", "(c) = (a) + store", "(d) = (b) + store", "(a) + store, gate",
        "c / b", "c / d", "gate / a",
    )  # fmt: skip
    lines = [
        columns(
            name,
            of("permissive", name, "lm"),
            of("everything", name, "lm"),
            of("permissive", name, "all"),
            of("everything", name, "all"),
            of("gated", name, "gate"),
            *(f"{each[ratio]:.3f}" for ratio in ("c / b", "c / d", "gated / a")),
        )
        for name, each in domains.items()
    ]
    return "\n".join([head, "|:---|" + "---:|" * 8, *lines])


def _mean(domains: dict[str, Any], ratio: str) -> float:
    return math.exp(statistics.fmean(math.log(of[ratio]) for of in domains.values()))


def _gap(row: dict[str, Any]) -> str:
    if row["unit"] is None:
        return f"a share that cannot be told ({row['why']})"
    means = (f"{100 * row[name][0]:.0f} % by {name} mean" for name in ("arithmetic", "geometric"))
    return f"{' and '.join(means)} of the perplexities"


SECTIONS = {"reference": reference}
