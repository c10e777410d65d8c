"""How fast the ∞-gram scores text as the number of owners grows, and beside infini-gram's own engine.

    pip install '.[bench]'
    python scripts/bench ngram CORPUS/*.jsonl.zst > scripts/results/ngram.json

Restricted documents are dealt out to 1, 200 and 2,000 owners, whose shards share groups as in a store, and those of the
most owners to smaller groups as well: so much does each group cost of a store that has several. The peer is one merged
index of the same documents; all take turns at scoring the same windows of documents that are in none of them.
infini-gram (Liu 2024) gets the same tokens, with one more separator at the end, and takes turns too: one call a token
with all of the tokens before it, which is how its interface scores a sequence. The tokenizer learns from the permissive
documents.

Its counts are compared with ours token by token. It also counts occurrences at the end of a document, and takes the
separator after them for the next token; so where its suffix is as long as ours, its count must be ours plus that of the
suffix with a separator, and where it is longer, all of its occurrences must be at the ends of documents.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from recording import files_hash

from bench import ceiling
from bench.harness import WrongResult, compete, say, subject
from bench.profiling import functions
from datastore.group_texts import GroupTexts, write_texts
from datastore.groups import GROUP_TOKENS, NGRAMS, PARTS, SEARCH, regroup
from datastore.manifest import Group, ShardEntry
from datastore.ngrams import NgramIndex
from datastore.shard import Encoded, write_shard
from datastore.suffix_arrays import write_suffixes
from datastore.suffixes import Suffixes
from silo.documents import Document
from silo.files import sha256
from silo.licensing import DEFAULT_POLICY
from silo.readings import SHORTER
from silo.sources import open_source
from training.tokens import train_tokenizer

OWNERS = (1, 200, 2000)
TOKENS = (3_900_000, 16_000_000)
SMALL = f"{OWNERS[-1]} in groups of {GROUP_TOKENS / 1e6:.0f} M"
"""The most owners' documents in groups as small as those of keys."""
WINDOW = 1024
BATCH = 8
SEPARATOR = 0xFFFF
WORK = ceiling.Work(reads=2)
"""Of a token, at least: where its suffix stands in the array, and what stands there in the text."""
PEER_WINDOWS = 24
"""Windows whose counts are compared with infini-gram's."""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--tokens",
    multiple=True,
    type=int,
    default=(3_900_000, 16_000_000),
    show_default=True,
    help="Tokens of the stores.",
)
@click.option("--windows", default=64, show_default=True, help="Windows of 1,024 tokens that are scored.")
@click.option("--peer-tokens", default=512, show_default=True, help="Tokens that infini-gram scores a round.")
@click.option("--vocabulary", default=16_384, show_default=True, help="Entries of the tokenizer.")
@click.option("--rounds", default=5, show_default=True, help="Counted rounds.")
@subject
def main(
    files: tuple[Path, ...], tokens: tuple[int, ...], windows: int, peer_tokens: int, vocabulary: int, rounds: int
) -> dict[str, Any]:
    """The ∞-gram by owners, beside infini-gram."""
    roof = ceiling.measure()
    documents = [d for file in files for d in open_source(str(file))]
    documents.sort(key=lambda document: sha256(document.id.encode()))
    held, queries = tokenized(documents, max(tokens), windows, vocabulary)
    say(f"{sum(len(each.tokens) for each in held):,} tokens of {len(held)} documents")
    with tempfile.TemporaryDirectory() as scratch:
        result = {}
        for number, size in enumerate(tokens):
            cut = int(np.searchsorted(np.cumsum([len(each.tokens) for each in held]), size))
            result[str(size)] = measure(Path(scratch) / str(number), held[:cut], queries, peer_tokens, rounds)
            rates = result[str(size)]["tokens_per_second"]
            result[str(size)]["ceiling"] = {name: roof.share(WORK, 1 / rate) for name, rate in rates.items()}
    return {
        "seed": 0,
        "data": files_hash(files),
        "vocabulary": vocabulary,
        "windows": len(queries),
        "rounds": rounds,
        "ceiling": roof.told(),
        "result": result,
    }


