"""The ratios in recorded runs: who is compared with whom, by how much, with what spread, and what the goal was.

One reader a subject knows how its record is laid out. The comparison of two runs, the figure and the README's three
numbers all read records through it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.harness import Measured

Record = dict[str, Any]
Clock = Literal["wall", "processor"]
PREFIXES: dict[Clock, str] = {"wall": "", "processor": "processor_"}
"""Of the names under which times by a clock are recorded."""


class Ratio(NamedTuple):
    """A number that was measured in turns with a peer."""

    what: str
    peer: str
    measured: Measured
    better: Literal["higher", "lower"] = "higher"
    """Whether it is a speed or a time, both in multiples of the peer's."""
    goal: float | None = None
    """What it should be at least, or at most."""
    clock: Clock = "wall"

    @property
    def name(self) -> str:
        """What tells it from the others of its record."""
        unit = "speed of" if self.better == "higher" else "time of"
        return f"{self.what} / {unit} {self.peer}" + (", processor time" if self.clock == "processor" else "")

    @property
    def speed(self) -> Measured:
        """As a multiple of the peer's speed, whichever it was measured as."""
        if self.better == "higher":
            return self.measured
        return Measured(1 / self.measured.value, 1 / self.measured.high, 1 / self.measured.low)

    @property
    def reached(self) -> bool | None:
        """Whether the goal was reached; None if there was none."""
        if self.goal is None:
            return None
        return self.measured.value >= self.goal if self.better == "higher" else self.measured.value <= self.goal


def subject_of(record: Record) -> str:
    """The subject that a record is of, by its command: ``python scripts/bench store …`` or, as it once was,
    ``python scripts/bench_store.py …``."""
    _, script, *words = shlex.split(record["command"])
    stem = Path(script).stem
    return words[0] if stem == "bench" and words else stem.removeprefix("bench_")


def ratios(record: Record, name: str = "") -> list[Ratio]:
    """All ratios of a record, whose file has this name; none if it is of no subject that has any."""
    reader = READERS.get(subject_of(record))
    return list(reader(record["result"], name)) if reader else []


def _spread(values: Mapping[str, float], spread: Mapping[str, list[float]]) -> Iterator[tuple[str, Measured]]:
    """Medians and spreads that are recorded apart, without the peer itself."""
    for name, value in values.items():
        if spread[name] != [1, 1]:
            yield name, Measured(value, *spread[name])


def _owners(number: str) -> str:
    return "one owner" if number == "1" else f"{int(number):,} owners"


def store(result: Record, _: str) -> Iterator[Ratio]:
    """Adding beside the forward pass, and search by owners beside one index."""
    building = result["building"]
    added = Measured(building["ratio_to_forward"]["add"], *building["spread"]["add"])
    yield Ratio("adding documents", "the model's forward pass", added, goal=0.85)
    for owners, found in _spread(result["neighbours"]["ratio_to_merged"], result["neighbours"]["spread"]):
        yield Ratio(f"neighbours, {_owners(owners)}", "one FAISS index", found, goal=0.8)
    for owners, found in _spread(result["few_neighbours"]["ratio_to_merged"], result["few_neighbours"]["spread"]):
        yield Ratio(f"few neighbours, {_owners(owners)}", "one FAISS index", found, goal=0.8)
    for owners, found in _spread(result["blocks"]["ratio_to_1"], result["blocks"]["spread"]):
        yield Ratio(f"blocks, {_owners(owners)}", "one Lucene index", found, goal=0.8)


def ngram(result: Record, _: str) -> Iterator[Ratio]:
    """The ∞-gram by owners, beside one suffix array and beside infini-gram."""
    for size in result.values():
        for peer, named, goal in (("merged", "one suffix array", 0.8), ("infini-gram", "infini-gram", 50)):
            for name, found in _spread(size[f"ratio_to_{peer}"], size[f"spread_to_{peer}"]):
                owners, *batch = name.partition(", ")
                if owners.isdigit():
                    what = f"∞-gram of {size['tokens'] / 1e6:.1f} M tokens, {_owners(owners)}{''.join(batch)}"
                    # Against one suffix array only the same way of calling is fair.
                    if peer != "merged" or not batch[1]:
                        yield Ratio(what, named, found, goal=goal)


def collect(result: Record, _: str) -> Iterator[Ratio]:
    """Collecting, auditing and tokenising beside tokenising."""
    found = Measured(result["ratio"], *result["ratio_spread"])
    yield Ratio("collect + audit + tokenise", "tokenizers alone", found, "lower", 2.5)


