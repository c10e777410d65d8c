"""The sections of RESULTS.md that tell of the store."""

from __future__ import annotations

from typing import Any

from recording import provenance


def store(record: dict[str, Any]) -> str:
    """A store of many owners: opening, searching, removing."""
    result, removal = record["result"], record["result"]["removal"]
    near, few, blocks = result["neighbours"], result["few_neighbours"], result["blocks"]
    speed = "\n".join(
        f"| {owners} | {near['queries_per_second'][owners]:,.0f} | {near['ratio_to_merged'][owners]:.2f} × "
        f"| {few['queries_per_second'][owners]:,.0f} | {few['ratio_to_merged'][owners]:.2f} × "
        f"| {blocks['queries_per_second'][owners]:,.0f} | {blocks['ratio_to_1'][owners]:.2f} × |"
        for owners in blocks["queries_per_second"]
    )
    what = {
        "large_shard": large_owner(removal),
        "document_of_it": "one document of that owner",
        "small_shard": "an owner of few tokens, in a group",
    }
    removals = "\n".join(
        f"| {title} | {found['10']['beside_syncing']:.3f} | {found['1000']['beside_syncing']:.3f} | "
        f"{found['10']['syncing']:.3f} and {found['1000']['syncing']:.3f} |"
        for name, title in what.items()
        for found in [removal[name]]
    )
    encoding, building = removal["encoding_seconds"], result["building"]
    return f"""## A store of many owners

{result["keys"]:,} keys of real text, encoded once by the quickstart's model and dealt out to 1, 4, 200 and 2,000 \
owners; the store of 4 has {result["groups"]["4"]} search structures, since large shards have their own, the others \
one. {record["rounds"]} rounds in turn, medians. The merged index is FAISS alone, in memory, without documents or ties.

{provenance(record)}

Adding documents to an empty store runs at {building["ratio_to_forward"]["add"]:.2f} × \
({building["spread"]["add"][0]:.2f} to {building["spread"]["add"][1]:.2f}) the tokens a second of the model's forward \
pass alone ({building["queries_per_second"]["add"]:,.0f} against {building["queries_per_second"]["forward"]:,.0f}), \
and at {building["ratio_to_keys"]["add"]:.2f} × where that stops at the keys; tokenising, codes, all search \
structures, checksums and syncing included. Larger models leave it a smaller share.

Opening a store of 10 owners and its neighbours takes {result["opening"]["10"] * 1000:.0f} ms, of 1,000 owners \
{result["opening"]["1000"] * 1000:.0f} ms.

| owners | neighbours, {result["queries"]["neighbours"]:,} queries at a time: queries/s | of one merged index \
| {result["queries"]["few_neighbours"]:,} at a time | of one merged index | blocks: queries/s | of one owner's |
|---:|---:|---:|---:|---:|---:|---:|
{speed}

Seconds that a removal takes, beside those in which it waits for the disk:

| removed | store of 10 owners | of 1,000 owners | waiting for the disk |
|:---|---:|---:|---:|
{removals}

For comparison: encoding {large_owner(removal)} takes {encoding["large_shard"]:.0f} s, all of the group of \
small owners {encoding["group_of_small_shards"]:.0f} s, with the smallest of models.
"""


def large_owner(removal: dict[str, Any]) -> str:
    """Who was removed; older records, of a million tokens all of them, do not say how many there were."""
    millions = f"{removal.get('tokens', 1_000_000) / 1e6:.1f}"
    return f"the owner of {'a' if millions == '1.0' else millions} million tokens"


