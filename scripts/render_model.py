"""The sections of RESULTS.md that tell of the parametric model: what it learns, and how fast."""

from __future__ import annotations

import math
import statistics
from typing import Any

from recording import provenance

KINDS = {"dense": "dense", "moe": "top-2 of 8", "pkm": "product-key memory", "peer": "PEER"}


def columns(*values: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, values))} |"


def spread(values: list[float], digits: int) -> str:
    """The mean, and from where to where single values go."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def sources(record: dict[str, Any]) -> str:
    """Where a record of runs of several seeds comes from; each run has its own commit."""
    commits = sorted({run["commit"] for run in record["result"]["runs"]})
    seeds = ", ".join(map(str, record["seeds"]))
    return provenance({**record, "commit": "`, `".join(commits), "seed": seeds})


def perplexities(runs: list[dict[str, Any]], split: str, name: str = "all") -> list[float]:
    """Perplexity of each run on one domain of a split."""
    return [math.exp(run[split][name]) for run in runs]


def curves(runs: dict[str, list[dict[str, Any]]], titles: dict[str, str], tokens_a_step: int) -> str:
    """Loss on validation text along the way, means over the seeds."""
    steps = next(iter(runs.values()))[0]["curve"]
    head = columns("tokens", *(titles[kind] for kind in runs)) + "\n|---:|" + "---:|" * len(runs)
    rows = [
        columns(
            f"{int(step) * tokens_a_step:,}",
            *(f"{statistics.fmean(run['curve'][step] for run in each):.3f}" for each in runs.values()),
        )
        for step in sorted(steps, key=int)
    ]
    return "\n".join([head, *rows])


def by_kind(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each kind, of the seeds that all kinds have finished."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in record["result"]["runs"]:
        found.setdefault(run["kind"], []).append(run)
    whole = set.intersection(*({run["seed"] for run in runs} for runs in found.values()))
    return {
        kind: sorted((run for run in runs if run["seed"] in whole), key=lambda run: run["seed"])
        for kind, runs in found.items()
    }


def experts(record: dict[str, Any]) -> str:
    """Four kinds of feed-forward layers at equal operations."""
    result, runs = record["result"], by_kind(record)
    dense = perplexities(runs["dense"], "test")
    kinds = result["kinds"]
    rows = "\n".join(
        columns(
            KINDS[kind],
            f"{kinds[kind]['parameters']:,}",
            f"{kinds[kind]['flops_per_token'] / 1e6:.3f}",
            spread(perplexities(each, "test"), 1),
            spread([a / b for a, b in zip(perplexities(each, "test"), dense, strict=True)], 3),
            f"{statistics.fmean(run['tokens_per_processor_second'] for run in each):,.0f}",
        )
        for kind, each in runs.items()
    )
    domains = [name for name in runs["dense"][0]["test"] if name != "all"]
    texts = "\n".join(
        columns(KINDS[kind], *(f"{statistics.fmean(perplexities(each, 'test', name)):,.1f}" for name in domains))
        for kind, each in runs.items()
    )
    one = runs["dense"][0]
    costs = [kind["flops_per_token"] for kind in kinds.values()]
    return f"""## Experts at equal operations

Four decoders that differ in the feed-forward layer in the middle of four, chosen to cost the same: counted, as they \
run, operations of a forward pass differ by {max(costs) / min(costs) - 1:.2%}. Permissive text of four domains, \
{one["tokens"]:,} tokens in {one["steps"]:,} steps, the same for all in the same order; {len(dense)} seeds. Perplexity \
of {result["test_tokens"]:,} held-out tokens (of {result["tokenizer"]:,} byte-pair entries). The learning rate is \
{one["learning_rate"]:g}, of PEER's experts {runs["peer"][0]["expert_learning_rate"]:g} and of the memory's values \
{runs["pkm"][0]["expert_learning_rate"]:g}: the best of a few on validation text, in short runs of another seed.

{sources(record)}

| feed-forward | parameters | M operations a token | test perplexity | of dense | tokens/s of one core |
|:---|---:|---:|---:|---:|---:|
{rows}

By domain, means over the seeds:

| feed-forward | {" | ".join(domains)} |
|:---|{"---:|" * len(domains)}
{texts}

Loss on {result["val_tokens"]:,} validation tokens, nats a token:

