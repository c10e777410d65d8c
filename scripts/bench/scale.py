"""How a store grows: bytes a token for each part, memory and time, at three sizes, and what larger ones would take.

    python scripts/bench scale run CORPUS/*.jsonl.zst --model MODEL > scripts/results/scale.json

Restricted documents of real text, each an owner's, are added in three steps to one store, as a user adds them, each in
a process of its own whose peak memory is taken. After each step other processes open the store and search it, and
remove one document. What larger stores would take is the last step's bytes and seconds a token, times the tokens.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from recording import files_hash

from bench.harness import BENCH, say, subject
from bench.store import control_plane
from datastore.store import Store
from silo.documents import Document
from silo.files import sha256
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.sources import open_source

STEPS = (1_000_000, 4_000_000, 16_000_000)
PROJECTED = (1_000_000_000, 100_000_000_000)
QUERIES = 256
NEIGHBOURS = 256
FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))


@click.group()
def main() -> None:
    """How a store grows; its steps run in processes of their own."""


@main.command()
@FILES
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True), help="Directory of the model.")
@click.option("--steps", multiple=True, type=int, default=STEPS, show_default=True, help="Tokens of the store.")
@subject
def run(files: tuple[Path, ...], model: Path, steps: tuple[int, ...]) -> dict[str, Any]:
    """Bytes, memory and time at three sizes, and what larger ones would take."""
    lm = LanguageModel.load(model)
    documents = sorted((d for file in files for d in open_source(str(file))), key=lambda d: sha256(d.id.encode()))
    permissive = [each for each in documents if DEFAULT_POLICY.tier(each).permissive]
    restricted = iter([each for each in documents if not DEFAULT_POLICY.tier(each).permissive])
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        plane = control_plane(lm, permissive)
        store = Store.create(root / "store", lm, model / "tokenizer.json", plane)
        np.save(root / "queries.npy", np.concatenate([lm.keys(lm.tokenize(each)) for each in permissive[:8]])[:QUERIES])
        held, rows = 0, []
        for wanted in steps:
            added = take(restricted, lm, wanted - held, root / "more.jsonl")
            held += added
            rows.append({**grow(store.path, model, root, added), "tokens": held})
            say(json.dumps(rows[-1]))
    return {
        "seed": 0,
        "data": files_hash(files),
        "model": lm.fingerprint,
        "result": {"steps": rows, "key_dimension": lm.key_spec.dimension, "projected": projected(rows[-1])},
    }


def take(documents: Iterator[Document], lm: LanguageModel, tokens: int, file: Path) -> int:
    """Write documents of so many tokens to a file; how many tokens they have."""
    held = 0
    with open(file, "w", encoding="utf-8") as lines:
        for document in documents:
            lines.write(json.dumps(document.to_json()) + "\n")
            held += len(lm.tokenize(document))
            if held >= tokens:
                return held
    raise click.ClickException(
        f"the files have {tokens - held:,} tokens of restricted text too few; name smaller steps"
    )


def grow(store: Path, model: Path, root: Path, added: int) -> dict[str, Any]:
    """Add, search and remove, each in a process of its own."""
    adding = measured("-m", "silo", "datastore", "add", store, root / "more.jsonl", "--model", model, "--json")
    opened = Store.open(store)
    searching = measured(BENCH, "scale", "search", store, root / "queries.npy")
    some = opened.rows()[min(opened.manifest.shards)][0].id
    removing = measured("-m", "silo", "datastore", "remove", store, "--document", some, "--no-duplicates", "--json")
    return {
        "added": added,
        "groups": len(opened.manifest.groups),
        "bytes": sizes(store),
        "add": {"seconds": adding["seconds"], "peak_bytes": adding["peak_bytes"]},
        "search": {**json.loads(searching["said"]), "peak_bytes": searching["peak_bytes"]},
        "remove_document": {"seconds": removing["seconds"], "peak_bytes": removing["peak_bytes"]},
    }


def measured(*arguments: object) -> dict[str, Any]:
    """What a command of Python said, its seconds and its peak memory."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise click.ClickException(f"{' '.join(map(str, arguments[:4]))} failed")
        said.seek(0)
        text = said.read().decode()
    return {"said": text, "seconds": time.perf_counter() - begin, "peak_bytes": used.ru_maxrss * 1024}


def sizes(store: Path) -> dict[str, int]:
    """Bytes of each part of a store."""
    found: dict[str, int] = defaultdict(int)
    for path in store.rglob("*"):
        if path.is_file():
            top, *rest = path.relative_to(store).parts
            part = f"{top}/{rest[1] if top == 'search' and len(rest) > 2 else path.stem}" if rest else "the rest"
            found[part if top in ("shards", "search") else "the rest"] += path.stat().st_size
    return dict(sorted(found.items()))


@main.command(hidden=True)
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("queries", type=click.Path(path_type=Path))
def search(store: Path, queries: Path) -> None:
    """Print the seconds to open a store, and queries or tokens a second of each search, in this process."""
    begin = time.perf_counter()
    opened = Store.open(store)
    neighbours = opened.neighbours()
    opening = time.perf_counter() - begin
    keys = np.load(queries)
    tokens = next(iter(opened.shard(min(opened.manifest.shards)).documents())).tokens[:1024].astype(np.int64)
    blocks, ngrams = opened.blocks(), opened.ngrams()
    texts = [opened.tokenizer.decode(tokens[at : at + 32].tolist()) for at in range(0, len(tokens) - 32, 8)]
    what = {
        "neighbours": (lambda: neighbours.search(keys, NEIGHBOURS), len(keys)),
        "blocks": (lambda: blocks.search(texts, 1), len(texts)),
        "ngrams": (lambda: ngrams.match([tokens]), len(tokens)),
    }
    rates = {}
    for name, (function, count) in what.items():
        function()
        begin = time.perf_counter()
        function()
        rates[name] = count / (time.perf_counter() - begin)
    print(json.dumps({"opening": opening, "per_second": rates}))


def projected(last: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes by part, and days of encoding, of larger stores."""
    seconds = last["add"]["seconds"] / last["added"]
    return [
        {
            "tokens": tokens,
            "bytes": {part: round(size / last["tokens"] * tokens) for part, size in last["bytes"].items()},
            "encoding_days": seconds * tokens / 86_400,
        }
        for tokens in PROJECTED
    ]
