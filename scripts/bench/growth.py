"""How cost grows: searching, opening, removing and encoding at three sizes or more, with the exponent that fits.

    python scripts/bench growth CORPUS/*.jsonl.zst --model MODEL > scripts/results/growth.json

- By the tokens of the store, each document its author's: a query for neighbours, a query for blocks, a token of the
  ∞-gram, opening, and removing one document.
- By the number of owners who share the same tokens: opening, removing one of them, who has a part of a group, and
  removing the owner of half a million tokens more, who has a group alone.
- Opening is that of stores too large to be checked meanwhile, whatever size they have.
- By the tokens that are encoded: codes and lists of documents, by the model.

All sizes of one kind take turns. The exponent e of cost ∝ sizeᵉ is the slope of logarithms, fitted to each round. What
a billion tokens and a hundred billion would cost is the largest size's cost, grown by the exponent: far outside of what
was measured, and on one machine like this. Of removing a document that would be wrong: what it rewrites is one group,
which grows no further. Bytes are in the bench of scale.

Most keys are borrowed (see mixing_store.py), since what a search costs does not hang on whether they are the right
ones. Stores are made if --stores has none; make them in one run and measure in another if the machine has other work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from recording import files_hash

from bench import ceiling
from bench.ceiling import Ceiling, Work
from bench.harness import Contest, Measured, compete, exponent, moved, say, subject
from bench.mixing_store import borrowing_keys, documents_hash, kept
from bench.store import LARGE, build, control_plane, once, owned, work_of_a_search
from datastore import snapshot
from datastore.control import ControlPlane
from datastore.groups import ALONE_TOKENS
from datastore.shard import Encoded
from datastore.store import Selection, Store
from silo.documents import Document
from silo.files import sha256
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.sources import open_source
from training.flops import flops_per_token

TOKENS = (500_000, 2_000_000, 8_000_000)
OWNERS = (10, 100, 1000)
OWNED_TOKENS = ALONE_TOKENS
"""That owners share; and no fewer that one has alone."""
ENCODED_TOKENS = (12_500, 25_000, 50_000, 100_000)
OWN_KEYS = 500_000
"""Tokens with keys of their own."""
QUERIES, NEIGHBOURS = 128, 256
WINDOW = 1024
BOUNDED = "removing one document"
"""Which rewrites one group at most."""
BLOCK_QUERY = 32
"""Tokens of a query for blocks."""
PROJECTED = (1_000_000_000, 100_000_000_000)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True), help="Directory of the model.")
@click.option("--stores", type=click.Path(path_type=Path), help="Kept there, and made if they are not.")
@click.option("--tokens", multiple=True, type=int, default=TOKENS, show_default=True, help="Of the stores.")
@click.option("--owners", multiple=True, type=int, default=OWNERS, show_default=True, help="Of the others.")
@click.option("--owned-tokens", default=OWNED_TOKENS, show_default=True, help="Tokens of those.")
@click.option("--rounds", default=5, show_default=True, help="Counted rounds, after one that warms up.")
@subject
def main(
    files: tuple[Path, ...],
    model: Path,
    stores: Path | None,
    tokens: tuple[int, ...],
    owners: tuple[int, ...],
    owned_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """How cost grows with tokens and owners, and what larger stores would cost."""
    roof = ceiling.measure()
    lm = LanguageModel.load(model)
    documents = sorted((d for file in files for d in open_source(str(file))), key=lambda d: sha256(d.id.encode()))
    permissive = [each for each in documents if DEFAULT_POLICY.tier(each).permissive]
    restricted = [each for each in documents if not DEFAULT_POLICY.tier(each).permissive]
    with tempfile.TemporaryDirectory() as scratch:
        root = stores or Path(scratch)
        by_tokens, by_owners = make_stores(root, lm, model, permissive, restricted, (tokens, owners, owned_tokens))
        asked = Asked(lm, permissive)
        result = {
            "tokens": grown_by_tokens(by_tokens, asked, roof, Path(scratch), rounds),
            "owners": grown_by_owners(by_owners, asked, roof, Path(scratch), rounds),
            "encoded": encoding(lm, by_tokens[min(by_tokens)], restricted, roof, rounds),
        }
    return {
        "seed": 0,
        "data": files_hash(files),
        "model": lm.fingerprint,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "ceiling": roof.told(),
        "result": result,
        "projected": {str(size): projected(result, size) for size in PROJECTED},
    }


def make_stores(
    root: Path,
    lm: LanguageModel,
    model: Path,
    permissive: list[Document],
    restricted: list[Document],
    sizes: tuple[Sequence[int], Sequence[int], int],
) -> tuple[dict[int, Store], dict[int, Store]]:
    """Stores of so many tokens, each document its author's; and of so many owners who share some tokens."""
    tokens, owners, owned_tokens = sizes

    @cache
    def texts() -> tuple[ControlPlane, list[Encoded]]:
        plane = control_plane(lm, permissive)
        with tempfile.TemporaryDirectory() as scratch:
            maker = Store.create(Path(scratch) / "maker", lm, model / "tokenizer.json", plane)
            return plane, borrowing_keys(maker, lm, restricted, max([*tokens, 3 * owned_tokens]), OWN_KEYS)

    def upto(size: int, begin: int = 0) -> int:
        return begin + 1 + int(np.searchsorted(np.cumsum([len(each.tokens) for each in texts()[1][begin:]]), size))

    def authors(size: int, path: Path) -> None:
        store = Store.create(path, lm, model / "tokenizer.json", texts()[0])
        store.insert(texts()[1][: upto(size)])
        say(f"{size:,} tokens: {len(store.manifest.groups)} groups")

    def owned_by(n: int, path: Path) -> None:
        cut = upto(owned_tokens)
        end = upto(owned_tokens, cut)
        store = build(path, lm, model, texts()[0], texts()[1][:cut], n)
        store.insert([owned(each, LARGE) for each in texts()[1][cut:end]])

    what = {"documents": documents_hash(restricted), "model": lm.fingerprint, "own_keys": OWN_KEYS}
    return (
        {size: kept(root / f"tokens-{size}", {**what, "tokens": size}, partial(authors, size)) for size in tokens},
        {
            n: kept(root / f"owners-{n}", {**what, "owners": n, "tokens": owned_tokens}, partial(owned_by, n))
            for n in owners
        },
    )


