"""Where a contestant's time goes: what is found, what is told, and that every missed number has it."""

import threading

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def profiling(bench):
    """``scripts/bench/profiling.py``."""
    return bench("profiling")


def mostly():
    """Works a thousand times as much as what follows."""
    return sum(range(300_000))


def hardly():
    """Works little."""
    return sum(range(300))


def sorts(numbers):
    """Has numpy's Python call numpy's C."""
    return np.sort(numbers)


def test_functions_are_told_by_what_they_take(profiling):
    """The one that takes nearly all of the time is told as such; the other is too small to be told."""

    def both():
        mostly()
        hardly()

    told = profiling.functions(both, seconds=0.5)
    assert next(iter(told)) == f"{__name__}.mostly"
    assert told[f"{__name__}.mostly"] > 0.5
    assert f"{__name__}.hardly" not in told


def test_what_calls_numpy_is_told_in_its_place(profiling):
    """A sort is of the function that asked for it."""
    numbers = np.random.default_rng(0).random(200_000)
    told = profiling.functions(lambda: sorts(numbers), seconds=0.5)
    assert next(iter(told)) == f"{__name__}.sorts"


def test_threads_that_wait_take_nothing_and_others_do(profiling):
    """Work in another thread, for which the first one waits, is all that there is."""

    def beside():
        worker = threading.Thread(target=mostly)
        worker.start()
        worker.join()

    told = profiling.functions(beside, seconds=0.5)
    assert next(iter(told)) == f"{__name__}.mostly"
    assert told[f"{__name__}.mostly"] > 0.5


def test_the_sampler_ends_when_a_call_fails(profiling):
    """Its thread is gone, and the error is the call's."""
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        profiling.functions(lambda: 1 / 0, seconds=0.5)
    assert threading.active_count() == before


def test_operations_are_told_by_what_they_take(profiling):
    """A product of large matrices takes most of the time beside a sum of few numbers."""
    large, small = torch.randn(1024, 1024), torch.randn(8)
    told = profiling.operations(lambda: (small.sum(), large @ large), times=5)
    assert next(iter(told)) == "mm"


def test_shares_sum_to_one_and_the_small_are_together(profiling):
    """Those below the bound are in ``other``, the largest comes first, and nothing spent is nothing told."""
    assert profiling.shares({"a": 1.0, "b": 8.0, "c": 0.1, "d": 0.9}) == {
        "b": 0.8,
        "a": 0.1,
        "d": 0.09,
        "other": 0.01,
    }
    assert profiling.shares({}) == {"other": 1.0}


def test_every_number_that_a_bench_missed_has_a_profile(script, bench):
    """In the record itself, so that the reason given for it can be checked."""
    records = script("render_results").read_records()
    missed = {
        name
        for name, record in records.items()
        for each in bench("ratios").ratios(record, name)
        if each.reached is False and each.clock == "wall" and "windows a call" not in each.what
    }
    assert missed
    profiles = script("render_profiles").profiles
    assert [name for name in sorted(missed) if not list(profiles(records[name]["result"]))] == []


def test_profiles_are_rendered_by_part_and_contestant(script):
    """From wherever in a record they are."""
    of = {"65k": {"profile": {"ours": {"mm": 0.75, "other": 0.25}}}, "profile": {"all": {"other": 1.0}}}
    told = script("render_profiles").where_time_goes({"model": {"result": {"peer": of}}})
    assert "| model | peer, 65k | ours | `mm` 75%, `other` 25% |" in told
    assert "| model | peer | all | `other` 100% |" in told
