"""The sections of RESULTS.md that tell of the machine, of peers and of growth; and the README's three numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.harness import Measured
from bench.ratios import ratios
from recording import provenance
from render_model import columns
from render_store import large_owner

from datastore.groups import GROUP_TOKENS, NGRAMS, TIMES

MIXED = {"mixing": "a small model trained here", "mixing_smollm2": "SmolLM2-135M"}
SCORED = {"evaluation": "the quickstart's model", "evaluation_smollm2": "SmolLM2-135M"}
"""Records of one bench with different models, and what these are called."""


def measured(of: list[float], digits: str = ".2f", factor: float = 1) -> str:
    """A median and its spread."""
    value, low, high = (f"{each * factor:{digits}}" for each in of)
    return f"{value} ({low} to {high})"


def ceiling(record: dict[str, Any]) -> str:
    """What the machine can do at best."""
    units = {
        "copy": ("copying, GB/s", 1e-9),
        "triad": ("a = b + s · c, GB/s", 1e-9),
        "matmul": ("matrix products in float32, G operations/s", 1e-9),
        "random": ("words read at random, M/s", 1e-6),
    }
    threads = list(record["result"]["copy"])
    rows = "\n".join(
        columns(title, *(measured(record["result"][name][of], ".1f", factor) for of in threads))
        for name, (title, factor) in units.items()
    )
    heads = " | ".join(f"{of} thread{'s' * (of != '1')}" for of in threads)
    return f"""## What the machine can do at best

{record["rounds"]} rounds, medians and quartiles; arrays of {record["array_bytes"] >> 20} MiB, matrices of \
{record["matrix"]:,} × {record["matrix"]:,}. Later records measure this first, with their own threads, and state their \
share of it: the seconds that the bytes, operations or reads of their work would take at these rates, over those that \
it took.

{provenance(record | {"data": "none"})}

| | {heads} |
|:---|{"---:|" * len(threads)}
{rows}
"""


def bm25(record: dict[str, Any]) -> str:
    """BM25 beside Pyserini and bm25s."""
    rows = "\n".join(
        columns(
            f"{int(size):,}",
            engine,
            *(f"{found[doing]['wall']['per_second'][engine][0]:,.0f}" for doing in ("building", "searching")),
            *(
                measured(found["searching"][clock]["speed_over"][engine]) if engine != "silo" else ""
                for clock in ("wall", "processor")
            ),
        )
        for size, found in record["result"].items()
        for engine in found["searching"]["wall"]["per_second"]
    )
    grown = ", ".join(f"{engine} {measured(found)}" for engine, found in record["growth"].items())
    last = list(record["result"].values())[-1]["ceiling"]
    peers = ", ".join(f"{name} {number}" for name, number in record["peers"].items())
    return f"""## BM25 beside Pyserini and bm25s

Restricted text in blocks of 96 words; {record["queries"]} queries of 32 different words of other documents, the \
{record["k"]} best blocks of each; one thread, {record["rounds"]} rounds in turns. All give the same scores to 1e-5. \
bm25s has its index in memory; ours and Pyserini's are Lucene's. An index is built once.

{provenance(record)}
- Peers: {peers}

| blocks | engine | built: blocks/s | queries/s | our speed over it, by the clock | by processor time |
|---:|:---|---:|---:|---:|---:|
{rows}

The time of a query grows with the number of blocks to the power of: {grown}. At the largest size a query's postings \
are {last["bytes"] / 1000:,.0f} kB: to read them at the machine's best would take {last["share"]:.2%} of our time.
"""


def times(found: dict[str, Any], base: str, name: str) -> list[str]:
    """Times of the base's time, by the clock and by processor time; spreads are recorded apart."""
    return [
        measured([found[f"{clock}times_{base}"][name], *found[f"{clock}spread"][name]]) for clock in ("", "processor_")
    ]