def tokenized(
    documents: list[Document], tokens: int, windows: int, vocabulary: int
) -> tuple[list[Encoded], list[np.ndarray]]:
    """Restricted documents of so many tokens, and windows of others."""
    permissive = [each.full_text for each in documents if DEFAULT_POLICY.tier(each).permissive]
    tokenizer = train_tokenizer(permissive[:800], vocabulary).backend_tokenizer
    held: list[Encoded] = []
    queries: list[np.ndarray] = []
    count = 0
    for document in (each for each in documents if not DEFAULT_POLICY.tier(each).permissive):
        ids = np.asarray(tokenizer.encode(document.full_text, add_special_tokens=False).ids, dtype=np.uint16)
        if count >= tokens:
            if len(queries) == windows:
                break
            if len(ids) >= WINDOW:
                queries.append(ids[:WINDOW].astype(np.int64))
        elif len(ids):
            held.append(Encoded.make(document, ids, np.zeros(len(ids), np.int32), np.zeros((len(ids), 1), np.uint8)))
            count += len(ids)
    return held, queries


def measure(
    root: Path, held: list[Encoded], queries: list[np.ndarray], peer_tokens: int, rounds: int
) -> dict[str, Any]:
    """Rates of stores of each number of owners, of one merged index and of infini-gram, in turns."""
    begin = time.perf_counter()
    merged = index([[held]], root / "merged")
    building = time.perf_counter() - begin
    opened = {str(n): dealt(held, n, root / str(n)) for n in OWNERS}
    small = dealt(held, OWNERS[-1], root / "small", SEARCH)
    if len(small.groups) > len(opened[str(OWNERS[-1])].groups):
        opened[SMALL] = small
    say(f"groups: { {n: len(each.groups) for n, each in opened.items()} }")
    engine, peer_building = infini_gram(root / "peer", held)
    part = queries[0][:peer_tokens]
    calls: dict[str, tuple[int, Callable[[], Any]]] = {}
    for batch in (1, BATCH):
        for name, each in {"merged": merged, **opened}.items():
            named = name if batch == 1 else f"{name}, {batch} windows a call"
            calls[named] = (WINDOW * len(queries), partial(match_all, each, queries, batch))
    calls["infini-gram"] = (len(part), lambda: scored(engine, part))
    if not same(merged, list(opened.values()), queries):
        raise WrongResult("stores of other numbers of owners answer otherwise than the merged index")
    told = compared(engine, merged, queries)
    if told.get("different"):
        raise WrongResult(f"{told['different']:,} counts differ from infini-gram's for no known reason")
    units = {name: count for name, (count, _) in calls.items()}
    contest = compete({name: call for name, (_, call) in calls.items()}, rounds, units=units)
    ratios = {peer: {n: contest.speed(n, peer) for n in calls} for peer in ("merged", "infini-gram")}
    return {
        "tokens": sum(len(each.tokens) for each in held),
        "documents": len(held),
        "groups": {name: len(each.groups) for name, each in opened.items()},
        "seconds_to_write_one_group": building,
        "seconds_to_build_infini_gram": peer_building,
        "tokens_per_second": {name: contest.rate(name).value for name in calls},
        **{f"ratio_to_{peer}": {n: v.value for n, v in each.items()} for peer, each in ratios.items()},
        **{f"spread_to_{peer}": {n: [v.low, v.high] for n, v in each.items()} for peer, each in ratios.items()},
        "profile": {name: functions(call) for name, (_, call) in calls.items() if "a call" not in name},
        "equal_for_all_owners": True,
        "beside_infini_gram": told,
    }


def match_all(searched: NgramIndex, queries: list[np.ndarray], batch: int) -> None:
    """Match windows, so many a call."""
    for at in range(0, len(queries), batch):
        searched.match(queries[at : at + batch])


def dealt(held: list[Encoded], owners: int, root: Path, kind: str = NGRAMS) -> NgramIndex:
    """Documents of so many owners, in the groups of a kind that a store would put their shards in."""
    names = {f"owner {number}": held[number::owners] for number in range(owners) if held[number::owners]}
    entries = {name: ShardEntry(name, "", sum(len(each.tokens) for each in of), len(of)) for name, of in names.items()}
    groups: list[Group] = []
    for planned in regroup(groups, entries, set(), kind):
        groups.append(Group(planned, "", 0))
    return index([[names[name] for name in group.shards] for group in groups], root)


