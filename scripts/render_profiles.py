"""The section of RESULTS.md that says where contestants' time goes, of every record that says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from render_model import columns


class Profiled(NamedTuple):
    """Where the time of one contestant went."""

    part: str
    """Of the record's result."""
    contestant: str
    shares: Mapping[str, float]


def profiles(result: Mapping[str, Any], part: str = "") -> Iterator[Profiled]:
    """All of a record's result, whose parts keep them as ``profile``."""
    for name, of in result.items():
        if name == "profile":
            yield from (Profiled(part, contestant, shares) for contestant, shares in of.items())
        elif isinstance(of, Mapping):
            yield from profiles(of, f"{part}, {name}" if part else name)


def where_time_goes(records: Mapping[str, dict[str, Any]]) -> str:
    """A line for each contestant; nothing if no record has any."""
    rows = "\n".join(
        columns(name, each.part, each.contestant, ", ".join(f"`{of}` {share:.0%}" for of, share in each.shares.items()))
        for name, record in records.items()
        for each in profiles(record["result"])
    )
    return f"""## Where the time goes

What stands behind the ratios above: shares of the time of one contestant, taken after the rounds. Of decoders and \
layers by torch's operation, of all else by the function of Python, with what that calls of C, Java or compiled code; \
what is too small to be told by itself is `other`.

| record | part | contestant | shares |
|:---|:---|:---|:---|
{rows}
"""