def control(record: dict[str, Any]) -> str:
    """Codes, fitted on permissive or on the store's own text: recall and perplexity."""
    result = record["result"]
    by_code: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in result["codes"]:
        by_code.setdefault((row["codes"], row["lists"]), {})[row["fitted_on"]] = row
    rows = "\n".join(
        f"| {codes} | {lists:,} | {ours['bytes']} | {ours['recall']:.3f} / {theirs['recall']:.3f} | "
        f"{ours['perplexity']:.2f} / {theirs['perplexity']:.2f} | "
        f"{ours['perplexity_reranked']:.2f} / {theirs['perplexity_reranked']:.2f} |"
        for (codes, lists), pair in by_code.items()
        for ours, theirs in [(pair["permissive"], pair["the store's own"])]
    )
    return f"""## The control plane: which codes lose how much, for keys of {record["model"]["name"]}

{result["keys"]:,} keys of {result["dimension"]} coordinates of restricted text, by {record["model"]["name"]}; \
centroids and codes fitted on {result["fitted_on"]:,} keys of permissive text that the weights did not see, or of the \
store's own, as a system without law 2 would. Recall of the {result["k"]} nearest keys; perplexity of restricted test \
text with τ and λ fitted on validation text for exact search. The model alone: {result["perplexity"]["lm"]:.1f}; with \
exact neighbours: {result["perplexity"]["exact"]:.2f}. Names are FAISS's, which codes what is left after the centroid.

{provenance(record)}

| codes | lists | bytes a key | recall: permissive / own | perplexity: permissive / own | re-ranked: permissive / own |
|:---|---:|---:|---:|---:|---:|
{rows}
"""


def ngram(record: dict[str, Any]) -> str:
    """The ∞-gram's speed by the number of owners, and beside infini-gram's engine."""
    rows = "\n".join(
        f"| {size['tokens']:,} | {name} | {size['groups'].get(name.partition(',')[0], 1)} | "
        f"{rate:,.0f} | {size['ratio_to_merged'][name]:.2f} × | {size['ratio_to_infini-gram'][name]:,.0f} × |"
        for size in record["result"].values()
        for name, rate in size["tokens_per_second"].items()
    )
    compared = "; ".join(
        f"of {size['tokens']:,} tokens, "
        + ", ".join(f"{count:,} {kind}" for kind, count in size["beside_infini_gram"].items())
        for size in record["result"].values()
    )
    return f"""## The ∞-gram

Restricted text dealt out to 1, 200 and 2,000 owners, the last also to smaller groups than a store makes; windows of \
1,024 tokens of other documents are scored. The merged index is one suffix array; infini-gram's engine has the same \
tokens and is called once a token, as its interface asks. {record["rounds"]} rounds in turn, medians.

{provenance(record)}

| tokens | owners | groups | tokens/s | of one merged index | of infini-gram |
|---:|:---|---:|---:|---:|---:|
{rows}

Counts beside infini-gram's: {compared}.
"""


def removal(record: dict[str, Any]) -> str:
    """Removal proved on stores of 3, 30 and 300 owners."""
    rows = "\n".join(
        f"| {owners} | {found['documents']:,} | {found['tokens']:,} | {len(found['steps'])} | "
        f"{'yes' if all(all(step['equal'].values()) for step in found['steps']) else 'NO'} |"
        for owners, found in record["result"].items()
    )

    def word(holds: bool) -> str:
        return "yes" if holds else "NO"

    return f"""## Removed is never added

Stores of restricted text go through random additions and removals by document, owner, source, licence, shard, with \
near-duplicates. After each change the store is compared with one that is built anew, in another order, from what \
remains: canonical hash, neighbours with distances, blocks with scores, ∞-grams with counts, and the mixture's \
distributions, in every bit. What only the removed documents had (runs of eight tokens and words, shingles, codes, \
keys, in every encoding in use) is sought in every byte of every file before and after.

{provenance(record)}

| owners | documents | tokens | changes | equal after each |
|---:|---:|---:|---:|---:|
{rows}

Nothing of what was removed was found, and the same search found it before: {word(record["physical"])}. With a control \
plane that was fitted on the restricted text itself, as law 2 forbids, the comparison fails: \
{word(record["law_2_broken_is_found_out"])}.
"""


