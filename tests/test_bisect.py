"""The bisect search for the thresholds of the Error-Uncertainty plane (Equation 6), claim by claim.

Each test draws mini-batches, and its name says what holds for all of them. To see what a line of
`bisect_thresholds` is for, break it and run `pytest tests/test_bisect.py`: Hypothesis answers with the
smallest batch that shows the difference. Breaks to begin with, and one test that notices each:

    .sum()) > num_keep    to  >=                     the_bracket_ends_where_too_many_are_kept
    return thresholds_at(ppl, ent, high, high)       the_search_keeps_at_most_the_target
    return thresholds_at(ppl, ent, alpha, alpha)     the same: the last midpoint may keep too many
    range(max_iters)      to  range(max_iters - 1)   every_iteration_halves_the_bracket
    ppl > thresholds.ppl_high   to  >=               alpha_zero_keeps_nothing
    ppl <= thresholds.ppl_low   to  <                constant_samples_are_all_redundant
    ceil to floor in `_rank`                         quantile_is_the_smallest_value_with_a_fraction_...
    no sort in `quantile`                            permuting_the_batch_permutes_the_quadrants
"""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import twin
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import planes, quadrants, tensor

import qtuning
from qtuning import KEEP_QUADRANTS, Quadrant

fractions = st.one_of(st.fractions(0, 1, max_denominator=12), st.fractions(0, 1, max_denominator=1000))
gammas = fractions.map(float)
alphas = gammas.map(lambda gamma: gamma / 2)  # many on a multiple of 1/B, where the plane changes
diagonal = (tensor([1.0, 2, 3, 4]), tensor([1.0, 2, 3, 4]))
anti_diagonal = (tensor([1.0, 2, 3, 4]), tensor([4.0, 3, 2, 1]))


def quadrants_at(plane, alpha):
    return qtuning.assign_quadrants(*plane, qtuning.thresholds_at(*plane, alpha, alpha))


def in_kept_corners(quadrant, kept=KEEP_QUADRANTS):
    return torch.stack([quadrant == q for q in kept]).any(0)


def num_kept(plane, alpha, kept=KEEP_QUADRANTS):
    return int(in_kept_corners(quadrants_at(plane, alpha), kept).sum())


def num_found(plane, thresholds, kept=KEEP_QUADRANTS):
    return int(in_kept_corners(qtuning.assign_quadrants(*plane, thresholds), kept).sum())


# ---- quantile -------------------------------------------------------------------------------------------


@given(planes(), gammas)
def test_quantile_is_the_smallest_value_with_a_fraction_gamma_at_or_below_it(plane, gamma):
    values = plane[0]
    q = qtuning.quantile(values, gamma)
    needed = twin.fraction_meant(gamma) * len(values)
    assert q in values
    assert int((values <= q).sum()) >= needed
    assert q == values.min() or int((values < q).sum()) < needed


@given(planes(), gammas, gammas)
def test_quantile_never_falls_as_gamma_grows(plane, one, two):
    low, high = sorted((one, two))
    assert qtuning.quantile(plane[0], low) <= qtuning.quantile(plane[0], high)


@given(planes(), gammas, st.randoms(use_true_random=False))
def test_quantile_does_not_depend_on_the_order(plane, gamma, random):
    values = plane[0].tolist()
    random.shuffle(values)
    assert qtuning.quantile(tensor(values), gamma) == qtuning.quantile(plane[0], gamma)


# ---- the plane at a given alpha -------------------------------------------------------------------------


