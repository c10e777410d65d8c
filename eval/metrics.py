"""What a number of a report says, and how sure it is: perplexity and bits per byte from sums by document, with
intervals over documents.

Documents are the units of chance, since tokens of one document are alike: every interval is over documents drawn
again, and a rate is the ratio of two sums, never the mean of the documents' own rates. Perplexity is per token of one
tokenizer. Between models with different tokenizers only bits per byte are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from silo.errors import DataError, UsageError

LEVEL = 0.95
"""Probability with which an interval should hold the true value."""
DRAWS = 2000
"""Bootstrap samples of an interval; with so many, its ends move by about a fiftieth of its width from seed to seed."""
_COUNTED = 1 << 22
"""Counts of documents in bootstrap samples that are in memory at once."""

Unit = Literal["token", "byte"]


class Interval(NamedTuple):
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sums:
    """What was measured on some documents, in the order in which they were read; every array is (documents,)."""

    log_probability: np.ndarray
    """float64: log p summed over a document's scored tokens, in nats."""
    tokens: np.ndarray
    """int64: scored tokens."""
    bytes: np.ndarray
    """int64: UTF-8 bytes of the scored text."""

    def __post_init__(self) -> None:
        sizes = {len(array) for array in (self.log_probability, self.tokens, self.bytes)}
        if len(sizes) != 1 or sizes == {0}:
            raise DataError(f"sums over {sorted(sizes)} documents; expected one log-probability a document, and some")

    @classmethod
    def of(cls, log_probabilities: Sequence[np.ndarray], sizes: Sequence[int]) -> Sums:
        """Add up, in float64, each document's log-probabilities (tokens,); ``sizes`` are their texts' UTF-8 bytes."""
        return cls(
            np.asarray([np.sum(each, dtype=np.float64) for each in log_probabilities]),
            np.asarray([len(each) for each in log_probabilities], dtype=np.int64),
            np.asarray(sizes, dtype=np.int64),
        )

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return math.exp(self.nats("token"))

    @property
    def bits_per_byte(self) -> float:
        """Mean negative log2-probability of a byte of text, whatever the tokens."""
        return self.nats("byte") / math.log(2)

    def nats(self, unit: Unit) -> float:
        """Mean negative log-probability of a token, or of a byte, in nats."""
        return -float(np.sum(self.log_probability)) / int(np.sum(self.units(unit)))

    def units(self, unit: Unit) -> np.ndarray:
        """How many tokens, or bytes, each document has."""
        return self.tokens if unit == "token" else self.bytes

    def standard_error(self, unit: Unit = "token") -> float:
        """Standard error of :meth:`nats`: the ratio estimator's, by linearisation (Cochran 1977, section 6.4).

        Since exp(x) changes by the share dx, it is also the relative error of the perplexity.

        Raises:
            DataError: with a single document nothing is known of others.
        """
        self._require_two()
        size = self.units(unit)
        residual = -self.log_probability - self.nats(unit) * size
        spread = float(np.sum(residual**2)) / (self.documents - 1)
        return math.sqrt(spread / self.documents) / float(np.mean(size))

    def _require_two(self) -> None:
        if self.documents < 2:
            raise DataError("1 document has no interval; measure at least 2, and better 20")


def interval(sums: Sums, measure: Literal["perplexity", "bits_per_byte"], *, seed: int = 0) -> Interval:
    """Perplexity or bits per byte, with its bootstrap interval over documents.

    Raises:
        DataError: there is only one document.
    """
    unit: Unit = "token" if measure == "perplexity" else "byte"
    columns = np.stack([-sums.log_probability, sums.units(unit)], axis=1)

    def of(drawn: np.ndarray) -> np.ndarray:
        nats = drawn[..., 0] / drawn[..., 1]
        return np.exp(nats) if measure == "perplexity" else nats / math.log(2)

    return bootstrap([columns], lambda drawn: of(drawn[0]), seed=seed)


@dataclass(frozen=True)
class Difference:
    """How one mixture or model differs from another on the same documents."""

    bits_per_byte: Interval
    """First minus second; below 0 the first is better."""
    perplexity_ratio: Interval | None
    """First over second, per token; absent where the two have different tokens."""
    better: float
    """Share of the documents on which the first gives the text more probability."""


def difference(first: Sums, second: Sums, *, seed: int = 0) -> Difference:
    """Compare two on the same documents, pair by pair, so that what makes a document hard falls out.

    Raises:
        DataError: the two were not measured on the same text, or on one document only.
    """
    if not np.array_equal(first.bytes, second.bytes):
        raise DataError(
            f"{first.documents} documents with {int(first.bytes.sum())} bytes and {second.documents} with "
            f"{int(second.bytes.sum())} are compared; expected the same documents in the same order"
        )
    gain = first.log_probability - second.log_probability
    of_bytes = np.stack([-gain / math.log(2), first.bytes], axis=1)
    bits = bootstrap([of_bytes], lambda drawn: drawn[0][..., 0] / drawn[0][..., 1], seed=seed)
    ratio = None
    if np.array_equal(first.tokens, second.tokens):
        of_tokens = np.stack([-gain, first.tokens], axis=1)
        ratio = bootstrap([of_tokens], lambda drawn: np.exp(drawn[0][..., 0] / drawn[0][..., 1]), seed=seed)
    return Difference(bits, ratio, float(np.mean(gain > 0)))


class Trio(NamedTuple):
    """One domain, measured with three models on the same documents."""

    restricted: Sums
    """The language model that never saw such text."""
    mixture: Sums
    """The same with a store."""
    reference: Sums
    """A model that was trained on everything."""


