"""What the store's tests share: the bytes of a store, and all that it answers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

# One thread each: models and indexes here are tiny, and on a busy machine threads mostly wait for each other (measured:
# 1.4 to 2.9 s for the keys of a document with two, 0.02 s with one).
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)


@pytest.fixture(scope="session")
def bytes_of():
    """A function that reads every file of a directory, by relative name; apart from the lock, which is always empty,
    and an unfinished add's spool, which is no part of a store and has its own tests."""

    def read(root: Path) -> dict[str, bytes]:
        files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock")
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files if path.parent != root / "spool"}

    return read


@pytest.fixture(scope="session")
def answers(model, documents):
    """A function that asks a store everything: its hash, neighbours, blocks, ∞-grams, and the mixture's distributions.

    The questions are real text, some of it in the store and some not.
    """
    from eval.perplexity import Text, distribution_digest
    from silo.readings import SHORTER
    from silo.weights import METHODS, Weights

    texts = [Text(document, model.tokenize(document)[:96]) for document in documents[::3]]
    keys = np.concatenate([model.keys(text.tokens) for text in texts])
    queries = [model.tokenizer.decode(text.tokens[start : start + 40]) for text in texts for start in (0, 50)]

    def ask(store):
        neighbours, blocks, ngrams = store.neighbours(), store.blocks(), store.ngrams()
        found = neighbours.search(keys, 20)
        matches = ngrams.match([text.tokens for text in texts])
        contexts = np.arange(len(matches.lengths))
        following = matches.following(contexts)
        origins = matches.origins(np.repeat(contexts, np.diff(following.begins)), following.tokens)
        mixture = store.mixture(model, METHODS)
        weights = Weights({"lm": 0.4, "knn": 0.25, "ric": 0.15, "ngram": 0.2}, 8.0)
        return {
            "hash": store.hash,
            "rows": {name: [row.id for row in rows] for name, rows in store.rows().items()},
            "neighbours": [array.tolist() for array in (found.distances, found.values, found.positions)],
            "cited": [[neighbours.document(at).id if at >= 0 else None for at in row] for row in found.documents],
            "blocks": [
                [(block.document.id, block.start, block.tokens.tolist(), block.score) for block in hits]
                for hits in blocks.search(queries, 3)
            ],
            "ngrams": [array.tolist() for array in (matches.lengths, matches.counts, matches.hits)],
            "shorter ngrams": [
                [array.tolist() for array in (each.counts, each.hits, each.kinds(contexts))]
                for each in (matches.shorter(length) for length in SHORTER)
            ],
            "following": [array.tolist() for array in (following.begins, following.tokens, following.counts)],
            "origins": [origins.begins.tolist(), origins.counts.tolist()],
            "traced": [ngrams.document(at).id for at in origins.documents],
            "distributions": distribution_digest(mixture, texts, weights),
        }

    return ask


@pytest.fixture(scope="session")
def mixed(documents):
    """Seven documents of four shards: three owners with two sources, and a source without an owner."""
    chosen = [
        replace(document, source="web" if number % 3 else "mail") for number, document in enumerate(documents[:6])
    ]
    return [*chosen, replace(documents[6], id="nobody's", owner="", source="found")]


@pytest.fixture(scope="session")
def fresh_answers(model, model_dir, control, answers, mixed, tmp_path_factory):
    """A function that says what a store answers that was built in one go of some of the documents, by their ids."""
    from datastore.store import Store

    known = {}

    def of(ids):
        ids = frozenset(ids)
        if ids not in known:
            path = tmp_path_factory.mktemp("fresh") / "store"
            store = Store.create(path, model, model_dir / "tokenizer.json", control)
            if ids:
                store.add([document for document in mixed if document.id in ids], model)
            known[ids] = answers(store)
        return known[ids]

    return of