def mixing(record: dict[str, Any], model: str) -> str:
    """What mixtures cost beside the model alone, how neighbours are searched, and others' loops."""
    result = record["result"]
    store, scored, mixed, near = (result[name] for name in ("store", "scored", "mixtures", "neighbours"))
    rows = "\n".join(
        columns(name, f"{rate:,.0f}", *times(mixed, "lm", name), perplexity(mixed, name))
        for name, rate in mixed["tokens_per_second"].items()
    )
    (base,) = (name.removeprefix("times_") for name in near if name.startswith("times_"))
    curve = "\n".join(
        columns(name, f"{rate:,.0f}", *times(near, base, name), perplexity(near, name))
        for name, rate in near["tokens_per_second"].items()
    )
    dealt = result["ngram"]
    (first,) = (name.removeprefix("times_") for name in dealt if name.startswith("times_"))
    owners = "; ".join(
        f"of {name} {rate:,.0f} tokens/s, {times(dealt, first, name)[0]} × the time of one"
        for name, rate in dealt["tokens_per_second"].items()
    )
    own = (
        f"{result['own_keys']:,} of them with keys of their own"
        if result["own_keys"] < store["tokens"]
        else "each with a key of its own"
    )
    return f"""## What mixtures cost: {model}

A store of {store["tokens"]:,} tokens of {store["documents"]:,} documents in {store["groups"]} groups, {own}; \
{scored["tokens"]:,} tokens of other documents are scored. All take turns, {record["rounds"]} rounds, medians with \
their spread. Perplexities are of one half of the text, with weights fitted on the other.

{provenance(record)}

| | tokens/s | of the model alone, by the clock | by processor time | perplexity |
|:---|---:|---:|---:|---:|
{rows}

Neighbours by the lists that are read and how many are taken; perplexity with the ∞-gram:

| | queries/s | of the default's time, by the clock | by processor time | perplexity |
|:---|---:|---:|---:|---:|
{curve}

The ∞-gram alone: {owners.replace("of 1 owners", "of one owner")}.
{spared(result["spared"]) if "spared" in result else ""}{loops(result["peers"]) if "peers" in result else ""}"""


def spared(found: dict[str, Any]) -> str:
    """The model, neighbours and the ∞-gram with fewer searches."""
    rows = "\n".join(
        columns(
            name, f"{found['searched'][name]:.0%}", f"{rate:,.0f}", *times(found, "none", name), perplexity(found, name)
        )
        for name, rate in found["tokens_per_second"].items()
    )
    return f"""
Searches spared where the model is sure of the next token (p is its highest probability), or where one token always \
follows so long a suffix, or for some steps after a search whose neighbours, 16 unless it says so, can be followed \
(RetoMaton); the model, neighbours and the ∞-gram, with weights fitted with the same searches spared:

| spared | searched | tokens/s | of the time with none spared, by the clock | by processor time | perplexity |
|:---|---:|---:|---:|---:|---:|
{rows}
"""


def perplexity(found: dict[str, Any], name: str) -> str:
    """As it is told, or nothing."""
    return f"{found['perplexity'][name]:.2f}" if name in found["perplexity"] else ""


def loops(peers: dict[str, Any]) -> str:
    """Neighbours alone beside others' loops."""
    told = "; ".join(
        f"{name} {rate:,.0f} tokens/s" + ("" if name == "ours" else f", {times(peers, 'ours', name)[0]} × our time")
        for name, rate in peers["tokens_per_second"].items()
    )
    return f"""
Neighbours alone, {peers["k"]} of {peers["probes"]} lists, in others' own loops over the same keys and codes: {told}. \
Of their distances {peers["same_distances"]:.2%} are ours, to a thousandth.
"""


