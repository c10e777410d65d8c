"""The section of RESULTS.md that tells of the studies."""

from __future__ import annotations

from typing import Any

from recording import provenance

MOMENTS, CUTS = ("before", "after", "never"), ("last", "text", "context")
NAMES = {"lm": "model alone", "lm+knn": "+ neighbours", "lm+ric": "+ blocks", "lm+ngram": "+ ∞-gram", "all": "all"}


def studies(record: dict[str, Any]) -> str:
    """One study on a store of all restricted domains."""
    [(name, result)] = record["result"]["studies"].items()
    title, render = STUDIES[name]
    return f"""## Study of {title}: {record["model"]["name"]}

`silo eval study {name}` on one store of {record["result"]["store_tokens"]:,} tokens of all restricted domains alike. \
Weights are fitted on validation text, numbers are of test text; in brackets 95 % bootstrap intervals over documents.

{provenance(record)}

""" + render(result) + "\n"  # fmt: skip


def opt_out(result: dict[str, Any]) -> str:
    """Owners taken out one by one."""
    rows = []
    for row in result["owners"]:
        of = row["perplexity"]
        numbers = [of["before"]["lm"], *(of[moment]["all"] for moment in ("before", "after", "never"))]
        equal = "equal" if row["equal"] else "**differ**"
        cells = " | ".join(spread(each) for each in numbers)
        rows.append(f"| {row['owner']} | {row['store_tokens']:,} | {row['test_tokens']:,} | {cells} | {equal} |")
    return f"""Opt-out: each owner leaves alone. Perplexity of their held-out text by the model alone, and with all \
methods at weights that are the same throughout: before, after the removal, and with a store that never held them. The \
last two are compared by every bit of every token's log-probabilities, and by the stores' hashes.

| owner | tokens in store | test tokens | model alone | before | after | never held | last two |
|:---|---:|---:|---:|---:|---:|---:|:---|
{chr(10).join(rows)}"""


def store_size(result: dict[str, Any]) -> str:
    """Perplexity by size, and the fits."""
    names = [name for name in result["sizes"][0]["perplexity"] if name != "lm"]
    rows = [
        f"| {each['tokens']:,} | " + " | ".join(spread(each["perplexity"][name]) for name in names) + " |"
        for each in result["sizes"]
    ]
    fits = result["fits"]
    rows.append("| nats a doubling | " + " | ".join(f"{fits[name]['nats_a_doubling']:+.4f}" for name in names) + " |")
    rows.append("| r² | " + " | ".join(f"{fits[name]['r2']:.4f}" for name in names) + " |")
    alone = spread(result["sizes"][0]["perplexity"]["lm"])
    return f"""Store size: nested stores, {result["test_tokens"]:,} test tokens, λ and τ fitted at each size; the \
model alone has {alone}. The last lines fit log-perplexity as a line in the logarithm of the size.

| tokens in store | {" | ".join(NAMES[name] for name in names)} |
|:---|{"---:|" * len(names)}
{chr(10).join(rows)}"""


def neighbours(result: dict[str, Any]) -> str:
    """The best settings by k, and by λ."""
    rows = [
        f"| {row['k']} | {row['temperature']:g} | {row['lambda']:.2f} | {row['validation']:.1f} | {row['test']:.1f} |"
        for row in result["by_k"]
    ]
    lambdas = ", ".join(f"{row['lambda']:.2f}: {row['test']:.1f}" for row in result["by_lambda"][::3])
    chosen, lm = result["chosen"], result["lm"]
    return f"""k, λ and τ of the neighbours, chosen on {result["validation_tokens"]:,} tokens of validation text from \
a grid, reported on {result["test_tokens"]:,} of test text (model alone {lm["test"]:.1f}). Best: k = {chosen["k"]}, \
τ = {chosen["temperature"]:g}, λ = {chosen["lambda"]:.3f}: {chosen["test"]:.1f}.

| k | τ | λ | validation | test |
|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

Test perplexity by λ, with k and τ that validation text likes best with it: {lambdas}."""


def licenses(result: dict[str, Any]) -> str:
    """What each class of licences adds."""
    steps = result["steps"]
    groups = list(steps[0]["perplexity"])
    rows = ["| model alone | | " + " | ".join(f"{steps[0]['perplexity'][of]['lm'][0]:.1f}" for of in groups) + " |"]
    for step in steps:
        cells = " | ".join(f"{step['perplexity'][of]['all'][0]:.1f}" for of in groups)
        rows.append(f"| + {step['adds']} | {step['tokens']:,} | {cells} |")
    return f"""Classes of licences added one by one: test perplexity of neighbours and ∞-gram together, of all text \
and by the class of the text's own licence.

| store | tokens added | {" | ".join(groups)} |
|:---|---:|{"---:|" * len(groups)}
{chr(10).join(rows)}"""


