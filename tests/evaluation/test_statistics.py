"""The coverage of intervals by simulation, and rank correlation by its definition."""

import math

import numpy as np
import pytest

from dopsd.evaluation.statistics import bootstrap, paired, resampled, spearman


def coverage(
    prompts: int, seeds: int, between: float, within: float, experiments: int = 1500
) -> float:
    """Share of simulated experiments whose interval holds the true mean 0. between, within:
    standard deviations of prompts and of the seeds of a prompt."""
    rng = np.random.default_rng([prompts, seeds])
    hits = 0
    for _ in range(experiments):
        table = between * rng.normal(size=(prompts, 1)) + within * rng.normal(size=(prompts, seeds))
        _, low, high = bootstrap(table, draws=1000)
        hits += low <= 0 <= high
    return hits / experiments


@pytest.mark.parametrize(
    ("prompts", "between", "within"),
    [(10, 1, 0.3), (20, 1, 1), (20, 0, 1), (40, 0.3, 1)],
)
def test_an_interval_over_prompts_and_seeds_covers_the_truth_95_times_in_100(
    prompts, between, within
):
    assert 0.93 <= coverage(prompts, 4, between, within) <= 0.97


def test_the_seeds_of_a_single_prompt_are_resampled():
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap(values[None]) == bootstrap(values)


def test_few_values_give_wider_intervals_than_the_plain_percentiles():
    values = np.random.default_rng(0).uniform(size=400)
    many, few = bootstrap(values), bootstrap(values[:10])
    picks = np.random.default_rng(0).integers(10, size=(2000, 10))
    low, high = np.percentile(values[:10][picks].mean(1), (2.5, 97.5))
    assert few.low < low and high < few.high
    assert many.value == pytest.approx(values.mean())
    assert many.high - many.low < (few.high - few.low) / 4


def test_prompts_weigh_the_same_whatever_is_missing():
    table = np.array([[1.0, 3.0], [10.0, math.nan], [math.nan, math.nan]])
    assert bootstrap(table).value == pytest.approx((2 + 10) / 2)
    assert bootstrap(table[:1]).value == 2 and math.isnan(bootstrap(table[2:]).value)
    alone = bootstrap(np.array([5.0]))
    assert (alone.value, alone.low, alone.high) == (5, -math.inf, math.inf)


def test_a_paired_difference_is_more_precise_than_the_two_values():
    rng = np.random.default_rng(0)
    base = 5 * rng.normal(size=(20, 1)) + rng.normal(size=(20, 4))
    tuned = base + 0.5 + 0.1 * rng.normal(size=(20, 4))
    difference = paired(tuned, base)
    assert 0.4 < difference.low < 0.5 < difference.high < 0.6
    assert bootstrap(tuned).low < bootstrap(base).high


def test_rank_correlation_is_one_minus_six_sums_where_nothing_is_tied():
    rng = np.random.default_rng(0)
    one, other = rng.permutation(12), rng.permutation(12)
    by_definition = 1 - 6 * np.square(one - other).sum() / (12 * (12**2 - 1))
    assert spearman(one, other).value == pytest.approx(by_definition)
    assert spearman(np.exp(one), -other).value == pytest.approx(-by_definition)


def test_tied_ranks_are_averaged_and_constants_have_no_rank():
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])).value == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    assert math.isnan(spearman(np.ones(5), np.arange(5)).value)
    assert spearman(np.array([1, 2, 3, math.nan]), np.array([1, 2, 3, 0])).value == pytest.approx(1)


def test_the_interval_of_a_rank_correlation_covers_the_truth():
    rng = np.random.default_rng(0)
    truth = 6 / math.pi * math.asin(0.7 / 2)  # Spearman's of a normal pair of correlation 0.7
    hits = []
    for _ in range(150):
        one = rng.normal(size=30)
        _, low, high = spearman(
            one, 0.7 * one + math.sqrt(1 - 0.49) * rng.normal(size=30), draws=200
        )
        hits.append(low <= truth <= high)
    assert 0.90 <= np.mean(hits) <= 0.98


def test_any_statistic_of_items_can_be_resampled():
    values = np.random.default_rng(0).normal(size=50)
    median = resampled(lambda picks: np.median(values[picks], axis=1), 50)
    assert median.value == np.median(values) and median.low < median.value < median.high