def torture(record: dict[str, Any]) -> str:
    """Kills and failing writes."""
    result = record["result"]
    killed = result["killed_at_random_moments"]["states"]
    ways = {"killed there": result["killed_at_writes"], **result["failing_writes"]}

    def states(found: dict[str, dict[str, int]]) -> str:
        before, after = (sum(each.get(state, 0) for each in found.values()) for state in ("before", "after"))
        return f"{before:,} | {after:,}"

    rows = "\n".join(f"| {name} | {states(way['states'])} | {len(way['wrong'])} |" for name, way in ways.items())
    writes = ", ".join(f"{name} {count}" for name, count in result["writes"].items())
    return f"""## Torture

A store is changed while its process is killed, or its disk fails, Lucene's writes included (a library loaded before \
all others counts and fails them). It must open, be the store before or after the change in hash, answers and files, \
verify, and take the next change.

{provenance(record)}

Writes, renames and syncs of each change: {writes}.

| what happened | stores before | stores after | anything else |
|:---|---:|---:|---:|
| `kill -9` at random moments | {states(killed)} | {len(result["killed_at_random_moments"]["wrong"])} |
{rows}

One bit flipped in each of {result["flipped_bits"]["files"]} files: all found and named, but for \
{len(result["flipped_bits"]["wrong"])}.
"""


def columns(*values: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, values))} |"


def scale(record: dict[str, Any]) -> str:
    """How a store grows."""
    steps, projections = record["result"]["steps"], record["result"]["projected"]
    parts = list(steps[-1]["bytes"])
    table = "\n".join(
        columns(
            part,
            *(f"{step['bytes'].get(part, 0) / step['tokens']:.1f}" for step in steps),
            *(f"{each['bytes'][part] / 1e9:,.0f}" for each in projections),
        )
        for part in parts
    )
    grown = "\n".join(
        columns(
            f"{step['tokens']:,}",
            step["groups"],
            f"{step['added'] / step['add']['seconds']:,.0f}",
            f"{step['add']['peak_bytes'] / 1e6:,.0f}",
            f"{step['search']['opening'] * 1000:.0f}",
            f"{step['search']['peak_bytes'] / 1e6:,.0f}",
            *(f"{step['search']['per_second'][name]:,.0f}" for name in ("neighbours", "blocks", "ngrams")),
            f"{step['remove_document']['seconds']:.1f}",
        )
        for step in steps
    )
    total = [sum(each["bytes"].values()) for each in projections]
    return f"""## How a store grows

Real text, each document its author's, added by `silo datastore add`; keys of {record["result"]["key_dimension"]} \
coordinates. Every step is a process of its own. Its peak memory counts the pages of files that it has mapped, which \
the system takes back when it needs them: codes are read from the spool and from shards so. Rates are per second in \
one call.

{provenance(record)}

| tokens | groups | added/s | peak MB, adding | ms to open | peak MB, searching | neighbours/s | blocks/s \
| ∞-gram tokens/s | s to remove a document |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{grown}

Bytes a token of each part, and gigabytes of larger stores (with the smallest of models: codes and lists grow with the \
width of a key):

| part | {" | ".join(f"{step['tokens'] / 1e6:.0f} M" for step in steps)} | \
{" | ".join(f"GB at {each['tokens'] / 1e9:,.0f} B" for each in projections)} |
|:---|{"---:|" * (len(steps) + len(projections))}
{table}

Together {" and ".join(f"{size / 1e12:,.1f} TB" for size in total)}; encoding on this machine would take \
{" and ".join(f"{each['encoding_days']:,.1f} days" for each in projections)}. Published: kNN-LM's store of 103 M keys \
took 400 GB of disk while it was built, SILO's of 1,024 M keys slowed its model 129 times, infini-gram takes 7 bytes a \
token.
"""


SECTIONS = {
    "store": store,
    "ngram": ngram,
    "control": control,
    "control_smollm2": control,
    "removal": removal,
    "torture": torture,
    "scale": scale,
}
