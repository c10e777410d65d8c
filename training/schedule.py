"""The learning rate over a run, as a share of its peak: a function of the step alone, so it has no state to keep."""

from __future__ import annotations

import math

FINAL_LEARNING_RATE = 0.1
"""Where the cosine ends, as a share of the peak."""


def learning_rate_factor(
    step: int, steps: int, *, schedule: str, warmup_fraction: float, decay_fraction: float
) -> float:
    """The share of the peak at a step, counted from 0.

    Both schedules begin with a linear rise. Then ``cosine`` falls to :data:`FINAL_LEARNING_RATE` (Loshchilov 2017,
    equation 5); ``wsd`` stays at the peak, and falls in the last ``decay_fraction`` of the steps by 1 − √progress to
    zero (Hägele 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", which found this
    better than a linear end).
    """
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = round(steps * decay_fraction)
    progress = (step - (steps - decay)) / max(1, decay)
    return 1 - math.sqrt(max(0.0, progress))