@given(planes(), alphas, alphas)
def test_every_sample_lies_in_exactly_one_quadrant_or_between(plane, alpha, beta):
    ppl, ent = plane
    thresholds = qtuning.thresholds_at(ppl, ent, alpha, beta)
    high_ppl, low_ppl = ppl > thresholds.ppl_high, ppl <= thresholds.ppl_low
    high_ent, low_ent = ent > thresholds.ent_high, ent <= thresholds.ent_low
    corners = torch.stack([high_ppl & high_ent, high_ppl & low_ent, low_ppl & low_ent, low_ppl & high_ent])
    assert int(corners.sum(0).max()) <= 1
    quadrant = qtuning.assign_quadrants(ppl, ent, thresholds)
    assert quadrant.tolist() == torch.where(corners.any(0), corners.int().argmax(0) + 1, 0).tolist()


@given(planes(), alphas, alphas)
def test_low_thresholds_never_exceed_high_ones(plane, alpha, beta):
    thresholds = qtuning.thresholds_at(*plane, alpha, beta)
    assert thresholds.ppl_low <= thresholds.ppl_high
    assert thresholds.ent_low <= thresholds.ent_high


@given(planes(), alphas, alphas)
def test_corners_only_grow_as_alpha_grows(plane, one, two):
    """What the search rests on, whichever corners it keeps: a sample in a corner stays there at every larger alpha."""
    before, after = quadrants_at(plane, min(one, two)), quadrants_at(plane, max(one, two))
    assert bool(((before == Quadrant.BETWEEN) | (before == after)).all())
    assert num_kept(plane, min(one, two)) <= num_kept(plane, max(one, two))


@given(planes())
def test_alpha_zero_keeps_nothing(plane):
    """So the lower end of the search interval never keeps too many, and the answer always exists.

    Q3 alone, which the method drops, holds then what is lowest on both axes.
    """
    assert num_kept(plane, 0.0, [Quadrant.HARMFUL_NOISE, *KEEP_QUADRANTS]) == 0
    lowest = (plane[0] == plane[0].min()) & (plane[1] == plane[1].min())
    assert torch.equal(quadrants_at(plane, 0.0) == Quadrant.REDUNDANT_KNOWLEDGE, lowest)


@given(planes(), alphas, alphas)
@example((torch.arange(6.0), torch.arange(6.0)), 1 / 6, 1 / 3)
def test_thresholds_and_quadrants_are_the_twins(plane, alpha, beta):
    ppl, ent = plane[0].tolist(), plane[1].tolist()
    expected = twin.thresholds_at(ppl, ent, alpha, beta)
    actual = qtuning.thresholds_at(*plane, alpha, beta)
    for name in ("alpha", "beta", "ppl_low", "ppl_high", "ent_low", "ent_high"):
        assert float(getattr(actual, name)) == getattr(expected, name)
    assert qtuning.assign_quadrants(*plane, actual).tolist() == twin.assign_quadrants(ppl, ent, expected)


# ---- the search -----------------------------------------------------------------------------------------

targets = st.integers(0, 12)
iterations = st.integers(1, 20)
uppers = st.sampled_from([0.49, 0.5, 0.3, 0.01])
kept_quadrants = st.one_of(st.just(KEEP_QUADRANTS), quadrants.filter(bool))  # the method's, or an ablation's


@given(planes(), targets, uppers, iterations, kept_quadrants)
@example(diagonal, 1, 0.49, 20, (Quadrant.HARMFUL_NOISE, Quadrant.REDUNDANT_KNOWLEDGE))
def test_the_search_keeps_at_most_the_target(plane, num_keep, upper, max_iters, kept):
    """Or, where Q3 is kept and more than that tie at the lowest point of the plane, these ties and no other."""
    found = qtuning.bisect_thresholds(*plane, num_keep, upper=upper, max_iters=max_iters, keep_quadrants=kept)
    lowest = num_kept(plane, 0.0, kept)  # 0 but for Q3
    assert num_found(plane, found, kept) <= max(num_keep, lowest)


@given(planes(), targets, uppers, iterations)
def test_alpha_and_beta_move_in_lockstep_inside_the_interval(plane, num_keep, upper, max_iters):
    found = qtuning.bisect_thresholds(*plane, num_keep, upper=upper, max_iters=max_iters)
    assert float(found.alpha) == float(found.beta)
    assert 0 <= float(found.alpha) < upper


