"""Opt-out: what an owner's removal does to text of theirs, and whether anything of it is left.

SILO's table of Harry Potter (Min 2023, section 5.3) for any owner: perplexity of their held-out text with the whole
store, after their removal, and with a store that never held them. Weights are the same in all three, so that every
difference is the store's. The last two have to be equal in every bit of every token's log-probability.

Removal is that of :meth:`datastore.store.Store.remove` on a copy; the store itself is not touched. The store that never
held the owner is built afresh from what all others' documents were encoded to, in another order: an encoded document
depends on nothing else in the store (law 3).
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datastore.selection import Selection
from datastore.store import Store
from eval.perplexity import Scores, Text, score
from eval.studies.figure import Panel, Series, draw
from eval.studies.subject import Progress, Subject, Weighings, most, rows_of
from silo.documents import Document
from silo.errors import UsageError
from silo.files import sha256
from silo.markup import visible

MOMENTS = ("before", "after", "never")


@dataclass(frozen=True)
class Owner:
    """A rights holder with text in the store, and other text beside it."""

    name: str
    tokens: int
    """In the store."""
    held_out: list[Document]


def owners_of(subject: Subject, names: Sequence[str], count: int) -> list[Owner]:
    """The owners that are named, or else the ``count`` largest of the store that have test text.

    Raises:
        UsageError: a named owner has no text in the store or none among the test text, or nobody has.
    """
    tokens: dict[str, int] = {}
    for row in rows_of(subject.store):
        tokens[row.owner] = tokens.get(row.owner, 0) + row.end - row.begin
    held_out: dict[str, list[Document]] = {}
    for document in subject.test:
        held_out.setdefault(document.owner, []).append(document)
    for name in names:
        if name not in tokens or name not in held_out:
            where = "the store" if name not in tokens else "the test text"
            raise UsageError(f"no text of owner {name!r} is in {where}; give owners that have some in both")
    both = [name for name in sorted(tokens, key=lambda name: (-tokens[name], name)) if name and name in held_out]
    if not both:
        raise UsageError("no owner of the store has test text; give --data held-out text of its owners")
    return [Owner(name, tokens[name], held_out[name]) for name in (names or both[:count])]


def study(subject: Subject, owners: Sequence[Owner], progress: Progress | None = None) -> dict[str, Any]:
    """Take each owner out of a copy of the store, alone, and ask three stores about their held-out text.

    Returns:
        By owner: perplexity of each mixture ``before``, ``after`` and where they were ``never``, each with its
        interval; the digests of all log-probabilities; whether these are ``equal``. And whether
        all are.
    """
    mixture = subject.mixture()
    weighings = subject.weighings(mixture)
    rows = []
    for number, owner in enumerate(owners, start=1):
        texts = subject.texts(owner.held_out)
        with tempfile.TemporaryDirectory(prefix="silo-opt-out-") as directory:
            stores = {"after": removed(subject.store, owner.name, Path(directory))}
            kept = {row.id for row in rows_of(subject.store) if row.owner != owner.name}
            stores["never"] = never(subject, kept, Path(directory), seed=number)
            scores = {"before": score(mixture, texts)}
            scores |= {moment: score(subject.mixture(store), texts) for moment, store in stores.items()}
            rows.append(_row(subject, owner, texts, scores, stores, weighings))
        if progress:
            progress(number, len(owners))
    return {
        "owners": rows,
        "weights": {name: each.to_json() for name, each in weighings.items() if not subject.given},
        "equal": all(row["equal"] for row in rows),
    }


def removed(store: Store, owner: str, directory: Path) -> Store:
    """A copy of a store, from which an owner was removed as anybody removes one."""
    shutil.copytree(store.path, directory / "after", ignore=shutil.ignore_patterns(".lock", "spool"))
    copy = Store.open(directory / "after")
    copy.remove(Selection(owners=(owner,)), reason="study of opting out")
    return Store.open(directory / "after")


def never(subject: Subject, ids: set[str], directory: Path, *, seed: int) -> Store:
    """A store of the same control plane that never held any but some documents, built in one shuffled addition."""
    old = subject.store
    made = Store.create(directory / "never", subject.model, old.path / "tokenizer.json", old.control)
    encoded = [each for name in old.manifest.shards for each in old.shard(name).documents()]
    kept = [each for each in encoded if each.document.id in ids]
    random.Random(seed).shuffle(kept)
    if kept:
        made.insert(kept)
    return Store.open(made.path)


def _row(
    subject: Subject,
    owner: Owner,
    texts: Sequence[Text],
    scores: dict[str, Scores],
    stores: dict[str, Store],
    weighings: Weighings,
) -> dict[str, Any]:
    bits = {moment: digest(each, weighings) for moment, each in scores.items()}
    return {
        "owner": owner.name,
        "store_tokens": owner.tokens,
        "test_documents": len(texts),
        "test_tokens": sum(len(text.tokens) for text in texts),
        "licenses": sorted({text.document.license for text in texts}),
        "perplexity": {moment: subject.perplexities(scores[moment], texts, weighings) for moment in MOMENTS},
        "log_probabilities": bits,
        "stores": {moment: store.hash for moment, store in stores.items()},
        "equal": bits["after"] == bits["never"] and stores["after"].hash == stores["never"].hash,
    }


def digest(scores: Scores, weighings: Weighings) -> str:
    """SHA-256 of every bit of every token's float64 log-probability under each mixture, and of what each method gave
    to it before it was weighed, since a logarithm can lose the last bit."""
    said = [each for each in (scores.distances, scores.hits, *scores.given.values()) if each is not None]
    logs = [scores.log_probabilities(each) for each in weighings.values()]
    return sha256(b"".join(each.numpy().tobytes() for each in (*logs, *said)))


def figure(result: dict[str, Any]) -> str:
    """One line of marks an owner: the model alone, and the mixture of most methods at each moment."""
    rows = result["owners"]
    best = most(list(rows[0]["perplexity"]["before"]))
    places = list(range(len(rows)))

    def values(moment: str, mixture: str) -> list[float]:
        return [row["perplexity"][moment][mixture][0] for row in rows]

    series = [
        Series("with the whole store", values("before", best), places, marks_only=True),
        Series("after the removal", values("after", best), places, marks_only=True),
        Series("model alone", values("before", "lm"), places, marks_only=True),
        Series("store that never held them", values("never", best), places, marks_only=True),
    ]
    names = [_short(row["owner"]) for row in rows]
    label = "perplexity of the owner's held-out text"
    return draw("Opt-out by owner", [Panel(label, "", series, x_scale="log", y_names=names)])


def _short(name: str) -> str:
    shown = " ".join(visible(name).split())
    return shown if len(shown) <= 24 else f"{shown[:23]}…"
