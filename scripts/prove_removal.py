"""Whether a store that documents were removed from is the store that never held them, and nothing of them is left.

    python scripts/prove_removal.py CORPUS/*.jsonl.zst --model quickstart/model > scripts/results/removal.json

Stores of 3, 30 and 300 owners of real restricted text go through random additions and removals: by document, owner,
source, licence and shard, and by document with its near-duplicates, of which some are planted. After each change a
store is built afresh, in one shuffled addition, from what should remain, in groups of another size. Compared, bit for
bit: the canonical hash; neighbours with distances, values, documents and positions; blocks with scores; ∞-grams with
counts and what follows them; the mixture's whole distributions. For each removal, what its documents alone had is
sought in every byte of every file, before and after.

The control breaks law 2: centroids and ranges are fitted on the store's own text, for the fresh store anew on what
remains of it. Then the comparison has to fail.

Prints one JSON document: machine, command, commit, seed, data hash, result. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
from recording import command, commit, files_hash, machine
from remains import Unique

from datastore import groups
from datastore.control import ControlPlane
from datastore.shard import Encoded
from datastore.store import Selection, Store
from eval.perplexity import Text, distribution_digest
from eval.quickstart import open_mixture
from silo.documents import Document
from silo.files import canonical_json, sha256
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.readings import SHORTER
from silo.sources import open_source
from silo.weights import Weights

KINDS = ("document", "owner", "source", "license", "shard", "duplicates")
"""How what is to go is named."""
BROKEN = "control_plane_fitted_on_restricted_text"
PASSAGE = 1200
"""Characters of a document's text that are taken."""
COPIED = 20
"""One document in so many has a copy under another owner."""
SOUGHT = 3
"""Documents of a removal that are sought."""
FOUND_BEFORE = ("tokens <u2", "shingles", "codes", "title")
"""Kinds of traces that a store has of every document that it holds; of a word's end Lucene may write less."""


class Remembering:
    """A language model that makes the keys of a document once."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._keys: dict[bytes, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def keys(self, tokens: np.ndarray) -> np.ndarray:
        """As :meth:`silo.language_model.LanguageModel.keys`."""
        name = tokens.tobytes()
        if name not in self._keys:
            self._keys[name] = self._model.keys(tokens)
        return self._keys[name]


class Proof:
    """Stores of some documents that are encoded once, and what is asked of them."""

    def __init__(self, root: Path, lm: Any, model: Path, plane: ControlPlane, documents: Sequence[Document]) -> None:
        self.root, self.lm, self.model, self.plane = root, lm, model, plane
        self.documents = {document.id: document for document in documents}
        maker = self.create("maker")
        self.encoded = {document.id: maker.encode(document, lm) for document in documents}
        shutil.rmtree(maker.path)
        asked = documents[:: max(1, len(documents) // 12)]
        self.texts = [Text(document, lm.tokenize(document)[:96]) for document in asked]
        self.fresh_stores = 0
        self.queries = [document.text[at : at + 200] for document in asked for at in (100, 600)]

    def create(self, name: str) -> Store:
        """An empty store."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return Store.create(self.root / name, self.lm, self.model / "tokenizer.json", self.plane)

    def keys(self, ids: Iterable[str]) -> np.ndarray:
        """The keys of some documents."""
        return np.concatenate([self.lm.keys(self.lm.tokenize(self.documents[each])) for each in sorted(ids)])

    def fresh(self, ids: Iterable[str], rng: random.Random, group_tokens: int) -> Store:
        """A store built in one addition, in random order, in a new place: nothing of it can be remembered."""
        self.fresh_stores += 1
        shutil.rmtree(self.root / f"fresh {self.fresh_stores - 1}", ignore_errors=True)
        store = self.create(f"fresh {self.fresh_stores}")
        shuffled = sorted(ids)
        rng.shuffle(shuffled)
        with grouped(group_tokens):
            if shuffled:
                store.insert([self.encoded[each] for each in shuffled])
        return store

    def answers(self, store: Store) -> dict[str, str]:
        """One hash for each kind of answer, over all that it says."""
        store = Store.open(store.path)
        neighbours = store.neighbours()
        keys = np.concatenate([self.lm.keys(self.lm.tokenize(text.document))[::4] for text in self.texts])
        found = neighbours.search(keys, 64)
        named = [[neighbours.document(each).id if each >= 0 else "" for each in row] for row in found.documents]
        arrays = [each.tobytes().hex() for each in (found.distances, found.values, found.positions)]
        blocks = [
            [each.document.id, each.start, each.tokens.tolist(), each.score.hex()]
            for hits in store.blocks().search(self.queries, 4)
            for each in hits
        ]
        ngrams = store.ngrams()
        texts = [self.lm.tokenize(text.document)[:256].astype(np.int64) for text in self.texts]
        matches = ngrams.match(texts)
        following = matches.following(np.flatnonzero(matches.lengths > 1))
        suffixes = [matches.lengths, matches.counts, matches.hits, following.tokens, following.counts]
        every = np.arange(len(matches.lengths))
        for shorter in (matches.shorter(length) for length in SHORTER):
            suffixes += [shorter.counts, shorter.hits, shorter.kinds(every)]
        mixture = open_mixture(self.lm, store)
        weights = Weights({method: 1 / len(mixture.methods) for method in mixture.methods}, 8.0)
        return {
            "hash": store.hash,
            "neighbours": sha256(canonical_json([arrays, named])),
            "blocks": sha256(canonical_json(blocks)),
            "ngrams": sha256(canonical_json([each.tolist() for each in suffixes])),
            "distributions": distribution_digest(mixture, self.texts, weights),
        }

    def with_keys(self, ids: Iterable[str]) -> list[tuple[Document, Encoded, np.ndarray]]:
        """Documents as :class:`remains.Unique` wants them."""
        return [(self.documents[each], self.encoded[each], self.keys([each])) for each in ids]


