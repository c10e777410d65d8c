"""Scoring: against a loop that reads one token at a time, and against lm-evaluation-harness."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from eval.protocols import Protocol
from eval.scoring import Scorer, log_probability, onednn_products
from silo.windows import windows


@pytest.fixture(scope="module")
def texts(model, documents) -> list[np.ndarray]:
    """Texts of many lengths, of one token as well."""
    return [model.tokenize(each)[: 7 * number**2 + 1] for number, each in enumerate(documents[:6])]


def slowly(model, start: int, inputs: list[int], token: int) -> float:
    """log p of one token after all of some inputs."""
    with torch.inference_mode():
        logits = model(torch.tensor([inputs]), use_cache=False).logits[0, -1]
    return logits.double().log_softmax(-1)[token].item()


def expected_alone(model, start: int, text: np.ndarray, protocol: Protocol) -> list[float]:
    inputs = [start, *text.tolist()]
    return [
        slowly(model, start, inputs[window.begin : position + 1], int(text[position]))
        for window in windows(len(text), context=protocol.context, stride=protocol.stride)
        for position in range(window.first, window.end)
    ]


@pytest.mark.parametrize("stride", [8, 16])
def test_documents_alone_are_those_of_a_slow_loop(model, texts, stride):
    """Each token has the log-probability that the model gives it after the window's inputs before it, to 1e-5."""
    protocol = Protocol("alone", 16, stride)
    scored = Scorer(model.model, model.start_token).score(texts[:4], protocol)
    for text, found in zip(texts[:4], scored, strict=True):
        assert found.dtype == np.float64
        assert found == pytest.approx(expected_alone(model.model, model.start_token, text, protocol), abs=1e-5)


def test_a_stream_is_read_across_documents(model, texts):
    """In SILO's protocol a token is read after the end of the document before it."""
    scored = Scorer(model.model, model.start_token).score(texts[:3], Protocol("stream", 32, 16))
    stream = np.concatenate(texts[:3]).tolist()
    assert [len(each) for each in scored] == [len(each) for each in texts[:3]]
    found = np.concatenate(scored)
    for position in range(1, len(stream)):
        begin = next(s for s in range(0, len(stream), 16) if s < position <= s + 32)
        expected = slowly(model.model, model.start_token, stream[begin:position], stream[position])
        assert found[position] == pytest.approx(expected, abs=1e-5)


def test_company_changes_nothing_that_counts(model, texts):
    """A text's log-probabilities are the same alone and among others, and in any order, to 1e-5."""
    scorer, protocol = Scorer(model.model, model.start_token), Protocol("alone", 64, 48)
    together = scorer.score(texts, protocol)
    assert all(np.array_equal(a, b) for a, b in zip(together, scorer.score(texts, protocol), strict=True))
    for text, found in zip(texts, together, strict=True):
        assert scorer.score([text], protocol)[0] == pytest.approx(found, abs=1e-5)
    backwards = scorer.score(texts[::-1], protocol)[::-1]
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(backwards, together, strict=True))


def test_progress_counts_tokens(model, texts):
    """Progress ends with all tokens of all texts."""
    calls: list[tuple[int, int]] = []
    Scorer(model.model, model.start_token).score(
        texts, Protocol("alone", 16, 16), progress=lambda *call: calls.append(call)
    )
    total = sum(map(len, texts))
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_capped_logits_are_scored_as_the_model_makes_them():
    """A model that does more to its states than multiply them is scored by its own logits."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(**shape, vocab_size=50, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1)
    model = Gemma2ForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=3)
    scorer, text = Scorer(model, 0), np.arange(1, 21)
    assert not scorer.plain_head
    protocol = Protocol("alone", 8, 8)
    assert scorer.score([text], protocol)[0] == pytest.approx(expected_alone(model, 0, text, protocol), abs=1e-5)


def test_blocks_of_a_vocabulary_sum_to_the_whole():
    """log p from a head in pieces is that of log-softmax over the whole, for tokens in every piece."""
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(60, 8, generator=generator), 3 * torch.randn(50, 8, generator=generator)
    targets = torch.arange(60) % 50
    expected = (states @ head.t()).double().log_softmax(-1)[torch.arange(60), targets]
    assert torch.allclose(log_probability(states, head.split(7), targets), expected, atol=1e-5)
    assert torch.allclose(log_probability(states @ head.t(), [None], targets), expected, atol=1e-5)


def test_a_model_is_given_back_as_it_was():
    """After an error in the middle of a scoring the model's layers are its own again, and so are its answers."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8, bias=False)))
    layers, x = list(model.modules()), torch.randn(64, 8)
    before = model(x)

    def fail_within() -> None:
        with onednn_products(model):
            assert torch.allclose(model(x), before, atol=1e-5)
            assert list(model.modules()) != layers
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert list(model.modules()) == layers
    assert torch.equal(model(x), before)


def test_rolling_log_likelihood_is_lm_evaluation_harnesss(model, documents):
    """Windows that do not overlap give lm-evaluation-harness's rolling log-likelihood, to 1e-5 a token."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    peer = harness.HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4, max_length=64, device="cpu")
    asked = [instance("loglikelihood_rolling", {}, (each.text,), number) for number, each in enumerate(documents[:4])]
    expected = peer.loglikelihood_rolling(asked, disable_tqdm=True)
    tokens = [model.tokenize(each) for each in documents[:4]]
    scored = Scorer(model.model, peer.prefix_token_id).score(tokens, Protocol("alone", 64, 64))
    for text, found, value in zip(tokens, scored, expected, strict=True):
        assert math.fsum(found) / len(text) == pytest.approx(value / len(text), abs=1e-5)
