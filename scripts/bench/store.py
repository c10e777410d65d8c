"""How a store behaves as its number of owners grows: opening, neighbours, blocks, removal.

    python scripts/bench store CORPUS/*.jsonl.zst --model quickstart/model > scripts/results/store.json

Documents of real text are encoded once, and dealt out to 1, 4, 200 and 2,000 owners, whose stores hold the same keys;
shards as large as those of 4 owners have search structures of their own. Building a shard takes turns with the model's
forward pass alone over the same documents. The peer of the neighbours is one merged FAISS index in
memory over those keys, without documents or ties; that of the blocks is one Lucene index, which is the store of one
owner. Both take turns with ours. For removals, one more owner with a million tokens joins stores of 10 and of 1,000
owners.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from recording import files_hash

from bench import ceiling
from bench.ceiling import Work
from bench.harness import Contest, Judge, compete, say, subject
from bench.mixing_peers import merged_index
from bench.mixing_store import require_tokens
from bench.nearness import as_near, decided
from datastore.control import ControlPlane
from datastore.shard import Encoded
from datastore.store import Selection, Store
from silo.documents import Document
from silo.files import sha256
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.retrieval import PROBES
from silo.sources import open_source
from training.flops import flops_per_token

NEIGHBOURS = 256
QUERIES, FEW_QUERIES, SPARE_QUERIES = 8192, 256, 256
"""So many at a time that lists are read once for all of them, and so few that each reads its own; and more to
choose from, since some may be undecided."""
LARGE = "the owner of much"
SEARCHED = (1, 4, 200, 2000)
BUILT_TOKENS = 200_000
"""Of the shard that is built in turn with the forward pass."""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True), help="Directory of the model.")
@click.option("--tokens", default=2_000_000, show_default=True, help="Tokens of the stores of many owners.")
@click.option("--large-tokens", default=1_000_000, show_default=True, help="Tokens of the owner who is removed.")
@click.option("--rounds", default=5, show_default=True, help="Counted rounds.")
@subject
def main(files: tuple[Path, ...], model: Path, tokens: int, large_tokens: int, rounds: int) -> dict[str, Any]:
    """A store by owners: adding, searching, removing."""
    roof = ceiling.measure()
    lm = LanguageModel.load(model)
    documents = [d for file in files for d in open_source(str(file))]
    documents.sort(key=lambda document: sha256(document.id.encode()))
    plane = control_plane(lm, [d for d in documents if DEFAULT_POLICY.tier(d).permissive])
    restricted = [d for d in documents if not DEFAULT_POLICY.tier(d).permissive]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        maker = Store.create(root / "maker", lm, model / "tokenizer.json", plane)
        begin = time.perf_counter()
        encoded = encode(maker, lm, restricted, tokens + large_tokens)
        encoding = time.perf_counter() - begin
        rows = np.cumsum([len(each.tokens) for each in encoded])
        cut = int(np.searchsorted(rows, tokens))
        small, large = encoded[:cut], [owned(each, LARGE) for each in encoded[cut:]]
        say(f"{rows[-1]:,} keys in {encoding:.0f} s")
        stores = {n: build(root / f"owners-{n}", lm, model, plane, small, n) for n in (1, 4, 10, 200, 1000, 2000)}
        keys = plane.quantizer().decode(np.concatenate([each.codes for each in small[:200]])[: QUERIES + SPARE_QUERIES])
        queries = decided(plane, keys, PROBES)[:QUERIES]
        result: dict[str, Any] = {
            "keys": int(rows[cut - 1]),
            "groups": {n: len(store.manifest.groups) for n, store in stores.items()},
            "neighbours": neighbours(stores, queries, rounds),
            "few_neighbours": neighbours(stores, queries[:FEW_QUERIES], rounds),
            "building": building(root, lm, model, plane, restricted, rounds),
            "opening": {n: opening(stores[n], rounds) for n in (10, 1000)},
            "queries": {"neighbours": len(queries), "few_neighbours": FEW_QUERIES},
            "blocks": blocks(stores, lm, small, rounds),
            "removal": removal(root, stores, large, rounds, encoding / rows[-1]),
        }
        result["ceiling"] = {
            "neighbours": {
                n: roof.share(work_of_a_search(stores[1], queries), 1 / rate)
                for n, rate in result["neighbours"]["queries_per_second"].items()
            },
            "building": {
                name: roof.share(Work(flops=flops_per_token(lm.model, 256)), 1 / rate)
                for name, rate in result["building"]["queries_per_second"].items()
                if name != "keys"
            },
        }
    return {
        "seed": 0,
        "data": files_hash(files),
        "model": lm.fingerprint,
        "rounds": rounds,
        "ceiling": roof.told(),
        "result": result,
    }


def work_of_a_search(store: Store, keys: np.ndarray) -> Work:
    """What a query for neighbours needs on average: the codes in its lists, and a difference, square and sum for each
    coordinate of theirs."""
    lists = np.zeros(len(store.control.centroids), np.int64)
    for name in store.manifest.shards:
        lists += np.bincount(store.shard(name).lists, minlength=len(lists))
    _, probed = store.control.coarse_index().search(keys, PROBES)
    scanned = float(lists[probed].sum(axis=1).mean())
    return Work(bytes=scanned * store.control.codes.size, flops=3 * scanned * keys.shape[1])


def control_plane(lm: LanguageModel, permissive: list[Document], keys: int = 131_072) -> ControlPlane:
    """Centroids and ranges from permissive text."""
    found: list[np.ndarray] = []
    for document in permissive:
        if sum(map(len, found)) >= keys:
            break
        found.append(lm.keys(lm.tokenize(document)))
    return ControlPlane.fit(np.concatenate(found), [])


def encode(store: Store, lm: LanguageModel, documents: list[Document], tokens: int) -> list[Encoded]:
    """Documents as shards hold them, until there are so many tokens."""
    encoded: list[Encoded] = []
    held = 0
    for document in documents:
        if held >= tokens:
            break
        encoded.append(store.encode(document, lm))
        held += len(encoded[-1].tokens)
    require_tokens(held, tokens)
    return encoded


def owned(each: Encoded, owner: str) -> Encoded:
    """A document as another owner's."""
    return replace(each, document=replace(each.document, owner=owner))