def index(groups: list[list[list[Encoded]]], root: Path) -> NgramIndex:
    """Write and open what a store has of groups of shards for the ∞-gram."""
    opened, row = [], 0
    for number, of_group in enumerate(groups):
        directory = root / str(number)
        for part in PARTS[NGRAMS]:
            (directory / part).mkdir(parents=True)
        shards = []
        for at, documents in enumerate(of_group):
            (directory / str(at)).mkdir()
            shards.append(write_shard(directory / str(at), documents, context={})[1])
        rows = [each for shard in shards for each in shard.rows]
        write_texts(directory / "texts", shards)
        write_suffixes(directory / "suffixes", shards)
        texts = GroupTexts(directory / "texts", first_row=row, document=rows.__getitem__)
        opened.append(Suffixes.open(texts, directory / "suffixes"))
        row += texts.rows
    return NgramIndex(opened)


def same(merged: NgramIndex, others: list[NgramIndex], queries: list[np.ndarray]) -> bool:
    """Whether all indexes answer alike: lengths, counts, hits, and all next tokens of some windows, and what they count
    of shorter suffixes."""

    def answers(it: NgramIndex) -> list[Any]:
        found = it.match(queries)
        following = found.following(np.arange(1, WINDOW))
        arrays = [found.lengths, found.counts, found.hits, following.begins, following.tokens, following.counts]
        for shorter in (found.shorter(length) for length in SHORTER):
            arrays += [shorter.counts, shorter.hits, shorter.kinds(np.arange(len(found.lengths)))]
        return [array.tolist() for array in arrays]

    expected = answers(merged)
    return all(answers(other) == expected for other in others)


def infini_gram(root: Path, held: list[Encoded]) -> tuple[Any, float]:
    """infini-gram's engine over the same documents, and the seconds that its index took."""
    from infini_gram.engine import InfiniGramEngine

    root.mkdir(parents=True)
    separator = np.asarray([SEPARATOR], np.uint16)
    separated = [part for each in held for part in (separator, each.tokens)]
    np.concatenate([*separated, separator]).tofile(root / "tokenized.0")
    sizes = [2 * (len(each.tokens) + 1) for each in held]
    np.cumsum([0, *sizes]).astype(np.uint64).tofile(root / "offset.0")
    begin = time.perf_counter()
    options = ["--token_dtype", "u16", "--mem", "4", "--cpus", "1", "--ulimit", "1024"]
    subprocess.run(
        [sys.executable, "-m", "infini_gram.indexing", "--data_dir", root, "--save_dir", root, *options],
        check=True,
        capture_output=True,
    )
    seconds = time.perf_counter() - begin
    return InfiniGramEngine(index_dir=str(root), eos_token_id=0, token_dtype="u16"), seconds


def scored(engine: Any, tokens: np.ndarray) -> list[dict[str, Any]]:
    """What infini-gram says of each token of a sequence."""
    ids = tokens.tolist()
    return [engine.infgram_prob(prompt_ids=ids[:at], cont_id=ids[at]) for at in range(len(ids))]


def compared(engine: Any, merged: NgramIndex, queries: list[np.ndarray], tokens: int = 256) -> dict[str, int]:
    """How many tokens' counts are explained, and how, over the first tokens of each window."""
    told: Counter[str] = Counter()
    for query in queries[:PEER_WINDOWS]:
        found = merged.match([query[:tokens]])
        ids = query[:tokens].tolist()
        for at, theirs in enumerate(scored(engine, query[:tokens])):
            length = theirs["suffix_len"]
            ended = engine.count(input_ids=[*ids[at - length : at], SEPARATOR])["count"]
            ours = (int(found.lengths[at]), int(found.counts[at]), int(found.hits[at]))
            if (length, theirs["prompt_cnt"], theirs["cont_cnt"]) == ours:
                told["equal"] += 1
            elif (length, theirs["prompt_cnt"] - ended, theirs["cont_cnt"]) == ours:
                told["equal but for occurrences at the ends of documents"] += 1
            elif length > ours[0] and ended == theirs["prompt_cnt"]:
                told["its suffix is longer and occurs at the ends of documents only"] += 1
            else:
                told["different"] += 1
    return dict(told)
