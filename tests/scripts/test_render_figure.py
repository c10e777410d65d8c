"""The figure of ratios: what is drawn, from the recorded runs and from altered ones."""

import copy
import xml.etree.ElementTree as ElementTree

import pytest


@pytest.fixture(scope="module")
def records(script):
    """The recorded runs."""
    return script("render_results").read_records()


def texts(svg):
    """All that the figure says."""
    return [each.text for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_ratio_is_drawn_once(script, records):
    """Each row has its name, its number and one mark, in a figure that is well-formed and wide enough."""
    figure = script("render_figure")
    svg = figure.figure(records)
    drawn = [each for _, kept in figure.rows(records) for each in kept]
    labels = [f"{each.what} / {each.peer}" for each in drawn]
    assert len(drawn) > 10
    assert [text for text in texts(svg) if " / " in text] == labels
    assert [text for text in texts(svg) if text.endswith(" ×")] == [f"{each.speed.value:.3g} ×" for each in drawn]
    assert svg.count("<circle") + svg.count("<polygon") == len(drawn)
    assert max(map(len, labels)) <= 68


def test_a_goal_that_is_missed_is_hollow(script, records):
    """A ratio below its goal is drawn as a ring, one that reaches it as a disc."""
    figure = script("render_figure").figure
    worse = copy.deepcopy(records)
    found = worse["store"]["result"]["neighbours"]
    assert found["ratio_to_merged"]["200"] > 0.8
    found["ratio_to_merged"]["200"], found["spread"]["200"] = 0.5, [0.4, 0.6]
    assert figure(worse).count('fill="white" stroke') == figure(records).count('fill="white" stroke') + 1


def test_times_are_drawn_as_speeds(script):
    """A time of twice the peer's stands at half its speed, and its spread is turned round."""
    ratios = script("bench.ratios")
    ratio = ratios.Ratio("a", "b", ratios.Measured(2.0, 1.0, 4.0), "lower", goal=2.5)
    assert ratio.speed == (0.5, 0.25, 1.0)
    assert ratio.reached
    assert not ratio._replace(goal=1.9).reached


def test_beyond_the_axis_is_at_its_end(script):
    """A ratio that no axis holds is drawn at the end, not outside."""
    figure = script("render_figure")
    assert figure._x(1e9) == figure._x(figure.HIGH) == figure.WIDTH - figure.RIGHT
    assert figure._x(1e-9) == figure.LEFT
