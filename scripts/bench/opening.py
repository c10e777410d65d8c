"""Opening a store and answering one query, beside FAISS alone, by the number of owners.

    python scripts/bench opening CORPUS/*.jsonl.zst --model MODEL > scripts/results/opening.json

A store of 10, 100 and 1,000 owners (of half a million tokens, and one owner of as many more) is opened, its files
checked as far as opening checks them, and asked for the neighbours of one key. The peer is one FAISS index of the same
lists and codes, as ``faiss.write_index`` writes it: read into memory, and mapped. It has no documents, owners, licences
or checksums. All must find the same distances. Files are in the system's cache.

Beside that, what is opened for blocks and for the ∞-gram. What opening cannot do without are the bytes that it reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
from recording import files_hash

from bench import ceiling
from bench.ceiling import Ceiling, Work
from bench.growth import OWNED_TOKENS, OWNERS, make_stores
from bench.harness import compete, moved, say, subject
from bench.mixing_peers import merged_index
from bench.nearness import as_near
from datastore.store import Store
from silo.documents import Document
from silo.files import sha256
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.retrieval import PROBES
from silo.sources import open_source

NEIGHBOURS = 16


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True), help="Directory of the model.")
@click.option("--stores", type=click.Path(path_type=Path), help="Kept there, and made if they are not.")
@click.option("--owners", multiple=True, type=int, default=OWNERS, show_default=True, help="Of the stores.")
@click.option("--owned-tokens", default=OWNED_TOKENS, show_default=True, help="Tokens of those.")
@click.option("--rounds", default=9, show_default=True, help="Counted rounds, after one that warms up.")
@subject
def main(
    files: tuple[Path, ...], model: Path, stores: Path | None, owners: tuple[int, ...], owned_tokens: int, rounds: int
) -> dict[str, Any]:
    """Opening a store beside FAISS alone."""
    roof = ceiling.measure()
    lm = LanguageModel.load(model)
    documents = sorted((d for file in files for d in open_source(str(file))), key=lambda d: sha256(d.id.encode()))
    sides: dict[bool, list[Document]] = {True: [], False: []}
    for document in documents:
        sides[DEFAULT_POLICY.tier(document).permissive].append(document)
    with tempfile.TemporaryDirectory() as scratch:
        root = stores or Path(scratch)
        _, opened = make_stores(root, lm, model, sides[True], sides[False], ((), owners, owned_tokens))
        key = lm.keys(lm.tokenize(sides[True][-1]))[:1]
        index, _ = merged_index(opened[owners[0]], PROBES)
        faiss.write_index(index, str(Path(scratch) / "merged.faiss"))
        result = beside_faiss(opened, Path(scratch) / "merged.faiss", key, roof, rounds)
        parts = compete(
            {f"{what}, {n:,} owners": call for n in owners for what, call in rest(opened[n]).items()}, rounds
        )
    return {
        "seed": 0,
        "data": files_hash(files),
        "model": lm.fingerprint,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "ceiling": roof.told(),
        "result": {**result, "other_parts_seconds": {name: parts.taken(name) for name in parts.seconds["wall"]}},
    }


def beside_faiss(stores: dict[int, Store], file: Path, key: np.ndarray, roof: Ceiling, rounds: int) -> dict[str, Any]:
    """Opening and one query: each store, and FAISS both ways."""

    def ours(path: Path) -> Callable[[], np.ndarray]:
        return lambda: Store.open(path).neighbours().search(key, NEIGHBOURS).distances

    def theirs(flags: int) -> Callable[[], np.ndarray]:
        def call() -> np.ndarray:
            index: Any = faiss.read_index(str(file), flags)
            index.nprobe = PROBES
            return index.search(key, NEIGHBOURS)[0]

        return call

    calls = {f"silo, {n:,} owners": ours(store.path) for n, store in stores.items()}
    calls |= {"FAISS, read": theirs(0), "FAISS, mapped": theirs(faiss.IO_FLAG_MMAP)}
    contest = compete(calls, rounds, judge=as_near(next(iter(stores.values())).control.codes, key))
    shares = {}
    for name in calls:
        with moved() as total:
            calls[name]()
        shares[name] = roof.share(Work(bytes=total[0]), contest.taken(name).value)
        say(f"{name}: {contest.taken(name)} s")
    return {
        "seconds": {name: contest.taken(name) for name in calls},
        "speed_over": {
            clock: {
                name: {peer: contest.speed(name, peer, clock) for peer in calls if peer.startswith("FAISS")}
                for name in calls
                if name.startswith("silo")
            }
            for clock in contest.seconds
        },
        "ceiling": shares,
    }


def rest(store: Store) -> dict[str, Callable[[], Any]]:
    """What else is opened to answer."""
    return {
        "blocks": lambda: Store.open(store.path).blocks(),
        "the ∞-gram": lambda: Store.open(store.path).ngrams(),
    }
