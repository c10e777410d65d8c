"""Windows: every position once, with a long enough past."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from silo.errors import UsageError
from silo.windows import windows


@given(st.integers(0, 300), st.integers(1, 70), st.integers(1, 70))
@example(length=1, context=1, stride=1)
@example(length=64, context=64, stride=48)
@example(length=65, context=64, stride=48)
def test_every_position_once_with_context(length: int, context: int, stride: int):
    """Positions come in order, each exactly once; past the first window each has context - stride inputs before it."""
    assume(stride <= context)
    cut = windows(length, context=context, stride=stride)
    assert [position for window in cut for position in range(window.first, window.end)] == list(range(length))
    for window in cut:
        assert 0 <= window.begin <= window.first < window.end <= length
        assert window.end - window.begin == min(context, length)
        if window is not cut[0]:
            assert window.first - window.begin >= context - stride
    # Nothing smaller would do: the count is that of one full window and strides for the rest.
    assert len(cut) == (0 if not length else 1 + -(-max(0, length - context) // stride))


def test_windows_that_would_not_advance_are_refused():
    """A stride of 0 is an error, and no loop without end."""
    with pytest.raises(UsageError, match="advance by 0 tokens; expected at least 1"):
        windows(3, context=1, stride=0)


@given(st.integers(1, 300), st.integers(2, 70), st.data())
def test_a_position_in_an_earlier_window_keeps_its_window(length: int, context: int, data):
    """All windows but the last of a document are those of a longer one: what follows moves nothing before it."""
    stride = data.draw(st.integers(1, context))
    shorter = windows(length, context=context, stride=stride)
    longer = windows(length + data.draw(st.integers(1, 100)), context=context, stride=stride)
    assert longer[: len(shorter) - 1] == shorter[:-1]
