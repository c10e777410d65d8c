"""Retrieval in context: against a slow reference, without looking ahead, and split exactly among documents."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from datastore.store import Store
from silo.errors import UsageError
from silo.in_context import InContext, find_blocks, read_blocks, read_in_context
from silo.language_model import LanguageModel
from silo.retrieval import Block, SourceDocument

SETTINGS = [
    InContext(),
    InContext(query_tokens=16, stride=4, blocks=1, block_tokens=20, text_tokens=24),
    InContext(query_tokens=16, stride=4, blocks=3, block_tokens=20, text_tokens=17),
    InContext(query_tokens=16, stride=5, blocks=3, combine="concatenate", block_tokens=20),
    InContext(query_tokens=64, stride=1000, blocks=1, block_tokens=1000),
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


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("changed_at", [40, 97])
def test_a_later_token_changes_nothing_before_it(model, source, tokens, settings, changed_at):
    """With another token at t, or none from t on, all positions up to t have the same blocks, evidence and
    distributions."""
    changed = tokens.copy()
    changed[changed_at] = (changed[changed_at] + 1) % model.vocab_size
    end = changed_at + 1  # the input of position t ends before t
    before = read_in_context(model, source, tokens, 0, len(tokens), settings)
    for after in (
        read_in_context(model, source, changed, 0, len(tokens), settings),
        read_in_context(model, source, tokens[:end], 0, end, settings),
    ):
        torch.testing.assert_close(after.distribution()[:end], before.distribution()[:end], rtol=0, atol=1e-5)
        assert [named(row) for row in after.blocks[:end]] == [named(row) for row in before.blocks[:end]]
        for name, values in before.evidence().items():
            np.testing.assert_array_equal(after.evidence()[name][:end], values[:end])


def named(blocks):
    return [(block.document.id, block.start, block.score) for block in blocks]


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_how_a_document_is_split_changes_nothing(model, source, tokens, settings):
    """Read in pieces that end anywhere, a document has the distributions and evidence that it has as a whole."""
    whole = read_in_context(model, source, tokens, 0, len(tokens), settings)
    cuts = [0, 1, 50, 83, 84, len(tokens)]
    pieces = [read_in_context(model, source, tokens, begin, end, settings) for begin, end in itertools.pairwise(cuts)]
    together = torch.cat([piece.distribution() for piece in pieces])
    torch.testing.assert_close(together, whole.distribution(), rtol=0, atol=1e-5)
    for name, values in whole.evidence().items():
        np.testing.assert_array_equal(np.concatenate([piece.evidence()[name] for piece in pieces]), values)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_shares_are_the_probability(model, source, tokens, settings):
    """A token's shares add up to its probability, which the distribution has too, and it sums to 1 or to nothing."""
    reading = read_in_context(model, source, tokens, 0, len(tokens), settings)
    targets = torch.from_numpy(tokens.astype(np.int64))
    given, distribution = reading.probability(targets), reading.distribution()
    assert torch.equal(given, distribution.gather(1, targets[:, None])[:, 0])
    np.testing.assert_allclose(distribution.sum(dim=1), reading.found.astype(float), rtol=0, atol=1e-6)
    for index in range(0, len(tokens), 7):
        shares = reading.shares(index, int(tokens[index]))
        assert math.fsum(part for part, _ in shares) == pytest.approx(given[index].item(), rel=1e-15, abs=0)
        assert [document for _, document in shares] == [block.document for block in reading.blocks[index]]


class Sequence:
    """A source that finds the same blocks for every query, worse and worse, and remembers what it was asked."""

    def __init__(self, *blocks):
        self.blocks = [
            Block(SourceDocument(id, "Ada", "MIT", "s", ""), start, np.asarray(tokens, dtype=np.int64), 9.0 - number)
            for number, (id, start, tokens) in enumerate(blocks)
        ]
        self.asked = []

    def search(self, queries, k, *, tokens=128, exclude=None):
        """Those blocks."""
        self.asked += queries
        return [
            [replace(block, tokens=block.tokens[:tokens]) for block in self.blocks if block.document.id != exclude][:k]
            for _ in queries
        ]


