"""What a study is made on: given weights are used as they were made."""

from eval.perplexity import fit_combinations, score
from eval.studies.subject import Subject
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
