"""Leakage: counted as a slow search through the stored text counts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import leakage as measured
from eval.leakage import covered, leakage


@given(st.lists(st.integers(0, 8), max_size=30), st.integers(1, 6))
def test_tokens_in_several_matches_count_once(lengths: list[int], least: int):
    """A token counts once if any match that is long enough covers it, whichever others do."""
    lengths = [min(length, end) for end, length in enumerate([0, *lengths])]
    expected = {token for end, length in enumerate(lengths) if length >= least for token in range(end - length, end)}
    assert covered(np.asarray(lengths), least) == len(expected)


def test_shares_are_those_of_a_slow_search(make_store, documents, model, monkeypatch):
    """Tokens inside runs that some stored document has, with a token after them, are counted, and no others."""
    monkeypatch.setattr(measured, "LENGTHS", (3, 13))
    stored = [replace(each, text=each.text[:500]) for each in documents[:3]]
    held = [model.tokenize(each).tolist() for each in stored]
    texts = [model.tokenize(replace(each, text=each.text[300:900])) for each in documents[1:5]]
    found = leakage(make_store("leaks", stored).ngrams(), texts)
    runs = {n: {tuple(one[at : at + n]) for one in held for at in range(len(one) - n)} for n in (3, 13)}
    for least, known in runs.items():
        inside = sum(
            any(
                begin >= 0 and tuple(text[begin : begin + least].tolist()) in known
                for begin in range(token - least + 1, token + 1)
                if begin + least <= len(text)
            )
            for text in texts
            for token in range(len(text))
        )
        assert found["shares"][str(least)] == pytest.approx(inside / sum(map(len, texts)))
    assert found["longest"] > 13
    assert 0 < found["shares"]["13"] < found["shares"]["3"] <= 1


def test_text_that_is_stored_leaks_all_but_its_end(make_store, documents, model):
    """A stored document is inside one run but for its last token, which nothing follows; an empty store leaks none."""
    tokens = model.tokenize(documents[0])
    found = leakage(make_store("whole", documents[:1]).ngrams(), [tokens])
    assert found["longest"] == len(tokens) - 1
    assert found["shares"]["50"] == (len(tokens) - 1) / len(tokens)
    empty = leakage(make_store("empty").ngrams(), [tokens])
    assert empty == {"tokens": len(tokens), "longest": 0, "shares": {"13": 0.0, "32": 0.0, "50": 0.0}}