def evaluation(record: dict[str, Any], model: str) -> str:
    """Scoring by the model alone, beside lm-evaluation-harness."""
    result = record["result"]
    rows = "\n".join(
        columns(name, measured(list(Measured.of(rates)), ",.0f")) for name, rates in result["tokens_per_second"].items()
    )
    rounded = result.get("largest_difference_as_it_comes")
    as_it_comes = f" from the peer's in float64, and by {rounded:.1e} from what it gives as it comes" if rounded else ""
    return f"""## Scoring by the model alone, beside lm-evaluation-harness: {model}

{record["documents"]} documents of {result["tokens"]:,} tokens, each alone, in windows of {record["context"]:,} that \
do not overlap; one thread, processor time, {record["rounds"]} rounds in turns. Sums differ by at most \
{result["largest_difference_a_token"]:.1e} nats a token{as_it_comes}.

{provenance(record)}

| | tokens/s |
|:---|---:|
{rows}

Beside the best of them: {result["times_the_best_peer"]:.2f} ×.
"""


def opening(record: dict[str, Any]) -> str:
    """Opening a store, beside FAISS alone."""
    result = record["result"]
    names = list(result["seconds"])
    peers = [name for name in names if name.startswith("FAISS")]
    rows = "\n".join(
        columns(
            name,
            measured(result["seconds"][name], ".1f", 1000),
            f"{result['ceiling'][name]['bytes'] / 1e6:,.1f}",
            *(
                measured(result["speed_over"]["wall"][name][peer]) if name in result["speed_over"]["wall"] else ""
                for peer in peers
            ),
        )
        for name in names
    )
    rest = ", ".join(f"{name} {measured(of, '.0f', 1000)}" for name, of in result["other_parts_seconds"].items())
    return f"""## Opening a store

A store, or FAISS's index of the same keys, is opened and asked for the neighbours of one key; {record["rounds"]} \
rounds in turns, files in the system's cache. A store checks what it reads against checksums.

{provenance(record)}

| what | ms | MB read | speed over {" | speed over ".join(peers)} |
|:---|---:|---:|{"---:|" * len(peers)}
{rows}

Milliseconds to open the rest: {rest}.
"""


GROWN = {"tokens": "tokens of the store", "owners": "owners of the same tokens", "encoded": "tokens that are encoded"}


def growth(record: dict[str, Any]) -> str:
    """How cost grows."""
    tables = []
    for by, title in GROWN.items():
        kinds = record["result"][by]
        sizes = list(next(iter(kinds.values()))["wall"]["seconds"])
        rows = "\n".join(
            columns(
                what,
                *(f"{grown['wall']['seconds'][size][0] * 1000:,.3g}" for size in sizes),
                measured(grown["wall"]["exponent"]),
                f"{grown['ceiling'][sizes[-1]]['share']:.1%}" if "ceiling" in grown else "",
            )
            for what, grown in kinds.items()
        )
        head = columns(f"ms, by {title}", *(f"{int(size):,}" for size in sizes), "exponent", "of the ceiling")
        tables.append(f"{head}\n|:---|{'---:|' * (len(sizes) + 2)}\n{rows}")
    projections = record["projected"]
    heads = " | ".join(f"{int(size) / 1e9:,.0f} B tokens" for size in projections)
    what_grows = "\n".join(
        columns(what, *(seconds_of(of[what]) for of in projections.values()))
        for what in next(iter(projections.values()))
    )
    return f"""## How cost grows

Each thing at all sizes in turns, {record["rounds"]} rounds, medians; cost ∝ sizeᵉ, e fitted to each round, with its \
spread. Removals without the waiting for the disk. The last column: what the bytes, operations or reads that the \
largest size cannot do without would take at the machine's best, over what it took.

{provenance(record)}

{(chr(10) * 2).join(tables)}

Opening is that of a store too large to be checked meanwhile. Removing one document rewrites the groups that it is in, \
of {GROUP_TOKENS / 1e6:.0f} M tokens with keys and {TIMES[NGRAMS] * GROUP_TOKENS / 1e6:.0f} M of ∞-grams at most, and \
grows no further from there on. The ∞-gram takes a pass for each of its groups: beyond one that is full it grows as \
the store does, and so by more than its exponent says.

From the largest size by the exponent, on one machine like this, far beyond what was measured:

| | {heads} |
|:---|{"---:|" * len(projections)}
{what_grows}
"""