def test_blocks_that_overlap_a_better_one_are_passed_over(model, tokens):
    """Of blocks that share a token of one document the best is read, and the next that shares none with it."""
    source = Sequence(
        ("a", 64, [5] * 20), ("a", 83, [6] * 20), ("a", 45, [7] * 20), ("b", 64, [8] * 20), ("a", 84, [9])
    )
    found = find_blocks(model, source, tokens, 0, 10, InContext(blocks=3))
    assert [[(block.document.id, block.start) for block in row] for row in found.blocks] == [
        [("a", 64), ("b", 64), ("a", 84)]
    ]


def test_an_ensemble_in_which_blocks_agree_is_one_block(model, tokens):
    """Blocks of the same tokens give what one of them gives, and share it by the softmax of their scores."""
    twice = Sequence(("a", 0, [5] * 9), ("b", 0, [5] * 9))
    reading = read_in_context(model, twice, tokens, 0, 30, InContext(blocks=2, temperature=2.0))
    alone = read_in_context(model, twice, tokens, 0, 30, InContext(blocks=1))
    torch.testing.assert_close(reading.distribution(), alone.distribution(), rtol=1e-12, atol=1e-15)
    (first, _), (second, _) = reading.shares(7, 3)
    assert first / second == pytest.approx(math.exp(0.5))


def test_the_best_of_several_in_a_row_is_nearest_to_the_text(model, tokens):
    """Blocks that are read at once stand worst first: their order matters, and this is the one."""
    row = Sequence(("a", 0, tokens[:9]), ("b", 0, tokens[50:59]))
    reading = read_in_context(model, row, tokens, 0, 20, InContext(blocks=2, combine="concatenate"))
    head = [model.start_token, *tokens[50:59].tolist(), *tokens[:9].tolist()]
    for order, same in ((head, True), ([head[0], *head[10:], *head[1:10]], False)):
        inputs = torch.tensor([[*order, model.start_token, *tokens[:19].tolist()]])
        expected = model.log_probabilities(inputs, 20)[0].double().exp()
        assert torch.allclose(reading.distribution(), expected, rtol=0, atol=1e-5) == same


def test_a_position_is_looked_up_by_the_tokens_before_its_stride(model, tokens):
    """Every stride is asked for once, by the last tokens before it, the first by none."""
    source = Sequence(("a", 0, [5]))
    find_blocks(model, source, tokens, 10, 40, InContext(query_tokens=6, stride=8))
    assert source.asked == [model.tokenizer.decode(tokens[start - 6 : start].tolist()) for start in (8, 16, 24, 32)]
    source.asked.clear()
    find_blocks(model, source, tokens, 0, 3, InContext(query_tokens=6, stride=8))
    assert source.asked == [""]


def test_an_excluded_document_is_not_read(model, source, tokens, documents):
    """What is read without a document cites only others; with it, it is cited."""
    settings = InContext(stride=16, blocks=2)
    cited = [
        {block.document.id for row in reading.blocks for block in row}
        for reading in (
            read_in_context(model, source, tokens, 0, len(tokens), settings, exclude=exclude)
            for exclude in (None, documents[0].id)
        )
    ]
    assert documents[0].id in cited[0]
    assert documents[0].id not in cited[1]
    assert cited[1]


