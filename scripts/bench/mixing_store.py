"""Stores that benches keep from one run to the next, and the held-out text of the bench of mixing.

What a search costs does not hang on whether keys are the right ones. So with a model that would take hours to read all
text, the keys of the first documents are used for the others too, their codes changed a little. Tokens, blocks and
suffixes are always those of the documents themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from bench.control import read
from bench.harness import say
from datastore.control import ControlPlane
from datastore.shard import Encoded, token_type
from datastore.store import Store
from silo.documents import Document
from silo.files import read_json, remove_tree, sha256, write_json
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY

CONTROL_KEYS = 131_072
NOISE = 8
"""Each coordinate of a borrowed code is moved by at most so many of its 256 steps."""


class Corpus(NamedTuple):
    """Documents in the order of their hashed ids."""

    control: list[Document]
    """Permissive ones that teach centroids and codes."""
    store: list[Document]
    """Restricted ones of the training split."""
    fitting: list[Document]
    """Permissive ones of the validation split that are not among the control's."""
    held_out: list[Document]
    """Restricted ones of the validation split."""


def read_corpus(files: Sequence[Path]) -> Corpus:
    """The documents of a corpus whose files name splits."""
    rows = sorted((row for file in files for row in read(file)), key=lambda row: sha256(row[1].id.encode()))
    permissive = [document for split, document in rows if split == "val" and DEFAULT_POLICY.tier(document).permissive]
    restricted = [(split, document) for split, document in rows if not DEFAULT_POLICY.tier(document).permissive]
    of = {wanted: [document for split, document in restricted if split == wanted] for wanted in ("train", "val")}
    cut = len(permissive) * 3 // 4
    return Corpus(permissive[:cut], of["train"], permissive[cut:], of["val"])


def make_store(path: Path, lm: LanguageModel, model: Path, corpus: Corpus, tokens: int, encoded: int) -> Store:
    """A store of the first restricted documents of so many tokens, the first of them with keys of their own."""
    what = {"documents": documents_hash(corpus.store), "model": lm.fingerprint, "tokens": tokens, "encoded": encoded}
    return kept(path, what, partial(_fill, lm, model, corpus, tokens, encoded))


def kept(path: Path, what: dict[str, Any], make: Callable[[Path], Any]) -> Store:
    """A store that is there, or is made now, whole or not at all; beside it lies what it is of, so that none is taken
    for another. Raises :class:`click.ClickException` if it is of something else."""
    note = path.with_name(f"{path.name}.json")
    if not path.exists():
        unfinished = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(unfinished)
        make(unfinished)
        write_json(note, what)
        unfinished.rename(path)
    before = read_json(note) if note.exists() else "nobody knows what"
    if before != what:
        raise click.ClickException(f"{path} is a store of {before}, and this is {what}; give another directory")
    return Store.open(path)


def documents_hash(documents: Sequence[Document]) -> str:
    """What some documents are, in their order."""
    return sha256("\n".join(each.content_hash for each in documents).encode())


def _fill(lm: LanguageModel, model: Path, corpus: Corpus, tokens: int, encoded: int, path: Path) -> None:
    keys, held = [], 0
    for document in corpus.control:
        if held >= CONTROL_KEYS:
            break
        keys.append(lm.keys(lm.tokenize(document)[:4096]))
        held += len(keys[-1])
    store = Store.create(path, lm, model / "tokenizer.json", ControlPlane.fit(np.concatenate(keys), []))
    say(f"{len(store.control.centroids)} lists of {held:,} keys")
    store.insert(borrowing_keys(store, lm, corpus.store, tokens, encoded))
    say(f"{store.describe()['tokens']:,} tokens, {len(store.manifest.groups)} groups")


def borrowing_keys(
    store: Store, lm: LanguageModel, documents: list[Document], tokens: int, encoded: int
) -> list[Encoded]:
    """Documents as shards hold them: encoded, and after so many tokens with others' keys."""
    random = np.random.default_rng(0)
    made: list[Encoded] = []
    held, lists, codes = 0, np.zeros(0, np.int32), np.zeros((0, 0), np.uint8)
    for document in documents:
        if held >= tokens:
            break
        if held < encoded:
            made.append(store.encode(document, lm))
        else:
            if not len(lists):
                lists, codes = (np.concatenate([getattr(each, name) for each in made]) for name in ("lists", "codes"))
                say(f"{held:,} tokens encoded")
            ids: np.ndarray = lm.tokenize(document).astype(token_type(lm.vocab_size))
            rows = (held + np.arange(len(ids))) % len(lists)
            moved = codes[rows] + random.integers(-NOISE, NOISE + 1, (len(ids), codes.shape[1]), dtype=np.int16)
            made.append(Encoded.make(document, ids, lists[rows], moved.clip(0, 255).astype(np.uint8)))
        held += len(made[-1].tokens)
    require_tokens(held, tokens)
    return made


def require_tokens(held: int, wanted: int) -> None:
    """Raise :class:`click.ClickException` if there is too little text for the size that would be told."""
    if held < wanted:
        raise click.ClickException(
            f"the files have {held:,} tokens of restricted text, and {wanted:,} are wanted; give more files, or ask "
            "for fewer tokens"
        )