class Asked:
    """What stores are asked: from permissive documents, which none of them holds."""

    def __init__(self, lm: LanguageModel, permissive: Sequence[Document]) -> None:
        """Takes the last documents of a window's length: the first have taught the control plane."""
        tokens = [lm.tokenize(each) for each in permissive[-64:]]
        self.tokens = next(each[:WINDOW] for each in tokens if len(each) >= WINDOW).astype(np.int64)
        """(1024,) int64, for the ∞-gram."""
        self.keys = np.concatenate([lm.keys(each) for each in tokens[:16]])[:QUERIES]
        """(128, dimension) float32, for neighbours."""
        words = [each[at : at + BLOCK_QUERY] for each in tokens for at in range(0, len(each) - BLOCK_QUERY, 128)]
        self.texts = [str(lm.tokenizer.decode(each.tolist())) for each in words[:QUERIES]]
        """For blocks."""


def grown_by_tokens(stores: dict[int, Store], asked: Asked, roof: Ceiling, root: Path, rounds: int) -> dict[str, Any]:
    """Searches, opening, and removing one document, by the size of the store."""
    opened = {size: (store.neighbours(), store.blocks(), store.ngrams()) for size, store in stores.items()}
    found = {
        "a query for neighbours": told(
            race(lambda size: opened[size][0].search(asked.keys, NEIGHBOURS), stores, rounds, QUERIES),
            roof,
            {size: work_of_a_search(store, asked.keys) for size, store in stores.items()},
        ),
        "a query for blocks": told(
            race(lambda size: opened[size][1].search(asked.texts, 1), stores, rounds, len(asked.texts))
        ),
        "a token of the ∞-gram": told(
            race(lambda size: opened[size][2].match([asked.tokens]), stores, rounds, WINDOW),
            roof,
            {size: Work(reads=2) for size in stores},
        ),
    }
    found |= opening_and_removing(
        stores, {"one document": lambda store: Selection(documents=(some_document(store),))}, roof, root, rounds
    )
    return found


def grown_by_owners(stores: dict[int, Store], asked: Asked, roof: Ceiling, root: Path, rounds: int) -> dict[str, Any]:
    """Opening, and removing an owner, by the number of owners of the same tokens."""
    who: dict[str, Callable[[Store], Selection]] = {
        "an owner in a group": lambda store: Selection(owners=("owner 0",)),
        "an owner with a group": lambda store: Selection(owners=(LARGE,)),
    }
    return opening_and_removing(stores, who, roof, root, rounds)


