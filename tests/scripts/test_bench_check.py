"""``--check`` and ``compare``: what got worse, what cannot be compared, and how the recorded runs are read."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "scripts" / "results").glob("*.json"))


def read(name):
    return json.loads((ROOT / "scripts" / "results" / f"{name}.json").read_text())


@pytest.fixture
def store():
    """The recorded run of the store's bench, with the width of vectors, which the oldest do not have."""
    record = read("store")
    record["machine"].setdefault("vectors", "AVX2")
    return record


def slower(record, factor):
    """The same run, had neighbours over 200 owners taken so many times the time."""
    changed = copy.deepcopy(record)
    found = changed["result"]["neighbours"]
    found["ratio_to_merged"]["200"] /= factor
    found["spread"]["200"] = [each / factor for each in found["spread"]["200"]]
    return changed


def test_a_run_is_equal_to_itself(bench, store):
    """Nothing got worse or better, and everything was compared."""
    found = bench("check").compare(store, store)
    assert (found.worse, found.better, found.apart) == ([], [], [])
    assert len(found.equal) == len(bench("ratios").ratios(store)) == 12


def test_what_got_worse_is_named(bench, store, capsys):
    """A search that takes twice the time is named with both numbers, alone, and ends the program with status 1."""
    with pytest.raises(SystemExit) as ended:
        bench("check").settle(store, slower(store, 2))
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    (worse,) = (line for line in said if line.startswith("worse: "))
    was = store["result"]["neighbours"]["ratio_to_merged"]["200"]
    assert worse.startswith(f"worse: neighbours, 200 owners / speed of one FAISS index: {was / 2:.3g} (")
    assert f", was {was:.3g} (" in worse
    assert said[-1] == "1 worse, 0 better, 11 equal within their spread, 0 not compared"


def test_what_lies_within_the_spread_is_equal(bench, store, capsys):
    """A search that is slower by less than the spread of both runs is not called worse."""
    bench("check").settle(store, slower(store, 1.03))
    assert capsys.readouterr().err.splitlines()[-1].startswith("0 worse, 0 better, 12 equal")


def test_what_got_better_is_told_and_is_no_failure(bench, store, capsys):
    """A search in half the time is told, with status 0."""
    bench("check").settle(store, slower(store, 0.5))
    twice = 2 * store["result"]["neighbours"]["ratio_to_merged"]["200"]
    assert f"better: neighbours, 200 owners / speed of one FAISS index: {twice:.3g} (" in capsys.readouterr().err


def test_more_time_is_worse_where_a_time_was_measured(bench):
    """Of a ratio of times, the larger is the worse."""
    before = read("collect")
    after = copy.deepcopy(before)
    after["result"] |= {"ratio": 3.0, "ratio_spread": [2.9, 3.1]}
    assert bench("check").compare(before, after).worse
    assert bench("check").compare(after, before).better


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.update(data="00ff"), "data was "),
        (lambda record: record.update(model="00ff"), "model was "),
        (lambda record: record["machine"].update(cpu="another"), " and is another"),
        (lambda record: record["machine"].update(memory_bytes=2**33), " and is 8"),
        (lambda record: record["machine"].update(vectors="another"), "vectors was "),
        (lambda record: record.update(command=record["command"] + " --tokens 5"), "options was [] and is ['--tokens 5"),
        (lambda record: record.update(command="python scripts/bench ngram a.jsonl"), "subject was store and is ngram"),
    ],
)
def test_what_cannot_be_compared_is_refused(bench, store, change, said):
    """Runs of another machine, data, model, size or subject are not compared: one line says why, with status 2."""
    other = copy.deepcopy(store)
    change(other)
    with pytest.raises(click.ClickException) as refused:
        bench("check").settle(store, other)
    assert refused.value.exit_code == 2
    assert refused.value.message.startswith("the runs cannot be compared: ")
    assert said in refused.value.message


def test_what_changes_no_work_may_differ(bench, store, capsys):
    """Rounds, another commit, the script's new place and newer packages are no reason to refuse; the last are told."""
    other = copy.deepcopy(store)
    files = store["command"].split()[2:]
    other["command"] = " ".join(["python", "scripts/bench", "store", *files, "--rounds", "9", "--model", "model"])
    other |= {"commit": "another", "rounds": 9}
    was = store["machine"]["versions"]["faiss-cpu"]
    other["machine"]["versions"]["faiss-cpu"] = "99"
    bench("check").settle(store, other)
    assert capsys.readouterr().err.splitlines()[0] == f"note: faiss-cpu was {was} and is 99"


def test_one_round_has_no_spread(bench, store, capsys):
    """A ratio of one round is neither equal nor worse: nobody knows by how much it wavers."""
    other = slower(store, 2)
    other["result"]["neighbours"]["spread"]["200"] = 2 * [other["result"]["neighbours"]["ratio_to_merged"]["200"]]
    bench("check").settle(store, other)
    said = capsys.readouterr().err
    assert "not compared: neighbours, 200 owners / speed of one FAISS index: of one round" in said
    assert "11 equal within their spread, 1 not compared" in said


@pytest.mark.parametrize("typed", ["--rounds=9", "--check=store.json", "--check store.json --rounds 9"])
def test_options_may_be_typed_with_an_equals_sign(bench, store, typed):
    """What changes no work is no difference, however it is typed; what changes some is the same both ways."""
    check = bench("check")
    assert check.differences(store, store | {"command": f"{store['command']} {typed}"}) == []
    both = [store | {"command": f"{store['command']} --tokens{sign}5"} for sign in ("=", " ")]
    assert check.differences(*both) == []
    assert check.differences(store, both[0])


def test_what_only_one_run_has_is_told(bench, store, capsys):
    """A number without its like is not passed over in silence."""
    other = copy.deepcopy(store)
    del other["result"]["blocks"]["ratio_to_1"]["4"]
    bench("check").settle(store, other)
    said = capsys.readouterr().err
    assert "not compared: blocks, 4 owners / speed of one Lucene index: only in one of them" in said
    assert "11 equal within their spread, 1 not compared" in said


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_recorded_runs_are_read(bench, path):
    """Each recorded run of a subject with peers has ratios, under names of their own, within their own spread."""
    found = bench("ratios").ratios(json.loads(path.read_text()), path.stem)
    names = [each.name for each in found]
    assert len(names) == len(set(names))
    assert all(each.measured.low <= each.measured.value <= each.measured.high for each in found)
    assert bool(found) == (bench("ratios").subject_of(json.loads(path.read_text())) in bench("ratios").READERS)


def test_the_command_compares_two_files(tmp_path, store):
    """``compare`` says what got worse and ends with status 1, or 0 if nothing did."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(store))
    after.write_text(json.dumps(slower(store, 3)))
    for second, status in ((before, 0), (after, 1)):
        typed = [sys.executable, ROOT / "scripts" / "bench", "compare", before, second]
        done = subprocess.run(typed, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        assert ("worse: neighbours, 200 owners" in done.stderr) == bool(status)
