"""A mixture as a causal language model: what transformers' own code makes of it, and what it must equal."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import silo.gate
import silo.past
from datastore.store import Store
from silo.causal_lm import MixtureForCausalLM
from silo.errors import UsageError
from silo.gate import HIDDEN, Gate
from silo.in_context import InContext
from silo.mixture import Mixture
from silo.past import KNOWN
from silo.streaming import MixtureCache
from silo.weights import METHODS, Weighing, Weights

WEIGHTS = Weights({"lm": 0.4, "knn": 0.3, "ric": 0.2, "ngram": 0.1}, 4.0)
RETRIEVAL = InContext(stride=6, blocks=2)


@pytest.fixture(scope="module")
def mixture(model, model_dir, control, documents, tmp_path_factory) -> Mixture:
    """A mixture over six short documents."""
    made = Store.create(tmp_path_factory.mktemp("causal") / "store", model, model_dir / "tokenizer.json", control)
    made.add([replace(document, text=document.text[:500]) for document in documents[:6]], model)
    return made.mixture(model, METHODS, in_context=RETRIEVAL)


def gate_of_the_past() -> Gate:
    """A gate with random weights that hangs on how well the methods have foretold the text."""
    features = ("lm_entropy", KNOWN, *(f"{name}_past" for name in METHODS))
    generator = torch.Generator().manual_seed(7)
    sizes = [(6,), (6,), (HIDDEN, 6), (HIDDEN,), (5, HIDDEN), (5,)]
    layers = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return Gate(METHODS, features, (layers[0], layers[1].abs() + 0.5, *layers[2:]), 4.0)


@pytest.fixture(scope="module", params=["weights", "gate"])
def lm(mixture, request) -> Iterator[MixtureForCausalLM]:
    """By fixed weights, and by a gate that looks back, less far than most texts here go."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (silo.past, silo.gate):
            patch.setattr(module, "WINDOW", 20)
        yield MixtureForCausalLM(mixture, WEIGHTS if request.param == "weights" else gate_of_the_past())


@pytest.fixture(scope="module")
def text(model, documents) -> np.ndarray:
    """Tokens that share passages with stored documents; more than two of the model's contexts."""
    joined = documents[0].text[100:300] + documents[1].text[:200] + documents[11].text[:200]
    return model.tokenize(replace(documents[0], text=joined))[:150]


def given(model, tokens: np.ndarray) -> torch.Tensor:
    """The start token and all tokens, (1, n + 1)."""
    return model.inputs(np.append(tokens, 0)).unsqueeze(0)


def expected(mixture: Mixture, tokens: np.ndarray, weights: Weighing) -> torch.Tensor:
    """The mixture's log-probabilities at each position and after the last token."""
    parts = mixture.parts(np.append(tokens, 0))
    return torch.cat([each.distribution(weights) for each in parts]).clamp_min(1e-300).log()


@pytest.mark.parametrize("length", [1, 40, 63, 64, 150])
def test_logits_are_the_mixture(lm, mixture, model, text, length):
    """After the start token, logits are what Mixture.parts says of the text, also beyond the model's context."""
    assert model.key_spec.context == 64
    logits = lm(given(model, text[:length])).logits[0]
    torch.testing.assert_close(logits.double(), expected(mixture, text[:length], lm.weighing), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [True, False])