def build(
    path: Path, lm: LanguageModel, model: Path, plane: ControlPlane, encoded: list[Encoded], owners: int
) -> Store:
    """A store of some documents, dealt out to so many owners."""
    store = Store.create(path, lm, model / "tokenizer.json", plane)
    begin = time.perf_counter()
    store.insert([owned(each, f"owner {number % owners}") for number, each in enumerate(encoded)])
    say(f"{owners} owners: {len(store.manifest.groups)} groups, {time.perf_counter() - begin:.1f} s")
    return store


def building(
    root: Path, lm: LanguageModel, model: Path, plane: ControlPlane, documents: list[Document], rounds: int
) -> dict[str, Any]:
    """Tokens a second of adding documents to an empty store, and of the model's forward pass over the same tokens: to
    its end, and as far as the keys."""
    chosen: list[Document] = []
    tokens: list[np.ndarray] = []
    for document in documents:
        if sum(map(len, tokens)) >= BUILT_TOKENS:
            break
        chosen.append(replace(document, owner=LARGE))
        tokens.append(lm.tokenize(document))
    stores = [Store.create(root / f"built-{n}", lm, model / "tokenizer.json", plane) for n in range(rounds + 1)]
    fresh = iter(stores)
    calls: dict[str, Callable[[], Any]] = {
        "keys": lambda: [lm.keys(each) for each in tokens],
        "forward": lambda: [len(keys) for each in tokens for keys, _ in lm.logits(each)],
        "add": lambda: next(fresh).add(chosen, lm),
    }
    contest = compete(calls, rounds, units=dict.fromkeys(calls, sum(map(len, tokens))))
    for store in stores:
        shutil.rmtree(store.path)
    return {**rates(contest, "forward"), "ratio_to_keys": rates(contest, "keys")["ratio_to_keys"]}


def opening(store: Store, rounds: int) -> float:
    """Median seconds to open a store and its neighbours."""
    return statistics.median(timed(lambda: Store.open(store.path).neighbours()) for _ in range(rounds))


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def neighbours(stores: dict[int, Store], queries: np.ndarray, rounds: int) -> dict[str, Any]:
    """Queries a second of each store, and of one merged index in memory."""
    plane = stores[1].control
    merged, _ = merged_index(stores[1], min(PROBES, len(plane.centroids)))
    opened = {n: stores[n].neighbours() for n in SEARCHED}
    calls: dict[str, Callable[[], Any]] = {"merged": lambda: merged.search(queries, NEIGHBOURS)}
    calls |= {str(n): lambda index=index: index.search(queries, NEIGHBOURS) for n, index in opened.items()}  # type: ignore[misc]
    judge = same_neighbours(as_near(plane.codes, queries))
    contest = compete(calls, rounds, units=dict.fromkeys(calls, len(queries)), judge=judge)
    return rates(contest, "merged")