def test_what_is_of_no_use_is_not_read(model, source, tokens, monkeypatch):
    """Strides without a wanted position cost no reading and count as not found; the others are as they were."""
    settings = InContext(stride=16)
    found = find_blocks(model, source, tokens, 0, len(tokens), settings)
    whole = read_blocks(model, tokens, found)
    where = np.zeros(len(tokens), dtype=bool)
    where[[35, 70, 71]] = True
    some = read_blocks(model, tokens, found, where)
    strides = np.isin(np.arange(len(tokens)) // 16, [35 // 16, 70 // 16])
    np.testing.assert_array_equal(some.found, whole.found & strides)
    torch.testing.assert_close(some.distribution()[strides], whole.distribution()[strides], rtol=0, atol=1e-5)
    assert not some.distribution()[~strides].any()
    monkeypatch.setattr(model, "log_probabilities", None)
    assert not read_blocks(model, tokens, found, where & False).found.any()


def test_a_poor_look_up_is_not_read(model, source, tokens):
    """Under a least score by words only the strides that have it are read, and their evidence is told all the same."""
    settings = InContext(query_tokens=16, stride=4)
    whole = read_in_context(model, source, tokens, 0, len(tokens), settings)
    least = float(np.median(whole.evidence()["score_per_word"]))
    some = read_in_context(model, source, tokens, 0, len(tokens), replace(settings, min_score_per_word=least))
    good = whole.evidence()["score_per_word"] >= least
    assert 0.3 < good.mean() < 0.7
    np.testing.assert_array_equal(some.found, good)
    torch.testing.assert_close(some.distribution()[good], whole.distribution()[good], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(some.evidence()["score"], whole.evidence()["score"])


def test_evidence_tells_a_good_look_up_from_a_bad_one(model, source, tokens):
    """Where the query is of a stored text its words are found together: score and overlap are higher; where nothing is
    found all is zero; and what is a part of something is from 0 to 1."""
    reading = read_in_context(model, source, tokens, 0, len(tokens), InContext(query_tokens=16, stride=4))
    evidence = reading.evidence()
    assert list(evidence) == ["score", "score_per_word", "gap", "overlap"]
    for values in evidence.values():
        assert values.shape == (len(tokens),)
        assert values.dtype == np.float64
        assert not values[~reading.found].any()
        assert values.min() >= 0
    assert max(evidence["gap"].max(), evidence["overlap"].max()) <= 1
    stored, strange = slice(20, 60), slice(95, 115)
    for name in ("score", "score_per_word", "overlap"):
        assert evidence[name][stored].mean() > evidence[name][strange].mean()


@pytest.mark.parametrize("context", [4, 5, 16, 40])
@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_any_context_has_room(model, tokens, context, settings, monkeypatch):
    """However short the model's context, no reading exceeds it, and each ends in what stands before the position."""
    small = LanguageModel(model.model, model.tokenizer, "")
    small.key_spec = replace(model.key_spec, context=context)
    read = []

    def remember(inputs, keep):
        assert inputs.shape[1] <= context
        assert keep <= context // 2 + 1
        read.append((inputs[0, 1:].tolist(), keep))
        return model.log_probabilities(inputs, keep)

    monkeypatch.setattr(small, "log_probabilities", remember)
    source = Sequence(("a", 0, [7] * 128), ("b", 0, [7] * 128))
    reading = read_in_context(small, source, tokens[:60], 0, 60, settings)
    assert reading.found.all()
    inputs = model.inputs(tokens[:60]).tolist()
    ends = {tuple(inputs[:end][-2:]) for end in range(1, 61)}
    assert all(tuple(sequence[-2:]) in ends for sequence, _ in read)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("query_tokens", "stride", "blocks", "block_tokens", "text_tokens", "temperature")),
        {"min_score_per_word": -1.0},
        {"combine": "product"},
    ],
    ids=str,
)
def test_nonsensical_settings_are_refused(wrong):
    """A setting out of range is a wrong call that names it."""
    with pytest.raises(UsageError, match=f"{next(iter(wrong)) if 'combine' not in wrong else 'combined'}"):
        InContext(**wrong)


def test_a_context_without_room_is_refused(model, tokens):
    """A model that reads three tokens at once has no room for a block beside a text, and the error says so."""
    tiny = LanguageModel(model.model, model.tokenizer, "")
    tiny.key_spec = replace(model.key_spec, context=3)
    with pytest.raises(UsageError, match="the model reads 3 tokens at once; retrieval in context takes at least 4"):
        read_in_context(tiny, Sequence(), tokens, 0, 9, InContext())
