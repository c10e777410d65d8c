"""What every subject of the bench shares: contestants in turns, results that must agree, medians with their spread.

Contestants run in one process, one after the other; every second round goes through them backwards, so that none always
comes after the same one. A ratio is taken within a round, whose contestants meet the same weather, and its spread is
that of the rounds. Whatever is measured is given by the clock and by the processor's time of all threads, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from recording import command, commit, machine

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
BENCH = Path(__file__).parent
"""What Python runs as the bench, for parts that want a process of their own."""
SPREAD = "quartiles of the rounds"
Judge = Callable[[dict[str, Any]], str]
"""Told what every contestant gave; says in one line what is wrong, or nothing."""


class WrongResult(click.ClickException):
    """A contestant gave what it should not, so that its time means nothing."""


class Measured(NamedTuple):
    """A number that was measured several times."""

    value: float
    """The median."""
    low: float
    """The first quartile, and below the third. Of three rounds, the smallest and the largest."""
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Sum up the values of some rounds."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4)
        return cls(middle, max(low, min(values)), min(high, max(values)))

    @property
    def once(self) -> bool:
        """Whether it has no spread, as of one round."""
        return self.low == self.high

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


class Contest(NamedTuple):
    """What was measured, by clock and contestant: seconds a unit of work, round by round."""

    seconds: dict[str, dict[str, list[float]]]

    def taken(self, name: str, clock: str = "wall") -> Measured:
        """Seconds that a contestant takes for a unit of work."""
        return Measured.of(self.seconds[clock][name])

    def rate(self, name: str, clock: str = "wall") -> Measured:
        """Units of work a second."""
        return Measured.of([1 / each for each in self.seconds[clock][name]])

    def times(self, name: str, other: str, clock: str = "wall") -> Measured:
        """How many times the other's time a contestant takes."""
        mine, theirs = self.seconds[clock][name], self.seconds[clock][other]
        return Measured.of([one / two for one, two in zip(mine, theirs, strict=True)])

    def speed(self, name: str, other: str, clock: str = "wall") -> Measured:
        """How many times as fast as the other a contestant is."""
        return self.times(other, name, clock)

    def told(self, ours: str) -> dict[str, Any]:
        """For the record, by clock: what all contestants do a second, and how many times as fast as each other one of
        them is."""
        return {
            clock: {
                "per_second": {name: self.rate(name, clock) for name in of},
                "speed_over": {name: self.speed(ours, name, clock) for name in of if name != ours},
            }
            for clock, of in self.seconds.items()
        }


def compete(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    units: Mapping[str, int] | None = None,
    judge: Judge | None = None,
    prepare: Callable[[], Any] = lambda: None,
    clocks: Mapping[str, Callable[[], float]] = CLOCKS,
) -> Contest:
    """Let contestants take turns.

    Args:
        contestants: what each does in a round.
        rounds: that count, after one that warms up.
        units: of work that each does in a round.  [default: one]
        judge: is told after each round what all of them gave, outside the time that is taken.
        prepare: called before each round, outside the time that is taken.
        clocks: that tell seconds.

    Raises:
        WrongResult: the judge found something wrong; no number is told.
    """
    spent: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in contestants} for clock in clocks}
    names = list(contestants)
    for number in range(rounds + 1):
        prepare()
        given = {}
        for name in names if number % 2 else names[::-1]:
            begun = {clock: now() for clock, now in clocks.items()}
            given[name] = contestants[name]()
            for clock, now in clocks.items():
                spent[clock][name].append((now() - begun[clock]) / (units[name] if units else 1))
        if judge and (problem := judge(given)):
            raise WrongResult(f"round {number}: {problem}; nothing was measured")
    return Contest({clock: {name: each[1:] for name, each in of.items()} for clock, of in spent.items()})


def alike(tolerance: float = 0.0, absolute: float = 0.0) -> Judge:
    """A judge who wants the same numbers from all, to a relative tolerance and an absolute one."""

    def judge(given: dict[str, Any]) -> str:
        (first, wanted), *others = given.items()
        wanted = np.asarray(wanted)
        for name, each in others:
            found = np.asarray(each)
            if found.shape != wanted.shape:
                return f"{name} gave {found.shape} numbers and {first} {wanted.shape}"
            apart = ~np.isclose(found, wanted, rtol=tolerance, atol=absolute)
            if apart.any():
                at = tuple(int(index) for index in np.argwhere(apart)[0])
                place = ", ".join(map(str, at))
                return f"{name} gave {found[at]} where {first} gave {wanted[at]} (at {place}; {apart.sum()} differ)"
        return ""

    return judge


def exponent(sizes: Sequence[float], rounds: Sequence[Sequence[float]]) -> Measured:
    """How a cost grows with a size: e in cost ∝ sizeᵉ, by least squares on logarithms, fitted to each round.

    Args:
        sizes: at least three.
        rounds: the costs at each size, round by round.
    """
    x = np.log(np.asarray(sizes, dtype=float))
    return Measured.of([float(np.polyfit(x, np.log(np.asarray(costs, dtype=float)), 1)[0]) for costs in rounds])


@contextmanager
def moved() -> Iterator[list[int]]:
    """Adds up the bytes that this process reads and writes by system calls: what is mapped does not count."""
    total = [0]
    begun = _input_and_output()
    try:
        yield total
    finally:
        total[0] = _input_and_output() - begun


def _input_and_output() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def versions(*packages: str) -> dict[str, str]:
    """Those of peers that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextmanager
def chatter_on_stderr() -> Iterator[None]:
    """What peers print meanwhile, also from Java or C, goes to stderr: stdout belongs to the JSON document."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def subject(measure: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Make a command of a function that measures: it prints one JSON document, and compares it if it is asked to.

    What the function returns is told after the machine, the command and the commit.
    """

    @click.option(
        "--check",
        "recorded",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="A recorded run: name what got worse by more than the spread of both, with exit status 1.",
    )
    @functools.wraps(measure)
    def run(*, recorded: Path | None, **options: Any) -> None:
        before = json.loads(recorded.read_text()) if recorded else None
        with chatter_on_stderr():
            measured = measure(**options)
        made = {"machine": machine(), "command": command(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
        report = {**made, "spread": SPREAD, **measured}
        print(json.dumps(report, indent=1))
        if before:
            from bench.check import settle

            settle(before, report)

    return run
