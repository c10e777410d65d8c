"""The learning rate over a run, by hand."""

import math

import pytest

from training.optimizer import set_learning_rate
from training.schedule import learning_rate_factor


def factors(steps: int, schedule: str, warmup: float = 0.05, decay: float = 0.2) -> list[float]:
    return [
        learning_rate_factor(step, steps, schedule=schedule, warmup_fraction=warmup, decay_fraction=decay)
        for step in range(steps + 1)
    ]


def test_the_cosine_by_hand():
    """It rises in equal steps to the peak, stands half-way down in the middle of the rest, and ends at a tenth."""
    found = factors(105, "cosine")
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[55] == pytest.approx(0.55)
    assert found[105] == pytest.approx(0.1)
    assert found[5:] == sorted(found[5:], reverse=True)
    assert factors(1, "cosine", warmup=0.0)[0] == 1.0


def test_warm_up_stable_decay_by_hand():
    """It rises as the cosine does, stays at the peak, and falls by 1 − √progress to zero in the last fifth."""
    found = factors(100, "wsd", warmup=0.04)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert set(found[3:81]) == {1.0}
    assert found[85] == pytest.approx(1 - math.sqrt(0.25))
    assert found[100] == pytest.approx(0.0)
    assert found[81:] == sorted(found[81:], reverse=True)
    assert set(factors(100, "wsd", decay=0.0)[5:]) == {1.0}


def test_each_group_keeps_its_own_peak():
    """A group's learning rate is its own peak times the factor, however often it is set."""

    class Optimizer:
        param_groups = [{"initial_lr": 0.5}, {"initial_lr": 2.0}]  # noqa: RUF012

    for factor in (0.1, 1.0, 0.25):
        set_learning_rate(Optimizer, factor)
        assert [group["lr"] for group in Optimizer.param_groups] == [0.5 * factor, 2.0 * factor]
