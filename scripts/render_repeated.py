"""The sections of RESULTS.md on benches that were run more than once: on another day, and on another processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.check import differences, moved
from bench.ratios import ratios
from recording import processor

Record = dict[str, Any]


def another_day(records: Mapping[str, Record], again: Mapping[str, Record], elsewhere: Mapping[str, Record]) -> str:
    """Every ratio of the benches that were run on another day as well, and whether both runs agree.

    Each second run is compared with the first on the same processor, of the records or of those made elsewhere. Raises
    ValueError if there is none.
    """
    pairs = {}
    for name, second in again.items():
        firsts = [of[name] for of in (records, elsewhere) if name in of]
        problems = [differences(first, second) for first in firsts]
        if all(problems):
            raise ValueError(f"{name} was repeated with something else: {'; '.join(map(', '.join, problems))}")
        pairs[name] = firsts[problems.index([])], second
    rows = [row for name, both in pairs.items() for row in _rows(name, *both)]
    agree = sum(row.endswith("| equal |") for row in rows)
    others = "; others are better or worse than they were by more than both" if agree < len(rows) else ""
    days = "\n".join(
        f"- {name}: {_when(first)} and {_when(second)}, {processor(second)}" for name, (first, second) in pairs.items()
    )
    return f"""## Benches run on another day

{agree} of {len(rows)} ratios agree within the spreads of both runs{others}.

{days}

| record | ratio | first | second | |
|:---|:---|---:|---:|:---|
{chr(10).join(sorted(rows))}
"""


def another_processor(records: Mapping[str, Record], elsewhere: Mapping[str, Record]) -> str:
    """Every ratio of the benches that were run on another processor, too. Raises ValueError if something else than
    machine and weights was other."""
    rows, machines = [], []
    for name, there in elsewhere.items():
        if problems := differences(records[name], there, elsewhere=True):
            raise ValueError(f"{name} was other work elsewhere: {'; '.join(problems)}")
        rows += list(_rows(name, records[name], there))
        machines.append(f"- {name}: {processor(records[name])} and {processor(there)}, {_when(there)}")
    agree = sum(row.endswith("| equal |") for row in rows)
    return f"""## Benches run on another processor

Ratios are less of the machine than times are, and still of it: {agree} of {len(rows)} agree within the spreads of \
both runs. The first is the one above, the second was made elsewhere, of other commits and days.

{chr(10).join(machines)}

| record | ratio | here | there | there it is |
|:---|:---|---:|---:|:---|
{chr(10).join(sorted(rows))}
"""


def _rows(name: str, first: Record, second: Record) -> Iterator[str]:
    """A row of each ratio that both runs have."""
    before, after = ({each.name: each for each in ratios(record, name)} for record in (first, second))
    for ratio in before.keys() & after.keys():
        pair = before[ratio], after[ratio]
        yield f"| {name} | {ratio} | {pair[0].measured} | {pair[1].measured} | {moved(*pair)} |"


def _when(record: Record) -> str:
    day = f"{record['date']} at " if "date" in record else ""
    return f"{day}`{record['commit'][:8]}`"