MODEL: dict[tuple[str, str], tuple[str, str, Literal["higher", "lower"], float]] = {
    ("dense", "transformers_over_silo"): ("training a dense decoder", "transformers' Llama", "higher", 1.0),
    ("moe", "transformers_over_silo"): ("training top-2 of 8 experts", "transformers' Mixtral", "higher", 1.2),
    ("peer", "peer_pytorch_65k_over_silo_65k"): ("training PEER, 65 k experts", "PEER-pytorch", "higher", 2.0),
    ("peer", "peer_pytorch_1m_over_silo_1m"): ("training PEER, a million experts", "PEER-pytorch", "higher", 8.0),
    ("peer", "silo_1m_over_silo_65k"): ("training PEER, a million experts", "our 65 k", "lower", 1.3),
}
"""What a ratio of two times says; others are of no two that are alike."""


def model(result: Record, _: str) -> Iterator[Ratio]:
    """Training steps beside those of other implementations."""
    for (part, key), (what, peer, better, goal) in MODEL.items():
        for clock in ("wall", "processor"):
            found = result.get(part, {}).get(clock, {})
            if key in found.get("ratio", {}):
                measured = Measured(found["ratio"][key], *found["spread"][key])
                yield Ratio(what, peer, measured, better, goal, clock)


def training_step(result: Record, _: str) -> Iterator[Ratio]:
    """The trainer's step beside bare ones."""
    for recipe, found in result.items():
        measured = Measured(found["ratio"], *found["quartiles"])
        yield Ratio(f"a step of silo train, {recipe}", "a bare step", measured, "lower", clock="processor")
        if "beside_accelerate" in found:
            measured = Measured(*found["beside_accelerate"])
            yield Ratio(f"a step of silo train, {recipe}", "accelerate's loop", measured, "lower", clock="processor")


def evaluation(result: Record, _: str) -> Iterator[Ratio]:
    """Scoring beside lm-evaluation-harness with its best batch."""
    rates, peer = result["tokens_per_second"], result["best_peer"]
    found = Measured.of([ours / theirs for ours, theirs in zip(rates["silo"], rates[peer], strict=True)])
    yield Ratio("scoring by the model alone", "lm-evaluation-harness", found, goal=2.0)


def mixing(result: Record, name: str) -> Iterator[Ratio]:
    """The mixtures beside the model alone, neighbours beside others' loops, many owners beside one."""
    mixtures = result["mixtures"]
    for clock, prefix in PREFIXES.items():
        for method, found in _spread(mixtures[f"{prefix}times_lm"], mixtures[f"{prefix}spread"]):
            goal = {"all": 2.1 if "smollm2" in name else 5.0}.get(method)
            what = "scoring, all methods" if method == "all" else f"scoring, {method}"
            yield Ratio(what, "the model alone", found, "lower", goal, clock)
        (base,) = (key for key in result["ngram"] if key.startswith(f"{prefix}times_"))
        for owners, found in _spread(result["ngram"][base], result["ngram"][f"{prefix}spread"]):
            yield Ratio(f"∞-gram, {_owners(owners.partition(' ')[0])}", "one owner's", found, "lower", 1.25, clock)
        if peers := result.get("peers"):
            for peer, found in _spread(peers[f"{prefix}times_ours"], peers[f"{prefix}spread"]):
                yield Ratio("neighbours alone", f"the loop of {peer}", found, "higher", 10.0, clock)


def bm25(result: Record, _: str) -> Iterator[Ratio]:
    """Building and searching an index of blocks beside Pyserini and bm25s."""
    for size, found in result.items():
        for doing in ("building", "searching"):
            for clock, of in found[doing].items():
                for peer, speed in of["speed_over"].items():
                    yield Ratio(f"BM25, {doing} {int(size):,} blocks", peer, Measured(*speed), clock=clock)


def opening(result: Record, _: str) -> Iterator[Ratio]:
    """Opening a store beside FAISS alone."""
    for clock, of in result["speed_over"].items():
        for name, peers in of.items():
            for peer, speed in peers.items():
                yield Ratio(f"opening, {name.removeprefix('silo, ')}", peer, Measured(*speed), clock=clock)


READERS: dict[str, Callable[[Record, str], Iterator[Ratio]]] = {
    "model": model,
    "training_step": training_step,
    "store": store,
    "bm25": bm25,
    "opening": opening,
    "ngram": ngram,
    "mixing": mixing,
    "evaluation": evaluation,
    "collect": collect,
}