class grouped:
    """Make groups of another size for a while."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._before = tokens, groups.GROUP_TOKENS

    def __enter__(self) -> None:
        groups.GROUP_TOKENS = self._tokens

    def __exit__(self, *exception: object) -> None:
        groups.GROUP_TOKENS = self._before


def deal(documents: Sequence[Document], owners: int) -> list[Document]:
    """Documents under so many owners: the real ones, the largest split or the smallest merged until there are."""
    by_owner: dict[str, list[Document]] = {}
    for document in documents:
        by_owner.setdefault(document.owner or document.source, []).append(document)
    sides = sorted(by_owner.items())
    while len(sides) < owners:
        name, most = sides.pop(max(range(len(sides)), key=lambda at: (len(sides[at][1]), at)))
        sides += [(name, most[::2]), (f"{name}, {len(sides)}", most[1::2])]
    while len(sides) > owners:
        sides.sort(key=lambda side: (len(side[1]), side[0]))
        (_, one), (name, other), *sides = sides
        sides.append((name, one + other))
    return [replace(document, owner=name) for name, of_owner in sides for document in of_owner]


def copied(documents: Sequence[Document]) -> list[Document]:
    """The documents, and copies of some under another's name: every other one exact, the rest with words changed."""
    copies = []
    for number, document in enumerate(documents[::COPIED]):
        other = documents[(number * COPIED + len(documents) // 2) % len(documents)]
        words = document.text.split(" ")
        if number % 2:
            words[10::30] = ["changed"] * len(words[10::30])
        facts = {name: getattr(other, name) for name in ("owner", "source", "license")}
        copies.append(replace(document, id=f"copy of {document.id}", text=" ".join(words), **facts))
    return [*documents, *copies]


def selection(kind: str, document: Document) -> Selection:
    """What names a document, and perhaps others."""
    name = document.id if kind in ("document", "duplicates") else getattr(document, {"shard": "owner"}.get(kind, kind))
    field = {"duplicates": "documents"}.get(kind, f"{kind}s")
    return Selection(**{field: (name,)})


def meant(kind: str, named: Document, documents: Iterable[Document]) -> set[str]:
    """The ids of the documents that a selection means, without asking the store."""
    field = {"document": "id", "duplicates": "id", "shard": "owner"}.get(kind, kind)
    return {each.id for each in documents if getattr(each, field) == getattr(named, field)}


def history(proof: Proof, rng: random.Random, changes: int) -> dict[str, Any]:
    """Change a store at random; compare it after each change with a fresh one, and seek what went."""
    everything = sum(len(each.tokens) for each in proof.encoded.values())
    store, held, steps = proof.create("store"), set[str](), []
    kinds = [*KINDS] * (1 + changes // len(KINDS))
    for number in range(changes):
        absent = sorted(proof.documents.keys() - held)
        with grouped(everything // 5):
            if len(held) < len(proof.documents) / 3 or (absent and rng.random() < 0.3):
                some = rng.sample(absent, rng.randint((len(absent) + 1) // 2, len(absent)))
                store.insert([proof.encoded[each] for each in some])
                held |= set(some)
                step: dict[str, Any] = {"change": "add", "documents": len(some)}
            else:
                kind = kinds.pop(0)
                step, gone = remove(proof, store, held, kind, rng)
                held -= gone
        fresh = proof.fresh(held, rng, rng.choice([everything // 3, groups.GROUP_TOKENS]))
        ours, theirs = proof.answers(store), proof.answers(fresh)
        step["equal"] = {name: ours[name] == theirs[name] for name in ours}
        step["as_expected"] = held == {row.id for rows in store.rows().values() for row in rows}
        store.verify()
        step |= {"remaining": len(held), "groups": len(store.manifest.groups)}
        step["fresh_groups"] = len(fresh.manifest.groups)
        say(f"{number + 1}: {step}")
        steps.append(step)
    return {"documents": len(proof.documents), "tokens": everything, "steps": steps}


def remove(
    proof: Proof, store: Store, held: set[str], kind: str, rng: random.Random
) -> tuple[dict[str, Any], set[str]]:
    """Remove something, seek it before and after, and say what should have gone."""
    some = sorted(held)
    copies = [each for each in some if f"copy of {each}" in held]
    named = proof.documents[rng.choice(copies if kind == "duplicates" and copies else some)]
    gone = meant(kind, named, [proof.documents[each] for each in held])
    chosen = rng.sample(sorted(gone), min(SOUGHT, len(gone)))
    alike = {row["id"] for row in store.near_duplicates(store.affected(selection(kind, named)))}
    if kind == "duplicates":
        gone |= alike
    unique = Unique(store.tokenizer, proof.with_keys(chosen), proof.with_keys(sorted(held - gone)), store.path)
    before, words_before = unique.in_files(store.path), unique.in_lucene(store.path)
    receipt = store.remove(selection(kind, named), duplicates="remove" if kind == "duplicates" else "ignore")
    after, words_after = unique.in_files(store.path), unique.in_lucene(store.path)
    found = {name: len(needles) for name, needles in unique.needles.items()}
    step = {
        "change": f"remove by {kind}",
        "documents": len(receipt.content["documents"]),
        "sought": {**found, "words in Lucene": len(unique.words)},
        "found_before": {name: len(files) for name, files in before.items()} | {"words in Lucene": len(words_before)},
        "found_after": {name: sorted(files) for name, files in after.items()} | {"words in Lucene": len(words_after)},
        "search_can_fail": all(name in before for name in FOUND_BEFORE if found.get(name))
        and finds_all(proof.root / "planted", unique)
        and len(words_before) == len(unique.words),
        "planted_copy_went_too": kind != "duplicates" or not copies or f"copy of {named.id}" in gone,
    }
    return step, gone


def finds_all(directory: Path, unique: Unique) -> bool:
    """Whether the search finds each kind of trace in a file that holds it."""
    directory.mkdir(exist_ok=True)
    (directory / "planted").write_bytes(b"\0".join(b"\0".join(sorted(each)) for each in unique.needles.values()))
    found = unique.in_files(directory)
    shutil.rmtree(directory)
    return found.keys() >= {kind for kind, needles in unique.needles.items() if needles}


def without_law_2(proof: Proof, rng: random.Random) -> dict[str, Any]:
    """Compare where the control plane was fitted on the store's own text: what is equal, which should not all be."""
    owner = rng.choice(sorted(document.owner for document in proof.documents.values()))
    staying = [each for each, document in proof.documents.items() if document.owner != owner]
    found = []
    for name, taught_by, holds in (("store", proof.documents, proof.documents), ("fresh", staying, staying)):
        plane = ControlPlane.fit(proof.keys(taught_by), [])
        other = Proof(proof.root / "broken", proof.lm, proof.model, plane, list(proof.documents.values()))
        store = other.create(name)
        store.insert([other.encoded[each] for each in holds])
        if name == "store":
            store.remove(Selection(owners=(owner,)))
        found.append(other.answers(store))
    return {"removed_documents": len(proof.documents) - len(staying), **equality(*found)}


def equality(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, Any]:
    """What of two stores' answers is equal."""
    return {"equal": {name: ours[name] == theirs[name] for name in ours}}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def prove(root: Path, lm: Any, model: Path, sides: tuple[list[Document], list[Document]], options: Any) -> dict:
    """All stores."""
    plane = ControlPlane.fit(np.concatenate([lm.keys(lm.tokenize(each)) for each in sides[1]]), [])
    result: dict[str, Any] = {}
    for owners in options["owners"]:
        rng = random.Random(f"{options['seed']} {owners}")
        chosen = copied(deal(sides[0][: max(60, 3 * owners)], owners))
        proof = Proof(root / str(owners), lm, model, plane, chosen)
        result[str(owners)] = {
            **history(proof, rng, options["changes"]),
            BROKEN: without_law_2(proof, rng),
        }
        say(f"{owners} owners, law 2 broken: {result[str(owners)][BROKEN]}")
        shutil.rmtree(root / str(owners))
    return result


def exact(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether the store was after each change the one that was built afresh of what should remain."""
    return all(step["as_expected"] and all(step["equal"].values()) for step in steps)


def physical(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether after each removal nothing was found by a search that did find it before."""
    gone = [step for step in steps if "found_after" in step]
    return (
        all(step["search_can_fail"] and step["planted_copy_went_too"] for step in gone)
        and all(step["found_after"] == {"words in Lucene": 0} for step in gone)
        and any("a word's end" in step["found_before"] for step in gone)
    )


def found_out(equal: dict[str, bool]) -> bool:
    """Whether a control plane of restricted text made all unequal but blocks and n-grams, which know no keys."""
    return not any(value for name, value in equal.items() if name not in ("blocks", "ngrams"))


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--owners", multiple=True, type=int, default=(3, 30, 300), show_default=True)
@click.option("--changes", default=12, show_default=True, help="To each store.")
@click.option("--seed", default=0, show_default=True)
def main(files: tuple[Path, ...], model: Path, **options: Any) -> None:
    """Prove, and print one JSON document."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    lm = Remembering(LanguageModel.load(model))
    documents = [document for file in files for document in open_source(str(file))]
    documents.sort(key=lambda document: sha256(document.id.encode()))
    cut = [replace(each, text=each.text[:PASSAGE]) for each in documents]
    restricted = [each for each in cut if not DEFAULT_POLICY.tier(each).permissive]
    permissive = [each for each in cut if DEFAULT_POLICY.tier(each).permissive][:150]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        result = prove(Path(scratch), lm, model, (restricted, permissive), options)
    report = {
        "machine": machine(),
        "command": command(),
        "commit": commit(),
        "seed": options["seed"],
        "data": files_hash(files),
        "model": lm.fingerprint,
        "seconds": time.perf_counter() - begin,
        "exact": all(exact(store["steps"]) for store in result.values()),
        "physical": all(physical(store["steps"]) for store in result.values()),
        "law_2_broken_is_found_out": all(found_out(store[BROKEN]["equal"]) for store in result.values()),
        "result": result,
    }
    print(json.dumps(report, indent=1))
    sys.exit(0 if report["exact"] and report["physical"] and report["law_2_broken_is_found_out"] else 1)


if __name__ == "__main__":
    main()
