"""Neighbours of many queries and of few: the same bits, whichever way they are found."""

# ruff: noqa: F401, F811 (fixtures of another file)

import contextlib

import numpy as np
import pytest
import torch

import datastore.queries
from datastore import knn, scan
from datastore.choosing import whole_products
from datastore.codes import Codes
from datastore.control import ControlPlane
from datastore.queries import Workspace, prepare
from tests.datastore.test_knn import (
    DIMENSION,
    cloud,
    encoded,
    index_of,
    plane,
    queries_of,
    same_answers,
    shards_of,
)

METRICS = ("l2", "inner_product")


@contextlib.contextmanager
def of_threads(count):
    """Compute with so many threads, and see that there are as many after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def both(monkeypatch):
    """A function that makes searches go one way: each query reads its lists, or lists are read once for all."""
    monkeypatch.setattr(scan, "THREADED", 0)
    return lambda each: monkeypatch.setattr(scan, "PAIRS_OF_A_LIST", 1e18 if each else 0)


@pytest.mark.parametrize("k", [1, 7, 64, 200])
def test_both_ways_give_the_same_bits(index_of, encoded, plane, both, k):
    """With ties at the last place and without."""
    index, queries = index_of(shards_of(encoded, by=lambda n: n % 7), to_a_group=2), queries_of(encoded, plane, 200)
    both(True)
    one_by_one = index.search(queries, k)
    both(False)
    assert same_answers(index.search(queries, k), one_by_one)


def test_selected_documents_both_ways(index_of, encoded, plane, both):
    """Of some documents of each group the same bits either way, and those of an index of these documents alone."""
    queries = queries_of(encoded, plane, 100)
    shards = shards_of(encoded, by=lambda n: n % 3)
    every = index_of(shards)
    masks = [np.arange(len(documents)) % 3 > 0 for documents in shards]
    masks[1] = None
    some = knn.NeighbourIndex(every._groups, plane, masks, probes=16)
    kept = [
        [d for d, there in zip(sorted(of, key=lambda d: d.document.id), mask, strict=True) if there]
        for of, mask in zip(shards, [masks[0], [True] * len(shards[1]), masks[2]], strict=True)
    ]
    alone = index_of(kept).search(queries, 30)
    for each in (True, False):
        both(each)
        assert same_answers(some.search(queries, 30), alone)
    assert not same_answers(every.search(queries, 30), alone)


@pytest.mark.parametrize("metric", METRICS)
def test_other_queries_change_nothing(index_of, encoded, plane, both, metric):
    """Searched for alone, in any company or in any order, and by any number of threads, a query has one answer."""
    index, queries = index_of(shards_of(encoded, by=lambda n: n % 3)), queries_of(encoded, plane, 300)
    index._metric = metric
    both(False)
    distances, rows = index._search_all(queries, 33)
    order = np.random.default_rng(0).permutation(len(queries))
    for used in (1, 3):
        with of_threads(used):
            for at in ([0], order, order[:20], np.repeat(order[:9], 40)):
                again = index._search_all(queries[at], 33)
                assert again[0].tobytes() == distances[at].tobytes()
                assert again[1].tobytes() == rows[at].tobytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KEYS_AT_ONCE", 9),
        ("QUERIES_AT_ONCE", 4),
        ("PENDING", 50),
        ("QUERIES_FINISHED", 3),
    ],
)
def test_how_much_is_done_at_a_time_changes_nothing(index_of, encoded, plane, both, monkeypatch, name, value):
    """Blocks, parts of lists, products, pending candidates: however small, the same bits."""
    index, queries = index_of(shards_of(encoded, by=lambda n: n % 7), to_a_group=2), queries_of(encoded, plane, 100)
    both(False)
    expected = index.search(queries, 25)
    monkeypatch.setattr(scan, "QUERIES_FINISHED", 7)
    monkeypatch.setattr(datastore.queries, "BLOCK_NUMBERS", 5 * DIMENSION)
    monkeypatch.setattr(scan, name, value)
    with of_threads(2):
        assert same_answers(index.search(queries, 25), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_products_are_exact(metric):
    """The products of rounded queries with codes are what whole numbers of 64 bits give, at the largest codes too."""
    rng = np.random.default_rng(0)
    codes = ControlPlane.fit(rng.normal(size=(4096, 200)).astype(np.float32), []).codes
    keys = (rng.normal(size=(50, 200)) * rng.lognormal(size=(50, 1))).astype(np.float32)
    queries = prepare(codes, keys, metric)
    stored = rng.integers(256, size=(300, 200), dtype=np.uint8)
    stored[:50] = np.where(queries.weights > 0, 255, 0)  # the largest sums that there can be
    products, as_they_are = torch.empty(50, 300), np.empty((50, 300), np.float32)
    queries.products(stored, Workspace(), products)
    for number, weights in enumerate(queries.weights):
        whole_products(weights, stored.ravel(), as_they_are[number])
    np.testing.assert_array_equal(products.numpy(), as_they_are)
    expected = queries.weights.astype(np.int64) @ (stored.astype(np.int64) - 128).T
    np.testing.assert_array_equal(products.numpy().astype(np.int64), expected)
    assert 2**23 < np.abs(expected).max() <= 2**24


def test_squares_are_sums_in_any_order():
    """Of steps from the least to the largest: near to what float64 gives, and equal however coordinates are turned."""
    rng = np.random.default_rng(3)
    known = (rng.normal(size=(4096, 200)) * 10.0 ** rng.uniform(-4, 3, size=200)).astype(np.float32)
    codes = ControlPlane.fit(known, []).codes
    stored = rng.integers(256, size=(300, 200), dtype=np.uint8)
    stored[0], stored[1] = 0, 255
    squares = codes.squares(stored)
    numbers = stored.astype(np.float64) - 128
    np.testing.assert_allclose(squares, ((numbers * codes.step) ** 2).sum(axis=1), rtol=1e-6)
    order = rng.permutation(200)
    turned = Codes("sq8", 200, np.concatenate([codes.fitted[:200][order], codes.fitted[200:][order]]))
    assert turned.squares(stored[:, order]).tobytes() == squares.tobytes()


def test_queries_are_moved_by_little():
    """By some thousandth of their length: a fifth of what codes move keys by, or less; distances are from there."""
    rng = np.random.default_rng(1)
    known = (rng.normal(size=(4096, 192)) * rng.uniform(0.1, 3, size=192)).astype(np.float32)
    codes = ControlPlane.fit(known, []).codes
    keys = known[:200]
    queries = prepare(codes, keys, "l2")
    moved = np.linalg.norm(queries.keys - keys, axis=1)
    stored = codes.quantizer().compute_codes(keys)
    decoded = codes.quantizer().decode(stored)
    assert (moved / np.linalg.norm(keys, axis=1)).max() < 2e-3
    assert np.median(moved / np.linalg.norm(decoded - keys, axis=1)) < 0.2
    far = ((queries.keys.astype(np.float64) - decoded[::-1]) ** 2).sum(axis=1)
    np.testing.assert_allclose(queries.measured(stored[::-1, None])[:, 0], far, rtol=1e-5)


def test_constant_coordinates_cost_nothing():
    """A coordinate that all keys of the control text share has no step, and no query is lost to it."""
    rng = np.random.default_rng(2)
    known = cloud(rng, 4096)
    known[:, 3] = 0.5
    codes = ControlPlane.fit(known, []).codes
    queries = prepare(codes, known[:9] + 1, "l2")
    stored = codes.quantizer().compute_codes(known[:9])
    far = ((queries.keys - codes.quantizer().decode(stored)) ** 2).sum(axis=1)
    np.testing.assert_allclose(queries.measured(stored[:, None])[:, 0], far, rtol=1e-4)
    zeros = prepare(codes, np.zeros((2, DIMENSION), np.float32), "inner_product")
    assert np.isfinite(zeros.measured(stored[:2, None])).all()
