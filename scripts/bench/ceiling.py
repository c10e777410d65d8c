"""What the machine can do at best: bytes a second to and from memory, multiplications a second, reads at random.

    python scripts/bench ceiling > scripts/results/ceiling.json

- ``copy`` and ``triad`` (a = b + s · c) over arrays far larger than the caches, as STREAM has them (McCalpin 1995), by
  torch. Counted are the bytes that the operation names, two or three arrays, not those that a processor reads before it
  overwrites them.
- ``matmul``: products of square float32 matrices, two operations a multiplication and addition.
- ``random``: single words gathered from places at random in an array far larger than the caches.

Each with one thread and with all. Every other subject measures this first, says how much its work needs at least, and
tells how much of the ceiling it reached: the seconds that the work would take there, over those that it took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import Measured, compete, subject
from training.flops import FORMULAS

ARRAY_BYTES = 2**28
"""Of each array."""
MATRIX = 2048
READS = 2**22
ROUNDS = 5


class Work(NamedTuple):
    """What a unit of work cannot do without."""

    bytes: float = 0
    """Read from memory or written to it."""
    flops: float = 0
    """Additions and multiplications, in float32."""
    reads: float = 0
    """Of single words at places that are known only then."""


def products_of(call: Callable[[], Any]) -> Work:
    """The operations of the matrix products of a call, forward and backward, of those that torch can count."""
    # oneDNN fills up the runs of experts to a few lengths, which is work but no part of the function.
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.backends.mkldnn.flags(enabled=False), counter:
        call()
    return Work(flops=counter.get_total_flops())


class Ceiling(NamedTuple):
    """Rates of this machine, by number of threads."""

    copy: dict[str, Measured]
    """Bytes a second."""
    triad: dict[str, Measured]
    """Bytes a second."""
    matmul: dict[str, Measured]
    """Float32 operations a second."""
    random: dict[str, Measured]
    """Reads a second."""

    @classmethod
    def read(cls, record: dict[str, dict[str, list[float]]]) -> Ceiling:
        """As it was told."""
        return cls(**{name: {of: Measured(*rate) for of, rate in rates.items()} for name, rates in record.items()})

    def told(self) -> dict[str, dict[str, Measured]]:
        """For the record."""
        return self._asdict()

    def seconds(self, work: Work, threads: int | None = None) -> float:
        """What work takes at least: its slowest part, since the others may go on meanwhile."""
        of = str(threads or torch.get_num_threads())
        bandwidth = max(self.copy[of].value, self.triad[of].value)
        return max(work.bytes / bandwidth, work.flops / self.matmul[of].value, work.reads / self.random[of].value)

    def share(self, work: Work, seconds: float, threads: int | None = None) -> dict[str, float]:
        """For the record: work, what it takes at least, and the share of the ceiling that was reached."""
        least = self.seconds(work, threads)
        needed = {name: value for name, value in work._asdict().items() if value}
        return {**needed, "seconds_at_the_ceiling": least, "share": least / seconds}


def measure(rounds: int = ROUNDS) -> Ceiling:
    """Measure the machine, with one thread and with as many as torch has now; some seconds."""
    found: dict[str, dict[str, Measured]] = {name: {} for name in Ceiling._fields}
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            for name, rate in _rates(rounds).items():
                found[name][str(threads)] = rate
    finally:
        torch.set_num_threads(before)
    return Ceiling(**found)


def _rates(rounds: int) -> dict[str, Measured]:
    count = ARRAY_BYTES // 4
    a, b, c = torch.zeros(count), torch.ones(count), torch.ones(count)
    square = torch.randn(MATRIX, MATRIX)
    product = torch.empty_like(square)
    places = torch.randint(count, (READS,))
    words = torch.empty(READS)
    does: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy": (2 * ARRAY_BYTES, lambda: a.copy_(b)),
        "triad": (3 * ARRAY_BYTES, lambda: torch.add(b, c, alpha=3.0, out=a)),
        "matmul": (2 * MATRIX**3, lambda: torch.mm(square, square, out=product)),
        "random": (READS, lambda: torch.index_select(b, 0, places, out=words)),
    }
    contest = compete(
        {name: call for name, (_, call) in does.items()},
        rounds,
        units={name: count for name, (count, _) in does.items()},
    )
    return {name: contest.rate(name) for name in does}


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Counted rounds, after one that warms up.")
@subject
def main(rounds: int) -> dict[str, Any]:
    """What the machine can do at best."""
    return {"rounds": rounds, "array_bytes": ARRAY_BYTES, "matrix": MATRIX, "result": measure(rounds).told()}
