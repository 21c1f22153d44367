"""Bootstrap intervals over prompts and seeds, and rank correlation."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

DRAWS = 2000  # bootstrap resamples


class Interval(NamedTuple):
    """A value and its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Interval:
    """The mean of values [N] or [prompts, seeds] and its 95% interval. NaN is left out.

    Prompts are resampled, each with all its seeds: a prompt's mean already carries the noise of its
    seeds, and resampling these as well would count it twice (coverage of both: docs/metrics.md). If
    there is one prompt, its seeds are resampled; the interval then does not cover other prompts.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim == 2:
        table = table[~np.isnan(table).all(1)]
        table = np.nanmean(table, axis=1) if len(table) > 1 else table.ravel()
    table = table[~np.isnan(table)]
    return resampled(lambda picks: table[picks].mean(-1), len(table), seed, draws)


def paired(values: np.ndarray, base: np.ndarray, seed: int = 0) -> Interval:
    """The mean difference values - base of the same prompts and noise, shapes as in
    `bootstrap`."""
    return bootstrap(np.asarray(values, dtype=float) - np.asarray(base, dtype=float), seed)


def spearman(one: np.ndarray, other: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Spearman's rank correlation of two lists of N numbers, ties at their mean rank, with its
    interval over items. Pairs with NaN are left out."""
    pairs = np.stack([np.asarray(one, dtype=float), np.asarray(other, dtype=float)])
    pairs = pairs[:, ~np.isnan(pairs).any(0)]
    return resampled(lambda picks: _rank_correlation(pairs[:, picks]), pairs.shape[1], seed, draws)


def resampled(
    statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """A statistic of `count` items and its 95% interval. statistic: indices [draws, count] ->
    values [draws]; draws whose value is NaN are left out.

    This is the expanded percentile interval (T. Hesterberg, "What Teachers Should Know about the
    Bootstrap", 2015): percentiles are moved outward by as much as Student's t requires for few
    items. Without that, intervals over ten items cover 90% instead of 95%.
    """
    if count < 1:
        return Interval(math.nan, math.nan, math.nan)
    value = float(statistic(np.arange(count)[None])[0])
    if count < 2:
        return Interval(value, -math.inf, math.inf)
    drawn = statistic(np.random.default_rng(seed).integers(count, size=(draws, count)))
    tail = 100 * NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student(count - 1))
    with np.errstate(invalid="ignore"):
        low, high = (
            np.nanpercentile(drawn, (tail, 100 - tail))
            if not np.isnan(drawn).all()
            else (math.nan, math.nan)
        )
    return Interval(value, float(low), float(high))


def _student(freedom: int) -> float:
    """The 97.5% quantile of Student's t by its expansion around the normal's (Abramowitz and Stegun
    26.7.5); within 1% from two degrees of freedom on, 11% low at one."""
    z, v = NormalDist().inv_cdf(0.975), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _rank_correlation(pairs: np.ndarray) -> np.ndarray:
    """The correlation of pairs [2, draws, N], [draws]; NaN where one side is constant."""
    smaller = (pairs[..., :, None] > pairs[..., None, :]).sum(-1)
    equal = (pairs[..., :, None] == pairs[..., None, :]).sum(-1)
    ranks = smaller + (equal - 1) / 2
    ranks -= ranks.mean(-1, keepdims=True)
    spread = np.sqrt(np.square(ranks).sum(-1))
    with np.errstate(invalid="ignore"):
        return (ranks[0] * ranks[1]).sum(-1) / (spread[0] * spread[1])