{curves(runs, KINDS, one["tokens"] // one["steps"])}

How experts, or values, are used: in how many steps each was moved, on average; and on validation text the share that \
any token takes, and the unevenness of the load in nats.

| feed-forward | experts | steps that moved each | used | unevenness |
|:---|---:|---:|---:|---:|
{_use(runs)}
"""


def _use(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Rows of how experts are used, by kind."""
    return "\n".join(
        columns(
            KINDS[kind],
            f"{each[0]['experts']['number']:,}",
            f"{statistics.fmean(run['experts']['updates_of_each'] for run in each):,.0f}",
            f"{statistics.fmean(run['experts']['used'] for run in each):.1%}",
            f"{statistics.fmean(run['experts']['unevenness'] for run in each):.2f}",
        )
        for kind, each in runs.items()
        if each[0]["experts"]
    )


def growth(record: dict[str, Any]) -> str:
    """A PEER layer that grows while it is trained, beside one that does not."""
    result, runs = record["result"], by_kind(record)
    few, many = result["experts"]
    rows = "\n".join(
        columns(
            before["seed"],
            f"{before['logits_changed_by']:.1e}",
            *(f"{run['val']['all']:.4f}" for run in (before, kept, grown)),
            f"{grown['val']['all'] - kept['val']['all']:+.4f}",
            *(f"{math.exp(run['test']['all']):.2f}" for run in (kept, grown)),
        )
        for before, kept, grown in zip(runs["before"], runs["kept"], runs["grown"], strict=True)
    )
    after = {kind: runs[kind] for kind in ("kept", "grown")}
    titles = {"kept": f"{few:,} experts", "grown": f"{many:,} experts"}
    one = runs["kept"][0]
    use = ", ".join(
        f"{statistics.fmean(run['experts']['used'] for run in each):.1%} of {titles[kind]}"
        for kind, each in after.items()
    )
    return f"""## A PEER layer that grows

A decoder with {few:,} experts learns from {runs["before"][0]["tokens"]:,} tokens. Then it goes on for \
{one["tokens"]:,} more, as it is and grown to {many:,} experts, with the same text in the same order and the same \
learning rate, which rises anew. Loss on {result["val_tokens"]:,} validation tokens in nats a token; perplexity of \
{result["test_tokens"]:,} test tokens.

{sources(record)}

| seed | growing changed logits by | loss before | kept | grown | difference | test perplexity, kept | grown |
|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}

Loss on validation text after the growth, means over the seeds:

{curves(after, titles, one["tokens"] // one["steps"])}

At the end validation text takes {use}.
"""


def model(record: dict[str, Any]) -> str:
    """Training steps beside those of other implementations."""
    parts = {"dense": "decoder, dense", "moe": "decoder, top-2 of 8", "peer": "PEER layer", "peer_decoder": "with PEER"}
    rows = "\n".join(
        columns(
            parts[part],
            ratio.replace("_over_", " / ").replace("_", " "),
            *(
                f"{found[clock]['ratio'][ratio]:.2f} ({low:.2f} to {high:.2f})"
                for clock in ("wall", "processor")
                for low, high in [found[clock]["spread"][ratio]]
            ),
        )
        for part, found in record["result"].items()
        for ratio in found["wall"]["ratio"]
    )
    times = "\n".join(
        columns(parts[part], name.replace("_", " "), f"{milliseconds:,.1f}")
        for part, found in record["result"].items()
        for name, milliseconds in found["wall"]["milliseconds"].items()
    )
    shape = record["shape"]
    against = ", PEER-pytorch with torch's default AdamW" if "--not-fused" in record["command"] else ""
    return f"""## Training steps: the model's layers{against}

Forward, backward and optimizer, in turns with the peers, {record["rounds"]} rounds, medians, {record["threads"]} \
threads. Decoders: {shape["num_hidden_layers"]} layers, {shape["hidden_size"]} wide, {shape["batch"]} sequences of \
{shape["time"]} random tokens. PEER layer: 256 wide, 8 heads of 16 experts, 512 tokens.

{provenance(record | {"data": "random tokens"})}

| what | milliseconds of … / of … | by the clock | by processor time |
|:---|:---|---:|---:|
{rows}

| what | which | ms a step |
|:---|:---|---:|
{times}
"""


def training_step(record: dict[str, Any]) -> str:
    """What the trainer adds to forward, backward and optimizer."""
    beside = all("beside_accelerate" in found for found in record["result"].values())
    rows = "\n".join(
        columns(
            name,
            f"{found['ratio']:.3f} ({found['quartiles'][0]:.3f} to {found['quartiles'][1]:.3f})",
            *(["{:.3f} ({:.3f} to {:.3f})".format(*found["beside_accelerate"])] if beside else []),
            f"{found['seconds_a_step'] * 1000:.0f}",
            f"{found['checkpoint_in_steps']:.1f}",
        )
        for name, found in record["result"].items()
    )
    return f"""## Training steps: the loop

A step of `silo train` (reading, schedule, clipping, checks, reports) beside the bare forward, backward and optimizer \
on tensors that are there already; one thread, in turns, medians and quartiles of the ratio of processor times. A \
checkpoint is written and synced every 500 steps, unless a recipe says otherwise.

{provenance(record)}

| recipe | step / bare step |{" of accelerate's loop |" if beside else ""} ms a step | a checkpoint, in steps |
|:---|---:|{"---:|" if beside else ""}---:|---:|
{rows}
"""


SECTIONS = {
    "experts": experts,
    "grown_experts": growth,
    "model": model,
    "model_not_fused": model,
    "training_step": training_step,
}
