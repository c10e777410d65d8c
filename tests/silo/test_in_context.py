"""Retrieval in context: against a slow reference, without looking ahead, and split exactly among documents."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datastore.store import Store
from silo.in_context import InContext, read_in_context

SETTINGS = [
    InContext(),
    InContext(query_tokens=16, stride=4, block_tokens=20, text_tokens=24),
    InContext(query_tokens=16, stride=4, blocks=3, block_tokens=20, text_tokens=17),
    InContext(query_tokens=16, stride=5, blocks=3, combine="concatenate", block_tokens=20),
    InContext(query_tokens=64, stride=1000, block_tokens=1000),
]
NAMES = ["default", "ralm", "ensemble", "concatenate", "silo"]


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory) -> Store:
    """A store of six documents of three owners."""
    made = Store.create(tmp_path_factory.mktemp("context") / "store", model, model_dir / "tokenizer.json", control)
    made.add([replace(document, text=document.text[:700]) for document in documents[:6]], model)
    return made


@pytest.fixture(scope="module")
def source(store):
    return store.blocks()


@pytest.fixture(scope="module")
def tokens(model, documents) -> np.ndarray:
    """Text that shares passages with two stored documents, around words that none of them holds."""
    text = documents[0].text[100:260] + "\nzyxw[qqq]§" * 6 + documents[1].text[:160]
    return model.tokenize(replace(documents[0], text=text))


def by_hand(model, source, tokens, position, settings):
    """The blocks at a position, their weights, and what the model says of it with them: one plain reading for each."""
    context = model.key_spec.context
    together = settings.blocks if settings.combine == "concatenate" else 1
    length = min(settings.block_tokens, (context // 2 - 1) // together)
    text = min(context - 1 - together * length, settings.text_tokens or context)
    stride = min(settings.stride, text // 2)
    start = position - position % stride
    query = model.tokenizer.decode(tokens[max(0, start - settings.query_tokens) : start].tolist())
    [hits] = source.search([query], 3 * max(2, settings.blocks), tokens=length)
    blocks = []
    for hit in hits:
        span = set(range(hit.start, hit.start + len(hit.tokens)))
        if all(b.document != hit.document or not span & set(range(b.start, b.start + len(b.tokens))) for b in blocks):
            blocks.append(hit)
    blocks = blocks[: settings.blocks]
    window, wide = 0, text // stride * stride
    while start + stride > window + wide:
        window += max(1, text // stride * 3 // 4) * stride
    read = [model.start_token, *tokens[:-1].tolist()][window : position + 1]
    heads = [[block] for block in blocks] if settings.combine == "ensemble" else [blocks[::-1]] if blocks else []
    given = []
    for head in heads:
        before = [model.start_token, *(token for block in head for token in block.tokens.tolist())]
        assert len(before) + len(read) <= context
        with torch.inference_mode():
            given.append(model.model(torch.tensor([before + read])).logits[0, -1].double().softmax(-1).numpy())
    exponents = np.exp(np.asarray([block.score for block in blocks]) / settings.temperature)
    weights = exponents / exponents.sum() if blocks else exponents
    if settings.combine == "concatenate":
        given = given * len(blocks)
    return blocks, weights, given


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_it_equals_a_slow_reference(model, source, tokens, settings):
    """Each position's distribution is that of plain readings of its own, one a block; where none is found it is 0."""
    reading = read_in_context(model, source, tokens, 0, len(tokens), settings)
    ours = reading.distribution().numpy()
    several = 0
    for position in range(0, len(tokens), 3):
        blocks, weights, given = by_hand(model, source, tokens, position, settings)
        theirs = sum((weight * p for weight, p in zip(weights, given, strict=True)), np.zeros(model.vocab_size))
        np.testing.assert_allclose(ours[position], theirs, rtol=0, atol=1e-5)
        assert reading.found[position] == bool(blocks)
        several = max(several, len(blocks))
    assert several == settings.blocks
    assert 0 < reading.found.mean() < 1
