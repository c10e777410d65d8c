"""Protocols: every token once, with the context that each promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.protocols import Protocol, stream_windows
from silo.errors import UsageError

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=6)


@st.composite
def protocols(draw: st.DrawFn, kind: str) -> Protocol:
    context = draw(st.integers(1, 40))
    return Protocol(kind, context, draw(st.integers(1, context)))


@given(LENGTHS, st.sampled_from(["alone", "stream"]).flatmap(protocols))
def test_every_token_is_scored_once(lengths: list[int], protocol: Protocol):
    """The windows of all readings keep each position exactly once, and the readings hold the texts' tokens in order."""
    texts = [np.arange(length) + 1000 * number for number, length in enumerate(lengths)]
    readings = protocol.readings(texts)
    assert np.array_equal(np.concatenate([each.tokens for each in readings]), np.concatenate(texts))
    assert [length for each in readings for length in each.lengths] == lengths
    for reading in readings:
        kept = [position for window in reading.windows for position in range(window.first, window.end)]
        assert kept == list(range(len(reading.tokens)))
        assert all(window.end - window.begin <= protocol.context for window in reading.windows)


@given(st.integers(1, 300), protocols("stream"))
def test_stream_windows_are_silos(length: int, protocol: Protocol):
    """A token but the first is read in the first of SILO's windows, at multiples of the stride, that predicts it."""
    context, stride = protocol.context, protocol.stride
    before = {
        position: window.begin
        for window in stream_windows(length, context=context, stride=stride)
        for position in range(window.first, window.end)
    }
    for position in range(1, length):
        # SILO's window at s reads tokens s to s + context - 1, and predicts each one's next; input i is token i - 1.
        expected = next(s for s in range(0, length, stride) if s < position <= s + context)
        assert before[position] == expected + 1


@given(LENGTHS, protocols("alone"))
def test_alone_depends_on_one_document(lengths: list[int], protocol: Protocol):
    """Documents that stand alone are read as if no other were there."""
    texts = [np.arange(length) for length in lengths]
    together = protocol.readings(texts)
    assert [each.windows for each in together] == [protocol.readings([text])[0].windows for text in texts]


def test_no_texts_give_no_readings():
    """Without texts there is nothing to read, in either protocol."""
    assert Protocol("alone").readings([]) == Protocol("stream").readings([]) == []


@pytest.mark.parametrize("wrong", [{"kind": "both"}, {"stride": 0}, {"stride": 1025}])
def test_impossible_protocols_are_refused(wrong: dict):
    """An unknown kind and a stride that leaves tokens out are errors of use."""
    with pytest.raises(UsageError, match="protocol"):
        Protocol(**wrong)


def test_a_model_with_less_context_is_refused():
    """A protocol asks for what a model can read, and says both numbers."""
    Protocol().require_context(1024)
    with pytest.raises(UsageError, match="1024 tokens, the model reads 512"):
        Protocol().require_context(512)
