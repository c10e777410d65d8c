"""Write RESULTS.md and the README's table from the recorded runs in ``scripts/results``, so that no number is typed.

python scripts/render_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "results"
BEGIN, END = "<!-- results: quickstart -->", "<!-- end of results -->"
COLUMNS = {"lm": "model alone", "lm+knn": "+ neighbours", "lm+ric": "+ blocks", "all": "all"}


def main() -> None:
    """Render both files."""
    record = json.loads((RECORDS / "quickstart.json").read_text())
    readme = (ROOT / "README.md").read_text()
    (ROOT / "README.md").write_text(with_results(readme, record))
    (ROOT / "RESULTS.md").write_text(results(record))


def with_results(readme: str, record: dict[str, Any]) -> str:
    """The README with its results between the two marks replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    found, removal = record["result"]["perplexity"], record["result"]["removal"]
    rows = [
        ("copyleft text of five owners", found["restricted"]),
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
        f"Measured by `silo quickstart` on {cores} cores, beside other work, twice: {took}; RESULTS.md says how."
    )
    return f"{head}{BEGIN}\n\n{table}\n\n{said}\n\n{END}{tail}"


def perplexity_table(title: str, rows: list[tuple[str, dict[str, float]]]) -> str:
    """A Markdown table, one row a text and one column a mixture."""
    lines = [f"| {title} | {' | '.join(COLUMNS.values())} |", f"|:---|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(f'{values[column]:.1f}' for column in COLUMNS)} |" for name, values in rows]
    return "\n".join(lines)


def results(record: dict[str, Any]) -> str:
    """All of RESULTS.md."""
    machine, result = record["machine"], record["result"]
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
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"""# Results

Every number here is written by `python scripts/render_results.py` from a run recorded in `scripts/results`.

## Quickstart

- Command: `{record["command"]}`, twice, compared by `python scripts/record_quickstart.py`
- Commit: `{record["commit"]}`
- Configuration: `eval/quickstart.yaml`, seed {record["seed"]}
- Data: corpus `{record["data"]["permissive"][:16]}`, store `{record["data"]["store"][:16]}`
- Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["memory_bytes"] / 2**30:.0f} GiB; Python \
{machine["python"]}, {versions}
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
