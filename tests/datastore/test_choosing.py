"""The compiled loops of a search beside the same in numpy."""

import numba
import numpy as np
import pytest
from numba.core import caching

from datastore.choosing import _ascending, _within, choose, compiled, look_up, nearest, nearest_centroids

K = 20


def values_of(rng, kind, count):
    """Distances as they come, and as they must not: all equal, of few kinds, far apart, below zero."""
    drawn = rng.normal(size=count).astype(np.float32)
    return {
        "usual": np.abs(drawn),
        "below zero": drawn,
        "equal": np.full(count, 3, np.float32),
        "few": np.rint(drawn),
        "far apart": (drawn * np.float32(10) ** rng.integers(-30, 30, count)).astype(np.float32),
        "one far": np.where(np.arange(count) == 5, np.float32(1e30), np.abs(drawn)),
    }[kind]


KINDS = ("usual", "below zero", "equal", "few", "far apart", "one far")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [K + 1, 100, 5000])
def test_k_are_within_and_few_more(kind, count):
    """What is within a limit are k at least, all that are as near as the k-th, and few more unless they are equal."""
    rng = np.random.default_rng(count)
    values = values_of(rng, kind, count)
    last = np.sort(values)[K - 1]
    for most in (np.float32(np.inf), last, np.sort(values)[min(count, 3 * K) - 1]):
        limit = _within(values, most, K)
        assert last <= limit <= max(most, values.max())
        if kind in ("usual", "below zero"):
            assert (values <= limit).sum() <= K + K // 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_ascending(kind, count):
    """Some of the values in order, equal ones as they come."""
    rng = np.random.default_rng(0)
    values = np.concatenate([values_of(rng, kind, max(count, 6))[:count], np.float32([0, -0.0, np.inf])])
    which = np.sort(rng.choice(len(values), len(values) // 2, replace=False)).astype(np.int32)
    found = _ascending(values, which)
    np.testing.assert_array_equal(values[found], np.sort(values[which]))
    same = np.diff(values[found].view(np.int32)) == 0
    assert (np.diff(found)[same] > 0).all()
    assert sorted(found) == sorted(which)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [1, 4])
@pytest.mark.parametrize("squared", [0.0, 1.0])
def test_nearest_centroids(kind, few, squared):
    """The few nearest of each key, as whole numbers say, whatever rounding did to the products."""
    rng = np.random.default_rng(3)
    keys, centroids = (rng.integers(-9, 10, size=(size, 12)).astype(np.float32) for size in (60, 40))
    centroids[20:] = centroids[:20]  # equally near: the first counts
    products, squares = keys @ centroids.T, np.float32(squared) * (centroids**2).sum(axis=1)
    distances = squares - 2 * products
    # Noise that a bound says could be there, of any size that it could have.
    noise = np.clip(values_of(rng, kind, products.size).reshape(products.shape), -1, 1) * 40
    into, rounding = np.full((60, few), 99), np.full(60, 4 * 40.0)
    nearest_centroids((products + noise).astype(np.float32), squares, rounding, keys, centroids, squared, into)
    nearest_few = np.argsort(distances, axis=1, kind="stable")[:, :few]
    np.testing.assert_array_equal(np.sort(into, axis=1), np.sort(nearest_few, axis=1))


def test_centroids_are_measured_again_within_rounding_only():
    """Products that are beyond doubt are believed; and a key whose distances are no numbers has the first centroids."""
    keys, centroids = np.float32([[1], [1], [1], [1]]), np.float32([[1], [3], [2], [0]])
    products = np.float32([[1, 2, 3, 0], [2.4, 2.5, 2, 0], [np.nan, 1, np.nan, np.nan], [1, np.inf, np.inf, 2]])
    into = np.full((4, 2), 99)
    nearest_centroids(products, np.zeros(4, np.float32), np.full(4, 0.9), keys, centroids, 0.0, into)
    assert into.tolist() == [[2, 1], [1, 2], [0, 1], [0, 1]]


def test_look_up():
    """Of rows of a group its values; what is of no group, or of another, is left alone."""
    values = np.arange(50, 60, dtype=np.uint16)
    into = np.full(6, 7)
    look_up(np.asarray([-1, 99, 100, 104, 109, 110]), 100, values, into)
    assert into.tolist() == [7, 7, 50, 54, 59, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_choose_keeps_the_nearest(kind):
    """Whatever was known before, all keys that are as near as a query's k-th are kept, and what is known is true."""
    rng = np.random.default_rng(1)
    products = np.stack([values_of(rng, kind, 400) for _ in range(5)])
    squares, units = np.abs(rng.normal(size=400)).astype(np.float32), np.float32([1, 2, 0.5, 1, 3])
    constants = np.float32([0, 1, 2, 3, 4])
    expected = products * units[:, None] + squares + constants[:, None]
    wanted = np.maximum(expected, np.float32(-1))
    last = np.sort(wanted, axis=1)[:, K - 1]
    bounds = np.full(9, np.inf, np.float32)
    queries = np.int32([8, 1, 2, 3, 7])
    bounds[2], bounds[3] = last[2], np.nextafter(last[3], np.float32(-np.inf))  # as near as it may be, and nearer still
    known = bounds.copy()
    rows = np.arange(400) + 1000
    counts, near, where = choose(products, units, constants, squares, np.float32(-1), rows, queries, bounds, K)
    np.testing.assert_array_equal(products, wanted)
    assert (bounds[queries] <= known[queries]).all()
    at = [0, 1, 2, 4]
    assert (bounds[queries][at] >= last[at]).all()
    ends = np.cumsum(counts)
    for number, (begin, end) in enumerate(zip(ends - counts, ends, strict=True)):
        kept = wanted[number] <= bounds[queries[number]]
        np.testing.assert_array_equal(where[begin:end], rows[kept])
        np.testing.assert_array_equal(near[begin:end], wanted[number][kept])
        assert set(rows[wanted[number] <= min(last[number], known[queries[number]])]) <= set(where[begin:end])


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_by_distance_document_and_position(kind):
    """Of parts in any order, with too few, as many and more than k: what sorting all of them gives."""
    rng = np.random.default_rng(2)
    documents = np.sort(rng.choice(10_000, 50, replace=False))
    documents[0] = 0
    hashes = rng.permutation(1 << 20)[:50].astype(np.uint64) << np.uint64(44)
    sizes = np.array([0, 3, 5, 30, 1, 300, 250, 0, K])
    begins = np.array([0, 1, 2, 4, 7, 9])  # of five queries: nothing, 3, 35, 551 and K candidates
    parts = np.cumsum(sizes) - sizes
    distances = values_of(rng, kind, sizes.sum())
    rows = rng.permutation(10_000)[: sizes.sum()]
    into, into_rows = np.full((5, K), np.inf, np.float32), np.full((5, K), -1)
    nearest(begins, parts, sizes, distances, rows, documents, hashes, into, into_rows)
    for query in range(5):
        low, high = np.append(parts, sizes.sum())[[begins[query], begins[query + 1]]]
        of = hashes[np.searchsorted(documents, rows[low:high], side="right") - 1]
        order = low + np.lexsort((rows[low:high], of, distances[low:high]))[:K]
        np.testing.assert_array_equal(into_rows[query, : len(order)], rows[order])
        np.testing.assert_array_equal(into[query, : len(order)], distances[order])
        assert (into_rows[query, len(order) :] == -1).all()
        assert np.isinf(into[query, len(order) :]).all()


def test_what_cannot_be_kept_is_compiled_all_the_same(monkeypatch):
    """Where neither the package's directory nor the user's can be written to, nothing fails."""

    def twice(number):
        return 2 * number

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(twice)
    assert compiled(twice)(21) == 42
