"""How much restricted text that was planted in permissive documents is found, and how much clean text is lost by it.

    python scripts/bench laundering CORPUS/*.jsonl.zst --seed 2 > scripts/results/laundering.json

Passages of 100 to 300 words are drawn from restricted documents and planted, each in a permissive document of its own:
half as they are, half lightly edited (words replaced, left out and put in; case and punctuation changed). Everything is
then collected as one heap, with its declared licences. Nothing was fitted on these passages: the thresholds of
`silo.overlap` were set on seed 1, and are reported on another.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from recording import files_hash

from bench.harness import subject
from silo.audit import read_findings
from silo.collect import collect
from silo.corpus import SIDES, Corpus, split_of
from silo.documents import Document
from silo.files import canonical_json
from silo.licensing import DEFAULT_POLICY, Policy, load_policy
from silo.shingles import shingles
from silo.sources import open_source

PASSAGE_WORDS = (100, 300)
EDITS = {"light": (0.05, 0.02, 0.02), "heavy": (0.10, 0.04, 0.04)}
"""Share of words that are replaced, left out, put in."""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--seed", default=2, show_default=True, help="Of what is random.")
@click.option("--passages", default=500, show_default=True, help="How many of each kind are planted.")
@click.option("--policy", type=click.Path(path_type=Path, exists=True), help="A policy with evidence from elsewhere.")
@subject
def main(files: tuple[Path, ...], seed: int, passages: int, policy: Path | None) -> dict[str, Any]:
    """Planted passages: how many are found, and what is lost by it."""
    documents = [document for file in files for document in open_source(str(file))]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        untouched = collect_all(documents, root / "untouched")
        planted, plants = plant(documents, seed, passages)
        found = collect_all(planted, root / "planted")
        result = {
            "documents": {side: count for side, count in sides(documents).items()},
            "restricted_documents_on_the_permissive_side": trespassers(documents, untouched),
            "conflicts": conflicts(documents, root / "with-policy", policy),
            "untouched": outcome(untouched, set()),
            "planted": {kind: recall(kind, plants, found) for kind in sorted({kind for kind, _ in plants.values()})},
            "clean_documents": outcome(found, set(plants)),
        }
    return {
        "seed": seed,
        "data": files_hash(files),
        "passages_of_each_kind": passages,
        "edits": EDITS,
        "result": result,
    }


def sides(documents: list[Document]) -> dict[str, int]:
    """How many documents are declared permissive, and how many are not."""
    count = Counter(DEFAULT_POLICY.tier(document).permissive for document in documents)
    return {"permissive": count[True], "restricted": count[False]}


def trespassers(documents: list[Document], out: Path) -> int:
    """How many documents that are declared restricted stand on the permissive side: there must be none."""
    restricted = {document.id for document in documents if not DEFAULT_POLICY.tier(document).permissive}
    return sum(row.id in restricted for row in Corpus.open(out / "permissive").rows)


def conflicts(documents: list[Document], out: Path, policy: Path | None) -> dict[str, Any]:
    """What is declared permissive and contradicted: by texts themselves, and by the evidence that a policy brings."""
    collect_all(documents, out, load_policy(policy) if policy else DEFAULT_POLICY)
    sources = {document.id: document.source for document in documents}
    found = [finding for finding in read_findings(out) if finding.outcome == "restricted"]
    return {
        reason: {
            "documents": sum(finding.reason == reason for finding in found),
            "sources": sorted({sources[finding.id] for finding in found if finding.reason == reason}),
        }
        for reason in sorted({finding.reason for finding in found})
    }


def plant(documents: list[Document], seed: int, count: int) -> tuple[list[Document], dict[str, tuple[str, str]]]:
    """Plant passages; return all documents, and id → (kind, passage) of those that hold one."""
    rng = random.Random(seed)
    restricted = [d for d in documents if not DEFAULT_POLICY.tier(d).permissive and len(d.text.split()) > 120]
    hosts = [d for d in documents if DEFAULT_POLICY.tier(d).permissive and split_of(d.id) == "train"]
    vocabulary = sorted({word for d in rng.sample(restricted, 200) for word in d.text.split()})
    plants: dict[str, tuple[str, str]] = {}
    changed: dict[str, Document] = {}
    kinds = ["verbatim", *EDITS]
    for number, host in enumerate(rng.sample(hosts, count * len(kinds))):
        words = re.findall(r"\S+\s*", rng.choice(restricted).text)
        length = min(len(words), rng.randint(*PASSAGE_WORDS))
        begin = rng.randint(0, len(words) - length)
        kind, passage = kinds[number % len(kinds)], "".join(words[begin : begin + length])
        text = passage if kind == "verbatim" else edited(passage, EDITS[kind], vocabulary, rng)
        places = [match.end() for match in re.finditer(r"\s", host.text)] or [0]
        at = rng.choice(places)
        changed[host.id] = replace(host, text=f"{host.text[:at]}{text} {host.text[at:]}")
        plants[host.id] = (kind, text)
    return [changed.get(document.id, document) for document in documents], plants


def edited(passage: str, rates: tuple[float, float, float], vocabulary: list[str], rng: random.Random) -> str:
    """A passage with words replaced, left out and put in, and case and punctuation changed here and there."""
    replaced, dropped, inserted = rates
    words: list[str] = []
    for word in passage.split():
        chance = rng.random()
        if chance < dropped:
            continue
        word = rng.choice(vocabulary) if chance < dropped + replaced else word
        word = word.capitalize() if rng.random() < 0.05 else word
        word = word.strip(",;") if rng.random() < 0.3 else word
        words.append(word)
        if rng.random() < inserted:
            words.append(rng.choice(vocabulary))
    return " ".join(words)


def collect_all(documents: list[Document], out: Path, policy: Policy = DEFAULT_POLICY) -> Path:
    """Collect documents as one heap."""
    heap = out.with_suffix(".jsonl")
    heap.write_bytes(b"".join(canonical_json(document.to_json()) for document in documents))
    begin = time.perf_counter()
    collect([str(heap)], out, policy=policy)
    print(f"{out.name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return out


def findings(out: Path) -> dict[str, str]:
    """Id → outcome, of the permissive documents that repeat restricted text."""
    return {f.id: f.outcome for f in read_findings(out) if f.reason == "repeats restricted text"}


def outcome(out: Path, without: set[str]) -> dict[str, Any]:
    """What became of the documents that hold no plant."""
    corpus = Corpus.open(out / "permissive")
    found = {id: what for id, what in findings(out).items() if id not in without}
    kept = sum(row.id not in without for row in corpus.rows)
    dropped = sum(what == "refused" for what in found.values())
    cut = sum(what == "cut" for what in found.values())
    return {
        "documents": kept + dropped,
        "dropped": dropped,
        "cut": cut,
        "dropped_share": dropped / (kept + dropped),
        "cut_share": cut / (kept + dropped),
    }


def recall(kind: str, plants: dict[str, tuple[str, str]], out: Path) -> dict[str, Any]:
    """How many plants of one kind were found, and how much of their text is left on the permissive side."""
    corpus = Corpus.open(out / "permissive")
    texts = {d.id: d.text for split in SIDES["permissive"] for d in corpus.documents(split) if d.id in plants}
    found, left = findings(out), []
    mine = {id: passage for id, (of_kind, passage) in plants.items() if of_kind == kind}
    for id, passage in mine.items():
        grams = shingles([passage.encode()]).hashes
        kept = shingles([texts.get(id, "").encode()]).hashes
        left.append(float(np.isin(grams, kept).mean()) if len(grams) else 0.0)
    outcomes = Counter(found.get(id, "missed") for id in mine)
    return {
        "planted": len(mine),
        "found": len(mine) - outcomes["missed"],
        "recall": 1 - outcomes["missed"] / len(mine),
        "cut": outcomes["cut"],
        "dropped": outcomes["refused"],
        "shingles_left": float(np.mean(left)),
        "words_of_the_missed": sorted(len(mine[id].split()) for id in mine if id not in found),
    }
