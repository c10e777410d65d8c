"""The mixture p(w | c) = Σ λ p over a real store: against a slow reference, and split into shares that add up."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from datastore.store import Store
from silo.language_model import LanguageModel
from silo.mixture import NEIGHBOURS, Mixture, Parts, Weights
from silo.retrieval import Block, Neighbours, SourceDocument

WEIGHTS = Weights({"lm": 0.5, "knn": 0.3, "ric": 0.2}, 4.0)
COMBINATIONS = [
    Weights({"lm": 1.0}, 1.0),
    Weights({"lm": 0.25, "knn": 0.75}, 0.5),
    Weights({"lm": 0.6, "ric": 0.4}, 1.0),
    WEIGHTS,
]


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory) -> Store:
    """A store of six short documents of three owners."""
    made = Store.create(tmp_path_factory.mktemp("mixture") / "store", model, model_dir / "tokenizer.json", control)
    made.add([replace(document, text=document.text[:500]) for document in documents[:6]], model)
    return made


@pytest.fixture(scope="module")
def mixture(model, store) -> Mixture:
    return Mixture(model, neighbours=store.neighbours(), blocks=store.blocks())


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


def test_the_text_meets_the_store(parts):
    """The tests below are about something: neighbours are found nearly everywhere, and so are blocks, of many texts."""
    assert np.mean(np.concatenate([part.neighbours.documents[:, 0] >= 0 for part in parts])) > 0.9
    with_block = [block is not None for part in parts for block in part.blocks]
    assert any(with_block)
    assert not all(with_block)
    assert len({block.document.id for part in parts for block in part.blocks if block}) > 1


def test_each_position_comes_once_and_in_order(parts, tokens):
    """Parts cover a document from its first to its last token, and every array in them has a row for each."""
    assert [position for part in parts for position in range(part.begin, part.end)] == list(range(len(tokens)))
    for part in parts:
        rows = part.end - part.begin
        assert len(part.lm) == len(part.ric) == len(part.blocks) == len(part.neighbours.values) == rows
        assert part.neighbours.values.shape == (rows, NEIGHBOURS)


@pytest.mark.parametrize("weights", COMBINATIONS, ids=lambda weights: "+".join(weights.by_method))
def test_a_distribution_sums_to_one(parts, weights):
    """At every position the mixture is non-negative and sums to 1."""
    for part in parts:
        mixed = part.distribution(weights)
        assert mixed.dtype == torch.float64
        assert mixed.min() >= 0
        assert (mixed.sum(dim=1) - 1).abs().max() < 1e-6


def slow_distributions(mixture: Mixture, tokens: np.ndarray, weights: Weights) -> Iterator[tuple[int, np.ndarray]]:
    """The mixture at every third position in plain loops, with a reading of the model for each."""
    model = mixture.model
    inputs = [model.start_token, *tokens[:-1].tolist()]
    scored = list(model.score(tokens))
    lm = np.concatenate([scores.double().exp().numpy() for _, scores in scored])
    found = mixture.neighbours.search(np.concatenate([keys for keys, _ in scored]), NEIGHBOURS)
    batch_ends = np.cumsum([len(scores) for _, scores in scored]).tolist()
    begin = 0
    for end in batch_ends:
        for start in range(begin, end, 32):
            query = model.tokenizer.decode(tokens[max(0, start - 64) : start].tolist())
            [hits] = mixture.blocks.search([query], 1)
            block = hits[0] if hits else None
            for position in range(start, min(start + 32, end), 3):
                knn = np.zeros(model.vocab_size)
                near = found.squared_l2[position].astype(np.float64)
                near = near[np.isfinite(near)]
                exponents = np.exp((near.min(initial=np.inf) - near) / weights.temperature)
                for exponent, value in zip(exponents, found.values[position], strict=False):
                    knn[value] += exponent / exponents.sum()
                if not len(near):
                    knn = lm[position]
                ric = lm[position]
                if block is not None:
                    head = [model.start_token, *block.tokens[: model.key_spec.context // 2 - 1].tolist()]
                    until = min(start + 32, end)
                    room = model.key_spec.context - len(head)
                    read = [*head, *inputs[max(0, until - room) : position + 1]]
                    with torch.inference_mode():
                        ric = model.model(torch.tensor([read])).logits[0, -1].double().softmax(-1).numpy()
                of_method = {"lm": lm[position], "knn": knn, "ric": ric}
                yield position, sum(weight * of_method[method] for method, weight in weights.by_method.items())
        begin = end


def test_the_mixture_equals_a_slow_reference(mixture, parts, tokens):
    """Neighbours, blocks and model mixed position by position in plain loops give the same distributions."""
    ours = torch.cat([part.distribution(WEIGHTS) for part in parts]).numpy()
    for position, theirs in slow_distributions(mixture, tokens, WEIGHTS):
        np.testing.assert_allclose(ours[position], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", COMBINATIONS, ids=lambda weights: "+".join(weights.by_method))
def test_one_target_is_read_off_the_distribution(parts, tokens, weights):
    """What probabilities() gives for a target, mixed by hand, is the distribution's entry at that target."""
    for part in parts:
        targets = targets_of(part, tokens)
        given = part.probabilities(targets, weights.temperature)
        mixed = sum(weight * given[method] for method, weight in weights.by_method.items())
        entry = part.distribution(weights).gather(1, targets.unsqueeze(1)).squeeze(1)
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


