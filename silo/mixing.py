"""The mathematics of p(w | c) = Σ_s λ_s p_s(w | c): pure functions on tensors, no files, no models.

Probabilities of single tokens are float64, since their logarithms are summed over whole corpora; distributions over
the vocabulary are float32, as the model gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def neighbour_weights(squared_l2: torch.Tensor, temperature: float) -> torch.Tensor:
    """Weight of each neighbour, softmax(-d² / τ) over the neighbours of one query (kNN-LM, equation 2).

    Args:
        squared_l2: (n, k) squared distances, infinite where there is no neighbour.
        temperature: τ, in units of squared distance.

    Returns:
        (n, k) float64 that sums to 1 a row; a row without any neighbour is all zero.
    """
    score = -squared_l2.double() / temperature
    return torch.softmax(score, dim=-1).nan_to_num(0.0)


def neighbour_distribution(weights: torch.Tensor, values: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Sum the weights (n, k) of neighbours with the same token (n, k) into a distribution (n, vocabulary), float64."""
    out = torch.zeros(len(weights), vocab_size, dtype=torch.float64)
    return out.scatter_add_(1, values, weights)


def neighbour_probability(weights: torch.Tensor, values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same for one token a row only: targets (n,) give probabilities (n,), float64."""
    return (weights * (values == targets.unsqueeze(1))).sum(dim=1)


def interpolate(parts: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Σ_s λ_s p_s in the order of ``parts``, so that equal parts give equal bits.

    Args:
        parts: probabilities by method, all of one shape.
        weights: λ by method, summing to 1.

    Raises:
        ValueError: a weight is missing, or they do not sum to 1.
    """
    if set(parts) != set(weights) or abs(sum(weights.values()) - 1.0) > 1e-9:
        raise ValueError(f"weights {dict(weights)} do not fit the methods {list(parts)}; they must sum to 1")
    total = torch.zeros(())
    for name, part in parts.items():
        total = total + weights[name] * part
    return total


def fit_weights(parts: Sequence[torch.Tensor], *, tolerance: float = 1e-7, max_iterations: int = 2000) -> list[float]:
    """The λ that maximise Σ_i log Σ_s λ_s p_s(i), by expectation maximisation (Jelinek and Mercer 1980).

    The likelihood is concave in λ, so the answer is the global optimum and needs no grid.

    Args:
        parts: for each method the probability of each validation token, (n,) float64.
        tolerance: stop when no weight moves by more.
        max_iterations: stop in any case.

    Returns:
        One weight a method, summing to 1.
    """
    probability = torch.stack([part.double() for part in parts])
    probability = probability[:, probability.sum(dim=0) > 1e-300]  # What no method explains tells nothing of weights.
    weights = torch.full((len(parts),), 1.0 / len(parts), dtype=torch.float64)
    for _ in range(max_iterations if probability.shape[1] else 0):
        joint = weights.unsqueeze(1) * probability
        new = (joint / joint.sum(dim=0)).mean(dim=1)
        new /= new.sum()
        moved = (new - weights).abs().max().item()
        weights = new
        if moved < tolerance:
            break
    # The climb towards a corner of the simplex never quite arrives, so the corners stand for election too.
    candidates = [weights, *torch.eye(len(parts), dtype=torch.float64)]
    return max(candidates, key=lambda weights: (weights @ probability).log().sum().item()).tolist()


def perplexity(log_probabilities: torch.Tensor) -> float:
    """exp of the mean negative log-probability, which is in nats and (n,)."""
    return float(torch.exp(-log_probabilities.double().mean()))