def seconds_of(seconds: float) -> str:
    """A duration in a unit that suits it."""
    units = ((86_400, "days"), (3_600, "hours"), (1, "s"), (1e-3, "ms"), (0, "µs"))
    unit, name = next(each for each in units if seconds >= each[0])
    return f"{seconds / (unit or 1e-6):,.3g} {name}"


def three(records: dict[str, dict[str, Any]]) -> str:
    """The numbers that matter, for the README: removing, searching and scoring."""
    gone = records["store"]["result"]["removal"]
    few, many = (gone["large_shard"][owners]["beside_syncing"] * 1000 for owners in ("10", "1000"))
    of = {name: {each.name: each for each in ratios(records[name], name)} for name in records}
    near = of["store"]["neighbours, 2,000 owners / speed of one FAISS index"].measured
    said = [
        f"Removing {large_owner(gone)} takes {few:.0f} ms in a store of 10 owners and {many:.0f} ms in one of 1,000, "
        "beside the waiting for the disk.",
    ]
    at_once = records["store"]["result"].get("queries")
    if at_once:  # before it was told, lists were read in another way
        said.append(
            f"Neighbours, {at_once['neighbours']:,} at a time, are found among the keys of "
            f"2,000 owners at {measured(list(near))} × the speed of one bare FAISS index of the same keys."
        )
    mixed = [
        f"{measured(list(of[name]['scoring, all methods / time of the model alone'].measured))} × with {model}"
        for name, model in MIXED.items()
        if name in of
    ]
    if mixed:
        said.append(f"Scoring text by all methods takes, of the time of the model alone, {' and '.join(mixed)}.")
    else:
        what, best = [pair for pair in of["ngram"].items() if pair[0].endswith("2,000 owners / speed of infini-gram")][
            -1
        ]
        said.append(
            f"The {what.partition(',')[0]} scores text, over 2,000 owners, at "
            f"{measured(list(best.measured), '.0f')} × the speed of infini-gram's engine."
        )
    machine = records["store"]["machine"]
    head = f"Measured in turns with the peers on {machine['cores']} cores; in brackets the spread of the rounds:"
    lines = "\n".join(f"- {line}" for line in said)
    more = "RESULTS.md and its figure have all ratios; `python scripts/bench --help` lists what can be measured again."
    return f"{head}\n\n{lines}\n\n{more}"


def suite_repeated(record: dict[str, Any]) -> str:
    """A suite on the same processor used in other ways."""
    result = record["result"]
    names = list(result["settings"])
    told = [
        f"{name} ({', '.join(f'`{key}={value}`' for key, value in of.items())})"
        for name, of in result["settings"].items()
        if of
    ]
    apart = [
        max(abs(row["perplexity"][number] / row["perplexity"][0] - 1) for row in result["rows"])
        for number in range(len(names))
    ]
    digits = [
        sum(f"{row['perplexity'][number]:.3g}" != f"{row['perplexity'][0]:.3g}" for row in result["rows"])
        for number in range(len(names))
    ]
    rows = "\n".join(
        f"| {row['model']} | {row['domain']} | {row['mixture']} | "
        + " | ".join(f"{each:.5f}" for each in row["perplexity"])
        + " |"
        for row in result["rows"]
    )
    summary = ". ".join(
        f"{name}: apart by {apart[number]:.1e} of the perplexity at most, {digits[number]} of {len(result['rows'])} "
        "numbers with other first three digits"
        for number, name in enumerate(names)
        if number
    )
    return f"""## A suite repeated

`silo eval suite {result["suite"]["name"]}` on one model and store, run again with fewer threads or older instructions \
than the processor has, so that sums come in another order: {"; ".join(told)}. {summary}.

{provenance(record)}

| model | domain | mixture | {" | ".join(names)} |
|:---|:---|:---|{"---:|" * len(names)}
{rows}
"""


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    **{name: partial(mixing, model=model) for name, model in MIXED.items()},
    **{name: partial(evaluation, model=model) for name, model in SCORED.items()},
    "suite_repeated": suite_repeated,
    "bm25": bm25,
    "opening": opening,
    "growth": growth,
    "ceiling": ceiling,
}