@given(planes(), targets, uppers, iterations)
def test_the_thresholds_are_those_of_the_alpha_found(plane, num_keep, upper, max_iters):
    found = qtuning.bisect_thresholds(*plane, num_keep, upper=upper, max_iters=max_iters)
    assert found == qtuning.thresholds_at(*plane, float(found.alpha), float(found.beta))


@given(planes(), targets, uppers, iterations)
def test_every_iteration_halves_the_bracket(plane, num_keep, upper, max_iters):
    """One more iteration stays, or moves up by the width that is left: it never keeps fewer."""
    before = qtuning.bisect_thresholds(*plane, num_keep, upper=upper, max_iters=max_iters)
    after = qtuning.bisect_thresholds(*plane, num_keep, upper=upper, max_iters=max_iters + 1)
    step = upper / 2 ** (max_iters + 1)
    assert float(after.alpha) - float(before.alpha) in (0, pytest.approx(step, rel=1e-6))
    assert num_found(plane, before) <= num_found(plane, after)


@given(planes(), targets, uppers, iterations, kept_quadrants)
@example(anti_diagonal, 1, 0.49, 20, (Quadrant.HARMFUL_NOISE,))
def test_the_bracket_ends_where_too_many_are_kept(plane, num_keep, upper, max_iters, kept):
    """The level found is the largest on the grid of the halvings that keeps few enough."""
    found = qtuning.bisect_thresholds(*plane, num_keep, upper=upper, max_iters=max_iters, keep_quadrants=kept)
    beyond = float(found.alpha) + 1.001 * upper / 2**max_iters
    assert beyond >= upper or num_kept(plane, beyond, kept) > num_keep


@given(planes(), targets, targets)
def test_a_larger_target_never_keeps_fewer(plane, one, two):
    less, more = (qtuning.bisect_thresholds(*plane, num_keep) for num_keep in sorted((one, two)))
    assert float(less.alpha) <= float(more.alpha)
    assert num_found(plane, less) <= num_found(plane, more)


@given(planes(max_size=64), st.integers(0, 64), st.sampled_from([0.49, 0.5, 0.3]))
@example(anti_diagonal, 1, 0.49)
@example(anti_diagonal, 2, 0.5)
def test_the_search_finds_what_brute_force_over_every_distinct_alpha_finds(plane, num_keep, upper):
    """The plane changes only where alpha crosses a multiple of 1/B, so one alpha between each two will do.

    On a multiple itself the upper threshold has moved and the lower one has not: only there can the count lie
    between those of its neighbours. A search that halves 0.49 meets none (B < 128); one that halves 0.5 or
    0.3 can land on one, and may then keep more than any open interval does, never fewer.
    """
    size, end = len(plane[0]), twin.fraction_meant(upper)
    edges = [Fraction(k, size) for k in range(size) if Fraction(k, size) < end] + [end]
    between = [float((left + right) / 2) for left, right in pairwise(edges)]
    best = max(kept for kept in (num_kept(plane, alpha) for alpha in between) if kept <= num_keep)
    found = num_found(plane, qtuning.bisect_thresholds(*plane, num_keep, upper=upper))
    assert found <= num_keep
    assert found == best if upper == 0.49 else found >= best


@given(planes(), targets)
def test_by_default_the_interval_ends_at_049_and_is_halved_20_times(plane, num_keep):
    default = qtuning.bisect_thresholds(*plane, num_keep)
    assert default == qtuning.bisect_thresholds(*plane, num_keep, upper=0.49, max_iters=20)


