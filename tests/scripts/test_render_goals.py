"""What was wanted: every goal is told once, and whatever was missed has its reason."""

import copy

import pytest


@pytest.fixture
def records(script):
    """The recorded runs."""
    return script("render_results").read_records()


def lines(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith("| ")][1:]


def test_every_goal_is_told_with_its_number(script, records):
    """A line for each ratio by the clock that had a goal, as reached as its number says, and for the experiments."""
    ratios = script("bench.ratios").ratios
    told = script("render_goals").goals(records)
    for name, record in records.items():
        if name in ("reference", "large_ngram_smollm2", "attribution"):
            assert any(line.startswith(f"| {name} |") for line in lines(told))
        for each in ratios(record, name):
            if each.goal is not None and each.clock == "wall" and "windows a call" not in each.what:
                (line,) = (
                    one for one in lines(told) if f"| {name} | {each.what} / " in one and f"{each.peer} |" in one
                )
                assert line.endswith("| yes |") == bool(each.reached)
    yes = sum(line.endswith("| yes |") for line in lines(told))
    assert f"\n{yes} of {len(lines(told))} numbers" in told


def test_a_goal_that_is_missed_without_a_reason_is_found_out(script, records):
    """A number that falls short for the first time stops the rendering until someone has said why."""
    worse = copy.deepcopy(records)
    worse["attribution"]["result"]["correlation"]["left"] = 0.5
    with pytest.raises(KeyError, match=r"attribution has missed .*WHY does not say why"):
        script("render_goals").goals(worse)


def test_an_experiments_goal_is_one_of_every_domain(script, records):
    """One domain above the bound, and it is not reached; the range and the count say so."""
    goals, worse = script("render_goals").goals, copy.deepcopy(records)
    ratios = worse["reference"]["result"]["ratios"]
    for of in ratios.values():
        of["c / d"] = 1.0
    assert "| reference | c / d / restricted domains | ≤ 1.05 | 1.000 to 1.000, reached on 5 of 5 | yes |" in goals(
        worse
    )
    next(of for of in ratios.values() if not of["permissive"])["c / d"] = 1.2
    assert "| 1.000 to 1.200, reached on 4 of 5 | no: " in goals(worse)