def test_the_model_alone_is_the_model(mixture, model, text, start):
    """With λ of the model at 1, logits are transformers' own log-softmax, with a start token or without."""
    ids = given(model, text[:50])[:, 0 if start else 1 :]
    alone = MixtureForCausalLM(Mixture(model), Weights({"lm": 1.0}))(ids).logits
    weighed = MixtureForCausalLM(mixture, Weights({"lm": 1.0, "knn": 0.0, "ric": 0.0, "ngram": 0.0}))(ids).logits
    with torch.no_grad():
        theirs = torch.log_softmax(model.model(ids).logits, dim=-1)
    torch.testing.assert_close(alone, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(weighed, theirs, rtol=0, atol=1e-5)


def test_without_a_start_token_ngrams_and_blocks_are_the_same(mixture, model, text):
    """A missing start token changes what the model says, and nothing that n-grams and blocks say beside it."""
    ids = given(model, text[:40])
    alone = MixtureForCausalLM(mixture, Weights({"lm": 1.0}))
    lm = [row.exp() for row in (alone(ids).logits[0, 1:], alone(ids[:, 1:]).logits[0])]
    assert not torch.allclose(*lm, atol=1e-5)
    parts = list(mixture.parts(np.append(text[:40], 0)))
    for method in ("ngram", "ric"):
        one = MixtureForCausalLM(mixture, Weights({"lm": 0.0, method: 1.0}))
        left = torch.cat([getattr(each, method).left for each in parts])[1:, None]
        assert (left < 1).sum() > 10
        whole = [row.exp() for row in (one(ids).logits[0, 1:], one(ids[:, 1:]).logits[0])]
        own = [given - left * of_model for given, of_model in zip(whole, lm, strict=True)]
        torch.testing.assert_close(*own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pieces", [[1] * 59, [20, 7, 1, 31]])
def test_reading_on_equals_reading_at_once(lm, model, text, pieces):
    """Inputs that come one by one, or some at a time, give the same as all at once, within the model's context."""
    ids = given(model, text)[:, : 1 + sum(pieces)]
    whole = lm(ids).logits
    out = lm(ids[:, :1], use_cache=True)
    found, at = [out.logits], 1
    for count in pieces:
        out = lm(ids[:, at : at + count], past_key_values=out.past_key_values, use_cache=True)
        assert out.logits.shape[1] == count
        found.append(out.logits)
        at += count
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("told", ["how many go", "how many stay"])
@pytest.mark.parametrize("cut", [1, 7, 30])
def test_what_was_cut_is_forgotten(lm, model, text, cut, told):
    """Inputs that are taken back, as when a draft is rejected, and others in their place: as if read at once."""
    ids = given(model, text[:62])
    draft = torch.cat([ids[:, :25], ids[:, 25:55].flip(1)], dim=1)
    out = lm(draft, use_cache=True)
    cache = out.past_key_values
    lm(ids[:, 55:56], past_key_values=cache, use_cache=True)
    cache.crop(-1 - cut if told == "how many go" else 55 - cut)
    kept = torch.cat([draft[:, : 55 - cut], ids[:, 55:58]], dim=1)
    first = lm(kept[:, 55 - cut : -1], past_key_values=cache, use_cache=True).logits
    then = lm(kept[:, -1:], past_key_values=cache, use_cache=True).logits
    whole = lm(kept).logits[:, -3:]
    torch.testing.assert_close(torch.cat([first, then], dim=1), whole, rtol=0, atol=1e-5)


def test_all_may_be_cut_or_nothing(lm, model, text):
    """A cut of no inputs, or to more than there are, changes nothing; after one of all, a text can be begun anew."""
    ids = given(model, text[:20])
    out = lm(ids, use_cache=True)
    cache = out.past_key_values
    for nothing in (0, 21, 100):
        cache.crop(nothing)
        assert cache.get_seq_length() == 21
    cache.crop(-21)
    assert cache.get_seq_length() == 0
    again = lm(ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(again.logits, out.logits, rtol=0, atol=1e-5)


def test_reading_on_past_the_context(mixture, model, text):
    """A full window is followed by one that begins with its last quarter, however the inputs come."""
    lm = MixtureForCausalLM(mixture, Weights({"lm": 0.5, "knn": 0.5}, 4.0))
    ids, context = given(model, text), model.key_spec.context
    out = lm(ids[:, :context], use_cache=True)
    for at in range(context, 130):
        out = lm(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        if at not in (context, context + 1, 90, 111, 112, 129):
            continue
        begin = at // 48 * 48 if at % 48 >= 16 else (at // 48 - 1) * 48
        seen = lm(ids[:, begin : at + 1]).logits[:, -1]
        torch.testing.assert_close(out.logits[:, -1], seen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(lm, model, text, side):
    """Rows of several lengths, padded on either side, have the logits of each row alone; padding has no opinion."""
    rows = [given(model, text[:length])[0] for length in (5, 30, 100)]
    width = max(map(len, rows))
    ids, mask = torch.full((3, width), 7), torch.zeros(3, width, dtype=torch.int64)
    places = [slice(width - len(row), width) if side == "left" else slice(0, len(row)) for row in rows]
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[number, place], mask[number, place] = row, 1
    for chosen in ([0, 1], [0, 1, 2]):  # within the context, and beyond it
        cut = slice(-31, None) if side == "left" and chosen == [0, 1] else slice(None)
        logits = lm(ids[chosen, cut], attention_mask=mask[chosen, cut]).logits
        for number in chosen:
            own = logits[number][mask[chosen, cut][number].bool()]
            torch.testing.assert_close(own, lm(rows[number].unsqueeze(0)).logits[0], rtol=0, atol=1e-5)
        uniform = torch.tensor(-np.log(model.vocab_size)).float()
        torch.testing.assert_close(logits[0][~mask[chosen, cut][0].bool()].unique(), uniform.unsqueeze(0))


def test_the_last_logits_alone(lm, model, text):
    """logits_to_keep gives the last logits of the whole answer."""
    ids = given(model, text[:90])
    torch.testing.assert_close(lm(ids, logits_to_keep=3).logits, lm(ids).logits[:, -3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", [1, 3, 12, 16, 19, 20])
def test_the_last_logits_of_rows_that_end_before_them(lm, model, text, keep):
    """Of a row that is padded on the right, whatever is kept is what all of the answer has there."""
    ids = given(model, text[:19]).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    whole = lm(ids, attention_mask=mask).logits
    torch.testing.assert_close(
        lm(ids, attention_mask=mask, logits_to_keep=keep).logits, whole[:, -keep:], rtol=0, atol=1e-5
    )


def greedy(lm, ids: torch.Tensor, count: int) -> list[int]:
    """The likeliest continuation, from the whole text at each step."""
    for _ in range(count):
        ids = torch.cat([ids, lm(ids).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0].tolist()


def test_generate_is_greedy(lm, model, text):
    """transformers' generate finds the continuation that the logits say, with its cache and without, also in a batch
    that is padded on the left."""
    ids = given(model, text[:12])
    wanted = greedy(lm, ids, 20)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = torch.ones_like(ids)  # transformers would take the start token for padding, were no mask given
    assert lm.generate(ids, attention_mask=whole, **options)[0].tolist() == wanted
    assert lm.generate(ids, attention_mask=whole, use_cache=False, **options)[0].tolist() == wanted
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), ids], dim=1)
    other = given(model, text[:18])
    mask = torch.ones(2, 19, dtype=torch.int64)
    mask[0, :6] = 0
    both = lm.generate(torch.cat([padded, other]), attention_mask=mask, **options)
    assert both[0, 6:].tolist() == wanted
    assert both[1].tolist() == greedy(lm, other, 20)


def test_drafts_change_nothing(lm, model, text, monkeypatch):
    """Drafts that are looked up in the prompt, of which some tokens are rejected, lead to the greedy text."""
    cropped, crop = [], MixtureCache.crop
    monkeypatch.setattr(MixtureCache, "crop", lambda cache, count: cropped.append(count) or crop(cache, count))
    for length in (12, 35):
        ids = given(model, text[:length])
        options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        drafted = lm.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3, **options)
        assert drafted[0].tolist() == greedy(lm, ids, 25)
    assert any(cropped), "no token was rejected"
    assert len(cropped) < 50, "no token was taken over"


def test_generate_by_beams_and_by_chance(lm, model, text):
    """Beams find a text that is at least as likely as the greedy one, the same with the cache as without; a seed
    repeats a sample."""
    ids = given(model, text[:12])
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    beams = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0}
    found = [lm.generate(ids, use_cache=cache, **options, **beams)[0] for cache in (True, False)]
    assert found[0].tolist() == found[1].tolist()

    def value(row: torch.Tensor) -> float:
        logits = lm(row.unsqueeze(0)).logits[0]
        return logits[:-1].gather(1, row[1:].unsqueeze(1))[12:].sum().item()

    assert value(found[0]) >= value(lm.generate(ids, do_sample=False, **options)[0]) - 1e-6
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(lm.generate(ids, do_sample=True, num_return_sequences=2, **options).tolist())
    assert samples[0] == samples[1]


def test_a_step_costs_a_step(lm, mixture, model, text, monkeypatch):
    """With the cache, one more input takes the model one input, the neighbours one query, the ∞-gram its last match and
    one token, and BM25 nothing within a stride."""
    read, searched, matched, looked = [], [], [], []
    real = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids, **k: read.append(ids.shape[1]) or real(ids, **k))
    for source, name, seen in (
        (mixture.neighbours, "search", searched),
        (mixture.ngrams, "match", matched),
        (mixture.blocks, "search", looked),
    ):
        whole = getattr(source, name)
        monkeypatch.setattr(
            source, name, lambda given, *a, _w=whole, _s=seen, **k: _s.append(given) or _w(given, *a, **k)
        )
    ids = given(model, text[:60])
    out = lm(ids[:, :38], use_cache=True)
    for seen in (read, searched, matched, looked):
        seen.clear()
    for at in range(38, 42):  # positions 38 to 41 are of one stride
        suffix = out.past_key_values.rows[0].suffix
        out = lm(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        assert len(matched[-1][0]) <= suffix + 1
    assert set(read) == {1}
    assert [len(each) for each in searched] == [1] * 4
    assert len(matched) == 4
    assert looked == []
    lm(ids[:, 42:43], past_key_values=out.past_key_values, use_cache=True)
    assert len(looked) == 1


def test_what_cannot_be_read_is_said_in_one_line(lm, mixture, model, text):
    """A mask with holes, a cache of another model and weights for what is not there are errors of ours."""
    ids = given(model, text[:4])
    with pytest.raises(UsageError, match="not one run of ones"):
        lm(ids, attention_mask=torch.tensor([[1, 0, 1, 1, 1]]))
    with torch.no_grad():
        foreign = model.model(ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="another model"):
        lm(ids, past_key_values=foreign)
    with pytest.raises(UsageError, match="weights for lm, knn"):
        MixtureForCausalLM(Mixture(model), Weights({"lm": 0.5, "knn": 0.5}))
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        lm.generate_with_sources("a", max_new_tokens=0)
