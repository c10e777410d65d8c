"""What is said of a document's leaving, against what happens when it leaves."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import silo
from datastore.selection import Selection
from datastore.store import Store
from silo.documents import Document
from silo.leaving import Leaving, concerned
from silo.nearest import Nearest
from silo.weights import METHODS, Weights

ALL_KEYS = Nearest(k=2048, probes=64)
"""More neighbours than the store has keys, in more lists than it has."""
WEIGHTS = Weights({"lm": 0.3, "knn": 0.4, "ngram": 0.3}, 2.0)
BLOCKS = Weights({"lm": 0.5, "ric": 0.5})


@pytest.fixture(scope="module")
def stored(documents) -> list[Document]:
    """Four short documents, of which two have a passage in common. All begin after the licence at their head."""
    long = [replace(document, text=document.text[600:]) for document in documents if len(document.text) > 1000]
    short = [replace(document, text=document.text[:400]) for document in long[:3]]
    return [*short, replace(long[3], text=long[0].text[50:200] + long[3].text[:200])]


@pytest.fixture(scope="module")
def store(model, model_dir, control, stored, tmp_path_factory) -> Store:
    made = Store.create(tmp_path_factory.mktemp("leaving") / "store", model, model_dir / "tokenizer.json", control)
    made.add(stored, model)
    return made


@pytest.fixture(scope="module")
def tokens(model, stored) -> np.ndarray:
    """Text that follows two documents, then one alone, and ends in what none holds."""
    text = stored[0].text[60:350] + stored[1].text[:150] + "\nzyxw = [qqq, '§', 0.0]\n"
    return model.tokenize(replace(stored[0], text=text))


def own_probabilities(mixture, tokens, weights) -> np.ndarray:
    """What a mixture gives to the tokens of a text."""
    found = [
        part.distribution(weights).gather(1, torch.from_numpy(tokens[part.begin : part.end].astype(np.int64))[:, None])
        for part in mixture.parts(tokens)
    ]
    return torch.cat(found).squeeze(1).numpy()


def told(mixture, tokens, weights) -> list[dict[str, float]]:
    """What is said of each position, by the document's id."""
    return [
        {document.id: p for document, p in leaving.at(index).items()}
        for parts in mixture.parts(tokens)
        for leaving in [Leaving(parts, tokens, weights, concerned([parts], tokens))]
        for index in range(parts.end - parts.begin)
    ]


def test_it_is_what_happens(store, model, tokens, stored):
    """With all neighbours at hand, each document's leaving is told exactly: also where the longest suffix was its
    alone, and where it said something else."""
    mixture = store.mixture(model, WEIGHTS.methods, nearest=ALL_KEYS)
    said = told(mixture, tokens, WEIGHTS)
    before = own_probabilities(mixture, tokens, WEIGHTS)
    for document in stored:
        rest = store.mixture(model, WEIGHTS.methods, nearest=ALL_KEYS, deny=Selection(documents=(document.id,)))
        seen = own_probabilities(rest, tokens, WEIGHTS)
        np.testing.assert_allclose([each[document.id] for each in said], seen, rtol=1e-9)
        assert (np.abs(seen / before - 1) > 0.01).sum() > 10, "its leaving changes something"
    matches = next(mixture.parts(tokens)).ngram.matches
    alone = [
        length > 1 and len(np.unique(matches.origins(np.asarray([number]), np.asarray([token])).documents)) == 1
        for number, (length, token) in enumerate(zip(matches.lengths, tokens, strict=False))
    ]
    assert sum(alone) > 20, "there are suffixes of one document alone"


def test_the_last_document_leaves_the_model(store, model, tokens, stored):
    """Where nothing is left of a method, the model has its weight."""
    others = Selection(documents=tuple(document.id for document in stored[1:]))
    mixture = store.mixture(model, WEIGHTS.methods, nearest=ALL_KEYS, deny=others)
    lm = own_probabilities(store.mixture(model, ("lm",)), tokens, Weights({"lm": 1.0}))
    said = told(mixture, tokens, WEIGHTS)
    np.testing.assert_allclose([each[stored[0].id] for each in said], lm, rtol=1e-9)


def test_other_blocks_are_weighed_among_themselves(store, model, tokens):
    """Without a block's document the other blocks say all, and the model if there are none."""
    mixture = store.mixture(model, METHODS)
    seen = set()
    for parts in mixture.parts(tokens):
        ric = parts.ric
        assert ric is not None
        leaving = Leaving(parts, tokens, BLOCKS, concerned([parts], tokens))
        own = torch.from_numpy(tokens[parts.begin : parts.end].astype(np.int64))
        lm = parts.lm.probability(own).numpy()
        for index in np.flatnonzero(ric.found).tolist():
            ids = [block.document.id for block in ric.blocks[index]]
            given = [
                float(ric.log_probabilities[row, own[index]].double().exp()) * float(weight)
                for row, weight in zip(ric.rows[index], ric.weights[index], strict=True)
            ][: len(ids)]
            for document, p in leaving.at(index).items():
                rest = [number for number, id in enumerate(ids) if id != document.id]
                weight = float(sum(ric.weights[index][number] for number in rest))
                expected = sum(given[number] for number in rest) / weight if rest else lm[index]
                assert p == pytest.approx(0.5 * lm[index] + 0.5 * expected, rel=1e-9)
                seen.add(bool(rest))
    assert seen == {True, False}


def test_a_change_is_what_comes_about(store, stored, model):
    """A document's change is that of the text's log-probability when it is denied; JSON has it beside the share."""
    text, weights = stored[0].text[60:260], {"ngram": 0.5}
    explained = silo.load(model, store=store, weights=weights).explain(text)

    def log_probability(explanation):
        return sum(math.log(each.probability) for each in explanation.tokens)

    changes = explained.changes()
    assert {document.id for document in changes} == {document.id for document in stored}
    for document, change in changes.items():
        others = silo.load(model, store=store, weights=weights, deny=Selection(documents=(document.id,)))
        seen = log_probability(others.explain(text)) - log_probability(explained)
        assert math.isclose(change, seen, abs_tol=1e-9)
    assert min(changes.values()) < -1 < 0 < max(changes.values()), "one helps much, and one leads astray"
    written = {each["document"]: each["change"] for each in explained.to_json()["documents"]}
    assert written == {document.id: changes[document] for document, _ in explained.documents()}


def test_nothing_may_be_left(store, stored, model):
    """Where only one document gives a token any probability, its change has no number, and JSON has none."""
    explained = silo.load(model, store=store, weights={"lm": 0.0, "knn": 1.0}).explain(stored[0].text[60:260])
    changes = {document.id: change for document, change in explained.changes().items()}
    assert changes[stored[0].id] == -math.inf
    of_documents = {each["document"]: each for each in explained.to_json()["documents"]}
    assert "change" not in of_documents[stored[0].id]
