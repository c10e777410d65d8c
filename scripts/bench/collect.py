"""Throughput and memory of collect + audit + tokenise, beside tokenising the same text alone.

    python scripts/bench collect run CORPUS/*.jsonl.zst > scripts/results/collect.json

Each measurement is a process of its own; ours and the peer take turns, on the same texts with the same tokenizer
(trained once, before). The peer is `tokenizers` alone: `encode_batch_fast` over every text. Then ours once more on four
times the text, for memory: three more copies with their letters shifted, so that no copy is a duplicate.

Prints one JSON document: machine, command, commit, data hash, medians, spread, ratio.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from recording import files_hash
from tokenizers import Tokenizer

from bench.harness import BENCH, Measured, subject
from silo.audit import audit
from silo.collect import collect
from silo.corpus import Corpus
from silo.documents import Document
from silo.files import canonical_json
from silo.licensing import DEFAULT_POLICY
from silo.sources import open_source
from training.tokens import tokenize, train_tokenizer, wrap_tokenizer

LETTERS = [b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
PEER_BATCH = 256


@click.group()
def main() -> None:
    """Collecting, auditing and tokenising beside tokenising alone; its parts run in processes of their own."""


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=3, show_default=True, help="Counted rounds.")
@click.option("--vocab-size", default=16_384, show_default=True, help="Entries of the tokenizer.")
@subject
def run(files: tuple[Path, ...], rounds: int, vocab_size: int) -> dict[str, Any]:
    """Collecting, auditing and tokenising beside tokenising alone."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        tokenizer = root / "tokenizer.json"
        names = [str(file.resolve()) for file in files]
        # Processes of their own: a child starts with its parent's peak memory, so this one has to stay small.
        roof = json.loads(run_bench("ceiling"))["result"]
        characters = json.loads(run_bench("collect", "prepare", str(tokenizer), str(vocab_size), str(root), *names))
        heap = names
        ours, peer = [], []
        for _ in range(rounds):
            peer.append(worker("alone", tokenizer, root, heap))
            ours.append(worker("ours", tokenizer, root, heap))
        fourfold = worker("ours", tokenizer, root, heap + [str(root / f"copy{n}.jsonl") for n in (1, 2, 3)])
    seconds = [sum(each["seconds"].values()) for each in ours]
    alone = [each["seconds"]["tokenise"] for each in peer]
    ratio = Measured.of([one / other for one, other in zip(seconds, alone, strict=True)])
    from bench.ceiling import Ceiling, Work  # now that no process starts any more: it loads torch

    reached = Ceiling.read(roof).share(Work(bytes=characters), statistics.median(seconds), 1)
    return {
        "data": files_hash(files),
        "megabytes": characters / 1e6,
        "rounds": rounds,
        "vocab_size": vocab_size,
        "ceiling": roof,
        "result": {
            "ceiling": reached,
            "ratio": ratio.value,
            "ratio_spread": [ratio.low, ratio.high],
            "seconds": {name: statistics.median(each["seconds"][name] for each in ours) for name in ours[0]["seconds"]},
            "seconds_alone": statistics.median(alone),
            "megabytes_per_second": characters / 1e6 / statistics.median(seconds),
            "megabytes_per_second_alone": characters / 1e6 / statistics.median(alone),
            "tokens": [ours[0]["tokens"], peer[0]["tokens"]],
            "peak_memory_bytes": {"1x": ours[-1]["peak"], "4x": fourfold["peak"], "alone": peer[-1]["peak"]},
            "seconds_4x": fourfold["seconds"],
        },
    }


def run_bench(*arguments: str) -> str:
    """What a command of the bench prints, in a process of its own."""
    typed = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(typed, stdout=subprocess.PIPE, check=True, text=True).stdout


