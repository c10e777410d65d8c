"""Benches run again, on another day or on another processor: what is said of them and what is refused."""

import copy
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "scripts" / "results"


@pytest.fixture
def render(script):
    """The module under test."""
    return script("render_repeated")


@pytest.fixture
def store():
    """The recorded run of the store's bench."""
    return json.loads((RESULTS / "store.json").read_text())


@pytest.fixture
def second(store):
    """The same on another day, had neighbours over 200 owners taken twice the time."""
    changed = copy.deepcopy(store) | {"date": "2026-11-27", "commit": "f" * 40}
    found = changed["result"]["neighbours"]
    found["ratio_to_merged"]["200"] /= 2
    found["spread"]["200"] = [each / 2 for each in found["spread"]["200"]]
    return changed


def on_another(record):
    """The same run on a processor of another name, with the weights that were trained there."""
    changed = copy.deepcopy(record) | {"model": "00ff"}
    changed["machine"] |= {"cpu": "Another", "vectors": "AVX2"}
    return changed


def test_another_day(render, store, second):
    """Each ratio says whether both runs agree within their spreads, and each run its day and commit."""
    told = render.another_day({"store": store}, {"store": second}, {})
    assert "11 of 12 ratios agree" in told
    assert "and 2026-11-27 at `ffffffff`" in told
    (worse,) = (line for line in told.splitlines() if line.endswith("| worse |"))
    assert worse.startswith("| store | neighbours, 200 owners / speed of one FAISS index | ")


def test_one_round_is_no_second_run(render, store, second):
    """A ratio without a spread is neither equal nor worse."""
    found = second["result"]["neighbours"]
    found["spread"]["200"] = 2 * [found["ratio_to_merged"]["200"]]
    told = render.another_day({"store": store}, {"store": second}, {})
    assert "11 of 12 ratios agree" in told
    assert sum(line.endswith("| of one round |") for line in told.splitlines()) == 1


def test_another_day_is_of_the_same_work(render, store):
    """A run with another seed is no second run, and neither is one on another processor."""
    with pytest.raises(ValueError, match="store was repeated with something else: seed was 0 and is 1"):
        render.another_day({"store": store}, {"store": store | {"seed": 1}}, {})
    with pytest.raises(ValueError, match=r"store was repeated with something else: cpu was .* and is Another"):
        render.another_day({"store": store}, {"store": on_another(store)}, {})


def test_another_day_elsewhere(render, store, second):
    """A second run is compared with the first of its own processor, which may be the one elsewhere."""
    first = on_another(second)
    told = render.another_day({"store": store}, {"store": first | {"date": "2026-11-28"}}, {"store": first})
    assert "12 of 12 ratios agree" in told
    assert "2026-11-28 at `ffffffff`, Another with AVX2" in told


def test_another_processor(render, store, second):
    """Machine and weights may be others, work may not."""
    told = render.another_processor({"store": store}, {"store": on_another(second)})
    assert "11 of 12 agree" in told
    assert "and Another with AVX2, 2026-11-27" in told
    assert sum(line.endswith("| worse |") for line in told.splitlines()) == 1
    other = store | {"command": store["command"] + " --tokens 5"}
    with pytest.raises(ValueError, match="store was other work elsewhere: options was"):
        render.another_processor({"store": store}, {"store": on_another(other)})
