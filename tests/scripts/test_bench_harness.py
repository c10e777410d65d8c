"""The bench's harness: turns, ratios, spreads and judges, by a clock that counts work instead of time."""

import json
import os
from pathlib import Path

import click
import pytest


@pytest.fixture(scope="module")
def harness(bench):
    """``scripts/bench/harness.py``."""
    return bench("harness")


class Workers:
    """Contestants that count what they do, and a clock that shows the count."""

    def __init__(self):
        self.done, self.order = 0, []

    def works(self, name, steps, times=1):
        """A contestant."""

        def call():
            self.order.append(name)
            for _ in range(times):
                given = 0
                for step in range(steps):
                    self.done += 1
                    given += step
            return [given]

        return call

    @property
    def clocks(self):
        """What :func:`compete` takes."""
        return {"wall": lambda: float(self.done)}


def test_a_peer_made_slower_changes_the_ratio_as_it_should(harness):
    """A peer that does all its work three times gives three times the ratio, and ours stays what it was."""
    workers = Workers()
    fair = {"ours": workers.works("ours", 100), "peer": workers.works("peer", 150)}
    before = harness.compete(fair, 5, clocks=workers.clocks)
    slower = fair | {"peer": workers.works("peer", 150, times=3)}
    after = harness.compete(slower, 5, clocks=workers.clocks)
    assert before.speed("ours", "peer") == (1.5, 1.5, 1.5)
    assert after.speed("ours", "peer") == (4.5, 4.5, 4.5)
    assert after.times("ours", "peer").value == pytest.approx(1 / 4.5)
    assert before.taken("ours") == after.taken("ours") == (100, 100, 100)


def test_a_contestant_that_does_more_units_is_not_slower_for_it(harness):
    """Rates and ratios are those of a unit of work."""
    workers = Workers()
    contest = harness.compete(
        {"ours": workers.works("ours", 400), "peer": workers.works("peer", 50)},
        3,
        units={"ours": 8, "peer": 1},
        clocks=workers.clocks,
    )
    assert contest.speed("ours", "peer").value == 1
    assert contest.rate("ours").value == pytest.approx(1 / 50)


def test_contestants_take_turns_and_then_the_other_way_round(harness):
    """Neither always comes after the other; the first round is not counted."""
    workers = Workers()
    both = {name: workers.works(name, 1) for name in "ab"}
    contest = harness.compete(both, 3, clocks=workers.clocks)
    assert "".join(workers.order) == "baabbaab"
    assert len(contest.seconds["wall"]["a"]) == 3


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_a_wrong_result_from_either_side_stops_the_run(harness, wrong):
    """The run ends with one line that names who differs and where, in whatever round it happens; no number is told."""
    given = iter([[1.0, 2.0]] * 3 + [[1.0, 2.5]])  # wrong in the fourth round only
    calls = {name: lambda: [1.0, 2.0] for name in ("ours", "peer")} | {wrong: lambda: next(given)}
    with pytest.raises(harness.WrongResult) as stopped:
        harness.compete(calls, 5, judge=harness.alike(1e-6))
    assert stopped.value.exit_code == 1
    (line,) = stopped.value.message.splitlines()
    assert line.startswith("round 3: peer gave ")
    assert "2.5" in line
    assert "(at 1; 1 differ)" in line


def test_results_of_another_shape_are_wrong(harness):
    """A contestant that answers fewer questions does not win."""
    assert "peer gave (1,) numbers and ours (2,)" in harness.alike()({"ours": [1, 2], "peer": [1]})
    assert harness.alike()({"ours": [1, float("inf")], "peer": [1, float("inf")]}) == ""
    assert harness.alike(0.1)({"ours": [1.0], "peer": [1.05]}) == ""
    assert harness.alike(0.01)({"ours": [1.0], "peer": [1.05]}) != ""


def test_the_spread_is_that_of_the_rounds(harness):
    """The median with quartiles, which go no further than what was measured."""
    assert harness.Measured.of([4, 1, 3, 2, 5]) == (3, 1.5, 4.5)
    assert harness.Measured.of([3, 1, 2]) == (2, 1, 3)
    assert harness.Measured.of([1, 2]) == (1.5, 1, 2)
    assert harness.Measured.of([7]) == (7, 7, 7)


def test_ratios_are_taken_within_a_round(harness):
    """Weather that both contestants meet alike cancels out."""
    rounds = {"ours": [1.0, 10.0, 2.0], "peer": [2.0, 20.0, 3.0]}  # of the medians: 3 / 2
    assert harness.Contest({"wall": rounds}).speed("ours", "peer") == (2, 1.5, 2)


def test_how_a_cost_grows(harness):
    """A square law has the exponent 2, a constant 0, and rounds that differ a spread."""
    sizes = [1, 10, 100]
    assert harness.exponent(sizes, [[3, 300, 30000]]).value == pytest.approx(2)
    assert harness.exponent(sizes, [[5, 5, 5]]).value == pytest.approx(0)
    spread = harness.exponent(sizes, [[1, 10, 100], [1, 100, 10000], [1, 1, 1]])
    assert [round(each, 6) for each in spread] == [1, 0, 2]


def test_bytes_that_are_read_and_written_are_counted(harness, tmp_path):
    """A file of a million bytes, written and read, is two million bytes moved, and little besides."""
    with harness.moved() as total:
        (tmp_path / "file").write_bytes(bytes(1_000_000))
        (tmp_path / "file").read_bytes()
    assert 2_000_000 <= total[0] < 2_200_000


def test_measured_numbers_are_told_as_numbers(harness):
    """JSON has a median and its spread as a list."""
    assert json.loads(json.dumps({"rate": harness.Measured(2.0, 1.0, 3.0)})) == {"rate": [2.0, 1.0, 3.0]}


def test_stdout_belongs_to_the_document(harness, capfd):
    """What a peer prints, from Python or below it, goes to stderr, and stdout is one JSON document."""

    @click.command()
    @harness.subject
    def chatty():
        """A subject with a peer that talks."""
        print("from Python", flush=True)
        os.write(1, b"from below\n")
        return {"result": {"rate": harness.Measured(2.0, 1.0, 3.0)}}

    chatty.main([], standalone_mode=False)
    out, err = capfd.readouterr()
    record = json.loads(out)
    assert record["result"] == {"rate": [2.0, 1.0, 3.0]}
    assert set(record) == {"machine", "command", "commit", "date", "spread", "result"}
    assert "from Python" in err
    assert "from below" in err


def test_a_run_is_checked_when_it_is_asked_to_be(harness, tmp_path, capfd):
    """``--check`` prints the new run all the same, and refuses to compare it with another subject's."""

    @click.command()
    @harness.subject
    def it():
        """A subject."""
        return {"result": {}}

    recorded = Path(__file__).resolve().parents[2] / "scripts" / "results" / "store.json"
    with pytest.raises(click.ClickException, match="cannot be compared: subject was store"):
        it.main(["--check", str(recorded)], standalone_mode=False)
    assert json.loads(capfd.readouterr().out)["result"] == {}