@main.command(hidden=True)
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("vocab_size", type=int)
@click.argument("root", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def prepare(tokenizer: Path, vocab_size: int, root: Path, files: tuple[Path, ...]) -> None:
    """Train the tokenizer, write three shifted copies of the text, and print how many bytes of text there are."""
    documents = [d for file in files for d in open_source(str(file))]
    permissive = [d.text for d in documents if DEFAULT_POLICY.tier(d).permissive]
    train_tokenizer(permissive[::5], vocab_size).backend_tokenizer.save(str(tokenizer))
    for number in (1, 2, 3):
        shifted(files, root / f"copy{number}.jsonl", 7 * number)
    print(sum(len(d.text.encode()) for d in documents))


def worker(kind: str, tokenizer: Path, root: Path, files: list[str]) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    printed = run_bench("collect", "work", kind, str(tokenizer), str(root / "out"), *files)
    shutil.rmtree(root / "out", ignore_errors=True)
    print(f"{kind}: {printed.strip()}", file=sys.stderr)
    return json.loads(printed)


@main.command(hidden=True)
@click.argument("kind", type=click.Choice(["ours", "alone"]))
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1)
def work(kind: str, tokenizer: Path, out: Path, files: tuple[str, ...]) -> None:
    """One measurement; prints seconds by step, tokens and peak memory."""
    seconds, tokens, peaks = ours(files, tokenizer, out) if kind == "ours" else alone(files, tokenizer)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak": peaks}))


def peak() -> int:
    """Peak memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ours(files: tuple[str, ...], tokenizer: Path, out: Path) -> tuple[dict[str, float], int, dict[str, int]]:
    """Collect, audit, and tokenise the training and validation text of both sides."""
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    tokens, begin = 0, time.perf_counter()

    def done(step: str) -> None:
        seconds[step], peaks[step] = time.perf_counter() - begin - sum(seconds.values()), peak()

    collect(list(files), out)
    done("collect")
    audit(out)
    done("audit")
    for side in ("permissive", "restricted"):
        wrapped = wrap_tokenizer(Tokenizer.from_file(str(tokenizer)))
        tokenize(Corpus.open(out / side), DEFAULT_POLICY, wrapped, out / f"tokens-{side}")
        tokens += sum(json.loads((out / f"tokens-{side}" / "manifest.json").read_bytes())["tokens"].values())
    done("tokenise")
    return seconds, tokens, peaks


def alone(files: tuple[str, ...], tokenizer: Path) -> tuple[dict[str, float], int, dict[str, int]]:
    """Tokenise the texts that :func:`ours` tokenises, and nothing else. Reading them is not counted."""
    from silo.corpus import split_of

    backend, seconds, tokens = Tokenizer.from_file(str(tokenizer)), 0.0, 0
    for batch in batches(d for file in files for d in open_source(file)):
        texts = [d.text for d in batch if split_of(d.id, side_of(d)) in ("train", "val")]
        begin = time.perf_counter()
        tokens += sum(len(encoded.ids) for encoded in backend.encode_batch_fast(texts, add_special_tokens=False))
        seconds += time.perf_counter() - begin
    return {"tokenise": seconds}, tokens, {"tokenise": peak()}


def side_of(document: Document) -> str:
    """The side that a document's declared licence puts it on."""
    return "permissive" if DEFAULT_POLICY.tier(document).permissive else "restricted"


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents, so many at a time."""
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == PEER_BATCH:
            yield batch
            batch = []
    yield batch


def shifted(files: tuple[Path, ...], out: Path, by: int) -> Path:
    """A copy of the documents with every ASCII letter moved on by some places, under ids of its own."""
    table = bytes.maketrans(b"".join(LETTERS), b"".join(each[by:] + each[:by] for each in LETTERS))
    with open(out, "wb") as file:
        for source in files:
            for document in open_source(str(source)):
                record = {**document.to_json(), "id": f"{by}/{document.id}"}
                record["text"] = document.text.encode().translate(table).decode()
                file.write(canonical_json(record))
    return out
