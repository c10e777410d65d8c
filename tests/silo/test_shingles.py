"""Shingles: what counts as the same run of words."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.shingles import SHINGLE_WORDS, shingles, word_spans

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."


def hashes(text: str) -> list[int]:
    return shingles([text.encode()]).hashes.tolist()


@pytest.mark.parametrize(
    "other",
    [
        TEXT.upper(),
        TEXT.replace(" ", "\n\n  "),
        TEXT.replace(",", " —").replace(".", "…"),
        f"“{TEXT}”",
        TEXT.replace(" ", "\u00a0"),
        "> " + TEXT.replace("times", "**times**"),
        TEXT.replace("s", "s\u00ad"),
        TEXT.replace("t", "\u200bt\u2060"),
        TEXT.replace("wisdom", "wi\u017fdom"),
        TEXT.translate({code: code + 0xFEE0 for code in range(ord("A"), ord("z") + 1)}),
    ],
)
def test_case_punctuation_and_layout_do_not_count(other):
    """The same words give the same shingles, however they are set."""
    assert hashes(other) == hashes(TEXT)


@pytest.mark.parametrize(
    "text",
    [
        "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền",
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다 인간은",
        "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte",
        "ВСЕ ЛЮДИ РОЖДАЮТСЯ СВОБОДНЫМИ И РАВНЫМИ В СВОЁМ ДОСТОИНСТВЕ И ПРАВАХ",
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である",
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_all_forms_of_unicode_are_one_text(text, form):
    """Composed or decomposed, in upper or in lower case, a text has the same shingles."""
    assert hashes(unicodedata.normalize(form, text).lower()) == hashes(text) != []


def test_each_word_counts():
    """A changed word changes exactly the shingles that it lies in."""
    changed = hashes(TEXT.replace("worst", "first"))
    differ = [index for index, (one, other) in enumerate(zip(hashes(TEXT), changed, strict=True)) if one != other]
    assert differ == list(range(9 - SHINGLE_WORDS + 1, min(9, len(changed) - 1) + 1))


@given(
    st.lists(
        st.lists(
            st.sampled_from(["a", "bb", "Über", "u\u0308", "ß", "½", "数", "据", "x1", "don't", "…"]), max_size=20
        ),
        max_size=6,
    )
)
def test_a_batch_is_its_texts_one_by_one(words):
    """Together or alone, a text has the same shingles at the same words, and none crosses into the next text."""
    texts = [" ".join(each).encode() for each in words]
    together = shingles(texts) if texts else None
    for number, text in enumerate(texts):
        alone, mine = shingles([text]), together.documents == number
        assert np.array_equal(together.hashes[mine], alone.hashes)
        assert np.array_equal(together.positions[mine], np.arange(len(alone.hashes)))
        assert together.words[number] == alone.words[0] == len(word_spans(text)[0])
        assert len(alone.hashes) == max(0, alone.words[0] - SHINGLE_WORDS + 1)


def test_words_are_where_they_stand():
    """A word's span is its own bytes, and each Chinese character is a word."""
    text = "Über-cool: 数据 x, e\u0301te\u0301\u00ad s½".encode()
    begins, ends = word_spans(text)
    assert [text[begin:end].decode() for begin, end in zip(begins, ends, strict=True)] == [
        "Über",
        "cool",
        "数",
        "据",
        "x",
        "e\u0301te\u0301\u00ad",
        "s",
        "½",
    ]


def test_unequal_runs_have_unequal_hashes():
    """Among 200,000 runs of words that all differ, no two have one hash."""
    text = " ".join(str(number) for number in range(200_000))
    found = shingles([text.encode()]).hashes
    assert len(np.unique(found)) == len(found)


def test_the_order_of_words_counts():
    """The same words in another order are another shingle."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert hashes(" ".join(words)) != hashes(" ".join(words[::-1]))
