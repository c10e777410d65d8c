"""What a recorded number comes with: a run that goes on in a directory is of what that was begun with."""

import json

import click
import pyarrow as pa
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
    """What was trained with fewer steps, at another rate, from another shape or other text is not read as what is asked
    for."""
    run_of, corpus = tmp_path / "run", tmp_path / "corpus"
    for each in (run_of, corpus):
        each.mkdir()
    (corpus / "manifest.json").write_text("{}")
    (run_of / "run.json").write_text(json.dumps({"val": 1.5}))
    asked = {"batch_size": 2, "sequence_length": 8, "token_budget": 64, "seed": 0, "learning_rate": 0.1}
    asked |= {"model": {"peer_num_experts": 16}, "corpus": corpus}

    def run(**changed):
        return script("experiment").run_once(run_of, asked | changed, {}, 1, print)

    assert run() == run() == {"val": 1.5}
    shape = {"peer_num_experts": 64}
    for changed in ({"token_budget": 128}, {"learning_rate": 0.2}, {"seed": 1}, {"model": shape}, {"batch_size": 1}):
        with pytest.raises(click.ClickException, match=r"was begun with .*; give another directory"):
            run(**changed)
    (corpus / "manifest.json").write_text('{"other": "text"}')
    with pytest.raises(click.ClickException, match=r"was begun with .*; give another directory"):
        run()


def test_text_of_other_files_is_not_taken_for_these(script, tmp_path, monkeypatch):
    """Split text that is there is of the same files, or refused."""
    experiment = script("experiment")
    monkeypatch.setattr(experiment, "collect", lambda *args, **kwargs: None)
    files = []
    for name in ("a", "b"):
        row = {"id": name, "text": name * 50, "license": "MIT", "owner": "Ada", "split": "train"}
        with pa.output_stream(str(tmp_path / f"{name}.jsonl.zst"), compression="zstd") as stream:
            stream.write(json.dumps(row).encode() + b"\n")
        files.append(tmp_path / f"{name}.jsonl.zst")
    assert experiment.prepare(files[:1], tmp_path / "out") == experiment.prepare(files[:1], tmp_path / "out")
    with pytest.raises(click.ClickException, match="was begun with"):
        experiment.prepare(files[1:], tmp_path / "out")
