"""From a tokenised corpus to training sequences: every text as it is, every prompt read and not learnt."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from silo.collect import collect
from silo.corpus import Corpus
from silo.errors import UsageError
from silo.licensing import DEFAULT_POLICY
from training.data import IGNORED, Domain, Mixture
from training.reweighting import reweighted
from training.tokens import DOCUMENT_TOKEN, Tokens, open_tokens, train_tokenizer

WORDS = ["def", "return", "import", "lambda", "yield", "while", "class", "assert", "naïve", "数据", "\n\t"]


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


LENGTH = 16


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A permissive corpus of four sources: one large, two small, and pairs."""
    root = tmp_path_factory.mktemp("corpus")
    rows = [
        {"id": f"{source}/{n}", "text": f"{source} text number {n} says {n * n} things. " * 6, "source": source}
        for source, count in (("large", 200), ("small", 12), ("tiny", 8))
        for n in range(count)
    ]
    rows += [
        {
            "id": f"pair/{n}",
            "prompt": f"What is {n} plus {n}, please? ",
            "completion": f"It is {n + n}.",
            "source": "pairs",
        }
        for n in range(60)
    ]
    file = root / "x.jsonl"
    file.write_text("".join(json.dumps({**row, "license": "MIT", "owner": "Ada"}) + "\n" for row in rows))
    collect([str(file)], root / "out")
    return root / "out" / "permissive"


@pytest.fixture(scope="module")
def tokens(side: Path) -> Tokens:
    return open_tokens(side, DEFAULT_POLICY, 400)


def test_tokens_are_those_of_the_texts(side: Path, tokens: Tokens):
    """Every training and validation document stands in its range, start token first, prompt and text in one."""
    rows = {row.id: row for row in tokens.rows}
    for split in ("train", "val"):
        array, end = tokens.array(split), 0
        for document in Corpus.open(side).documents(split):
            row = rows.pop(document.id)
            assert (row.begin, array[row.begin]) == (end, tokens.tokenizer.bos_token_id)
            assert tokens.tokenizer.decode(array[row.begin + 1 : row.end]) == document.full_text
            assert tokens.tokenizer.decode(array[row.begin + 1 : row.begin + 1 + row.prompt]) == document.prompt
            assert (row.license, row.owner, row.source, row.tier) == ("MIT", "Ada", document.source, "SW")
            end = row.end
        assert end == len(array)
    assert rows == {}


def test_tokens_are_made_once(side: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch):
    """A second opening reads what the first one made, and maps it instead of reading it."""

    def never(*_: object) -> None:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr("training.tokens.tokenize", never)
    again = open_tokens(side, DEFAULT_POLICY, 400)
    assert isinstance(again.array("train"), np.memmap)
    assert np.array_equal(again.array("train"), tokens.array("train"))


def everything(mixture: Mixture) -> list[tuple[np.ndarray, np.ndarray]]:
    return [mixture.sequence(name, n) for name, domain in mixture.domains.items() for n in range(domain.sequences)]


def test_one_pass_gives_every_token_once(tokens: Tokens):
    """The sequences of one pass are the documents end to end, in an order of the seed's, but for a shorter rest."""
    mixture = Mixture(tokens, "train", by=None, length=LENGTH, seed=3)
    ids = np.concatenate([ids for ids, _ in everything(mixture)])
    found = [tuple(piece) for piece in np.split(ids, np.flatnonzero(ids == 0)[1:])]
    array = tokens.array("train")
    wanted = {tuple(array[row.begin : row.end]): row.id for row in tokens.rows if row.split == "train"}
    assert all(piece in wanted for piece in found[:-1])
    assert Counter(found[:-1]).most_common(1)[0][1] == 1
    assert len(wanted) - len(found) <= 2
    other = Mixture(tokens, "train", by=None, length=LENGTH, seed=4)
    assert not np.array_equal(np.concatenate([ids for ids, _ in everything(other)]), ids)


def test_prompts_are_read_and_not_learnt(tokens: Tokens):
    """A pair's prompt has the label that the loss leaves out, also where it is cut in two; all else has its own id."""
    mixture = Mixture(tokens, "train", by="source", length=7, seed=0)
    ids, labels = (np.concatenate(arrays) for arrays in zip(*everything(mixture), strict=True))
    assert np.array_equal(ids[labels != IGNORED], labels[labels != IGNORED])
    domain = mixture.domains["pairs"]
    ids, labels = (
        np.concatenate(a) for a in zip(*[mixture.sequence("pairs", n) for n in range(domain.sequences)], strict=True)
    )
    by_text = {
        tokens.tokenizer.decode(tokens.array("train")[row.begin + 1 : row.end]): row.prompt
        for row in tokens.rows
        if row.split == "train"
    }
    starts = np.flatnonzero(ids == 0)
    for begin, end in itertools.pairwise(starts):
        prompt = by_text[tokens.tokenizer.decode(ids[begin + 1 : end])]
        hidden = np.flatnonzero(labels[begin:end] == IGNORED)
        assert prompt > 0
        assert np.array_equal(hidden, np.arange(1, prompt + 1))


def test_a_sequence_with_nothing_to_learn_is_left_out():
    """A sequence that lies within a prompt would have no loss but not-a-number; its first token's label is no help."""
    domain = Domain(np.array([0]), np.array([11]), np.array([30]), length=5, seed=0)
    assert [domain.teaches(index) for index in range(6)] == [False, False, True, True, True, True]
    within = Domain(np.array([0]), np.array([9]), np.array([15]), length=5, seed=0)
    # Tokens 1 to 9 are the prompt: the second sequence is prompt alone, the third begins to learn at its second token.
    assert [within.teaches(index) for index in range(3)] == [False, False, True]


