"""Zero-shot choices: three scorings side by side, and none that hangs on the order in which options are listed."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from click.testing import CliRunner

from eval.continuations import Pair, score_pairs
from eval.zero_shot import Question, orders, read_task, score_task, summary
from silo.cli import main
from silo.errors import DataError, UsageError
from silo.mixture import Mixture
from silo.weights import Weights

ALONE = {"lm": Weights({"lm": 1.0})}
OPTIONS = ("import os", "return", "class")
LISTED = Question("Choose one of\n{options}\nA line of Python begins with:", OPTIONS, 1, "begins with:")
PLAIN = replace(LISTED, context="def main():\n    x = 1\n   ", answer=0)


def ids(model, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def log_p(model, context: str, option: str) -> float:
    [found] = score_pairs(Mixture(model), ALONE, [Pair(ids(model, context), ids(model, option))])
    return found["lm"].log_probability


def test_scores_are_what_they_are_called(model):
    """Each scoring of each option is its formula: the mean over all orders, a byte of it, and less the domain's."""
    scores = score_task(Mixture(model), ALONE, [LISTED, PLAIN])["lm"]
    contexts = [LISTED.context.replace("{options}", "\n".join(order)) for order in permutations(OPTIONS)]
    for number, option in enumerate(OPTIONS):
        plain = np.mean([log_p(model, context, f" {option}") for context in contexts])
        assert scores["plain"][0][number] == pytest.approx(plain)
        assert scores["normalised"][0][number] == pytest.approx(plain / len(option))
        assert scores["pmi"][0][number] == pytest.approx(plain - log_p(model, "begins with:", f" {option}"))
        assert scores["plain"][1][number] == pytest.approx(log_p(model, PLAIN.context, option))


@pytest.mark.parametrize("options", [OPTIONS, (*OPTIONS, "with", "assert")])
def test_the_order_of_options_changes_no_score(model, options):
    """However a file orders its options, each has the same scores, though a single order would score it otherwise."""
    one = replace(LISTED, options=options)
    other = replace(one, options=options[::-1])
    first, second = (score_task(Mixture(model), ALONE, [each])["lm"] for each in (one, other))
    for scoring in first:
        assert first[scoring][0].tolist() == second[scoring][0].tolist()[::-1]
    single = [log_p(model, context, " return") for context in one.contexts()]
    assert max(single) - min(single) > 1e-5


def test_every_option_has_every_place_once():
    """Of many options there are as many orders, in which each stands at each place; of few, all orders."""
    many = orders(list("fbdace"))
    assert len(many) == 6
    assert [sorted(place) for place in zip(*many, strict=True)] == [list("abcdef")] * 6
    assert sorted(orders(OPTIONS)) == sorted(permutations(OPTIONS))
    assert LISTED.contexts() != PLAIN.contexts() == [PLAIN.context]


def test_a_context_that_says_nothing_gives_chance(model):
    """If the domain prompt is the whole context, PMI knows nothing, and ties count as the share of the tied."""
    idle = replace(PLAIN, context="begins with:")
    found = summary([idle, idle], score_task(Mixture(model), ALONE, [idle, idle]))
    by_scoring = {row["scoring"]: row["accuracy"][0] for row in found["rows"]}
    assert by_scoring["pmi"] == pytest.approx(1 / 3) == found["chance"]
    assert by_scoring["plain"] in (0.0, 1.0)
    assert found["orders"] == {"1": 2}


@pytest.fixture
def files(documents, make_store, model, tmp_path):
    """A store, and a task whose right options are how its documents go on."""
    texts = [replace(each, text=each.text[700:1300]) for each in documents if len(each.text) >= 1300]
    make_store("store", texts)
    lines = []
    for number, each in enumerate(texts):
        cut = each.text.index(" ", 200)
        options = [texts[number - 1].text[cut + 1 : cut + 30], each.text[cut + 1 : cut + 30]]
        lines.append({"context": each.text[:cut], "options": options, "answer": 1 if number % 2 else options[1]})
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, tmp_path / "store"


def test_the_command_compares_model_and_mixture(files, model_dir):
    """Model alone and mixture stand side by side with intervals; knowing the text, the mixture is right more often."""
    path, store = files
    asked = ["eval", "zero-shot", str(model_dir), str(path), "--store", str(store), "--domain-prompt", "\n"]
    weights = path.with_name("weights.json")
    weights.write_text('{"knn": 0.2, "ngram": 0.6, "temperature": 4}')
    result = CliRunner().invoke(main, [*asked, "--weights", str(weights), "--json"])
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    found = {(row["mixture"], row["scoring"]): row["accuracy"] for row in value["rows"]}
    assert list(found) == [(m, s) for m in ("lm", "lm+knn+ngram") for s in ("plain", "normalised", "pmi")]
    for scoring in ("plain", "normalised", "pmi"):
        assert found["lm+knn+ngram", scoring][0] > found["lm", scoring][0]
        assert found["lm", scoring][1] <= found["lm", scoring][0] <= found["lm", scoring][2]
    assert value["chance"] == 0.5
    shown = CliRunner().invoke(main, [*asked, "--weights", str(weights)])
    assert "means over 1 order of the options" in " ".join(shown.output.split())
    refused = CliRunner().invoke(main, [*asked])
    assert refused.exit_code == UsageError.exit_code
    assert "a store without weights" in refused.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"context": "a"}', "expected a JSON object with context, options and answer"),
        ('{"context": "a", "options": ["x", "x"], "answer": 0}', "none empty or named twice"),
        ('{"context": "a", "options": ["x", "y"], "answer": 2}', "has the answer 2"),
        ('{"context": "a", "options": ["x", "y"], "answer": true}', "has the answer True"),
        ('{"context": "a", "options": ["x", "y"], "answer": "y"}', "no domain_prompt"),
        ("", "0 questions"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, said):
    """What cannot be asked is an error that names the line and says what is missing."""
    path = tmp_path / "task.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=said):
        read_task(path)