def test_a_share_is_that_of_the_documents_own_neighbours(mixture, parts, tokens):
    """A document's kNN share is the weight of its own neighbours with that token: without them it would be gone."""
    part = parts[0]
    targets = targets_of(part, tokens)
    right = part.neighbours.values == targets.numpy()[:, None]
    index = next(i for i in range(len(right)) if len(set(part.neighbours.documents[i, right[i]])) > 1)
    of_document = {
        share.document.id: share.probability
        for share in mixture.attribute(part, index, targets[index].item(), WEIGHTS)
        if share.method == "knn"
    }
    near = part.neighbours.squared_l2[index].astype(np.float64)
    weights = np.exp((near.min() - near) / WEIGHTS.temperature)
    weights /= weights.sum()
    for number in set(part.neighbours.documents[index].tolist()) - {-1}:
        own = (part.neighbours.documents[index] == number) & (part.neighbours.values[index] == targets[index].item())
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
        for method in ("lm", "ric"):
            old, new = getattr(before_part, method)[:end], getattr(after_part, method)[:end]
            torch.testing.assert_close(new, old, rtol=0, atol=1e-4)
        old, new = before_part.neighbours, after_part.neighbours
        np.testing.assert_allclose(new.squared_l2[:end], old.squared_l2[:end], rtol=1e-4, atol=1e-4)
        mixed = [part.distribution(WEIGHTS)[:end] for part in (before_part, after_part)]
        torch.testing.assert_close(mixed[1], mixed[0], rtol=0, atol=1e-5)
        assert [b and (b.document.id, b.start) for b in after_part.blocks[:end]] == [
            b and (b.document.id, b.start) for b in before_part.blocks[:end]
        ]
    # And the change is one: what follows is not as it was.
    assert (torch.cat([p.lm for p in after]) - torch.cat([p.lm for p in parts]))[changed_at + 1 :].abs().max() > 1e-3


def test_without_a_store_it_is_the_model(model, tokens):
    """A mixture of nothing but the model has the model's own bits, and says so."""
    alone = Mixture(model)
    assert alone.methods == ["lm"]
    for part, (_, scores) in zip(alone.parts(tokens), model.score(tokens), strict=True):
        assert torch.equal(part.lm, scores)
        assert torch.equal(part.distribution(Weights({"lm": 1.0}, 1.0)), scores.double().exp())
        targets = targets_of(part, tokens)
        assert list(part.probabilities(targets, 1.0)) == ["lm"]
        [share] = alone.attribute(part, 3, targets[3].item(), Weights({"lm": 1.0}, 1.0))
        assert (share.method, share.document) == ("lm", None)
        assert share.probability == scores[3, targets[3]].double().exp().item()


def test_all_weight_on_the_model_is_the_model(parts):
    """Beside neighbours and blocks, λ_lm = 1 leaves the model's own bits."""
    for part in parts:
        mixed = part.distribution(Weights({"lm": 1.0, "knn": 0.0, "ric": 0.0}, 4.0))
        assert torch.equal(mixed, part.lm.double().exp())


class Nothing:
    """Sources that find nothing."""

    def search(self, queries, k: int):
        """No neighbours, or no blocks."""
        if isinstance(queries, list):
            return [[] for _ in queries]
        shape = (len(queries), k)
        none = np.zeros(shape, dtype=np.int64)
        return Neighbours(np.full(shape, np.inf, dtype=np.float32), none, none - 1, none)

    def document(self, index: int) -> SourceDocument:
        """Never asked for."""
        raise AssertionError("there is no document")


def test_an_empty_store_is_the_model(model, tokens):
    """Where neither neighbour nor block is found, the model takes their weight: probability does not leak away."""
    empty = Mixture(model, neighbours=Nothing(), blocks=Nothing())
    for part in empty.parts(tokens):
        lm = part.lm.double().exp()
        torch.testing.assert_close(part.distribution(WEIGHTS), lm, rtol=1e-12, atol=0)
        targets = targets_of(part, tokens)
        [share] = empty.attribute(part, 0, targets[0].item(), WEIGHTS)
        assert (share.method, share.document) == ("lm", None)
        assert share.probability == pytest.approx(lm[0, targets[0]].item(), rel=1e-12)


class OneBlock:
    """A source that finds the same block for every query."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.block = Block(SourceDocument("b", "Ada", "GPL-3.0-only", "s", ""), 0, tokens.astype(np.int64), 1.0)

    def search(self, queries, k: int):
        """That block."""
        return [[self.block] for _ in queries]


@pytest.mark.parametrize("context", [4, 16, 40])
def test_a_block_never_takes_the_place_of_the_text(model, tokens, context: int):
    """However short the model's context, each token is predicted by what stands right before it, with a block in front.

    The inputs never exceed the context, and the block is never scored itself."""
    small = LanguageModel(model.model, model.tokenizer, "")
    small.key_spec = replace(model.key_spec, context=context, stride=context * 3 // 4)
    tokens = tokens[:50]
    inputs, block = model.inputs(tokens).tolist(), [7] * 128
    head = [model.start_token, *block[: context // 2 - 1]]
    room = context - len(head)
    for part in Mixture(small, blocks=OneBlock(np.asarray(block))).parts(tokens):
        for position in range(part.begin, part.end, 3):
            stride = min(32, room)
            end = min(position + stride - (position - part.begin) % stride, part.end)
            read = inputs[max(0, end - room) : position + 1]
            assert read[-1:] == inputs[position : position + 1]
            expected = small.log_probabilities(torch.tensor([head + read]), 1)[0, 0]
            torch.testing.assert_close(part.ric[position - part.begin], expected, rtol=0, atol=1e-4)
