"""What a study is made on: given weights are used as they were made."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from eval.perplexity import fit_combinations, score
from eval.studies.subject import Subject
from silo.errors import UsageError
from silo.files import write_json
from silo.nearest import Nearest


def test_neighbours_are_looked_up_as_given_weights_say(subject, place, tmp_path):
    """A file of weights that two neighbours were fitted with makes a study of two neighbours; fitting, of the usual."""
    two = Nearest(k=2)
    mixture = subject.store.mixture(subject.model, subject.methods, nearest=two)
    fitted = fit_combinations(score(mixture, subject.texts(subject.validation)), subject.methods)
    assert [each.nearest for each in fitted.values()] == [None, two, None, two]
    write_json(tmp_path / "w.json", {"mixtures": {name: each.to_json() for name, each in fitted.items()}})
    given = Subject.open(
        place / "model", place / "store", subject.methods, [place / "test.jsonl"], weights=tmp_path / "w.json"
    )
    assert given.mixture().nearest == two
    assert given.weighings(given.mixture()) == fitted
    assert subject.mixture().nearest == Nearest()


def test_given_weights_were_not_fitted_on_the_test_text(subject, place, tmp_path):
    """Weights that name a document of the test text are refused; ``gate`` is the store's own, which there is not."""
    mixture = subject.mixture()
    fitted = fit_combinations(score(mixture, subject.texts(subject.validation)), subject.methods)
    weights = {"mixtures": {name: each.to_json() for name, each in fitted.items()}}
    files = (place / "model", place / "store", subject.methods, [place / "test.jsonl"])
    for texts, refused in (([subject.validation[0].content_hash], False), ([subject.test[0].content_hash], True)):
        write_json(tmp_path / "w.json", {**weights, "texts": texts})
        with pytest.raises(UsageError, match=r"w.json was fitted on text of --data") if refused else nullcontext():
            Subject.open(*files, weights=tmp_path / "w.json")
    with pytest.raises(UsageError, match="has no gate"):
        Subject.open(*files, weights=Path("gate"))
