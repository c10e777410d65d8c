"""Skill-It's online data selection (Chen 2023, algorithm 1): what the model does badly at gets more of the next round.

With the identity as its skill graph: each domain helps itself. The weights are multiplied by exp(rate · loss) and
scaled to sum to 1. The losses are those of held-back validation text of the same domain, permissive as all that trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

SEQUENCES = 8
"""Validation sequences a domain."""


def reweighted(weights: Mapping[str, float], losses: Mapping[str, float], rate: float) -> dict[str, float]:
    """Weights for the next round.

    Args:
        weights: of the last round, by domain, summing to 1.
        losses: nats a token, by domain. A domain that was not measured is taken to have the mean loss.
        rate: η, by nat.
    """
    if not losses:
        return dict(weights)
    mean = sum(losses.values()) / len(losses)
    grown = {name: weight * math.exp(rate * (losses.get(name, mean) - mean)) for name, weight in weights.items()}
    total = sum(grown.values())
    return {name: weight / total for name, weight in grown.items()}
