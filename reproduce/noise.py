"""Student's t intervals of means over a few seeds, and of differences of such means.

The spread over seeds is that of the order of rows and of the draws of random pruners. All runs are scored on the same
items; the uncertainty from the choice of items is what the intervals of eval/statistics.py measure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom (any table); beyond, Cornish-Fisher's expansion.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_margin(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean; None for fewer than two values."""
    n = len(values)
    return t975(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def difference_margin(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of mean(a) - mean(b), by Welch's t; None for one value of each.

    The degrees of freedom (Welch-Satterthwaite) are rounded down. A single value beside several is taken to vary as
    they do.
    """
    known = [statistics.variance(part) for part in (a, b) if len(part) > 1]
    if not known:
        return None
    if len(known) == 1:
        return t975(max(len(a), len(b)) - 1) * math.sqrt(known[0] * (1 / len(a) + 1 / len(b)))
    of_means = [variance / len(part) for variance, part in zip(known, (a, b), strict=True)]
    total = sum(of_means)
    if not total:
        return 0.0
    shares = sum((of_mean / total) ** 2 / (len(part) - 1) for of_mean, part in zip(of_means, (a, b), strict=True))
    return t975(math.floor(1 / shares + 1e-9)) * math.sqrt(total)


def proportions_margin(a: tuple[float, int], b: tuple[float, int]) -> float:
    """Half the width of the 95 % interval of a difference of two scores over items.

    Args:
        a, b: (score in percent, number of items); the two are taken as independent.
    """
    return 1.96 * math.sqrt(sum(score * (100 - score) / n for score, n in (a, b)))
