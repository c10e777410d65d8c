"""Copied passages and near-duplicates: what is found, what is not, and that order and memory do not matter."""

import random
from pathlib import Path

import numpy as np
import pytest

import silo.overlap
from silo.overlap import Overlap, Passage, Role, batches, similarity
from silo.shingles import SHINGLE_WORDS
from silo.sources import open_source

WORDS = [f"word{n}" for n in range(5000)]


def text(seed: int, length: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def compared(directory: Path, documents: list[tuple[str, Role]], ranks: list[int] | None = None) -> Overlap:
    overlap = Overlap(directory)
    for batch in batches([words.encode() for words, _ in documents], size=5000):
        overlap.add(batch)
    overlap.compare(np.array([role for _, role in documents]), np.array(ranks or range(len(documents))))
    return overlap


def test_a_copied_passage_is_found_where_it_is(tmp_path: Path):
    """Sixty words of a restricted document within a permissive one: their place, their number, and whose they are."""
    restricted, clean = text(1, 300), text(2, 500)
    planted = clean[:200] + restricted[100:160] + clean[200:]
    documents = [
        (" ".join(text(3, 300)), Role.RESTRICTED),
        (" ".join(restricted), Role.RESTRICTED),
        (" ".join(clean), Role.TRAINING),
        (" ".join(planted), Role.TRAINING),
    ]
    found = dict(compared(tmp_path / "x", documents).passages())
    assert found == {3: [Passage(Role.RESTRICTED, 200, 260, 60, 1)]}


def test_an_edited_passage_is_one_passage(tmp_path: Path):
    """Every fourteenth word replaced, and case, punctuation and lines changed, a passage is found as one."""
    restricted, clean = text(1, 300), text(2, 400)
    copied = [word.upper() + "," if n % 3 else word for n, word in enumerate(restricted[:200])]
    copied[13::14] = ["edited"] * len(copied[13::14])
    planted = "\n".join(clean[:100] + copied + clean[100:])
    found = dict(
        compared(tmp_path / "x", [(" ".join(restricted), Role.RESTRICTED), (planted, Role.TRAINING)]).passages()
    )
    (passage,) = found[1]
    assert 100 <= passage.begin < 105
    assert 290 < passage.end <= 300
    assert passage.words > 150


@pytest.mark.parametrize("shared", ["a phrase that everybody has used at some time", " ".join(["0"] * 300)])
def test_a_phrase_and_a_row_of_zeros_are_no_passage(tmp_path: Path, shared):
    """One common phrase, or any length of the same word, is not copied text."""
    documents = [
        (f"{' '.join(text(n, 200))} {shared} {' '.join(text(n + 9, 200))}", role) for n, role in enumerate(Role)
    ]
    assert list(compared(tmp_path / "x", documents).passages()) == []


def test_training_text_is_compared_with_held_out_text(tmp_path: Path):
    """A passage that both have is found in the training document, and not in the held-out one."""
    held, own = text(1, 100), text(2, 200)
    documents = [(" ".join(own + held), Role.TRAINING), (" ".join(held), Role.EVALUATION)]
    found = dict(compared(tmp_path / "x", documents).passages())
    assert found == {0: [Passage(Role.EVALUATION, 200, 300, 100, 1)]}


def test_what_many_permissive_documents_have_is_common_property(tmp_path: Path):
    """A header in a dozen permissive documents is not copied from evaluation text, and is from restricted text."""
    header = " ".join(text(7, 80))
    documents = [(f"{header} {' '.join(text(n + 100, 200))}", Role.TRAINING) for n in range(12)]
    assert list(compared(tmp_path / "x", [*documents, (header, Role.EVALUATION)]).passages()) == []
    assert len(list(compared(tmp_path / "y", [*documents, (header, Role.RESTRICTED)]).passages())) == 12


def test_a_document_that_repeats_itself_makes_nothing_common(tmp_path: Path):
    """A held-out passage that one document has a dozen times is found in it, and in another that has it once."""
    held = " ".join(text(7, 80))
    once, often = f"{held} {' '.join(text(8, 200))}", "\n\n".join([held] * 12)
    documents = [(once, Role.TRAINING), (often, Role.TRAINING), (held, Role.EVALUATION)]
    assert {number for number, _ in compared(tmp_path / "x", documents).passages()} == {0, 1}


def test_the_lowest_rank_is_named_and_kept(tmp_path: Path):
    """Of several that share a text the one of the lowest rank is named, in whatever order they came."""
    shared = " ".join(text(1, 400))
    documents = [(shared, Role.RESTRICTED), (shared, Role.RESTRICTED), (shared, Role.TRAINING), (shared, Role.TRAINING)]
    for ranks in ([0, 1, 2, 3], [3, 2, 1, 0]):
        overlap = compared(tmp_path / str(ranks[0]), documents, ranks)
        best = min((0, 1), key=lambda number: ranks[number])
        assert {passage.other for _, passages in overlap.passages() for passage in passages} == {best}
        keep = min((2, 3), key=lambda number: ranks[number])
        assert list(overlap.similar()) == [(5 - keep, keep)]


def test_near_duplicates_are_proposed_and_confirmed(tmp_path: Path):
    """A document with a word in fifty changed is a near-duplicate, one that shares a quarter is not."""
    one = text(1, 2000)
    other = ["new" if n % 50 == 25 else word for n, word in enumerate(one)]
    quarter = one[:500] + text(2, 1500)
    documents = [(" ".join(words), Role.TRAINING) for words in (one, other, quarter)]
    overlap = compared(tmp_path / "x", documents)
    proposed = list(overlap.similar())
    assert (1, 0) in proposed
    similar = [similarity(*(documents[number][0].encode() for number in pair)) for pair in ((1, 0), (2, 0))]
    assert similar[0] == pytest.approx(1 / (1 + 2 * SHINGLE_WORDS / (50 - SHINGLE_WORDS)), abs=0.02)
    assert similar[1] < 0.2


def test_bounded_memory_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With buffers and joins of a few hundred records the result is that of large ones, on real files."""
    files = [document.text for document in open_source("python:click")]
    documents = [(text, Role.RESTRICTED if n % 3 == 0 else Role.TRAINING) for n, text in enumerate(files)]
    documents += [(files[0] + files[1], Role.TRAINING), (files[1] + "\n# the same, nearly\n", Role.TRAINING)]
    large = compared(tmp_path / "large", documents)
    monkeypatch.setattr(silo.overlap, "_BUFFERED", 500)
    monkeypatch.setattr(silo.overlap, "_JOINED", 300)
    small = compared(tmp_path / "small", documents)
    found = [(sorted(overlap.passages()), sorted(overlap.similar())) for overlap in (large, small)]
    assert found[0] == found[1]
    assert found[0][0]
    assert found[0][1]
    assert not [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
