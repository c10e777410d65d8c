"""Metrics: hand-computed cases, SILO's own table, properties, and coverage of the intervals by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import (
    Sums,
    Trio,
    bootstrap,
    bytes_before,
    difference,
    documents_needed,
    gap_closed,
    interval,
    student_quantile,
)
from silo.errors import DataError, UsageError

LENGTHS = st.lists(st.integers(1, 2000), min_size=2, max_size=30)


def sums(nats: list[float], tokens: list[int], sizes: list[int] | None = None) -> Sums:
    """Sums of documents by their mean negative log-probability of a token."""
    total = [-rate * count for rate, count in zip(nats, tokens, strict=True)]
    return Sums(np.asarray(total), np.asarray(tokens), np.asarray(sizes or [4 * count for count in tokens]))


def one(perplexity: float) -> Sums:
    """Two documents alike with a given perplexity."""
    return sums([math.log(perplexity)] * 2, [10, 10])


def population(count: int, generator: np.random.Generator, spread: float = 1.0) -> Sums:
    """Documents of unequal lengths, whose perplexity depends on their length."""
    tokens = np.ceil(np.exp(generator.normal(5.0, spread, count))).astype(np.int64)
    rate = 3.0 + 0.15 * (np.log(tokens) - 5.0) + generator.normal(0.0, 0.4, count)
    return Sums(-rate * tokens, tokens, 4 * tokens)


def drawn(whole: Sums, count: int, generator: np.random.Generator) -> Sums:
    chosen = generator.integers(0, whole.documents, count)
    return Sums(whole.log_probability[chosen], whole.tokens[chosen], whole.bytes[chosen])


def test_a_perplexity_weighs_tokens_not_documents():
    """Two documents, of 1 token at ln 2 and of 3 at ln 8, have perplexity 2^(10/4) and 10 bits over their 8 bytes."""
    found = Sums.of([np.log([0.5]), np.log([0.125] * 3)], [3, 5])
    assert found.perplexity == pytest.approx(2**2.5, rel=1e-14)
    assert found.bits_per_byte == pytest.approx(10 / 8, rel=1e-14)


def test_sums_are_double():
    """A document of float32 log-probabilities is summed in float64."""
    values = np.full(1_000_000, -0.1, dtype=np.float32)
    assert Sums.of([values], [1]).log_probability[0] == pytest.approx(-1e6 * float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("sizes", [[], [1, 2]])
def test_sums_must_fit(sizes: list[int]):
    """Sums of no document, or with more sizes than documents, are refused."""
    with pytest.raises(DataError, match="expected"):
        Sums.of([np.zeros(3)] * (1 if sizes else 0), sizes)


def test_the_standard_error_by_hand():
    """Documents with 1 and 3 tokens at rates 1 and 2 have residuals -3/4 and 3/4 about 7/4, and so an error of 3/8."""
    assert sums([1.0, 2.0], [1, 3]).standard_error() == pytest.approx(0.375, rel=1e-14)


def test_silo_closes_91_percent_by_one_mean_and_101_by_the_other():
    """SILO's table 4 gives its 91 % and 27 % by mean perplexity, and 101 % and 27 % by mean log-perplexity."""
    lm = [2.7, 19.2, 20.3, 23.3, 19.3, 13.2, 34.9, 19.0]
    knn = [2.4, 15.0, 14.5, 8.0, 17.4, 5.9, 26.0, 6.6]
    ric = [2.4, 18.5, 19.4, 16.8, 18.6, 9.9, 33.7, 15.6]
    pythia = [2.4, 11.1, 9.1, 12.0, 12.6, 6.9, 23.0, 13.1]
    for mixture, arithmetic, geometric in ((knn, 0.91, 1.01), (ric, 0.27, 0.27)):
        rows = zip(lm, mixture, pythia, strict=True)
        gap = gap_closed([Trio(one(a), one(b), one(c)) for a, b, c in rows])
        assert gap.arithmetic.value == pytest.approx(arithmetic, abs=0.006)
        assert gap.geometric.value == pytest.approx(geometric, abs=0.006)


def test_the_ends_of_the_gap():
    """A mixture as good as the restricted model closes nothing of the gap, one as good as the reference all of it."""
    low, high = one(20.0), one(5.0)
    for mixture, closed in ((low, 0.0), (high, 1.0)):
        gap = gap_closed([Trio(low, mixture, high)])
        assert gap.arithmetic.value == pytest.approx(closed)
        assert gap.geometric.value == pytest.approx(closed)


def test_different_tokens_are_compared_by_bytes_only():
    """Models with other tokens have no perplexity ratio, and their gap is refused by the token but not by the byte."""
    first, second = sums([2.0, 2.0], [10, 20], [40, 80]), sums([1.0, 1.0], [8, 25], [40, 80])
    found = difference(first, second)
    assert found.perplexity_ratio is None
    assert found.bits_per_byte.value == pytest.approx((60 - 33) / 120 / math.log(2))
    with pytest.raises(UsageError, match="unit='byte'"):
        gap_closed([Trio(first, first, second)])
    assert gap_closed([Trio(first, first, second)], unit="byte").geometric.value == 0.0


def test_other_text_is_not_compared():
    """Two measurements of other documents are no pair, nor part of a gap."""
    first, second = sums([1.0, 1.0], [10, 20]), sums([1.0, 1.0], [20, 10])
    with pytest.raises(DataError, match="same documents"):
        difference(first, second)
    with pytest.raises(DataError, match="same documents"):
        gap_closed([Trio(first, first, second)])


