"""The sections of RESULTS.md that tell of the mixture: what each method gives, and how it is weighed."""

from __future__ import annotations

import math
import statistics
from typing import Any

from recording import provenance
from render_reference import neighbours
from where_loss_lies import merged, table


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
    equal = result.get("store_keys", result["store_tokens"]) == result["store_tokens"]
    title = "Neighbours, blocks and ∞-grams at equal text" if equal else "A large ∞-gram beside fewer neighbours"
    rest = [_loss(result), _ways(result["ways_to_read_blocks"]), _leakage(result)]
    return f"""## {title}: {record["model"]["name"]}

One store of {result["store_tokens"]:,} tokens of {result["owners"]} owners, of all restricted domains alike, \
{_keys(result)}; {tokens:,} test tokens of each domain, {neighbours(result)}. Columns "+ …" have λ (with the ∞-gram \
for each class of suffix) and τ tuned on the domain's own validation text; "one for all" those of all domains' \
validation text together; the gate was taught by {gate["asked_tokens"]:,} tokens of permissive text beside a \
rehearsal's store of \
{gate["store_tokens"]:,}, and knows nothing of domains. Its last column compares it with the best of the tuned.

{provenance(record)}

{head}
{restricted}

Permissive text beside the same store, which holds nothing of it:

{head}
{permissive}

{(chr(10) * 2).join(part for part in rest if part)}
"""


def _loss(result: dict[str, Any]) -> str:
    """Where the loss lies on restricted text, where that was measured."""
    domains = [result["domains"][name] for name in result["restricted"]]
    if not all("loss" in of for of in domains):
        return ""
    rows = merged([of["loss"] for of in domains])
    names = list(domains[0]["tuned"])
    titles = {"lm": "the model", **{name: f"+ {name.replace('+', ', ')}" for name in names}, "gate": "the gate"}
    return f"""Where the loss lies on restricted text: tokens by the longest suffix of their context that the store \
knows, and mean nats a token.

{table(rows, titles)}"""


def _keys(result: dict[str, Any]) -> str:
    """Which of the store's text the methods search."""
    keys = result.get("store_keys", result["store_tokens"])
    if keys == result["store_tokens"]:
        return "searched by every method"
    return f"of which {keys:,} have keys to be found as neighbours, and all are searched by the ∞-gram"


def _leakage(result: dict[str, Any]) -> str:
    """What the store has of the test text word for word, where that was measured."""
    if not all("leakage" in of for of in result["domains"].values()):
        return ""
    found = {name: of["leakage"]["shares"] for name, of in result["domains"].items()}
    lengths = list(next(iter(found.values())))
    rows = "\n".join(
        f"| {name} | {' | '.join(f'{shares[length]:.1%}' for length in lengths)} |" for name, shares in found.items()
    )
    return f"""Share of the test tokens inside runs of so many tokens that the store has word for word:

| domain | {" | ".join(f"{length} tokens" for length in lengths)} |
|:---|{"---:|" * len(lengths)}
{rows}"""


def _ways(ways: dict[str, Any]) -> str:
    """Ways to read blocks, over all domains alike."""
    rows: list[str] = []
    if set(ways) == {"tokens"}:
        return ""
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
    correlation, error, untold = result["correlation"], result["greatest_error"], ""
    if "greatest_error_of_sums" in result:  # of every token; earlier runs compared a few
        untold = f" The shares of a token sum to its probability within {result['greatest_error_of_sums']:.0e}."
    if "not_told" in result:
        rest = result["not_told"]
        untold += f" At {rest['pairs']:,} more the document matters too little to be told of, and log p changed by at "
        untold += f"most {rest['greatest_change']:.3f}."
    return f"""## Does a share tell what would happen without the document?

{result["documents"]} documents of a store denied one by one; {result["pairs"]:,} tokens of test text in which they \
have one of the largest shares. Correlation of the predicted change of log p with the one that is seen.{untold}

{provenance(record)}

| predicted by | correlation | off by at most, nats |
|:---|---:|---:|
| what is left of what was found (`lm.explain`) | {correlation["left"]:.4f} | {error["left"]:.3f} |
| the share alone | {correlation["share"]:.4f} | {error["share"]:.3f} |
"""


SECTIONS = {
    "equal_text": equal_text,
    "equal_text_smollm2": equal_text,
    "large_ngram_smollm2": equal_text,
    "attribution": attribution,
}
