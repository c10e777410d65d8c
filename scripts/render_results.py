"""Write RESULTS.md, its figure and the README's numbers from the recorded runs in ``scripts/results``: none is typed.

python scripts/render_results.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import render_bench
import render_mixing
import render_model
import render_reference
import render_repeated
import render_store
import render_studies
from recording import provenance
from render_figure import figure
from render_goals import goals
from render_profiles import where_time_goes

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "results"
FIGURE = RECORDS / "ratios.svg"
REPEATED = RECORDS / "repeated"
"""Runs of recorded benches on another day, by the same names."""
ELSEWHERE = RECORDS / "elsewhere"
"""Runs of recorded benches on another processor, by the same names."""
END = "<!-- end of results -->"
Records = dict[str, dict[str, Any]]
Section = Callable[[dict[str, Any]], str]
"""What tells of one record."""
COLUMNS = {
    "lm": "model alone",
    "lm+knn": "+ neighbours",
    "lm+ric": "+ blocks",
    "lm+ngram": "+ ∞-grams",
    "all": "all",
}


def main() -> None:
    """Render all three files."""
    records = read_records()
    readme = (ROOT / "README.md").read_text()
    (ROOT / "README.md").write_text(with_results(readme, records))
    (ROOT / "RESULTS.md").write_text(results(records, read_records(REPEATED), read_records(ELSEWHERE)))
    FIGURE.write_text(figure(records))


def read_records(directory: Path = RECORDS) -> Records:
    """Every recorded run, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def results(records: Records, again: Records, elsewhere: Records) -> str:
    """All of RESULTS.md."""
    sections: dict[str, Section] = {"quickstart": quickstart, "laundering": laundering, "collect": throughput}
    sections |= render_store.SECTIONS | render_model.SECTIONS | render_mixing.SECTIONS | render_bench.SECTIONS
    sections |= render_reference.SECTIONS | render_studies.SECTIONS
    head = (
        "# Results\n\nEvery number here is written by `python scripts/render_results.py` from a run recorded in "
        "`scripts/results`.\n\n"
        "Benches are subjects of `python scripts/bench`; of those recorded before that was one command, "
        "`scripts/bench_X.py` is `scripts/bench X` now.\n\n"
        f"![Speeds as multiples of the peers', by subject]({FIGURE.relative_to(ROOT)})\n"
    )
    told = [section(records[name]) for name, section in sections.items() if name in records]
    others = [where_time_goes(records)]
    others += [render_repeated.another_day(records, again, elsewhere)] if again else []
    others += [render_repeated.another_processor(records, elsewhere)] if elsewhere else []
    return "\n".join([head, goals(records), *told, *others])


def laundering(record: dict[str, Any]) -> str:
    """Planted passages: what was found, and what it cost."""
    result = record["result"]
    rates = {kind: "as it is" if kind == "verbatim" else edits(record["edits"][kind]) for kind in result["planted"]}
    rows = "\n".join(
        f"| {rates[kind]} | {found['planted']} | {found['recall']:.1%} | {found['shingles_left']:.2%} |"
        for kind, found in sorted(result["planted"].items(), key=lambda item: -item[1]["recall"])
    )
    clean, untouched = result["clean_documents"], result["untouched"]
    conflicts = "\n".join(
        f"- {reason}: {found['documents']:,} of {', '.join(found['sources'][:3])}"
        + (f" and {len(found['sources']) - 3} more sources" if len(found["sources"]) > 3 else "")
        for reason, found in result["conflicts"].items()
    )
    return f"""## Licences and laundering

A real corpus of {sum(result["documents"].values()):,} documents in nine domains, given as one heap with its declared \
licences: {result["documents"]["permissive"]:,} permissive, {result["documents"]["restricted"]:,} restricted. \
Then passages of 100 to 300 words of restricted documents, planted in permissive ones.

{provenance(record)}

Declared restricted, on the permissive side: {result["restricted_documents_on_the_permissive_side"]}. Declared \
permissive, and contradicted:

{conflicts}

| planted passages | number | found | of their 6-word shingles left |
|:---|---:|---:|---:|
{rows}

Of {clean["documents"]:,} documents without a plant, {clean["dropped"]} were dropped ({clean["dropped_share"]:.2%}), \
and {clean["cut"]} lost a passage ({clean["cut_share"]:.2%}); of the untouched corpus {untouched["dropped"]} and \
{untouched["cut"]}. Thresholds were set on seed 1.
"""


def edits(rates: list[float]) -> str:
    """What was done to a planted passage."""
    replaced, dropped, inserted = rates
    return f"{replaced:.0%} of words replaced, {dropped:.0%} left out, {inserted:.0%} put in, case and commas changed"


