"""What a recorded number comes with: a run that goes on in a directory is of what that was begun with."""

import json

import click
import pytest


def test_a_run_of_something_else_does_not_go_on(script, tmp_path):
    """Other sizes or data in the same directory are refused, and what it was begun with stays noted."""
    goes_on = script("recording").require_same_run
    for _ in range(2):
        goes_on(tmp_path, {"data": "a", "sizes": [1, 2]})
    for other in ({"data": "a", "sizes": [1, 3]}, {"data": "b", "sizes": [1, 2]}):
        with pytest.raises(click.ClickException, match=r"was begun with .*; give another directory"):
            goes_on(tmp_path, other)
    goes_on(tmp_path, {"data": "a", "sizes": [1, 2]})


def test_a_finished_training_is_not_told_as_another(script, tmp_path):
    """What was trained with fewer steps or another rate is not read as what is asked for."""
    done = {"seed": 0, "learning_rate": 0.1, "expert_learning_rate": None, "steps": 4, "val": 1.5}
    (tmp_path / "run.json").write_text(json.dumps(done))
    asked = {"batch_size": 2, "sequence_length": 8, "token_budget": 64} | done

    def run(**changed):
        return script("experiment").run_once(tmp_path, asked | changed, {}, 1, print)

    assert run() == done
    for changed in ({"token_budget": 128}, {"learning_rate": 0.2}, {"seed": 1}):
        with pytest.raises(click.ClickException, match=r"has a run of .*; give another directory"):
            run(**changed)