def same_neighbours(near: Judge) -> Judge:
    """A judge who wants distances near those that FAISS found, its first."""

    def judge(given: dict[str, Any]) -> str:
        theirs, rows = given["merged"]
        found = {n: of.distances for n, of in given.items() if n != "merged"}
        return near({"merged": np.where(rows < 0, np.inf, theirs)} | found)

    return judge


def blocks(stores: dict[int, Store], lm: LanguageModel, encoded: list[Encoded], rounds: int) -> dict[str, Any]:
    """Queries a second of the BM25 index of each store."""
    texts = [str(lm.tokenizer.decode(each.tokens[100:164].tolist())) for each in encoded if len(each.tokens) > 200][
        :256
    ]
    opened = {n: stores[n].blocks() for n in SEARCHED}
    calls = {str(n): partial(index.search, texts, 1) for n, index in opened.items()}
    contest = compete(calls, rounds, units=dict.fromkeys(calls, len(texts)), judge=same_blocks)
    return rates(contest, "1")


def same_blocks(given: dict[str, Any]) -> str:
    """A judge who wants the same blocks, with the same scores, of all."""
    told = {
        n: [[(block.document.id, block.start, block.score) for block in hits] for hits in found]
        for n, found in given.items()
    }
    wrong = [n for n in told if told[n] != told["1"]]
    return f"the stores of {', '.join(wrong)} owners found other blocks than that of one" if wrong else ""


def rates(contest: Contest, peer: str) -> dict[str, Any]:
    """For the record: what all do a second, and how many times as fast as the peer they are."""
    ratios = {name: contest.speed(name, peer) for name in contest.seconds["wall"]}
    return {
        "queries_per_second": {name: contest.rate(name).value for name in ratios},
        f"ratio_to_{peer}": {name: each.value for name, each in ratios.items()},
        "spread": {name: [each.low, each.high] for name, each in ratios.items()},
    }


def removal(
    root: Path, stores: dict[int, Store], large: list[Encoded], rounds: int, seconds_a_key: float
) -> dict[str, Any]:
    """Seconds to remove the large owner, one document of it, and a small owner, beside the time that syncing took."""
    tokens = sum(len(each.tokens) for each in large)
    found: dict[str, Any] = {"tokens": tokens}
    for n in (10, 1000):
        stores[n].insert(large)
        what = {
            "large_shard": Selection(owners=(LARGE,)),
            "document_of_it": Selection(documents=(large[3].document.id,)),
            "small_shard": Selection(owners=("owner 3",)),
        }
        for name, selection in what.items():
            times = [once(root, stores[n], selection) for _ in range(rounds)]
            found.setdefault(name, {})[str(n)] = {
                key: statistics.median(each[key] for each in times) for key in ("seconds", "syncing", "beside_syncing")
            }
            say(f"{name} of {n}: {found[name][str(n)]}")
    group = sum(entry.tokens for name, entry in stores[1000].manifest.shards.items() if name != LARGE)
    found["encoding_seconds"] = {"large_shard": tokens * seconds_a_key, "group_of_small_shards": group * seconds_a_key}
    return found


def once(root: Path, store: Store, selection: Selection) -> dict[str, float]:
    """Remove from a copy of a store."""
    copy = root / "copy"
    shutil.copytree(store.path, copy, copy_function=os.link)
    for name in ("store.json", "log.jsonl"):
        (copy / name).unlink()
        shutil.copy(store.path / name, copy / name)
    opened = Store.open(copy)
    with syncing() as spent:
        seconds = timed(lambda: opened.remove(selection))
    shutil.rmtree(copy)
    return {"seconds": seconds, "syncing": spent[0], "beside_syncing": seconds - spent[0]}


@contextmanager
def syncing() -> Iterator[list[float]]:
    """Adds up the seconds that go into waiting for the disk."""
    real, spent = os.fsync, [0.0]

    def fsync(descriptor: int) -> None:
        spent[0] += timed(lambda: real(descriptor))

    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield spent
    finally:
        os.fsync = real