def throughput(record: dict[str, Any]) -> str:
    """Collect, audit and tokenise, beside tokenising alone."""
    result = record["result"]
    low, high = result["ratio_spread"]
    rows = "\n".join(f"| {name} | {seconds:.1f} |" for name, seconds in result["seconds"].items())
    peaks = result["peak_memory_bytes"]
    memory = "\n".join(
        f"| {name} | {peaks['1x'][name] / 1e6:.0f} MB | {peaks['4x'][name] / 1e6:.0f} MB |" for name in peaks["1x"]
    )
    return f"""## Collecting: throughput and memory

{record["megabytes"]:.0f} MB of text, {record["rounds"]} rounds in turn with the peer, medians.

{provenance(record)}

Collect + audit + tokenise takes {result["ratio"]:.2f} × ({low:.2f} to {high:.2f}) the time of `tokenizers` alone on \
the same text: {result["megabytes_per_second"]:.1f} against {result["megabytes_per_second_alone"]:.1f} MB/s.

| step | seconds |
|:---|---:|
{rows}
| tokenising alone | {result["seconds_alone"]:.1f} |

Peak memory of the process after each step, with the text and with four times as much:

| step | 1 × | 4 × |
|:---|---:|---:|
{memory}

`tokenizers` alone: {peaks["alone"]["tokenise"] / 1e6:.0f} MB.
"""


def with_results(readme: str, records: dict[str, dict[str, Any]]) -> str:
    """The README with what stands between its marks replaced."""
    for name, said in {
        "quickstart": in_the_readme(records["quickstart"]),
        "speed": render_bench.three(records),
    }.items():
        begin = f"<!-- results: {name} -->"
        head, found, rest = readme.partition(begin)
        _, closed, tail = rest.partition(END)
        if not (found and closed):
            raise SystemExit(f"README.md has no {begin} with {END} after it; put them where the numbers belong")
        readme = f"{head}{begin}\n\n{said}\n\n{END}{tail}"
    return readme


def in_the_readme(record: dict[str, Any]) -> str:
    """The quickstart's table and what it took."""
    found, removal = record["result"]["perplexity"], record["result"]["removal"]
    rows = [
        (f"copyleft text of {len(record['result']['owners']) - 1} owners", found["restricted"]),
        ("the same, after one owner is removed", found["after_removal"]),
        (f"text of the removed owner, {removal['owner']}, before", found["removed_owner"]["before"]),
        (f"text of the removed owner, {removal['owner']}, after", found["removed_owner"]["after"]),
        ("permissive text", found["permissive"]),
    ]
    table = perplexity_table("perplexity of held-out", rows)
    minutes = sorted(times["total"] / 60 for times in record["result"]["seconds"])
    peak = max(record["result"]["peak_memory_bytes"])
    cores = record["machine"]["cores"]
    took = f"{minutes[0]:.1f} and {minutes[1]:.1f} minutes, {peak / 1e9:.1f} GB of memory"
    said = (
        f"At all {removal['positions']:,} test positions, the distribution after the removal is, bit for bit, that of "
        "a store that never held the owner.\n"
        f"Measured by `silo quickstart` on {cores} cores, twice: {took}; RESULTS.md says how."
    )
    return f"{table}\n\n{said}"


def perplexity_table(title: str, rows: list[tuple[str, dict[str, float]]]) -> str:
    """A Markdown table, one row a text and one column a mixture."""
    lines = [f"| {title} | {' | '.join(COLUMNS.values())} |", f"|:---|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(f'{values[column]:.1f}' for column in COLUMNS)} |" for name, values in rows]
    return "\n".join(lines)


def quickstart(record: dict[str, Any]) -> str:
    """The quickstart's two runs."""
    result = record["result"]
    found = result["perplexity"]
    totals = [("all owners, before", found["restricted"]), ("all owners, after", found["after_removal"])]
    owners = [
        (f"{name}, {when}", values)
        for name, both in result["owners"].items()
        for when, values in zip(("before", "after"), both, strict=True)
    ]
    steps = "\n".join(
        f"| {name} | {' | '.join(f'{times[name]:.1f}' for times in result['seconds'])} |"
        for name in result["seconds"][0]
    )
    return f"""## Quickstart

Run twice, compared by `python scripts/record_quickstart.py`; configuration `eval/quickstart.yaml`.

{provenance(record)}
- Both `report.json` equal but for times: {"yes" if result["reports_equal_but_for_times"] else "NO"}
- Peak memory of the largest process: {" and ".join(f"{peak / 1e9:.2f} GB" for peak in result["peak_memory_bytes"])}

Perplexity of held-out text. Weights and temperature of each row are fitted on validation text of the same owner, and
fitted again after the removal.

{perplexity_table("text", [*totals, *owners])}

Restricted text, all methods against the model alone: {found["restricted"]["all"] / found["restricted"]["lm"]:.3f} ×. \
Permissive text: {found["permissive"]["all"] / found["permissive"]["lm"]:.3f} ×.

Removal of {result["removal"]["owner"]} ({result["removal"]["documents"]} documents, \
{result["removal"]["tokens"]:,} tokens): store hash `{result["removal"]["store_after"][:16]}`, that of the store which \
never held them `{result["removal"]["fresh_store"][:16]}`; distributions at {result["removal"]["positions"]:,} test \
positions `{result["removal"]["distributions_after"][:16]}` and `{result["removal"]["distributions_fresh"][:16]}`.

Seconds by step, in both runs (`download` depends on the network):

| step | first | second |
|:---|---:|---:|
{steps}
"""


if __name__ == "__main__":
    main()