@given(planes(max_size=40), st.integers(0, 40), uppers, iterations, kept_quadrants)
@example(anti_diagonal, 1, 0.5, 20, KEEP_QUADRANTS)  # halves 1/4 and 1/8: one low side, two high ones
def test_the_search_is_the_twins(plane, num_keep, upper, max_iters, kept):
    ppl, ent = plane[0].tolist(), plane[1].tolist()
    given_to_both = {"upper": upper, "max_iters": max_iters, "keep_quadrants": kept}
    expected = twin.bisect_thresholds(ppl, ent, num_keep, **given_to_both)
    actual = qtuning.bisect_thresholds(*plane, num_keep, **given_to_both)
    assert float(actual.alpha) == expected.alpha
    assert qtuning.assign_quadrants(*plane, actual).tolist() == twin.assign_quadrants(ppl, ent, expected)


# ---- what the search depends on: order alone -----------------------------------------------------------


def ranks(values):
    return torch.unique(values, return_inverse=True)[1]


increasing_maps = st.sampled_from(
    [
        lambda values: values.double() * 2.0**-20,
        lambda values: values.double() * 2.0**20,
        lambda values: ranks(values).float(),
        lambda values: ranks(values).double() ** 3 - 1e6,
        lambda values: torch.exp2(ranks(values).double()),
    ]
)


@given(planes(), targets, increasing_maps, increasing_maps)
def test_only_the_order_of_perplexities_and_entropies_matters(plane, num_keep, map_ppl, map_ent):
    """Strictly increasing maps that are exact in floats: scaling by powers of two, functions of the rank."""
    mapped = (map_ppl(plane[0]), map_ent(plane[1]))
    found, found_mapped = (qtuning.bisect_thresholds(*each, num_keep) for each in (plane, mapped))
    assert float(found.alpha) == float(found_mapped.alpha)
    expected = qtuning.assign_quadrants(*plane, found)
    assert torch.equal(qtuning.assign_quadrants(*mapped, found_mapped), expected)


@given(planes(), targets, st.data())
def test_permuting_the_batch_permutes_the_quadrants(plane, num_keep, data):
    order = torch.tensor(data.draw(st.permutations(range(len(plane[0])))))
    permuted = (plane[0][order], plane[1][order])
    found, found_permuted = (qtuning.bisect_thresholds(*each, num_keep) for each in (plane, permuted))
    assert found == found_permuted
    expected = qtuning.assign_quadrants(*plane, found)[order]
    assert torch.equal(qtuning.assign_quadrants(*permuted, found_permuted), expected)


@given(planes(), targets)
def test_swapping_the_axes_swaps_q2_and_q4(plane, num_keep):
    swapped = (plane[1], plane[0])
    found, found_swapped = (qtuning.bisect_thresholds(*each, num_keep) for each in (plane, swapped))
    assert float(found.alpha) == float(found_swapped.alpha)
    expected = torch.tensor([0, 1, 4, 3, 2])[qtuning.assign_quadrants(*plane, found)]
    assert torch.equal(qtuning.assign_quadrants(*swapped, found_swapped), expected)


@given(planes(), targets)
def test_a_constant_perplexity_leaves_only_the_uncertain_to_keep(plane, num_keep):
    """All perplexities are low then, none is high: kept, in Q4, are those of the highest entropies."""
    flat = (torch.full_like(plane[0], 3.0), plane[1])
    quadrant = qtuning.assign_quadrants(*flat, qtuning.bisect_thresholds(*flat, num_keep))
    calibration = quadrant == Quadrant.CALIBRATION_DATA
    assert torch.equal(in_kept_corners(quadrant), calibration)
    assert not bool((quadrant == Quadrant.HARMFUL_NOISE).any())
    assert all(kept > left for kept in plane[1][calibration] for left in plane[1][~calibration])


@given(planes(), targets)
def test_constant_samples_are_all_redundant(plane, num_keep):
    flat = (torch.full_like(plane[0], 3.0), torch.full_like(plane[1], 0.1))
    quadrant = qtuning.assign_quadrants(*flat, qtuning.bisect_thresholds(*flat, num_keep))
    assert bool((quadrant == Quadrant.REDUNDANT_KNOWLEDGE).all())
