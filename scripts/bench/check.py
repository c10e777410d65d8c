"""Two runs of one subject: what got worse by more than the spread of both, and what cannot be compared.

A ratio got worse if its median moved the wrong way by more than the two runs' spreads on the sides that face each
other: if the new run's spread lies wholly beyond the old one's. That is so only of runs on the same machine, data and
sizes; runs of others are refused. Newer versions of packages, and another commit, are told: they may be the reason.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any, NamedTuple

import click

from bench.ratios import Ratio, ratios, subject_of

FREE = ("--check", "--rounds", "--model", "--peers", "--store", "--stores")
"""Options that change no work: files are told apart by their hashes."""
SAME = (
    "data",
    "model",
    "seed",
    "threads",
    "vocabulary",
    "vocab_size",
    "shape",
    "context",
    "windows",
    "huge_pages",
    "megabytes",
    "k",
    "queries",
)
"""What of a record must be equal, if it has it."""


class Incomparable(click.ClickException):
    """Two runs say nothing of each other."""

    exit_code = 2


class Comparison(NamedTuple):
    """What two runs say of each other, each in a line."""

    worse: list[str]
    better: list[str]
    equal: list[str]
    apart: list[str]
    """What only one of them has, or was measured in one round."""


def differences(before: dict[str, Any], after: dict[str, Any], elsewhere: bool = False) -> list[str]:
    """Why two records cannot be compared, if so. Elsewhere, processor and memory may be others; and so may weights that
    were trained there, since sums are rounded in another order."""
    pairs: dict[str, tuple[Any, Any]] = {"subject": (subject_of(before), subject_of(after))}
    if not elsewhere:
        pairs |= machines(before["machine"], after["machine"])
    same = [name for name in SAME if not (elsewhere and name == "model")]
    pairs |= {name: (before.get(name), after.get(name)) for name in same}
    pairs["options"] = (options(before), options(after))
    return [f"{name} was {old} and is {new}" for name, (old, new) in pairs.items() if old != new]


def machines(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What must be equal of two machines; the width of vectors if both say it, as older records do not."""
    pairs = {name: (before[name], after[name]) for name in ("cpu", "cores")}
    memory = [round(each["memory_bytes"] / 2**30) for each in (before, after)]
    pairs["GiB of memory"] = memory[0], memory[1]
    if "vectors" in before and "vectors" in after:
        pairs["vectors"] = before["vectors"], after["vectors"]
    return pairs


def options(record: dict[str, Any]) -> list[str]:
    """The options of a record's command that change what is measured."""
    words = shlex.split(record["command"])
    found = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--") and word.partition("=")[0] not in FREE:
            lone = "=" in word or following.startswith("--")
            found.append(word.replace("=", " ", 1) if lone else f"{word} {following}")
    return sorted(found)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Compare two records that :func:`differences` finds alike."""
    old, new = ({each.name: each for each in ratios(record)} for record in (before, after))
    found = Comparison([], [], [], [f"{name}: only in one of them" for name in sorted(old.keys() ^ new.keys())])
    for name in old:
        if name in new:
            kind = moved(old[name], new[name])
            line = f"{name}: {new[name].measured}, was {old[name].measured}"
            if kind == "of one round":
                found.apart.append(f"{name}: {kind}, which has no spread")
            else:
                {"worse": found.worse, "better": found.better, "equal": found.equal}[kind].append(line)
    return found


def moved(old: Ratio, new: Ratio) -> str:
    """Whether a ratio got worse or better by more than both spreads, or neither; or cannot be said, of one round."""
    if old.measured.once or new.measured.once:
        return "of one round"
    fell, rose = new.measured.high < old.measured.low, new.measured.low > old.measured.high
    if not (fell or rose):
        return "equal"
    return "better" if rose == (new.better == "higher") else "worse"


def settle(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Say on stderr how a new run compares with a recorded one; ends the program unless all is as good as it was.

    Raises:
        Incomparable: they cannot be compared.
        SystemExit: with status 1, something got worse.
    """
    if found := differences(before, after):
        raise Incomparable(f"the runs cannot be compared: {'; '.join(found)}")
    versions = before["machine"]["versions"].items() ^ after["machine"]["versions"].items()
    for name in sorted({name for name, _ in versions}):
        was, now = (record["machine"]["versions"].get(name, "absent") for record in (before, after))
        click.echo(f"note: {name} was {was} and is {now}", err=True)
    compared = compare(before, after)
    for kind, lines in compared._asdict().items():
        for line in lines if kind != "equal" else []:
            click.echo(f"{ {'apart': 'not compared'}.get(kind, kind) }: {line}".strip(), err=True)
    click.echo(
        f"{len(compared.worse)} worse, {len(compared.better)} better, {len(compared.equal)} equal within their spread, "
        f"{len(compared.apart)} not compared",
        err=True,
    )
    if compared.worse:
        sys.exit(1)
