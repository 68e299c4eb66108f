"""How far a mean over a few seeds can be trusted: Student's t intervals of means and of differences of means.

What varies is what --seed sets: the order of rows and the draws of random pruners. The tests' items are the same in
all runs; whether others would say the same is another question, which the scorers' own intervals answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom (any table); beyond, Cornish-Fisher's expansion.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t975(freedom: int) -> float:
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_margin(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean; None of fewer than two values."""
    n = len(values)
    return t975(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def difference_margin(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of mean(a) - mean(b), their variances pooled; None where nothing varies.

    One value alone (an untuned model) is taken as exact: it has no seed.
    """
    if len(a) == 1 or len(b) == 1:
        return mean_margin(a if len(b) == 1 else b)
    squares = sum((len(part) - 1) * statistics.variance(part) for part in (a, b))
    freedom = len(a) + len(b) - 2
    return t975(freedom) * math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))


def proportions_margin(a: tuple[float, int], b: tuple[float, int]) -> float:
    """The same for two scores in percent, of n items each, taken as independent: where there is one run of each."""
    return 1.96 * math.sqrt(sum(score * (100 - score) / n for score, n in (a, b)))