class Gap(NamedTuple):
    """Which share of the way from the restricted model to the reference a mixture goes; 1 reaches the reference."""

    arithmetic: Interval
    """Of the mean perplexity of the domains, as SILO reports it (Min 2023, table 4: 91 %). A domain of high perplexity
    weighs more, and one that overshoots makes up for others."""
    geometric: Interval
    """Of the mean log-perplexity: by how much text gets more probable, all domains alike (the same table: 101 %)."""


def gap_closed(domains: Sequence[Trio], *, unit: Unit = "token", seed: int = 0) -> Gap:
    """Compare three models over some domains, with intervals over the documents of each domain.

    Args:
        domains: at least one.
        unit: perplexity of a token, or of a byte, for models with different tokenizers.
        seed: of the bootstrap.

    Raises:
        DataError: the models of a domain were not measured on the same text.
        UsageError: their tokens differ, and ``unit`` is tokens.
    """
    for trio in domains:
        if not all(np.array_equal(trio.restricted.bytes, each.bytes) for each in trio):
            raise DataError("the models of a domain were measured on different text; expected the same documents")
        if unit == "token" and not all(np.array_equal(trio.restricted.tokens, each.tokens) for each in trio):
            raise UsageError("perplexities of a token of different tokenizers do not compare; take unit='byte'")
    columns = [
        np.stack([*(-each.log_probability for each in trio), trio.restricted.units(unit)], axis=1) for trio in domains
    ]

    def nats(drawn: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([each[..., :3] / each[..., 3:] for each in drawn])  # (domains, draws, models)

    def arithmetic(drawn: Sequence[np.ndarray]) -> np.ndarray:
        return _closed(np.exp(nats(drawn)).mean(axis=0))

    def geometric(drawn: Sequence[np.ndarray]) -> np.ndarray:
        return _closed(nats(drawn).mean(axis=0))

    return Gap(*(bootstrap(columns, measure, seed=seed) for measure in (arithmetic, geometric)))


def _closed(of_models: np.ndarray) -> np.ndarray:
    restricted, mixture, reference = (of_models[..., model] for model in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (restricted - mixture) / (restricted - reference)


def bootstrap(
    groups: Sequence[np.ndarray],
    measure: Callable[[Sequence[np.ndarray]], np.ndarray],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """The interval of a function of sums over documents: percentiles of bootstrap samples, expanded for few documents.

    Plain percentiles are too near together by what a normal quantile is below Student's, and by the missing n / (n - 1)
    of the variance; taking percentiles farther out makes up for both (Hesterberg 2015, section 5.3). In simulations of
    ratios over unequal documents that covered better than bias-corrected, accelerated ends, whose correction is itself
    a guess from few documents.

    Args:
        groups: (documents, columns) each; documents are drawn again within their group.
        measure: from each group's sums (…, columns) to a value (…).
        seed: equal seeds give equal intervals.
        draws: bootstrap samples.
        level: probability with which the interval should hold the true value.

    Raises:
        DataError: a group has only one document, so that nothing can be drawn.
    """
    fewest = min(map(len, groups))
    if fewest < 2:
        raise DataError(f"{fewest} document has no interval; measure at least 2, and better 20")
    value = float(measure([group.sum(axis=0)[None] for group in groups])[0])
    drawn = np.concatenate([measure(each) for each in _draw(groups, draws, np.random.default_rng(seed))])
    farther = math.sqrt(fewest / (fewest - 1)) * student_quantile((1 - level) / 2, fewest - 1)
    tail = NormalDist().cdf(farther)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t, by its expansion about the normal's (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _draw(groups: Sequence[np.ndarray], draws: int, generator: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Sums (some draws, columns) of each group's documents, drawn with replacement."""
    at_once = max(1, _COUNTED // max(map(len, groups)))
    for begin in range(0, draws, at_once):
        size = min(at_once, draws - begin)
        yield [
            generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=size) @ group
            for group in groups
        ]


def documents_needed(
    pilot: Sums,
    *,
    relative_error: float = 0.01,
    measure: Literal["perplexity", "bits_per_byte"] = "perplexity",
    available: int | None = None,
    level: float = LEVEL,
) -> int:
    """The smallest sample of documents of which a number is this exact, from the variance over some documents.

    Args:
        pilot: some documents, drawn as the sample will be.
        relative_error: half the width of the interval, as a share of the number.
        measure: of which number.
        available: how many documents there are; of few, fewer are needed (Cochran 1977, section 4.4), and never more.
        level: probability with which the interval should hold the number.

    Raises:
        DataError: the pilot has only one document.
        UsageError: ``relative_error`` is not above 0.
    """
    if not relative_error > 0:
        raise UsageError(f"a relative error of {relative_error} was asked for; expected more than 0, such as 0.01")
    unit: Unit = "token" if measure == "perplexity" else "byte"
    of_one = pilot.standard_error(unit) * math.sqrt(pilot.documents)
    allowed = relative_error if measure == "perplexity" else relative_error * pilot.nats(unit)
    needed = (NormalDist().inv_cdf((1 + level) / 2) * of_one / allowed) ** 2
    if available is not None:
        needed = needed / (1 + needed / available)
    return max(2, math.ceil(needed - 1e-9))


def bytes_before(text: str, ends: Sequence[int]) -> np.ndarray:
    """UTF-8 bytes before each token of a text, so that every byte counts once, wherever a passage is cut.

    Args:
        text: the whole text.
        ends: where each of its n tokens ends, in characters, ascending.

    Returns:
        (n + 1,) int64, from 0 to the bytes of the whole text.
    """
    width = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (width >= 0x80).astype(np.int64) + (width >= 0x800) + (width >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths)])
    out = np.concatenate([[0], before[np.asarray(ends, dtype=np.int64)]])
    out[-1] = before[-1]
    return out
