"""From documents to training sequences: every text as it is, every prompt read and not learnt."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from silo.documents import Document
from training.data import DOCUMENT_TOKEN, IGNORED, Sequences, shuffled, tokenize_documents, train_tokenizer

WORDS = ["def", "return", "import", "lambda", "yield", "while", "class", "assert", "naïve", "数据", "\n\t"]
DOCUMENTS = [
    Document(id="pair", prompt="def add(a, b):\n", text="    return a + b\n"),
    Document(id="plain", text="import os\n\nprint(os.name)\n"),
    Document(id="short", text="x"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS) * 20, "x = 1\n" * 50], 400)


@given(st.text())
@example(DOCUMENT_TOKEN)
@example(f"a{DOCUMENT_TOKEN}{DOCUMENT_TOKEN} b")
@example(" leading, trailing \n")
@example("\x00\ufeff\u200d👩\u200d🔬 é é")
def test_any_text_comes_back(tokenizer, text):
    """Byte-level BPE gives back every text as it was, and no text is able to end its own document."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids


def test_a_loaded_tokenizer_is_the_same(tokenizer, tmp_path):
    """Saved and loaded, the tokenizer gives the same ids, and still lets no text end its document."""
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"def f(x):\n    return {DOCUMENT_TOKEN!r}\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert (again.bos_token, again.eos_token, again.bos_token_id) == (DOCUMENT_TOKEN, DOCUMENT_TOKEN, 0)


def test_the_tokenizer_is_a_function_of_its_texts():
    """Trained twice on the same texts it has the same bytes, whole vocabulary and all; of other texts, others."""
    texts = [" ".join(WORDS), "abc abd abe abf\n" * 3, "zz yy xx"]
    first, second = (train_tokenizer(iter(texts), 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    assert train_tokenizer(["qu " * 50], 300).backend_tokenizer.to_str() != first


def test_the_vocabulary_has_every_byte_first(tokenizer):
    """The document token has id 0, each byte its own, and the size is not exceeded."""
    vocabulary = tokenizer.get_vocab()
    assert vocabulary[DOCUMENT_TOKEN] == 0
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert 257 <= len(vocabulary) <= 400
    assert sum(len(token) == 1 for token in vocabulary) == 256


def test_prompts_are_read_and_not_learnt(tokenizer):
    """A pair's prompt has the label that the loss leaves out; its completion has its own tokens, and so has text."""
    ids, labels, used = tokenize_documents(DOCUMENTS, tokenizer, 1000)
    prompt, completion = (tokenizer(text)["input_ids"] for text in (DOCUMENTS[0].prompt, DOCUMENTS[0].text))
    end = 1 + len(prompt) + len(completion)
    assert ids[:end].tolist() == [0, *prompt, *completion]
    assert labels[:end].tolist() == [0, *[IGNORED] * len(prompt), *completion]
    assert np.array_equal(ids[end:], labels[end:])
    assert used == DOCUMENTS


def test_documents_stand_end_to_end(tokenizer):
    """Between document tokens stand the documents' texts, in order and whole."""
    ids, _, _ = tokenize_documents(DOCUMENTS, tokenizer, 1000)
    starts = [*np.flatnonzero(ids == 0), len(ids)]
    texts = [tokenizer.decode(ids[begin + 1 : end]) for begin, end in itertools.pairwise(starts)]
    assert texts == [document.full_text for document in DOCUMENTS]


def test_the_budget_is_kept(tokenizer):
    """No more tokens than asked for are laid out, and no document is named that gave none of them."""
    whole, whole_labels, _ = tokenize_documents(DOCUMENTS, tokenizer, 1000)
    first = len(tokenize_documents(DOCUMENTS[:1], tokenizer, 1000)[0])
    for budget in (1, 5, first, first + 1, len(whole) - 1, len(whole), len(whole) + 1):
        ids, labels, used = tokenize_documents(DOCUMENTS, tokenizer, budget)
        assert np.array_equal(ids, whole[:budget])
        assert np.array_equal(labels, whole_labels[:budget])
        assert len(used) == np.count_nonzero(ids == 0)
        assert used == DOCUMENTS[: len(used)]


def test_the_order_depends_on_the_seed_alone():
    """Whatever order documents come in, they are drawn in one that the seed decides, each once."""
    documents = [Document(id=f"d{n}", text="x") for n in range(50)]
    order = list(shuffled(documents, 3))
    assert list(shuffled(documents[::-1], 3)) == order
    assert sorted(order, key=lambda d: d.id) == sorted(documents, key=lambda d: d.id)
    assert list(shuffled(documents, 4)) != order
    assert order != documents


def test_sequences_are_cuts_of_one_length():
    """Tokens are cut into whole sequences, each token once and in order; a shorter rest is left out."""
    ids = np.arange(23, dtype=np.int64)
    sequences = Sequences(ids, ids + 100, 5)
    assert len(sequences) == 4
    assert torch.cat([row["input_ids"] for row in sequences]).tolist() == list(range(20))
    assert torch.cat([row["labels"] for row in sequences]).tolist() == list(range(100, 120))
    assert len(Sequences(ids[:4], ids[:4], 5)) == 0


def test_a_sequence_with_nothing_to_learn_is_left_out():
    """A sequence that lies within a prompt would have no loss: not a number, which ends the run. It is not drawn."""
    ids = np.arange(15, dtype=np.int64)
    labels = ids.copy()
    labels[5:10] = IGNORED
    labels[11:15] = IGNORED  # only the first token of the third has a label, and a first token is not predicted
    [only] = DataLoader(Sequences(ids, labels, 5))
    assert only["input_ids"].tolist() == [[0, 1, 2, 3, 4]]
