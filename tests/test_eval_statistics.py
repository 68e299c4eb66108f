"""eval/statistics.py: intervals and p-values against worked numbers and their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.statistics import bootstrap_interval, mcnemar_p, measure, paired_interval, wilson_interval


@pytest.mark.parametrize(
    "num_correct, n, low, high",
    [(0, 10, 0, 27.7533), (5, 10, 23.6593, 76.3407), (10, 10, 72.2467, 100), (81, 263, 25.53, 36.62)],
)
def test_wilson_interval_of_worked_numbers(num_correct, n, low, high):
    assert wilson_interval(num_correct, n) == pytest.approx((low, high), abs=2e-3)


@given(n=st.integers(1, 20000), data=st.data())
def test_wilson_interval_holds_the_score_narrows_with_n_and_is_symmetric(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k, n)
    assert 0 <= low <= 100 * k / n + 1e-9 and 100 * k / n - 1e-9 <= high <= 100
    assert (100 - high, 100 - low) == pytest.approx(wilson_interval(n - k, n), abs=1e-9)
    wider, narrower = high - low, wilson_interval(4 * k, 4 * n)
    assert narrower[1] - narrower[0] < wider


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30), order=st.randoms())
def test_a_bootstrap_interval_holds_the_mean_whatever_the_order(values, order):
    measured = measure(values)
    (low, high), score = measured["interval95"], measured["score"]
    assert score == pytest.approx(100 * sum(values) / len(values))
    assert 100 * min(values) - 1e-9 <= low <= score + 1e-9 and score - 1e-9 <= high <= 100 * max(values) + 1e-9
    order.shuffle(values)
    assert measure(values) == measured


def test_a_bootstrap_interval_of_many_values_is_the_normal_one():
    values = [i / 999 for i in range(1000)]
    margin = 1.96 * math.sqrt(1 / 12 / 1000)
    assert bootstrap_interval(values) == pytest.approx((0.5 - margin, 0.5 + margin), abs=1e-3)


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [(0, 0, 1), (3, 3, 1), (1, 0, 1), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (9, 1, 2 * 11 / 1024), (2, 3, 1)],
)
def test_mcnemar_p_of_worked_numbers(only_a, only_b, p):
    assert mcnemar_p(only_a, only_b) == pytest.approx(p)


@given(only_a=st.integers(0, 40), only_b=st.integers(0, 40))
def test_mcnemar_p_is_the_share_of_all_throws_of_a_fair_coin(only_a, only_b):
    n = only_a + only_b
    ways = [math.comb(n, heads) for heads in range(n + 1)]
    as_uneven = sum(way for heads, way in enumerate(ways) if abs(2 * heads - n) >= abs(only_a - only_b))
    assert mcnemar_p(only_a, only_b) == pytest.approx(as_uneven / 2**n)


@given(differences=st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_a_paired_interval_holds_the_mean_and_changes_sign_with_the_differences(differences):
    low, high = paired_interval(differences)
    assert low - 1e-9 <= 100 * math.fsum(differences) / len(differences) <= high + 1e-9
    assert paired_interval([-difference for difference in differences]) == (-high, -low)


@pytest.mark.parametrize("num_correct, n", [(1, 0), (-1, 3), (4, 3)])
def test_numbers_that_are_no_proportion_are_refused(num_correct, n):
    with pytest.raises(ValueError, match=f"got {num_correct} of {n}"):
        wilson_interval(num_correct, n)
    with pytest.raises(ValueError, match="expected at least one item to score, got none"):
        measure([])
