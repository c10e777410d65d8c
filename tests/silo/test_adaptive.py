"""Searches that are spared: nothing else changes, and nothing that comes later decides."""

import math

import numpy as np
import pytest
import torch

import silo
from datastore.store import Store
from silo.adaptive import Spare
from silo.mixture import Mixture
from silo.weights import Weights

WEIGHTS = Weights({"lm": 0.4, "knn": 0.3, "ngram": 0.3}, 4.0)
RULES = {
    "where the model is sure": Spare(sure=0.022),
    "where a suffix is long": Spare(suffix=2),
    "either": Spare(sure=0.022, suffix=2),
    "never": Spare(),
    "always": Spare(sure=0.0),
}


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory) -> Store:
    made = Store.create(tmp_path_factory.mktemp("adaptive") / "store", model, model_dir / "tokenizer.json", control)
    made.add(documents, model)
    return made


class Counted:
    """The store's neighbours, and how many queries they were asked."""

    def __init__(self, source):
        self.source, self.document, self.queries = source, source.document, 0

    def search(self, keys, k):
        """As the source does."""
        self.queries += len(keys)
        return self.source.search(keys, k)


def read(store, model, tokens, spare):
    """The mixture's distribution at all positions, which of them were searched, and how many queries there were."""
    neighbours = Counted(store.neighbours())
    mixture = Mixture(model, neighbours=neighbours, ngrams=store.ngrams(), spare=spare)
    parts = list(mixture.parts(tokens))
    found = np.concatenate([each.knn.found.numpy() for each in parts])
    return torch.cat([each.distribution(WEIGHTS) for each in parts]), found, neighbours.queries, parts


@pytest.mark.parametrize("name", RULES)
def test_what_is_not_spared_is_as_it_was(store, model, documents, name):
    """A spared position has the model's answer in place of the neighbours'; every other one is the same to the bit."""
    tokens = model.tokenize(documents[0])[:300]
    rule = RULES[name]
    whole, *_, parts = read(store, model, tokens, None)
    spared, found, queries, _ = read(store, model, tokens, rule)
    top = np.concatenate([each.lm.distribution().amax(dim=1).numpy() for each in parts])
    lengths = np.concatenate([each.ngram.matches.lengths[each.ngram.contexts] for each in parts])
    single = np.concatenate([each.ngram.matches.single[each.ngram.contexts] for each in parts])
    expected = (top < rule.sure) & ~((lengths >= rule.suffix) & (single >= 0))
    assert np.array_equal(found, expected)
    assert queries == expected.sum()
    assert queries == {"never": len(tokens), "always": 0}.get(name, queries)
    assert name in ("never", "always") or 0 < queries < len(tokens)
    assert torch.equal(spared[found], whole[found])
    lm = torch.cat([each.lm.distribution() for each in parts])
    knn = torch.cat([each.knn.distribution(WEIGHTS.temperature, model.vocab_size) for each in parts])
    instead = whole + WEIGHTS.by_method["knn"] * (lm - knn)
    torch.testing.assert_close(spared[~found], instead[~found], rtol=1e-9, atol=1e-12)
    assert float(spared.sum(dim=1).sub(1).abs().max()) < 1e-6


def test_reading_on_spares_the_same(store, model, documents):
    """`silo.load` takes the rule, and what it says, at once or with a cache, is the mixture's own with that rule."""
    tokens = model.tokenize(documents[0])[:40]
    rule = RULES["either"]
    lm = silo.load(model, store=store, weights=WEIGHTS.to_json(), spare=rule)
    expected, found, *_ = read(store, model, tokens, rule)
    assert 0 < found.sum() < len(found)
    ids = torch.tensor([[model.start_token, *tokens[:-1]]])
    torch.testing.assert_close(lm(ids).logits[0].double().exp(), expected, rtol=1e-4, atol=1e-6)
    whole = silo.load(model, store=store, weights=WEIGHTS.to_json())(ids).logits[0].double().exp()
    assert float((whole - expected).abs().max()) > 1e-3


def test_a_later_token_decides_nothing(store, model, documents):
    """Which searches are spared hangs on the context alone."""
    tokens = model.tokenize(documents[1])[:200]
    changed = tokens.copy()
    changed[120:] = tokens[120:][::-1]
    first, second = (read(store, model, each, RULES["either"]) for each in (tokens, changed))
    assert np.array_equal(first[1][:121], second[1][:121])
    assert math.isclose(float((first[0][:120] - second[0][:120]).abs().max()), 0, abs_tol=1e-6)
