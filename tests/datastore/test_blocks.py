"""Blocks of a store: the best of them, in one order, read on in their document, and without a document."""

from dataclasses import replace

import numpy as np
import pytest

from datastore.blocks import BLOCK_STRIDE, BLOCK_TOKENS
from silo.errors import UsageError


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory):
    """Five documents of several blocks each, the last a copy of the first, so that scores tie."""
    from datastore.store import Store

    made = Store.create(tmp_path_factory.mktemp("blocks") / "store", model, model_dir / "tokenizer.json", control)
    copy = replace(documents[0], id=f"copy of {documents[0].id}", owner="Zoe")
    made.add([*documents[:4], copy], model)
    return made


@pytest.fixture(scope="module")
def queries(model, documents):
    """Stretches of stored text, of text that is not stored, and no words at all."""
    texts = [model.tokenize(document) for document in documents[:6]]
    return [*(model.tokenizer.decode(text[at : at + 32]) for text in texts for at in (60, 200)), "", "…"]


def named(hits):
    return [[(block.document.id, block.start, block.score, block.tokens.tolist()) for block in row] for row in hits]


def test_the_best_come_first_and_ties_by_name(store, queries):
    """Scores never rise, equal ones come by document id and start, and a larger k only adds to the end."""
    found = store.blocks().search(queries, 40)
    ties = 0
    for hits in found:
        order = [(-block.score, block.document.id, block.start) for block in hits]
        assert order == sorted(order)
        ties += len(hits) - len({block.score for block in hits})
    assert ties > 5
    assert found[-2:] == [[], []]
    for k in (1, 2, 7):
        assert named(store.blocks().search(queries, k)) == [row[:k] for row in named(found)]


@pytest.mark.parametrize("tokens", [1, BLOCK_TOKENS, 300])
def test_a_block_is_a_run_of_its_documents_tokens(store, queries, model, documents, tokens):
    """A block goes so many tokens on from where it begins, as far as its document does, however far it is indexed."""
    texts = {document.id: model.tokenize(document) for document in documents[:4]}
    found = store.blocks().search(queries, 9, tokens=tokens)
    for block in (block for hits in found for block in hits):
        text = texts[block.document.id.removeprefix("copy of ")]
        assert block.start % BLOCK_STRIDE == 0
        np.testing.assert_array_equal(block.tokens, text[block.start : block.start + tokens])
    assert [[row[:3] for row in hits] for hits in named(found)] == [
        [row[:3] for row in hits] for hits in named(store.blocks().search(queries, 9))
    ]


@pytest.mark.parametrize("k", [1, 3, 100])
def test_an_excluded_document_is_passed_over(store, queries, documents, k):
    """What is left without a document is what the others have, in the same order, as many as are wanted."""
    everything = named(store.blocks().search(queries, 1000))
    for excluded in (documents[0].id, documents[3].id, "no such document"):
        found = named(store.blocks().search(queries, k, exclude=excluded))
        assert found == [[row for row in hits if row[0] != excluded][:k] for hits in everything]


def test_k1_and_b_are_settable(store, queries):
    """With k1 = 0 a word counts once however often it comes, and with b = 0 length counts for nothing; else not."""
    one, other = (store.blocks(k1=k1, b=b).search(queries, 5) for k1, b in ((0.9, 0.4), (0.0, 0.4)))
    assert named(one) != named(other)
    by_b = [store.select().blocks(k1=0.0, b=b).search(queries, 5) for b in (0.0, 1.0)]
    assert named(by_b[0]) == named(by_b[1]) == named(other)


@pytest.mark.parametrize(("k1", "b"), [(-1.0, 0.4), (float("nan"), 0.4), (0.9, 1.1), (0.9, -0.1)])
def test_nonsensical_parameters_are_refused(store, k1, b):
    """Parameters of BM25 out of range are a wrong call that names both."""
    with pytest.raises(UsageError, match="expected k1 from 0, and b from 0 to 1"):
        store.blocks(k1=k1, b=b)


def test_a_block_of_no_tokens_is_refused(store):
    """A block without tokens is a wrong call."""
    with pytest.raises(UsageError, match="a block of 0 tokens"):
        store.blocks().search(["word"], 1, tokens=0)
