"""The section of RESULTS.md that holds what was wanted against what was measured, and says why where it fell short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bench.ratios import Ratio, ratios
from render_model import columns

ISOLATION, ALONE = 0.6, 1.05
"""Of the reference experiment: c / b and c / d at most."""
STORE, LEFT, GATE = 0.75, 0.99, 1.03
"""Of SmolLM2 with a store, as multiples of itself; of predicted changes, their correlation; of the gate, as a multiple
of weights tuned on each domain."""
WHY = {
    ("evaluation", "scoring by the model alone"): "both spend their time in the same products, which one library "
    "multiplies for both, unless there is AVX-512 and the processor is not of that library's maker",
    ("mixing", "scoring, all methods"): "where vectors are wide the model's products take half the time, and blocks, "
    "n-grams and what follows a search's products take what they took",
    (
        "mixing",
        "neighbours alone / knn-transformers",
    ): "its loop is hardly more than FAISS's own search; ours is faster, "
    "and its products alone, which no exact search is without, are a good part of what it takes",
    ("mixing", "neighbours alone / silo-lm"): "of wide keys products, which both need, are a larger part; and where "
    "vectors are wide its scan gains more than our choosing among neighbours",
    ("model", "training a dense decoder"): "both are the same products by the same library",
    ("model", "training top-2 of 8 experts"): "the peer multiplies its experts in groups too; most of a step is the "
    "same products by the same library",
    ("model_not_fused", "training PEER, 65 k experts"): "the machine had other work, which the clock counts; by "
    "processor time it is reached",
    ("model", "training PEER, 65 k experts"): "the peer was given torch's fused AdamW, which it does not come with",
    (
        "model",
        "training PEER, a million experts / PEER-pytorch",
    ): "the peer was given torch's fused AdamW, which it does "
    "not come with; the section without says what it takes as it comes",
    ("model", "training PEER, a million experts / our 65 k"): "as many picks hit more different rows of a million than "
    "of 65 k, and memory is what a step waits for",
    (
        "reference",
        "c / d",
    ): "weights that were taught a text gain by it beside the store as well, most where the text is "
    "unlike all that is permissive",
    ("large_ngram_smollm2", ""): "most tokens have a short known suffix, where a store adds little to this model; of "
    "the domains that gain least the corpus has least",
}
"""Why a goal was missed, by record and by what begins so, with the peer after a slash where there are several. No
number is typed here: LOG.md has the measurements behind it."""


class Goal(NamedTuple):
    """What was wanted, and what was measured."""

    record: str
    what: str
    peer: str
    wanted: str
    measured: str
    reached: bool


def goals(records: Mapping[str, dict[str, Any]]) -> str:
    """All goals that a number was named for."""
    found = [*_of_benches(records), *_of_experiments(records)]
    reached = sum(each.reached for each in found)
    rows = "\n".join(
        columns(
            each.record, f"{each.what} / {each.peer}", each.wanted, each.measured, "yes" if each.reached else why(each)
        )
        for each in found
    )
    return f"""## What was wanted

{reached} of {len(found)} numbers that were named before anything was built are reached. Speeds and times are \
multiples of the peer's by the clock (by processor time where that alone was taken), with the spread of the rounds. \
Behind each that a bench missed stands a profile, in [Where the time goes](#where-the-time-goes).

| record | what | wanted | measured | reached, or why not |
|:---|:---|---:|---:|:---|
{rows}
"""


def why(goal: Goal) -> str:
    """Why a goal was missed. Raises KeyError if nobody has said."""
    for (record, begins), reason in WHY.items():
        what, _, peer = begins.partition(" / ")
        if goal.record.startswith(record) and goal.what.startswith(what) and peer in goal.peer:
            return f"no: {reason}"
    raise KeyError(f"{goal.record} has missed {goal.what} / {goal.peer}, and WHY does not say why")


def _of_benches(records: Mapping[str, dict[str, Any]]) -> Iterator[Goal]:
    """The ratios that had a goal."""
    for name, record in records.items():
        of = [each for each in ratios(record, name) if each.goal is not None]
        clock = "wall" if any(each.clock == "wall" for each in of) else "processor"
        for each in of:
            if each.clock == clock and "windows a call" not in each.what:
                yield _goal(name, each)


def _goal(name: str, ratio: Ratio) -> Goal:
    unit, bound = ("speed", "≥") if ratio.better == "higher" else ("time", "≤")
    return Goal(
        name,
        ratio.what,
        f"{unit} of {ratio.peer}",
        f"{bound} {ratio.goal:g}",
        str(ratio.measured),
        bool(ratio.reached),
    )


def _of_experiments(records: Mapping[str, dict[str, Any]]) -> Iterator[Goal]:
    """What was wanted of perplexities, on every domain; and of what attribution foretells."""
    if "reference" in records:
        of = records["reference"]["result"]["ratios"]
        restricted = {name: each for name, each in of.items() if not each["permissive"]}
        free = {name: each for name, each in of.items() if each["permissive"]}
        for what, bound in (("c / b", ISOLATION), ("c / d", ALONE)):
            yield _on_all(
                "reference", what, "restricted domains", bound, {n: each[what] for n, each in restricted.items()}
            )
        harm = {name: each["gated / a"] for name, each in free.items()}
        yield _on_all("reference", "(a) + store, gate", "(a), permissive domains", 1.0, harm)
    if "large_ngram_smollm2" in records:
        result = records["large_ngram_smollm2"]["result"]
        domains = {name: result["domains"][name] for name in result["restricted"]}
        beside = {name: of["gate"] / of["lm"] for name, of in domains.items()}
        tuned = {name: of["gate"] / min(of["tuned"].values()) for name, of in domains.items()}
        yield _on_all("large_ngram_smollm2", "SmolLM2 + store", "itself, restricted domains", STORE, beside)
        yield _on_all("large_ngram_smollm2", "the gate", "weights tuned on each domain", GATE, tuned)
    if "attribution" in records:
        value = records["attribution"]["result"]["correlation"]["left"]
        yield Goal(
            "attribution", "changes without a document", "foretold", f"≥ {LEFT}", f"r = {value:.3f}", value >= LEFT
        )


def _on_all(record: str, what: str, peer: str, bound: float, of: Mapping[str, float]) -> Goal:
    """A goal of every domain: the range, and on how many it was reached."""
    values = sorted(of.values())
    kept = sum(value <= bound for value in values)
    told = f"{values[0]:.3f} to {values[-1]:.3f}, reached on {kept} of {len(values)}"
    return Goal(record, what, peer, f"≤ {bound:g}", told, kept == len(values))
