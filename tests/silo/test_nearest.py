"""Searches that are spared: nothing else changes, and nothing that comes later decides."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import silo
from datastore.queries import prepare
from datastore.store import Selection, Store
from silo.errors import UsageError
from silo.mixture import Mixture
from silo.nearest import Nearest, Spare
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
    mixture = Mixture(model, neighbours=neighbours, ngrams=store.ngrams(), nearest=Nearest(spare=spare))
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
    lm = silo.load(model, store=store, weights=WEIGHTS.to_json(), nearest=Nearest(spare=rule))
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


FOLLOWED = {"steps": 5, "pointers": 3}


def decoded(store):
    """{(document, position): (token, key)} of all that is stored."""
    quantizer, known = store.control.quantizer(), {}
    for name in store.manifest.shards:
        for each in store.shard(name).documents():
            for position, (token, key) in enumerate(zip(each.tokens, quantizer.decode(each.codes), strict=True)):
                known[each.document.id, position] = int(token), key
    return known


def followed_slowly(store, keys, tokens, k, steps, pointers):
    """RetoMaton by its definition, position by position: {(document, position): distance} for each, which of them were
    searched for, and how many pointers ended with their document."""
    known, index, out, searched, ended = decoded(store), store.neighbours(), [], [], 0
    moved = prepare(store.control.codes, keys, "l2").keys
    for number, key in enumerate(keys):
        goes_on = [(name, at) for name, at in out[-1] if known[name, at][0] == tokens[number - 1]] if out else []
        there = [(name, at + 1) for name, at in goes_on if (name, at + 1) in known]
        searched.append(number % (steps + 1) == 0 or len(there) < pointers)
        ended += len(goes_on) - len(there)
        if not searched[-1]:
            out.append({place: float(((moved[number] - known[place][1]) ** 2).sum()) for place in there})
            continue
        found = index.search(key[None], k)
        rows = zip(found.documents[0], found.positions[0], found.distances[0], strict=True)
        out.append({(index.document(row).id, int(at)): float(far) for row, at, far in rows if row >= 0})
    return out, searched, ended


def turns_of(keys, *, steps, pointers):
    """Arguments that follow one text for so many steps."""
    return {"turns": np.arange(len(keys)) % (steps + 1), "pointers": pointers}


def keys_of(model, tokens):
    return np.concatenate([keys for keys, _ in model.logits(tokens)])


def test_pointers_equal_a_slow_reference(store, model, documents):
    """The same neighbours, as near, with as many searches; nearest first. None goes on into another document."""
    tokens = np.concatenate([model.tokenize(each)[-60:] for each in documents[:2]])
    keys, index = keys_of(model, tokens), store.neighbours()
    expected, searched, ended = followed_slowly(store, keys, tokens, 24, **FOLLOWED)
    assert ended > 0
    found = index.follow(keys, tokens, 24, **turns_of(keys, **FOLLOWED), wanted=np.ones(len(keys), dtype=bool))
    assert index.searches == sum(searched)
    assert len(keys) / 6 < sum(searched) < len(keys) * 0.9
    for number, of in enumerate(expected):
        there = found.documents[number] >= 0
        places = zip(found.documents[number][there], found.positions[number][there], strict=True)
        far = dict(
            zip([(index.document(row).id, int(at)) for row, at in places], found.distances[number], strict=False)
        )
        assert far.keys() == of.keys()
        np.testing.assert_allclose([far[place] for place in of], list(of.values()), rtol=1e-4, atol=1e-4)
        assert (np.diff(found.distances[number][there]) >= 0).all()
        assert np.isinf(found.distances[number][~there]).all()


def test_a_pointer_ends_with_its_document(store, model, documents):
    """A text that begins as a stored document finds that document to its end, and there the pointer goes nowhere: not
    into the document that lies behind it."""
    ended = 0
    for document in documents[:4]:
        whole = model.tokenize(document)
        tokens = np.concatenate([whole, whole[:10]])
        keys, index = keys_of(model, tokens), store.neighbours()
        near = slice(len(whole) - 12, None)
        keys, tokens = keys[near], tokens[near]
        expected, searched, ends = followed_slowly(store, keys, tokens, 24, steps=9, pointers=1)
        found = index.follow(
            keys, tokens, 24, **turns_of(keys, steps=9, pointers=1), wanted=np.ones(len(keys), dtype=bool)
        )
        assert index.searches == sum(searched)
        assert (found.documents >= 0).sum(axis=1).tolist() == [len(of) for of in expected]
        ended += ends
    assert ended >= 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Spare(steps=-1), "-1 steps"),
        (lambda: Spare(steps=3, pointers=0), "0 pointers"),
        (lambda: Nearest(k=0), "0 neighbours"),
        (lambda: Nearest(probes=0), "0 lists"),
        (lambda: Nearest(metric="cosine"), "nearness by 'cosine'; expected one of l2, inner_product"),
    ],
)
def test_what_cannot_be_looked_up_is_said_in_one_line(make, said):
    """Wrong settings are told when they are made."""
    with pytest.raises(UsageError, match=said):
        make()


def test_pointers_hang_on_what_is_stored_alone(model, model_dir, control, documents, store, tmp_path):
    """Groups, order of adding and what was removed leave no trace in what is followed; nor do documents that a view
    leaves out."""
    other = Store.create(tmp_path / "other", model, model_dir / "tokenizer.json", control)
    for document in reversed(documents):
        other.add([document], model)
    tokens = model.tokenize(documents[4])[:150]
    keys, wanted = keys_of(model, tokens), np.arange(150) % 7 != 3

    def followed(index):
        found = index.follow(keys, tokens, 16, **turns_of(keys, **FOLLOWED), wanted=wanted)
        names = [[index.document(row).id if row >= 0 else "" for row in of] for of in found.documents]
        assert 0 < index.searches < wanted.sum()
        return names, found.positions.tolist(), found.distances.tolist()

    assert followed(store.neighbours()) == followed(other.neighbours())
    owner = documents[0].owner
    viewed = followed(store.select(deny=Selection(owners=(owner,))).neighbours())
    other.remove(Selection(owners=(owner,)))
    assert viewed == followed(other.neighbours())
    for names, _, far in np.asarray(list(zip(*viewed, strict=True)), dtype=object)[~wanted]:
        assert np.isinf(np.asarray(far, dtype=float)).all()
        assert set(names) == {""}


def test_a_mixture_follows(store, model, documents):
    """Few searches answer a text, nothing that comes later decides, and it is a distribution."""
    tokens = model.tokenize(documents[1])[:200]
    changed = tokens.copy()
    changed[120:] = tokens[120:][::-1]
    found = []
    for each in (tokens, changed):
        mixture = store.mixture(model, ("lm", "knn", "ngram"), nearest=Nearest(spare=Spare(steps=7, pointers=2)))
        found.append(torch.cat([parts.distribution(WEIGHTS) for parts in mixture.parts(each)]))
        assert 0 < mixture.neighbours.searches < len(each) / 2
    torch.testing.assert_close(found[0][:121], found[1][:121], rtol=1e-5, atol=1e-7)
    assert float(found[0].sum(dim=1).sub(1).abs().max()) < 1e-6
    whole = torch.cat(
        [parts.distribution(WEIGHTS) for parts in store.mixture(model, ("lm", "knn", "ngram")).parts(tokens)]
    )
    assert float((whole - found[0]).abs().max()) > 1e-3


def test_near_by_inner_product(store, model, documents):
    """All lists read, the neighbours are those with the largest products, which is another order than that of
    distances; and a distance is that of keys which are all of one length."""
    keys = keys_of(model, model.tokenize(documents[0])[:60])
    everything = len(store.control.centroids)
    index = store.neighbours(probes=everything, metric="inner_product")
    found = index.search(keys, 32)
    stored = np.stack([key for _, key in decoded(store).values()])
    products = np.sort(keys @ stored.T, axis=1)[:, ::-1][:, :32]
    length = found.distances + 2 * products - (keys**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(length, (store.control.centroids**2).sum(axis=1).mean(), rtol=1e-3)
    other = store.neighbours(probes=everything).search(keys, 32)
    assert (other.documents != found.documents).mean() > 0.1


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_ties_hang_on_documents_alone(metric, model, model_dir, control, documents, tmp_path):
    """Of a text that 24 owners have, the same five are found whoever has which copy, though FAISS breaks ties by where
    keys lie; and so they are when they are followed, in whatever order they come."""
    found, text = [], documents[0].text[:300]
    keys = keys_of(model, model.tokenize(replace(documents[0], text=text))[:40])
    for turn in (1, -1):
        copies = [
            replace(documents[0], id=f"copy-{number}", text=text, owner=f"owner {turn * number + 50}")
            for number in range(24)
        ]
        made = Store.create(tmp_path / str(turn), model, model_dir / "tokenizer.json", control)
        made.add([*documents[4:6], *copies], model)
        index = made.neighbours(metric=metric, probes=len(control.centroids))
        rows = index.search(keys, 5)
        found.append([[index.document(row).id for row in of] for of in rows.documents])
        distances, numbers = index._search_all(keys, 24)
        again = index._measured(prepare(made.control.codes, keys, metric), numbers[:, ::-1].copy())
        tied = distances[:, 0] == distances[:, -1]
        assert tied.sum() > 5
        np.testing.assert_array_equal(again[1][tied], numbers[tied])
    assert found[0] == found[1]
    assert any("copy" in name for of in found[0] for name in of)


def test_what_is_followed_is_as_near_as_what_is_found(store, model, documents):
    """Both metrics: a key that both ways give has one distance, to the last bit."""
    tokens = model.tokenize(documents[0])[:60]
    keys = keys_of(model, tokens)
    for metric in ("l2", "inner_product"):
        index = store.neighbours(probes=len(store.control.centroids), metric=metric)
        searched = index.search(keys, 400)
        followed = index.follow(keys, tokens, 64, **turns_of(keys, steps=3, pointers=1), wanted=np.ones(60, dtype=bool))
        compared = 0
        for row in range(60):
            far = {
                (document, position): at
                for document, position, at in zip(
                    searched.documents[row], searched.positions[row], searched.distances[row], strict=True
                )
            }
            for document, position, at in zip(
                followed.documents[row], followed.positions[row], followed.distances[row], strict=True
            ):
                if document >= 0 and (document, position) in far:
                    assert at == far[document, position]
                    compared += 1
        assert compared > 500


@pytest.mark.parametrize("rule", [None, *RULES.values(), Spare(**FOLLOWED)])
def test_texts_read_together_are_as_alone(rule, store, model, documents):
    """Neighbours and past of a text are the same bits, whichever texts are looked up with it."""
    texts = [model.tokenize(each)[:length] for each, length in zip(documents, (70, 33, 90), strict=False)]
    mixture = store.mixture(model, ("lm", "knn", "ngram"), nearest=Nearest(k=16, spare=rule))
    together = list(mixture.read(texts))
    alone = [(number, parts) for number, text in enumerate(texts) for parts in mixture.parts(text)]
    assert [number for number, _ in together] == [number for number, _ in alone] == [0, 1, 2]
    for (_, one), (_, other) in zip(together, alone, strict=True):
        for name in ("distances", "values", "positions"):
            mine, theirs = (getattr(parts.knn.neighbours, name) for parts in (one, other))
            assert mine.tobytes() == theirs.tobytes()
        assert one.past.keys() == other.past.keys()
        assert all(torch.equal(one.past[name], other.past[name]) for name in one.past)


def test_k_and_metric_reach_the_search(store, model, documents):
    """`nearest` of a store's mixture is what is searched with."""
    tokens = model.tokenize(documents[0])[:50]
    way = Nearest(k=7, probes=2, metric="inner_product")
    [parts] = store.mixture(model, ("lm", "knn"), nearest=way).parts(tokens)
    expected = store.neighbours(probes=2, metric="inner_product").search(keys_of(model, tokens), 7)
    np.testing.assert_array_equal(parts.knn.neighbours.distances, expected.distances)
    assert parts.knn.neighbours.distances.shape == (50, 7)
