"""A limit on copies: no longer run of what is written stands in the store, and nothing else is forbidden."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

import silo
from datastore.selection import Selection
from datastore.store import Store
from silo.copying import CopyLimit
from silo.errors import UsageError

WEIGHTS = {"lm": 0.2, "ngram": 0.8}
WRITTEN = 40


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory) -> Store:
    made = Store.create(tmp_path_factory.mktemp("copying") / "store", model, model_dir / "tokenizer.json", control)
    made.add([replace(document, text=document.text[:600]) for document in documents[:6]], model)
    return made


@pytest.fixture(scope="module")
def lm(model, store):
    return silo.load(model, store=store, weights=WEIGHTS)


@pytest.fixture(scope="module")
def held(store) -> set[tuple[int, ...]]:
    """Every run of up to so many tokens that a document of the store has."""
    texts = [each.tokens.tolist() for name in store.manifest.shards for each in store.shard(name).documents()]
    return {tuple(text[at:to]) for text in texts for at in range(len(text)) for to in range(at + 1, at + WRITTEN + 1)}


@pytest.fixture(scope="module")
def ids(model, documents) -> torch.Tensor:
    """Two prompts of stored text."""
    rows = [model.tokenize(document)[20:32] for document in documents[:2]]
    return torch.stack([model.inputs(np.append(row, 0)) for row in rows])


def written(lm, ids, limit=None):
    processors = LogitsProcessorList([limit] if limit else [])
    common = {"do_sample": False, "min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "pad_token_id": 0}
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **common)
    return out[:, ids.shape[1] :].tolist()


def longest(row, held):
    return max(
        to - at for at in range(len(row)) for to in range(at, len(row) + 1) if to == at or tuple(row[at:to]) in held
    )


@pytest.mark.parametrize("most", [1, 4, 9])
def test_no_longer_run_is_written_and_nothing_else_changes(lm, store, ids, held, most):
    """Rows are limited each by itself, and of the tokens that make no run too long the likeliest is written."""
    free, limited = written(lm, ids), written(lm, ids, CopyLimit(store.ngrams(), most, ids.shape[1]))
    assert all(longest(row, held) > 9 for row in free)
    assert max(longest(row, held) for row in limited) <= most
    for begin, row in zip(ids, limited, strict=True):
        logits = lm(torch.cat([begin, torch.tensor(row[:-1])])[None]).logits[0, len(begin) - 1 :]
        for at, token in enumerate(row):
            run = row[max(0, at - most) : at]
            forbidden = [each for each in range(logits.shape[1]) if len(run) == most and (*run, each) in held]
            logits[at, forbidden] = -torch.inf
            assert logits[at, token] >= logits[at].max() - 1e-4


def test_what_is_forbidden_is_what_comes_after_in_the_store(store, held, model):
    """In each row those tokens that the store has after its last ones, and no other: none where these do not occur."""
    stored = next(run for run in sorted(held) if len(run) == 20)
    rows = torch.tensor([stored[:10], stored[9::-1]])
    assert tuple(rows[1, -3:].tolist()) not in held
    scores = CopyLimit(store.ngrams(), 3, 0)(rows, torch.zeros(2, model.vocab_size))
    after = [token for token in range(model.vocab_size) if (*stored[7:10], token) in held]
    assert stored[10] in after
    assert torch.isinf(scores[0]).nonzero().flatten().tolist() == after
    assert not scores[1].any()


def test_a_limit_that_nothing_reaches_changes_nothing(lm, store, ids):
    """With room enough the text is what it would be, and the prompt, which stands in the store, is nobody's copy."""
    assert written(lm, ids, CopyLimit(store.ngrams(), WRITTEN, ids.shape[1])) == written(lm, ids)


def test_what_a_policy_leaves_out_is_not_copied_either(model, store, documents, held):
    """The limit is of all that the store has; a prompt of a denied owner's text is gone on with in other words."""
    lm = silo.load(model, store=store, weights=WEIGHTS, deny=Selection(owners=("Ada",)))
    for document in documents[:3]:
        answer = lm.generate_with_sources(document.text[40:120], max_new_tokens=30, temperature=0, longest_copy=3)
        row = [each.token for each in answer.explanation.tokens]
        assert longest(row, held) <= 3


def test_wrong_limits_are_told(model, lm):
    """No run of nothing, and no limit where nothing could be copied."""
    with pytest.raises(UsageError, match="a longest copy of 0 tokens"):
        lm.generate_with_sources("a", longest_copy=0)
    with pytest.raises(UsageError, match="without a store"):
        silo.load(model).generate_with_sources("a", longest_copy=3)
