"""The mathematics of p(w | c) = Σ_s λ_s p_s(w | c): pure functions on tensors, no files, no models.

Probabilities of single tokens are float64, since their logarithms are summed over whole corpora; distributions over
the vocabulary are float32, as the model gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def neighbour_weights(distances: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Weight of each neighbour, softmax(-d² / τ) over the neighbours of one query (kNN-LM, equation 2).

    Args:
        distances: (n, k) squared distances, infinite where there is no neighbour.
        temperature: τ, in units of squared distance; one for all queries, or (n, 1).

    Returns:
        (n, k) float64 that sums to 1 a row; a row without any neighbour is all zero.
    """
    score = -distances.double() / temperature
    return torch.softmax(score, dim=-1).nan_to_num(0.0)


def neighbour_distribution(weights: torch.Tensor, values: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Sum the weights (n, k) of neighbours with the same token (n, k) into a distribution (n, vocabulary), float64."""
    out = torch.zeros(len(weights), vocab_size, dtype=torch.float64)
    return out.scatter_add_(1, values, weights)


def neighbour_probability(weights: torch.Tensor, values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same for one token a row only: targets (n,) give probabilities (n,), float64."""
    return (weights * (values == targets.unsqueeze(1))).sum(dim=1)


def discounted(
    orders: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], discount: float
) -> tuple[np.ndarray, np.ndarray]:
    """What n-grams of several lengths say of a token, each leaving to shorter ones what it takes off its counts.

    Absolute discounting, interpolated (Ney, Essen and Kneser 1994; Chen and Goodman 1999, section 2.7):
    p_l(w) = max(c_l(w) - D, 0) / c_l + D N_l / c_l · p_{l-1}(w), with c_l how often a suffix of l tokens occurs, c_l(w)
    how often w comes after it, and N_l how many different tokens do. A suffix that does not occur leaves everything.

    Args:
        orders: from the shortest suffix to the longest c_l(w), c_l and N_l, arrays of one shape or shapes that
            broadcast to one.
        discount: D, between 0 and 1.

    Returns:
        What the n-grams say, and what they leave to whatever comes below the shortest: float64. What they say of all
        tokens, and what they leave, sum to 1.
    """
    given, left = np.zeros(()), np.ones(())
    for hits, counts, kinds in orders:
        some = counts > 0
        kept = np.where(some, discount * kinds / np.maximum(counts, 1), 1.0)
        own = np.where(hits > 0, (hits - discount) / np.maximum(counts, 1), 0.0)
        given, left = given * kept + own, left * kept
    return given, left


def interpolate(parts: Mapping[str, torch.Tensor], weights: Mapping[str, float | torch.Tensor]) -> torch.Tensor:
    """Σ_s λ_s p_s in the order of ``parts``, so that equal parts give equal bits.

    Args:
        parts: probabilities by method, all of one shape: (n,) or (n, vocabulary).
        weights: λ by method, summing to 1; one for all positions, or (n,).

    Raises:
        ValueError: a weight is missing, or they do not sum to 1.
    """
    total = torch.as_tensor(sum(weights.values()))
    if set(parts) != set(weights) or ((total - 1.0).abs() > 1e-9).any():
        raise ValueError(
            f"weights of {list(weights)} that sum to {total.min():g} to {total.max():g} do not fit the methods "
            f"{list(parts)}; they must sum to 1"
        )
    mixed = torch.zeros(())
    for name, part in parts.items():
        weight = weights[name]
        if isinstance(weight, torch.Tensor) and part.dim() == 2:
            weight = weight.unsqueeze(1)
        mixed = mixed + weight * part
    return mixed


def fit_weights(parts: Sequence[torch.Tensor], *, tolerance: float = 1e-9, max_sweeps: int = 100) -> list[float]:
    """The λ that maximise Σ_i log Σ_s λ_s p_s(i), by trading weight between two methods at a time.

    The likelihood is concave in λ: with g_s = mean_i p_s(i) / p(i), no λ is better by more than max_s g_s - 1 nats a
    token. So the answer is the global optimum, known to be, and needs no grid. Expectation maximisation (Jelinek and
    Mercer 1980) has the same optimum, but creeps where two methods are alike or one deserves nothing.

    Args:
        parts: for each method the probability of each validation token, (n,) float64.
        tolerance: stop when no λ can be better by more, in nats a token.
        max_sweeps: stop in any case after so many rounds of all pairs.

    Returns:
        One weight a method, summing to 1.
    """
    probability = torch.stack([part.double() for part in parts])
    probability = probability[:, probability.sum(dim=0) > 1e-300]  # What no method explains tells nothing of weights.
    weights = torch.full((len(parts),), 1.0 / len(parts), dtype=torch.float64)
    for _ in range(max_sweeps if probability.shape[1] else 0):
        for one, other in itertools.combinations(range(len(parts)), 2):
            _trade(weights, probability, one, other)
        gain = (probability / (weights @ probability)).mean(dim=1).max().item() - 1
        if gain < tolerance:
            break
    return (weights / weights.sum()).tolist()


def _trade(weights: torch.Tensor, probability: torch.Tensor, one: int, other: int) -> None:
    """Share the weight of two methods between them as is best, in place: Newton's steps, kept between two bounds."""
    mass = (weights[one] + weights[other]).item()
    others = weights.clone()
    others[[one, other]] = 0.0
    rest = others @ probability
    difference = probability[one] - probability[other]

    def ratio(
        share: float,
    ) -> torch.Tensor:  # Its mean is the slope of the likelihood, minus its square's the curvature.
        return difference / (rest + share * probability[one] + (mass - share) * probability[other])

    low, high, share, last = 0.0, mass, weights[one].item(), mass
    if ratio(high).mean() >= 0:  # At a bound the slope may point outwards; then the bound is the answer.
        low = share = high
    elif ratio(low).mean() <= 0:
        high = share = low
    for _ in range(200):
        at_share = ratio(share)
        slope, curvature = at_share.mean().item(), at_share.square().mean().item()
        low, high = (share, high) if slope > 0 else (low, share)
        if not abs(slope) * (high - low) > 1e-13:  # Nowhere between the bounds is the likelihood higher by more.
            break
        step = slope / curvature
        if not (low < share + step < high and abs(step) < last / 2):  # Newton goes astray: halve the way instead.
            step = (low + high) / 2 - share
        share, last = share + step, abs(step)
    weights[one], weights[other] = share, mass - share


def perplexity(log_probabilities: torch.Tensor) -> float:
    """exp of the mean negative log-probability, which is in nats and (n,)."""
    return float(torch.exp(-log_probabilities.double().mean()))
