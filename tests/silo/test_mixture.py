"""The mixture p(w | c) = Σ λ p over a real store: against a slow reference, and split into shares that add up."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import silo.mixture
from datastore import groups
from datastore.ngrams import NgramIndex
from datastore.store import Store
from silo.in_context import read_in_context
from silo.language_model import Unread
from silo.mixture import Mixture, Parts
from silo.nearest import Nearest, Spare
from silo.retrieval import SourceDocument
from silo.weights import METHODS, Weights

WEIGHTS = Weights({"lm": 0.4, "knn": 0.3, "ric": 0.2, "ngram": 0.1}, 4.0)
BY_SUFFIX = Weights(
    {"lm": 0.8, "knn": 0.1, "ngram": 0.1},
    2.0,
    {2: {"lm": 0.5, "knn": 0.3, "ngram": 0.2}, 9: {"lm": 0.1, "knn": 0.2, "ngram": 0.7}},
)
COMBINATIONS = [
    Weights({"lm": 1.0}),
    Weights({"lm": 0.25, "knn": 0.75}, 0.5),
    Weights({"lm": 0.6, "ric": 0.4}),
    Weights({"lm": 0.3, "ngram": 0.7}),
    WEIGHTS,
    BY_SUFFIX,
]


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory) -> Store:
    """A store of six short documents of three owners."""
    made = Store.create(tmp_path_factory.mktemp("mixture") / "store", model, model_dir / "tokenizer.json", control)
    made.add([replace(document, text=document.text[:500]) for document in documents[:6]], model)
    return made


@pytest.fixture(scope="module")
def mixture(model, store) -> Mixture:
    return store.mixture(model, METHODS)


@pytest.fixture(scope="module")
def tokens(model, documents) -> np.ndarray:
    """Text that shares passages with two stored documents and ends in what none of them holds."""
    text = documents[0].text[100:400] + documents[1].text[:200] + "\nzyxw = [qqq, '§', 0.0]\n" * 3
    return model.tokenize(replace(documents[0], text=text))


@pytest.fixture(scope="module")
def parts(mixture, tokens) -> list[Parts]:
    return list(mixture.parts(tokens))


def targets_of(parts: Parts, tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens[parts.begin : parts.end].astype(np.int64))


def documents_of(ric, targets: torch.Tensor) -> list[SourceDocument]:
    return [d for at in range(len(targets)) if ric.found[at] for _, d in ric.shares(at, targets[at].item())]


def test_the_text_meets_the_store(parts, tokens):
    """The tests below are about something: neighbours are found nearly everywhere, and so are blocks, of many texts."""
    for method, least in (("knn", 0.9), ("ric", 0.1), ("ngram", 0.5)):
        found = torch.cat([torch.as_tensor(getattr(part, method).found) for part in parts])
        assert found.double().mean() > least, method
        assert method == "knn" or not found.all(), method
    cited = {document.id for part in parts for document in documents_of(part.ric, targets_of(part, tokens))}
    assert len(cited) > 1
    lengths = np.concatenate([part.ngram.matches.lengths[part.ngram.contexts] for part in parts])
    assert lengths.max() > 16


def test_each_position_comes_once_and_in_order(parts, tokens):
    """Parts cover a document from its first to its last token, and every array in them has a row for each."""
    assert [position for part in parts for position in range(part.begin, part.end)] == list(range(len(tokens)))
    for part in parts:
        rows = part.end - part.begin
        assert {len(part.lm), *(len(each.found) for each in (part.knn, part.ric, part.ngram))} == {rows}
        assert part.knn.neighbours.values.shape == (rows, Nearest.k)
        assert {each.shape for each in part.evidence().values()} == {(rows,)}


@pytest.mark.parametrize("weights", COMBINATIONS, ids=lambda weights: "+".join(weights.by_method))
def test_a_distribution_sums_to_one(parts, weights):
    """At every position the mixture is non-negative and sums to 1."""
    for part in parts:
        mixed = part.distribution(weights)
        assert mixed.dtype == torch.float64
        assert mixed.min() >= 0
        assert (mixed.sum(dim=1) - 1).abs().max() < 1e-6


def slow_ngram(stored: list[list[int]], context: list[int], lm: np.ndarray) -> np.ndarray:
    """What follows the last tokens of a context in some documents, counted by looking everywhere: of the longest suffix
    that goes on, with what is discounted given to that of three tokens, and so on to the model."""

    def counts_after(length: int) -> np.ndarray:
        suffix, counts = context[len(context) - length :], np.zeros(len(lm))
        for document in stored:
            for at in range(len(document) - length):
                if document[at : at + length] == suffix:
                    counts[document[at + length]] += 1
        return counts

    longest = next((n for n in range(len(context), 0, -1) if counts_after(n).any()), 0)
    said = lm
    for length in sorted({1, 2, 3, longest}):
        if 0 < length <= longest:
            counts = counts_after(length)
            said = np.maximum(counts - 0.75, 0) / counts.sum() + 0.75 * (counts > 0).sum() / counts.sum() * said
    return said


def slow_distributions(
    mixture: Mixture, stored: list[list[int]], tokens: np.ndarray, weights: Weights
) -> Iterator[tuple[int, np.ndarray]]:
    """The mixture at every third position in plain loops, with a reading of the model for each."""
    model = mixture.model
    scored = list(model.score(tokens))
    lm = np.concatenate([scores.double().exp().numpy() for _, scores in scored])
    found = mixture.neighbours.search(np.concatenate([keys for keys, _ in scored]), Nearest.k)
    # Read in one piece; tests/silo/test_in_context.py compares that with a loop.
    blocks = read_in_context(model, mixture.blocks, tokens, 0, len(tokens), mixture.in_context)
    of_blocks = blocks.distribution().numpy()
    for position in range(0, len(tokens), 3):
        knn = np.zeros(model.vocab_size)
        near = found.distances[position].astype(np.float64)
        near = near[np.isfinite(near)]
        exponents = np.exp((near.min(initial=np.inf) - near) / weights.temperature)
        for exponent, value in zip(exponents, found.values[position], strict=False):
            knn[value] += exponent / exponents.sum()
        if not len(near):
            knn = lm[position]
        ric = of_blocks[position] if blocks.found[position] else lm[position]
        ngram = slow_ngram(stored, tokens[:position].tolist(), lm[position])
        of_method = {"lm": lm[position], "knn": knn, "ric": ric, "ngram": ngram}
        yield position, sum(weight * of_method[method] for method, weight in weights.by_method.items())


def test_the_mixture_equals_a_slow_reference(mixture, model, documents, parts, tokens):
    """Neighbours, blocks, suffixes and model mixed position by position in plain loops give the same distributions."""
    ours = torch.cat([part.distribution(WEIGHTS) for part in parts]).numpy()
    stored = [model.tokenize(replace(each, text=each.text[:500])).tolist() for each in documents[:6]]
    for position, theirs in slow_distributions(mixture, stored, tokens, WEIGHTS):
        np.testing.assert_allclose(ours[position], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", COMBINATIONS, ids=lambda weights: "+".join(weights.by_method))
def test_one_target_is_read_off_the_distribution(parts, tokens, weights):
    """What probabilities() gives for a target, mixed by hand, is the distribution's entry at that target."""
    for part in parts:
        targets = targets_of(part, tokens)
        for asked in (targets, targets.flip(0)):  # the document's own tokens, and others
            given = part.probabilities(asked, weights.temperature)
            of_method = weights.weigh(part.evidence())
            mixed = sum(weight * given[method] for method, weight in of_method.items())
            entry = part.distribution(weights).gather(1, asked.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(mixed, entry, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weights", COMBINATIONS, ids=lambda weights: "+".join(weights.by_method))
def test_shares_add_up_to_the_probability(mixture, parts, tokens, documents, weights):
    """The model's share and the documents' sum to the token's probability, and each document is one of the store's."""
    stored = {document.id: document for document in documents[:6]}
    named = set()
    for part in parts:
        targets = targets_of(part, tokens)
        mixed = part.distribution(weights).gather(1, targets.unsqueeze(1)).squeeze(1)
        for index in range(0, part.end - part.begin, 5):
            shares = mixture.attribute(part, index, targets[index].item(), weights)
            assert math.fsum(share.probability for share in shares) == pytest.approx(mixed[index].item(), abs=1e-12)
            assert [share.probability for share in shares] == sorted((s.probability for s in shares), reverse=True)
            assert len({(share.method, share.document) for share in shares}) == len(shares)
            for share in shares:
                assert share.method in weights.by_method
                assert (share.document is None) == (share.method == "lm")
                if share.document is not None:
                    known = stored[share.document.id]
                    assert (share.document.owner, share.document.license) == (known.owner, known.license)
                    named.add(known.id)
    assert bool(named) == (len(weights.by_method) > 1)


def test_equal_shares_have_an_order_of_their_own(model, control, model_dir, documents, tokens, tmp_path, monkeypatch):
    """Documents with the same text give the same; they are told in the order of their ids, in one group or in many."""
    text = documents[0].text[:500]
    copies = [replace(documents[0], id=f"{7 * n % 5}", owner=f"owner {n}", text=text) for n in range(5)]
    found = []
    for name, bound in (("one", groups.GROUP_TOKENS), ("many", 1)):
        monkeypatch.setattr(groups, "GROUP_TOKENS", bound)
        store = Store.create(tmp_path / name, model, model_dir / "tokenizer.json", control)
        store.add(copies, model)
        mixture = store.mixture(model, ["lm", "knn", "ngram"])
        part = next(iter(mixture.parts(tokens)))
        weights = Weights({"lm": 0.4, "knn": 0.3, "ngram": 0.3}, 4.0)
        shares = [mixture.attribute(part, index, int(tokens[index]), weights) for index in range(40)]
        found.append([[(s.probability, s.method, s.document and s.document.id) for s in each] for each in shares])
        assert len(store.manifest.groups) == (1 if name == "one" else 5)
    assert found[0] == found[1]
    tied = [[id for _, method, id in each if method == "ngram"] for each in found[0]]
    assert ["0", "1", "2", "3", "4"] in tied


def test_a_share_is_that_of_the_documents_own_neighbours(mixture, parts, tokens):
    """A document's kNN share is the weight of its own neighbours with that token: without them it would be gone."""
    part = parts[0]
    targets = targets_of(part, tokens)
    right = part.knn.neighbours.values == targets.numpy()[:, None]
    index = next(i for i in range(len(right)) if len(set(part.knn.neighbours.documents[i, right[i]])) > 1)
    of_document = {
        share.document.id: share.probability
        for share in mixture.attribute(part, index, targets[index].item(), WEIGHTS)
        if share.method == "knn"
    }
    near = part.knn.neighbours.distances[index].astype(np.float64)
    weights = np.exp((near.min() - near) / WEIGHTS.temperature)
    weights /= weights.sum()
    for number in set(part.knn.neighbours.documents[index].tolist()) - {-1}:
        own = (part.knn.neighbours.documents[index] == number) & (
            part.knn.neighbours.values[index] == targets[index].item()
        )
        id = mixture.neighbours.document(number).id
        assert of_document.get(id, 0.0) == pytest.approx(0.3 * weights[own].sum(), abs=1e-12)


@pytest.mark.parametrize("changed_at", [33, 150, 171])
def test_a_later_token_changes_nothing_before_it(mixture, parts, tokens, changed_at):
    """No method looks ahead: with another token at t, every method says the same of all tokens before it.

    Positions up to t itself are compared: their inputs end before t."""
    changed = tokens.copy()
    changed[changed_at] = (changed[changed_at] + 1) % mixture.model.vocab_size
    after = list(mixture.parts(changed))
    for before_part, after_part in zip(parts, after, strict=True):
        same = range(max(0, min(changed_at + 1, before_part.end) - before_part.begin))
        if not same:
            continue
        end = same.stop
        torch.testing.assert_close(after_part.lm.logits[:end], before_part.lm.logits[:end], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            after_part.ric.distribution()[:end], before_part.ric.distribution()[:end], rtol=0, atol=1e-5
        )
        assert torch.equal(
            after_part.ngram.distribution(mixture.model.vocab_size)[:end],
            before_part.ngram.distribution(mixture.model.vocab_size)[:end],
        )
        old, new = before_part.knn.neighbours, after_part.knn.neighbours
        np.testing.assert_allclose(new.distances[:end], old.distances[:end], rtol=1e-4, atol=1e-4)
        for name, of_before in before_part.evidence().items():
            torch.testing.assert_close(after_part.evidence()[name][:end], of_before[:end], rtol=1e-3, atol=1e-3)
        mixed = [part.distribution(WEIGHTS)[:end] for part in (before_part, after_part)]
        torch.testing.assert_close(mixed[1], mixed[0], rtol=0, atol=1e-5)
    # And the change is one: what follows is not as it was.
    logits = [torch.cat([part.lm.logits for part in each]) for each in (parts, after)]
    assert (logits[1] - logits[0])[changed_at + 1 :].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("nearest", "early"),
    [(None, False), (Nearest(spare=Spare(suffix=3)), False), (Nearest(spare=Spare(sure=0.9)), True)],
)
def test_what_the_model_says_waits_only_where_it_decides(model, store, documents, monkeypatch, nearest, early):
    """Positions are read far ahead of their neighbours, and their logits are made when their turn comes; before, where
    they decide about a search. However far ahead is read, the bits are the same."""
    texts = [model.tokenize(document) for document in documents[4:8]]
    made, logits = [], Unread.logits
    monkeypatch.setattr(Unread, "logits", lambda unread: made.append(None) or logits(unread))
    results, seen = [], []
    for ahead in (silo.mixture.AHEAD, 1):
        monkeypatch.setattr(silo.mixture, "AHEAD", ahead)
        made.clear()
        of = []
        for number, (_, parts) in enumerate(store.mixture(model, ("lm", "knn"), nearest=nearest).read(texts), start=1):
            of.append(parts.distribution(Weights({"lm": 0.5, "knn": 0.5}, 4.0)))
            seen.append((len(made), number))
        results.append(of)
        assert len(of) == len(made)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    first = seen[: len(results[0])]
    assert len(first) > 3
    assert (first == [(len(first), number) for _, number in first]) is early
    assert (first == [(number, number) for _, number in first]) is not early


def test_without_a_store_it_is_the_model(model, tokens):
    """A mixture of nothing but the model has the model's own bits, and says so."""
    alone = Mixture(model)
    assert alone.methods == ["lm"]
    for part, (_, logits) in zip(alone.parts(tokens), model.logits(tokens), strict=True):
        assert torch.equal(part.lm.logits, logits)
        expected = logits.double().softmax(dim=-1)
        torch.testing.assert_close(part.distribution(Weights({"lm": 1.0})), expected, rtol=1e-6, atol=0)
        targets = targets_of(part, tokens)
        assert list(part.probabilities(targets, 1.0)) == ["lm"]
        [share] = alone.attribute(part, 3, targets[3].item(), Weights({"lm": 1.0}))
        assert (share.method, share.document) == ("lm", None)
        assert share.probability == part.lm.probability(targets)[3].item()


def test_all_weight_on_the_model_is_the_model(parts):
    """Beside neighbours and blocks, λ_lm = 1 leaves the model's own bits."""
    for part in parts:
        mixed = part.distribution(Weights({"lm": 1.0, "knn": 0.0, "ric": 0.0, "ngram": 0.0}, 4.0))
        assert torch.equal(mixed, part.lm.distribution())


class Nothing:
    """Sources that find nothing."""

    def search(self, queries, k: int, **_):
        """No neighbours, or no blocks."""
        if isinstance(queries, list):
            return [[] for _ in queries]
        shape = (len(queries), k)
        none = np.zeros(shape, dtype=np.int64)
        found = np.full(shape, np.inf, dtype=np.float32)
        return SimpleNamespace(distances=found, values=none, documents=none - 1, positions=none, part=self.part)

    def part(self, begin, end):
        """As many that are not there."""
        return self.search(range(begin, end), 8)

    def document(self, index: int) -> SourceDocument:
        """Never asked for."""
        raise AssertionError("there is no document")


def test_an_empty_store_is_the_model(model, tokens):
    """Where neither neighbour nor block is found, the model takes their weight: probability does not leak away."""
    empty = Mixture(model, neighbours=Nothing(), blocks=Nothing(), ngrams=NgramIndex([]))
    for part in empty.parts(tokens):
        lm = part.lm.distribution()
        torch.testing.assert_close(part.distribution(WEIGHTS), lm, rtol=1e-12, atol=0)
        targets = targets_of(part, tokens)
        [share] = empty.attribute(part, 0, targets[0].item(), WEIGHTS)
        assert (share.method, share.document) == ("lm", None)
        assert share.probability == pytest.approx(lm[0, targets[0]].item(), rel=1e-12)
