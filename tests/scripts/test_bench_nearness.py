"""The bench's judge of neighbours: what is compared with FAISS, and that it sees a wrong distance."""

import numpy as np
import pytest

from datastore.control import ControlPlane
from datastore.queries import prepare


@pytest.fixture
def nearness(bench):
    """``scripts/bench/nearness.py``."""
    return bench("nearness")


@pytest.fixture
def plane() -> ControlPlane:
    """Of 16 centroids in 8 dimensions."""
    keys = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    return ControlPlane.fit(keys, [], lists=16)


def test_queries_between_two_lists_are_left_out(nearness, plane):
    """One that is as near to the last list that is read as to the next is not asked; all others are, in order."""
    queries = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)
    assert np.array_equal(nearness.decided(plane, queries, 1), queries)
    first, second = plane.centroids[0], plane.centroids[plane.nearest(plane.centroids[:1], 2)[0, 1]]
    with_middle = np.insert(queries, 20, (first + second) / 2, axis=0)
    assert np.array_equal(nearness.decided(plane, with_middle, 1), queries)
    assert len(nearness.decided(plane, with_middle, 16)) == 51


def test_a_distance_that_is_off_by_more_than_its_query_was_moved_is_wrong(nearness, plane):
    """What rounding does to a query is allowed, and not much more."""
    queries = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    moved = np.linalg.norm(prepare(plane.codes, queries, "l2").keys - queries, axis=1).max()
    judge, true = nearness.as_near(plane.codes, queries), np.full((5, 3), 4.0)
    assert 0 < moved < 0.01
    assert judge({"FAISS": true, "ours": (2 + np.full_like(true, moved)) ** 2}) == ""
    wrong = true.copy()
    wrong[3, 1] = (2 + moved + 0.01) ** 2
    assert "(at 3, 1; 1 differ)" in judge({"FAISS": true, "ours": wrong})