def test_a_paired_difference_sees_what_unpaired_intervals_hide():
    """Where all documents gain 1 % alike, the intervals of the two overlap, and the paired one excludes no change."""
    first = population(60, np.random.default_rng(3))
    second = Sums(first.log_probability * 0.99, first.tokens, first.bytes)
    assert interval(second, "perplexity").high > interval(first, "perplexity").low
    found = difference(second, first)
    assert found.better == 1.0
    assert found.bits_per_byte.high < 0
    assert found.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(second.perplexity / first.perplexity)
    assert found.perplexity_ratio.high < 1


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.floats(0.5, 6.0), st.integers(0, 5))
def test_equal_documents_have_no_spread(lengths: list[int], rate: float, seed: int):
    """Documents of one rate have an interval of no width, whatever their lengths, and no standard error."""
    found = sums([rate] * len(lengths), lengths)
    value, low, high = interval(found, "perplexity", seed=seed)
    assert (low, high) == (pytest.approx(value), pytest.approx(value))
    assert found.standard_error() == pytest.approx(0.0, abs=1e-9)
    assert documents_needed(found) == 2


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(0, 2**31))
def test_an_interval_holds_its_value_and_repeats(lengths: list[int], seed: int):
    """The value lies between the ends, and the same seed gives the same ends."""
    rates = np.random.default_rng(seed).normal(3.0, 0.3, len(lengths)).tolist()
    first = interval(sums(rates, lengths), "bits_per_byte", seed=seed)
    assert first.low <= first.value + 1e-12
    assert first.high >= first.value - 1e-12
    assert first == interval(sums(rates, lengths), "bits_per_byte", seed=seed)


def test_the_ends_by_hand():
    """For a mean of 5 values they are those percentiles of all 5^5 samples that Student's 4 degrees of freedom ask."""
    values = np.asarray([-3.0, -1.0, 0.0, 1.0, 3.0])
    group = np.stack([values, np.ones(5)], axis=1)
    found = bootstrap([group], lambda drawn: drawn[0][..., 0] / drawn[0][..., 1], draws=40000, level=0.9)
    every = np.stack(np.meshgrid(*[values] * 5), axis=-1).reshape(-1, 5).mean(axis=1)
    tail = 0.00857  # the normal's tail beyond 2.132 · √(5/4)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [tail, 1 - tail])), abs=0.11)


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (10**6, 1.960)])
def test_students_quantiles(freedom: int, quantile: float):
    """They are those of the tables, within a hundredth from 4 degrees of freedom on."""
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=0.01 if freedom >= 4 else 0.4)


@pytest.mark.parametrize(("count", "spread", "least"), [(20, 0.3, 0.92), (60, 0.3, 0.93), (60, 1.0, 0.88)])
def test_intervals_cover(count: int, spread: float, least: float):
    """Of 300 samples, intervals of 95 % hold the true value for about that share, and for less where a few documents
    are ten times as long as the rest."""
    generator = np.random.default_rng(11)
    whole = population(200_000, generator, spread)
    ends = [interval(drawn(whole, count, generator), "perplexity", seed=seed)[1:] for seed in range(300)]
    covered = np.mean([low <= whole.perplexity <= high for low, high in ends])
    assert least <= covered <= 0.985


def test_the_stated_sample_is_large_enough_and_no_larger():
    """Of samples as large as is said for ± 1 %, about 95 % are so near to the whole, and of half as large fewer."""
    generator = np.random.default_rng(5)
    whole = population(200_000, generator)
    needed = documents_needed(drawn(whole, 3000, generator))
    near = [
        np.mean([abs(drawn(whole, size, generator).perplexity / whole.perplexity - 1) <= 0.01 for _ in range(200)])
        for size in (needed, needed // 2)
    ]
    assert near[0] >= 0.92
    assert near[1] < 0.9


def test_of_few_documents_fewer_are_needed():
    """The sample never is larger than what there is, and with ten times the error a hundredth is enough."""
    pilot = population(50, np.random.default_rng(1))
    assert documents_needed(pilot, available=50) <= 50
    assert documents_needed(pilot) == pytest.approx(100 * documents_needed(pilot, relative_error=0.1), rel=0.05)
    by_bytes = documents_needed(pilot, measure="bits_per_byte")
    assert by_bytes == pytest.approx(documents_needed(pilot) / pilot.nats("byte") ** 2 / 16, rel=0.05)
    with pytest.raises(UsageError, match=r"0\.01"):
        documents_needed(pilot, relative_error=0.0)


def test_one_document_tells_nothing_of_others():
    """A single document has no interval, no error, and says nothing of a sample."""
    alone = sums([2.0], [10])
    for call in (
        lambda: interval(alone, "perplexity"),
        alone.standard_error,
        lambda: documents_needed(alone),
        lambda: gap_closed([Trio(alone, alone, alone)]),
    ):
        with pytest.raises(DataError, match="at least 2"):
            call()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.data())
def test_every_byte_counts_once(text: str, data: st.DataObject):
    """Wherever tokens end, the bytes before them are those of the text's head, from 0 to the whole text's."""
    text = text.encode("utf-8", "replace").decode()
    count = data.draw(st.integers(1, 12))
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=count, max_size=count)))
    before = bytes_before(text, ends)
    assert before[0] == 0
    assert before[-1] == len(text.encode())
    assert before[1:-1].tolist() == [len(text[:end].encode()) for end in ends[:-1]]


def test_characters_at_the_edges_of_utf_8():
    """The last character of each width in UTF-8 and the first of the next one count as many bytes as they have."""
    text = "\x7f\x80\u07ff\u0800\uffff\U00010000"
    assert np.diff(bytes_before(text, range(1, 7))).tolist() == [1, 2, 2, 3, 3, 4]
