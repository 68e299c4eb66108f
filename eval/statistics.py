"""Scores with their uncertainty: intervals of proportions and means, and tests of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(num_correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, in percent.

    Unlike the normal interval it has a width at 0 and at n correct, and it stays within [0, 100].

    Args:
        z: quantile of the standard normal distribution; 1.959964 gives 95%.
    Raises:
        ValueError: n is below 1, or num_correct is not in [0, n].
    """
    if not 0 <= num_correct <= n or n < 1:
        raise ValueError(f"expected 0 <= num_correct <= n and n >= 1, got {num_correct} of {n}")
    p = num_correct / n
    centre = p + z * z / (2 * n)
    margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    return max(0.0, scale * (centre - margin)), min(100.0, scale * (centre + margin))


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values`, in their unit.

    One multinomial draw gives how often each distinct value occurs in a resample. So the interval depends on the
    values and the seed, and not on the order of the values.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    rng, n = np.random.default_rng(seed), counts.sum()
    chunks = [rng.multinomial(n, counts / n, size=draws // 10) @ distinct / n for _ in range(10)]
    low, high = np.quantile(np.concatenate(chunks), [0.025, 0.975])
    return float(low), float(high)


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean of differences in [-1, 1], in points.

    It is the average of the intervals of the differences and of their negatives, so negating the differences
    negates the interval exactly.
    """
    low, high = bootstrap_interval(differences)
    negative_low, negative_high = bootstrap_interval([-difference for difference in differences])
    return 50 * (low - negative_high), 50 * (high - negative_low)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test.

    It is the chance that a fair coin, thrown once for each item that only one side gets right, falls at least this
    unevenly; 1 where there is no such item.
    """
    n = only_a + only_b
    ways = total = 1  # of k heads, and of k or fewer
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def measure(values: Sequence[bool | float]) -> dict:
    """{score, n, interval95}, score and interval in percent.

    Of bools it is the share that is True, with Wilson's interval; of numbers in [0, 1] the mean, with a bootstrap
    interval.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("expected at least one item to score, got none")
    n, score = len(values), 100 * math.fsum(values) / len(values)
    if all(isinstance(value, bool) for value in values):
        interval = wilson_interval(sum(values), n)
    else:
        low, high = bootstrap_interval(values)
        interval = (100 * low, 100 * high)
    return {"score": score, "n": n, "interval95": interval}


def in_words(measured: dict) -> str:
    """What `measure` returns as text: `43.21%  n 200  95% [36.50, 50.14]`."""
    low, high = measured["interval95"]
    return f"{measured['score']:.2f}%  n {measured['n']}  95% [{low:.2f}, {high:.2f}]"