def routing(result: dict[str, Any]) -> str:
    """Experts by layer."""
    rows = []
    for row in result["layers"]:
        alike, told = row["alike"], row["information"]
        cells = [row["layer"], row["kind"], row["experts"], row["dead"]]
        numbers = [row["unevenness"], told["domain"], told["license"], alike["mean"], alike["greatest"]]
        rows.append("| " + " | ".join([*map(str, cells), *(f"{each:.3f}" for each in numbers)]) + " |")
    domains = len(result["tokens"])
    return f"""Routing of the model on text of {domains} domains ({sum(result["tokens"].values()):,} tokens): \
unevenness of the load in nats; nats that the expert tells of the domain and of the licence; cosine of the experts' \
weights.

| layer | kind | experts | dead | unevenness | on domain | on licence | mean cosine | greatest |
|---:|:---|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}"""


def membership(result: dict[str, Any]) -> str:
    """What can be told of removed text."""
    rows = []
    for step in result["steps"]:
        cells = [str(step["removals"])]
        cells += [f"{step['auc'][score][moment]:.3f}" for score in ("loss", "min_k") for moment in MOMENTS]
        cells += [f"{step['rouge_l'][moment]:.3f}" for moment in MOMENTS]
        cells += [f"{step['longest_run'][moment]}" for moment in MOMENTS]
        rows.append("| " + " | ".join([*cells, "equal" if step["equal"] else "**differ**"]) + " |")
    return f"""Membership after removals, one {result["unit"]} each, in a row: how often a removed passage scores \
above one of {result["others"]} that no store held (AUC; 0.5 tells nothing) by its mean log-probability and by Min-K% \
Prob; which share of its text is written after its first {result["prompt_tokens"]} tokens (ROUGE-L of \
{result["written_tokens"]}), and the longest run of that. Each of the whole store, after the removals, and of a store \
that never held them; the last two are compared by every bit of what they say, and by the stores' hashes. MUSE's \
privacy leakage is the difference of the last two, so 0 where they are equal.

| removals | AUC, loss: before | after | never | AUC, Min-K%: before | after | never | written: before | after \
| never | longest run: before | after | never | last two |
|{"---:|" * 13}:---|
{chr(10).join(rows)}"""


def copying(result: dict[str, Any]) -> str:
    """How much is written word for word."""
    found = result["mixtures"]
    names = NAMES | {"limited": f"all, where at most {result.get('longest_copy')} in a row may be copied"}
    lengths = list(next(iter(found.values()))["shares"])
    rows = [
        f"| {names.get(name, name)} | {of['longest']} | {of['mean']:.1f} | "
        + " | ".join(f"{of['shares'][length]:.1%}" for length in lengths)
        + " |"
        for name, of in found.items()
    ]
    return f"""Verbatim copying: {result["written_tokens"]} tokens are written after the first \
{result["prompt_tokens"]} of {result["prompts"]} held-out documents, the likeliest each, and looked up in the store; \
beside them the documents' own text. The longest run that stands in the store, its mean over the documents, and the \
share of tokens in runs of a length at least.

| text | longest run | mean of the longest | {" | ".join(f"from {length}" for length in lengths)} |
|:---|---:|---:|{"---:|" * len(lengths)}
{chr(10).join(rows)}"""


def reliance(result: dict[str, Any]) -> str:
    """What each path gives."""
    rows = []
    for name, of in result["groups"].items():
        said = of["log_probability"]
        lost = " | ".join(
            f"{middle:.3f} ({low:.3f}–{high:.3f}), {of['changed'][cut]:.0%}"
            for cut in CUTS
            for middle, low, high in [of["lost"][cut]]
        )
        rows.append(f"| {name} | {of['positions']:,} | {-said['alone']:.3f} | {-said['all']:.3f} | {lost} |")
    return f"""Reliance: at every {result["every"]}th position of {result["documents"]} texts the model reads the best \
block before the text, with attention knocked out in all layers between some positions. Nats of the token alone and \
after the block; then the nats lost by each cut, and the share of positions where another token becomes the likeliest.

| tokens | positions | alone | with the block | last position does not see the block | no position sees it \
| last position does not see the text |
|:---|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}"""


def spread(value: list[float | None]) -> str:
    """A number with its interval, where there is one."""
    middle, low, high = value
    return f"{middle:.1f}" if low is None or high is None else f"{middle:.1f} ({low:.1f}–{high:.1f})"


STUDIES = {
    "opt-out": ("opting out", opt_out),
    "store-size": ("store size", store_size),
    "neighbours": ("k, λ and τ", neighbours),
    "licenses": ("licences", licenses),
    "routing": ("routing", routing),
    "membership": ("membership", membership),
    "copying": ("verbatim copying", copying),
    "reliance": ("reliance", reliance),
}
SECTIONS = {f"study_{name.replace('-', '_')}": studies for name in STUDIES}