def test_a_second_pass_has_another_order(tokens: Tokens):
    """When a domain is used up it is laid out anew, in another order, and in the same one for the same seed."""
    mixture = Mixture(tokens, "train", by=None, length=LENGTH, seed=0)
    again = Mixture(tokens, "train", by=None, length=LENGTH, seed=0)
    count = mixture.domains["all"].sequences
    first, second = ([mixture.sequence("all", n)[0].tolist() for n in range(at, at + count)] for at in (0, count))
    assert first != second
    assert second == [again.sequence("all", n)[0].tolist() for n in range(count, 2 * count)]


def test_passes_are_laid_out_once(monkeypatch: pytest.MonkeyPatch):
    """Sequences of several passes in any order lay out each pass once, and are the same if none is kept."""
    ends = np.arange(1, 101) * 7
    domain, forgetful = (Domain(ends - 7, np.zeros(100, int), ends, length=50, seed=0) for _ in range(2))
    order = np.random.default_rng(0).permutation(3 * domain.sequences)
    permuted = []
    make = np.random.default_rng
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: permuted.append(seed) or make(seed))
        found = [domain.spans(int(index)) for index in order]
    assert sorted(permuted) == [[0, 0], [0, 1], [0, 2]]
    monkeypatch.setattr("training.data.KEPT_DOCUMENTS", 0)
    assert [forgetful.spans(int(index)) for index in order] == found


def test_rare_domains_count_three_times(tokens: Tokens):
    """With upsampling, a domain under 5 % of the tokens has three times its share against the large one."""
    mixture = Mixture(tokens, "train", by="source", length=LENGTH, seed=0)
    plain, raised = (mixture.natural_weights(upsample=upsample) for upsample in (False, True))
    assert plain["tiny"] < 0.05 < plain["large"]
    assert raised["tiny"] / raised["large"] == pytest.approx(3 * plain["tiny"] / plain["large"])
    for weights in (plain, raised):
        assert sum(weights.values()) == pytest.approx(1)


def test_a_mixture_is_drawn_as_it_is_given(tokens: Tokens):
    """Explicit weights decide how many sequences come from each domain, however large it is."""
    mixture = Mixture(tokens, "train", by="source", length=LENGTH, seed=0)
    weights = mixture.given_weights({"large": 1, "t*": 3})
    drawn = mixture.draw(400, weights)
    assert Counter(name for name, _ in drawn) == {"large": 100, "tiny": 300}
    assert len(drawn) == len(set(drawn)) == 400
    taught = {
        row.source for n, row in enumerate(r for r in tokens.rows if r.split == "train") if n in set(mixture.used())
    }
    assert taught == {"large", "tiny"}
    with pytest.raises(UsageError, match="'none' fits no domain"):
        mixture.given_weights({"none": 1})


def test_as_many_are_drawn_as_are_asked_for(tokens: Tokens):
    """Sequences without anything to learn are made up for, so that a run has the steps that its schedule counts on."""
    mixture = Mixture(tokens, "train", by="source", length=7, seed=0)
    domain = mixture.domains["pairs"]
    idle = sum(not domain.teaches(index) for index in range(domain.sequences))
    assert idle > 5
    drawn = mixture.draw(domain.sequences, {"pairs": 1.0})
    assert len(drawn) == domain.sequences
    assert all((mixture.sequence(*each)[1][1:] != IGNORED).any() for each in drawn)


def test_a_domain_of_prompts_alone_is_an_error(tokens: Tokens):
    """A domain without anything to learn cannot fill its share, and is named."""
    mixture = Mixture(tokens, "train", by=None, length=5, seed=0)
    mixture.domains["all"] = Domain(np.array([0]), np.array([30]), np.array([31]), length=5, seed=0)
    with pytest.raises(UsageError, match="'all' has nothing but prompts"):
        mixture.draw(1, {"all": 1.0})


def test_what_was_drawn_is_what_taught(tokens: Tokens):
    """The documents listed as teachers are exactly those with a token in a drawn sequence."""
    mixture = Mixture(tokens, "train", by=None, length=LENGTH, seed=0)
    drawn = mixture.draw(20, {"all": 1.0})
    spans = [span for _, index in drawn for span in mixture.domains["all"].spans(index)]
    rows = [row for row in tokens.rows if row.split == "train"]
    wanted = [n for n, row in enumerate(rows) if any(row.begin < end and begin < row.end for begin, end, *_ in spans)]
    assert mixture.used().tolist() == wanted
    assert mixture.documents(drawn) == [rows[number].id for number in wanted]
    assert 0 < len(wanted) < len(rows)


def test_reweighting_favours_what_goes_badly():
    """A weight is multiplied by exp(rate · loss) and scaled; an unmeasured domain is taken to be average."""
    weights = reweighted({"a": 0.5, "b": 0.25, "c": 0.25}, {"a": 1.0, "b": 3.0}, 0.5)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["b"] / weights["a"] == pytest.approx(0.5 * math.exp(0.5 * 2))
    assert weights["c"] / weights["a"] == pytest.approx(0.5 * math.exp(0.5 * 1))
    assert reweighted({"a": 0.4, "b": 0.6}, {}, 0.5) == {"a": 0.4, "b": 0.6}


def test_batches_are_tensors(tokens: Tokens):
    """What is drawn has the shape and type that a model takes."""
    mixture = Mixture(tokens, "train", by=None, length=LENGTH, seed=0)
    batch = mixture.batch(mixture.draw(2, {"all": 1.0}))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "input_ids": (torch.Size([2, LENGTH]), torch.int64),
        "labels": (torch.Size([2, LENGTH]), torch.int64),
    }
