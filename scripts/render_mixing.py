"""The sections of RESULTS.md that tell of the mixture: what each method gives, and how it is weighed."""

from __future__ import annotations

import math
import statistics
from typing import Any

from recording import provenance


def equal_text(record: dict[str, Any]) -> str:
    """Perplexity by domain, method and way to weigh it, over one store of all restricted domains."""
    result = record["result"]
    names = list(next(iter(result["domains"].values()))["tuned"])
    last = names[-1]
    head = "| domain | model | " + " | ".join(f"+ {name.replace('+', ', ')}" for name in names)
    head += " | one for all | gate | gate ÷ tuned |\n|:---|" + "---:|" * (len(names) + 4)

    def row(name: str) -> str:
        of = result["domains"][name]
        tuned = " | ".join(f"{of['tuned'][each]:.1f}" for each in names)
        best = min(of["tuned"].values())
        return (
            f"| {name} | {of['lm']:.1f} | {tuned} | {of['one for all'][last]:.1f} | {of['gate']:.1f} | "
            f"{of['gate'] / best:.3f} |"
        )

    restricted = "\n".join(row(name) for name in result["restricted"])
    permissive = "\n".join(row(name) for name in result["permissive"])
    gate = result["gate"]
    tokens = next(iter(result["domains"].values()))["tokens"]
    return f"""## Neighbours, blocks and ∞-grams at equal text: {record["model"]["name"]}

One store of {result["store_tokens"]:,} tokens of {result["owners"]} owners, of all restricted domains alike, \
searched by every method; {tokens:,} test tokens of each domain. Columns "+ …" have λ (with the ∞-gram for each class \
of suffix) and τ tuned on the domain's own validation text; "one for all" those of all domains' validation text \
together; the gate was taught by {gate["asked_tokens"]:,} tokens of permissive text beside a rehearsal's store of \
{gate["store_tokens"]:,}, and knows nothing of domains. Its last column compares it with the best of the tuned.

{provenance(record)}

{head}
{restricted}

Permissive text beside the same store, which holds nothing of it:

{head}
{permissive}

{_ways(result["ways_to_read_blocks"])}
"""


def _ways(ways: dict[str, Any]) -> str:
    """Ways to read blocks, over all domains alike."""
    rows = []
    for name, domains in ways.items():
        if name != "tokens":
            ratio = math.exp(statistics.fmean(math.log(of["lm+ric"] / of["lm"]) for of in domains.values()))
            seconds = sum(of["processor_seconds"] for of in domains.values())
            rows.append(f"| {name} | {ratio:.3f} | {seconds:.0f} |")
    lines = "\n".join(rows)
    return f"""Blocks read in other ways, {ways["tokens"]:,} test tokens of each restricted domain, λ tuned on \
validation text: perplexity over that of the model alone (geometric mean), and processor seconds for all.

| way | model + blocks ÷ model | seconds |
|:---|---:|---:|
{lines}"""


def attribution(record: dict[str, Any]) -> str:
    """Predicted and seen changes of log p when a document is denied."""
    result = record["result"]
    every, some = result["correlation"], result["correlation_where_others_are_left"]
    return f"""## Does a share tell what would happen without the document?

{result["documents"]} documents of a store denied one by one; {result["pairs"]:,} tokens of test text in which they \
have one of the largest shares. Correlation of the predicted change of log p with the one that is seen. The shares \
of a token sum to its probability within {result["greatest_error_of_a_sum"]:.0e}.

{provenance(record)}

| predicted by | all | where other documents were found too ({result["pairs_where_others_are_left"]:,}) |
|:---|---:|---:|
| what is left of what was found | {every["left"]:.4f} | {some["left"]:.4f} |
| the share alone | {every["share"]:.4f} | {some["share"]:.4f} |

Neither knows what is found in place of the document: the next neighbours, or what follows a shorter suffix.
"""


def mixing(record: dict[str, Any]) -> str:
    """Time and perplexity of mixtures, and curves of less work."""
    result = record["result"]
    store, mixtures = result["store"], result["mixtures"]
    threads = "one thread" if record["threads"] == 1 else f"{record['threads']} threads"
    return f"""## How fast the mixtures score text

{result["scored"]["tokens"]:,} tokens of held-out passages beside a store of {store["tokens"]:,} tokens in \
{store["groups"]} groups; {record["rounds"]} rounds in turns, {threads}. Times are multiples of the model's alone, by \
the clock and by the processor's time; a block is read where its look-up is among the best \
{mixtures["in_context"]["read"]} of a hundred. Perplexity is that of every second passage, weights are fitted on the \
others.

{provenance(record)}

{_curve(mixtures, "lm", "mixture")}

The ∞-gram over the same text as 200 owners': \
{result["ngram"]["times_1 owners"]["200 owners"]:.2f} × the time that it takes as one owner's.

Neighbours by the lists that are read and the neighbours that are taken, with perplexity of the model, these and the \
∞-gram together; time of the search alone:

{_curve(result["neighbours"], _base(result["neighbours"]), "search")}

Searches that are spared where the model is sure of the next token (its highest probability is p), or where one token \
always follows so long a suffix; model, neighbours and ∞-gram together, weights fitted with the searches spared:

{_curve(result["spared"], "none", "spared", result["spared"]["searched"])}
"""


def _base(found: dict[str, Any]) -> str:
    return next(key.removeprefix("times_") for key in found if key.startswith("times_"))


def _curve(found: dict[str, Any], base: str, what: str, searched: dict[str, float] | None = None) -> str:
    """Tokens a second, times of a base and perplexity."""
    head = ["tokens/s", f"time of “{base}”", "processor time", "perplexity"]
    lines = [f"| {' | '.join([what, *(['searched'] if searched else []), *head])} |"]
    lines.append("|:---|" + "---:|" * (len(head) + bool(searched)))
    for name, rate in found["tokens_per_second"].items():
        told = found["perplexity"].get(name)
        cells = [
            name,
            *([f"{100 * searched[name]:.0f} %"] if searched else []),
            f"{rate:,.0f}",
            f"{found[f'times_{base}'][name]:.2f}",
            f"{found[f'processor_times_{base}'][name]:.2f}",
            f"{told:.2f}" if told else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SECTIONS = {
    "mixing": mixing,
    "mixing_smollm2": mixing,
    "equal_text": equal_text,
    "equal_text_smollm2": equal_text,
    "attribution": attribution,
}