def opening_and_removing(
    stores: dict[int, Store], who: dict[str, Callable[[Store], Selection]], roof: Ceiling, root: Path, rounds: int
) -> dict[str, Any]:
    """Opening with neighbours, and removals, each from a copy; beside what system calls move in them."""
    paths = {size: store.path for size, store in stores.items()}
    work = {}
    with unchecked():
        for size, path in paths.items():
            with moved() as total:
                Store.open(path).neighbours()
            work[size] = Work(bytes=total[0])
        found = {"opening": told(race(lambda size: Store.open(paths[size]).neighbours(), stores, rounds), roof, work)}
    for what, select in who.items():
        chosen = {size: select(store) for size, store in stores.items()}
        seconds: dict[str, list[float]] = {str(size): [] for size in stores}
        for number in range(rounds):
            for size in stores if number % 2 else reversed(stores):
                seconds[str(size)].append(once(root, stores[size], chosen[size])["beside_syncing"])
        work = {}
        for size, store in stores.items():
            with moved() as total:
                once(root, store, chosen[size])
            work[size] = Work(bytes=total[0])
        found[f"removing {what}"] = told(Contest({"wall": seconds}), roof, work)
    return found


@contextmanager
def unchecked() -> Iterator[None]:
    """Open search structures of any size as large ones are."""
    usual = snapshot.CHECKED_BYTES
    snapshot.CHECKED_BYTES = 0
    try:
        yield
    finally:
        snapshot.CHECKED_BYTES = usual


def race(call: Callable[[int], Any], sizes: Sequence[int] | dict[int, Any], rounds: int, units: int = 1) -> Contest:
    """One thing at all sizes, in turns."""
    calls = {str(size): partial(call, size) for size in sizes}
    return compete(calls, rounds, units=dict.fromkeys(calls, units))


def told(contest: Contest, roof: Ceiling | None = None, work: dict[int, Work] | None = None) -> dict[str, Any]:
    """For the record: seconds at each size, the exponent, and the share of the ceiling where the work is known."""
    found: dict[str, Any] = {}
    for clock, of in contest.seconds.items():
        rounds = np.transpose(list(of.values())).tolist()
        seconds = {size: contest.taken(size, clock) for size in of}
        found[clock] = {"seconds": seconds, "exponent": exponent([float(size) for size in of], rounds)}
    if roof and work:
        found["ceiling"] = {str(size): roof.share(each, contest.taken(str(size)).value) for size, each in work.items()}
    say(
        f"{ {size: f'{each.value:.3g} s' for size, each in found['wall']['seconds'].items()} }, "
        f"exponent {found['wall']['exponent']}"
    )
    return found


def some_document(store: Store) -> str:
    """One document of the store: the first of its first shard."""
    return store.rows()[min(store.manifest.shards)][0].id


def encoding(
    lm: LanguageModel, store: Store, documents: Sequence[Document], roof: Ceiling, rounds: int
) -> dict[str, Any]:
    """Lists and codes of documents of so many tokens, beside the operations of their forward pass."""
    ends = np.cumsum([len(lm.tokenize(each)) for each in documents[: ENCODED_TOKENS[-1] // 100]])
    cuts = {int(ends[at]): at + 1 for at in np.searchsorted(ends, ENCODED_TOKENS).tolist()}
    flops = flops_per_token(lm.model, 256)
    contest = race(lambda size: [store.encode(each, lm) for each in documents[: cuts[size]]], cuts, rounds)
    return {"documents": told(contest, roof, {size: Work(flops=flops * size) for size in cuts})}


def projected(result: dict[str, Any], tokens: int) -> dict[str, float]:
    """Seconds of each thing with a store of so many tokens, by the exponents."""
    found = {}
    growing = {what: grown for what, grown in result["tokens"].items() if what != BOUNDED}
    for what, grown in {**growing, "encoding them": result["encoded"]["documents"]}.items():
        wall = grown["wall"]
        size, seconds = list(wall["seconds"].items())[-1]
        power = Measured(*wall["exponent"]).value
        found[what] = Measured(*seconds).value * (tokens / int(size)) ** power
    return found
