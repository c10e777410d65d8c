"""Views: some of a store's documents answer as a store does that holds no others."""

from dataclasses import replace

import numpy as np
import pytest

from datastore import groups
from datastore.selection import Selection
from datastore.store import Store

CHOICES = {
    "a licence": ({"allow": Selection(licenses=("GPL-*",))}, lambda d: d.license.startswith("GPL-")),
    "an owner": ({"allow": Selection(owners=("Ada",))}, lambda d: d.owner == "Ada"),
    "all but an owner": ({"deny": Selection(owners=("Ada",))}, lambda d: d.owner != "Ada"),
    "a source": ({"allow": Selection(sources=("books",))}, lambda d: d.source == "books"),
    "a document": ({"allow": Selection(documents=("Ada/0",))}, lambda d: d.id == "Ada/0"),
    "all but a document": ({"deny": Selection(documents=("Ada/0",))}, lambda d: d.id != "Ada/0"),
    "a licence without an owner": (
        {"allow": Selection(licenses=("GPL-*",)), "deny": Selection(owners=("Ada",))},
        lambda d: d.license.startswith("GPL-") and d.owner != "Ada",
    ),
    "a shard or a licence": (
        {"allow": Selection(shards=("Grace",), licenses=("CC-*",))},
        lambda d: d.owner == "Grace" or d.license.startswith("CC-"),
    ),
    "everything": ({}, lambda d: True),
    "what nobody has": ({"allow": Selection(owners=("Nobody",))}, lambda d: False),
}


@pytest.fixture(scope="module")
def various(documents):
    """Short documents of several owners, licences and sources, mixed within shards."""
    licences, sources = ("GPL-3.0-only", "CC-BY-NC-4.0", "GPL-2.0-only"), ("books", "web")
    return [
        replace(each, text=each.text[:700], license=licences[number % 3], source=sources[number // 2 % 2])
        for number, each in enumerate(documents)
    ]


def ask(source, model, documents):
    """Everything that a store or a view of it answers, with documents by their ids."""
    neighbours, blocks, ngrams = source.neighbours(), source.blocks(), source.ngrams()
    texts = [model.tokenize(document)[:80] for document in documents[::3]]
    found = neighbours.search(np.concatenate([model.keys(text) for text in texts]), 12)
    queries = [model.tokenizer.decode(text[10:40]) for text in texts]
    matches = ngrams.match(texts)
    origins = matches.origins(np.arange(5, 60), np.concatenate(texts)[5:60].astype(np.int64))
    return {
        "keys": neighbours.num_keys,
        "neighbours": [array.tolist() for array in (found.distances, found.values, found.positions)],
        "cited": [[neighbours.document(at).id if at >= 0 else None for at in row] for row in found.documents],
        "blocks": [
            [(block.document.id, block.start, block.tokens.tolist(), block.score) for block in hits]
            for hits in blocks.search(queries, 3)
        ],
        "ngrams": [array.tolist() for array in (matches.lengths, matches.counts, matches.hits)],
        "origins": sorted(
            (ngrams.document(int(each)).id, int(count))
            for each, count in zip(origins.documents, origins.counts, strict=True)
        ),
    }


GROUPS = {"one group": (1, 1), "a group for each shard": (3, 3), "larger groups for ∞-grams": (3, 2)}


@pytest.fixture(scope="module", params=GROUPS)
def many(request, various, model, model_dir, control, tmp_path_factory):
    """A store of all of them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "a group for each shard":
            patch.setattr(groups, "ALONE_TOKENS", 1)
        elif request.param == "larger groups for ∞-grams":
            patch.setattr(groups, "GROUP_TOKENS", 1)
            patch.setitem(groups.TIMES, groups.NGRAMS, 4000)
        path = tmp_path_factory.mktemp("many") / "store"
        store = Store.create(path, model, model_dir / "tokenizer.json", control)
        store.add(various, model)
    assert (len(store.manifest.groups), len(store.manifest.ngrams)) == GROUPS[request.param]
    return store


@pytest.mark.parametrize("choice", CHOICES)
def test_view_is_the_store_of_its_documents(many, make_store, model, various, choice):
    """Neighbours, blocks with their scores, and ∞-grams of a view are in every bit those of a store of its documents
    alone."""
    names, holds = CHOICES[choice]
    view = many.select(**names)
    chosen = [document for document in various if holds(document)]
    assert view.num_documents == len(chosen)
    assert ask(view, model, various) == ask(make_store("alone", chosen), model, various)


def test_view_reads_the_rows_of_mixed_shards_only(many, monkeypatch):
    """Choosing by owner or shard reads no document rows but those of the shards that are named."""
    read = []
    real = type(many).rows_of
    monkeypatch.setattr(type(many), "rows_of", lambda self, name: read.append(name) or real(self, name))
    many.select(allow=Selection(shards=("Ada",)))
    assert read == []
    many.select(deny=Selection(owners=("Ada",)))
    assert read == ["Ada"]
