"""Every equation of the paper on numbers small enough to check by hand.

Equations 4 (perplexity), 5 (entropy), 6 (bisect search) and 7 (smoothed token score), the supp-score of
Algorithm 1, and the choices C1 ... C15 where the paper is silent or contradicts itself.
"""

import math

import pytest
import torch

import qtuning
from qtuning import Quadrant

LN2 = math.log(2)
T, F = True, False
INF, NAN = float("inf"), float("nan")


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6, check_dtype=False)


def same(actual, expected):
    assert actual.tolist() == expected


# ---- token level: -log p and H(p) -----------------------------------------------------------------------


def test_nll_and_entropy_of_known_distributions():
    uniform, one_to_three = [0.0, 0, 0, 0], [0, math.log(3), -80, -80]
    logits = torch.tensor([[uniform, one_to_three, one_to_three]])
    nll, entropy = qtuning.token_nll_and_entropy(logits, torch.tensor([[2, 1, 0]]))
    close(nll, [[2 * LN2, math.log(4 / 3), 2 * LN2]])
    half = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    close(entropy, [[2 * LN2, half, half]])


def test_a_certain_prediction_has_no_entropy_and_a_large_loss_elsewhere():
    logits = torch.tensor([[[1000.0, 0, 0], [1000.0, 0, 0]]])
    nll, entropy = qtuning.token_nll_and_entropy(logits, torch.tensor([[0, 2]]))
    close(nll, [[0.0, 1000.0]])
    close(entropy, [[0.0, 0.0]])


def test_a_vocabulary_entry_at_minus_infinity_adds_nothing():
    logits = torch.tensor([[[0.0, -INF, 0.0]]])
    nll, entropy = qtuning.token_nll_and_entropy(logits, torch.tensor([[2]]))
    close(nll, [[LN2]])
    close(entropy, [[LN2]])


def test_labels_of_minus_100_get_zero():
    logits = torch.tensor([[[NAN, 0.0], [1.0, 1.0], [INF, INF]]])
    nll, entropy = qtuning.token_nll_and_entropy(logits, torch.tensor([[-100, 0, -100]]))
    close(nll, [[0.0, LN2, 0.0]])
    close(entropy, [[0.0, LN2, 0.0]])


# ---- Equations 4 and 5 ----------------------------------------------------------------------------------


def test_equation_4_is_the_geometric_mean_of_the_answer_tokens():
    nll = torch.tensor([[LN2, 3 * LN2, 99.0], [99.0, LN2, LN2], [0.0, 99.0, 99.0]])
    mask = torch.tensor([[T, T, F], [F, T, T], [T, F, F]])
    close(qtuning.sample_perplexity(nll, mask), [4.0, 2.0, 1.0])


def test_equation_5_is_the_mean_over_the_answer_tokens():
    entropy = torch.tensor([[0.5, 1.0, 9.0], [9.0, 9.0, 0.25], [1.0, 9.0, 2.0]])
    mask = torch.tensor([[T, T, F], [F, F, T], [T, F, T]])
    close(qtuning.sample_entropy(entropy, mask), [0.75, 0.25, 1.5])


# ---- quantile (C4) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(0.0, 1), (0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.76, 4), (1.0, 4)],
)
def test_quantile_is_the_smallest_value_that_a_fraction_gamma_reaches(gamma, expected):
    assert float(qtuning.quantile(torch.tensor([4.0, 2.0, 1.0, 3.0]), gamma)) == expected


@pytest.mark.parametrize(("gamma", "expected"), [(0.0, 5), (0.6, 5), (0.61, 7), (1.0, 7)])
def test_quantile_counts_ties_together(gamma, expected):
    assert float(qtuning.quantile(torch.tensor([5.0, 7, 5, 7, 5]), gamma)) == expected


@pytest.mark.parametrize("hundredths", range(101))
def test_quantile_of_a_percentage_is_free_of_float_error(hundredths):
    values = torch.arange(1.0, 101.0)  # 0.07 * 100 is 7.000000000000001 in floats
    assert float(qtuning.quantile(values, hundredths / 100)) == max(1, hundredths)


@pytest.mark.parametrize("hundredths", range(50))
def test_high_thresholds_are_free_of_float_error(hundredths):
    values = torch.arange(1.0, 101.0)  # 1 - 0.43 is 0.5700000000000001 in floats
    thresholds = qtuning.thresholds_at(values, values, hundredths / 100, hundredths / 100)
    assert float(thresholds.ppl_low) == float(thresholds.ent_low) == max(1, hundredths)
    assert float(thresholds.ppl_high) == float(thresholds.ent_high) == 100 - hundredths


# ---- quadrants (C5) -------------------------------------------------------------------------------------


def test_high_is_strictly_above_and_low_is_at_or_below():
    thresholds = qtuning.Thresholds(alpha=0.25, beta=0.25, ppl_low=2.0, ppl_high=4.0, ent_low=1.0, ent_high=3.0)
    cases = [
        (4.1, 3.1, Quadrant.HARMFUL_NOISE),
        (4.0, 3.1, Quadrant.BETWEEN),
        (4.1, 3.0, Quadrant.BETWEEN),
        (4.1, 1.0, Quadrant.VALUABLE_MISCONCEPTION),
        (4.1, 1.1, Quadrant.BETWEEN),
        (4.0, 1.0, Quadrant.BETWEEN),
        (2.0, 1.0, Quadrant.REDUNDANT_KNOWLEDGE),
        (2.1, 1.0, Quadrant.BETWEEN),
        (2.0, 3.1, Quadrant.CALIBRATION_DATA),
        (2.0, 3.0, Quadrant.BETWEEN),
        (2.1, 3.1, Quadrant.BETWEEN),
        (3.0, 2.0, Quadrant.BETWEEN),
    ]
    ppl, ent, expected = zip(*cases, strict=True)
    actual = qtuning.assign_quadrants(torch.tensor(ppl), torch.tensor(ent), thresholds)
    assert actual.dtype == torch.int64
    same(actual, [int(quadrant) for quadrant in expected])


def test_quadrants_are_numbered_as_in_the_paper():
    assert [int(quadrant) for quadrant in Quadrant] == [0, 1, 2, 3, 4]
    assert (Quadrant.BETWEEN, Quadrant.HARMFUL_NOISE, Quadrant.VALUABLE_MISCONCEPTION) == (0, 1, 2)
    assert (Quadrant.REDUNDANT_KNOWLEDGE, Quadrant.CALIBRATION_DATA) == (3, 4)


# ---- Equation 6, the bisect search (C1, C2, C3) ---------------------------------------------------------


@pytest.mark.parametrize(
    ("num_keep", "alphas"),
    [
        # Below alpha = 1/4 nothing is kept, above it samples 0 (Q4) and 3 (Q2) are.
        # midpoints      0.245       0.3675         0.30625     (target 1: two are too many, go down)
        (1, [0.245, 0.245, 0.245]),
        # midpoints      0.245       0.3675         0.42875     (target 2: on target, go on up: C2)
        (2, [0.245, 0.3675, 0.42875]),
        (3, [0.245, 0.3675, 0.42875]),
    ],
)
def test_equation_6_step_by_step(num_keep, alphas):
    ppl, ent = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])
    for steps, alpha in enumerate(alphas, start=1):
        thresholds = qtuning.bisect_thresholds(ppl, ent, num_keep, max_iters=steps)
        assert float(thresholds.alpha) == float(thresholds.beta) == pytest.approx(alpha, abs=1e-12)
        kept_two = alpha > 0.25
        assert (float(thresholds.ppl_low), float(thresholds.ppl_high)) == ((2, 3) if kept_two else (1, 4))
        assert (float(thresholds.ent_low), float(thresholds.ent_high)) == ((2, 3) if kept_two else (1, 4))


def test_the_search_interval_ends_at_upper():
    ppl, ent = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])
    assert float(qtuning.bisect_thresholds(ppl, ent, 4).alpha) == pytest.approx(0.49, abs=1e-5)  # C1
    assert float(qtuning.bisect_thresholds(ppl, ent, 4, upper=0.3).alpha) == pytest.approx(0.3, abs=1e-5)
    assert float(qtuning.bisect_thresholds(ppl, ent, 4, upper=0.5).alpha) == pytest.approx(0.5, abs=1e-5)


# ---- budget, supp-score, backfill (C6 ... C9, C14) ------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [
        (0.29, 100, 29),
        (0.07, 100, 7),
        (1 / 3, 3, 1),
        (0.125, 8, 1),
        (0.125, 15, 1),
        (0.999, 8, 7),
        (1.0, 5, 5),
    ],
)
def test_the_sample_budget_is_the_floor_without_float_error(ratio, size, expected):
    ppl = torch.arange(1.0, size + 1)
    assert int(qtuning.prune_samples(ppl, ppl.flip(0), ratio).keep.sum()) == expected


@pytest.mark.parametrize(("ratio", "size", "smallest"), [(0.125, 7, 8), (0.29, 3, 4), (1 / 3, 2, 3), (0.01, 99, 100)])
def test_a_batch_that_would_keep_nothing_is_refused_with_the_smallest_that_would_do(ratio, size, smallest):
    ppl = torch.arange(1.0, size + 1)
    with pytest.raises(ValueError, match=rf"\b{smallest}\b"):
        qtuning.prune_samples(ppl, ppl, ratio)
    grown = torch.arange(1.0, smallest + 1)
    assert int(qtuning.prune_samples(grown, grown, ratio).keep.sum()) == 1


def test_keeping_no_sample_at_all_is_refused():
    with pytest.raises(ValueError, match="sample_keep_ratio"):
        qtuning.prune_samples(torch.ones(8), torch.ones(8), 0.0)


def test_supp_score_is_the_distance_of_the_normalised_axes():
    close(qtuning.supp_score(torch.tensor([1.0, 2, 3, 5]), torch.tensor([0.0, 1, 4, 2])), [0.0, 0.0, 0.5, 0.5])


def test_a_constant_axis_normalises_to_zero():
    close(qtuning.supp_score(torch.tensor([3.0, 3, 3]), torch.tensor([0.0, 1, 4])), [0.0, 0.25, 1.0])
    close(qtuning.supp_score(torch.tensor([1.0, 3, 2]), torch.tensor([7.0, 7, 7])), [0.0, 1.0, 0.5])
    close(qtuning.supp_score(torch.tensor([2.0]), torch.tensor([5.0])), [0.0])


def test_backfill_takes_the_largest_supp_scores_of_all_that_is_not_kept():
    # PPL and Ent rise together: no sample in Q2 or Q4. Normalised: ppl 0 1/4 1/2 1, ent 0 1/2 1 1.
    ppl, ent = torch.tensor([1.0, 2, 3, 5]), torch.tensor([1.0, 2, 3, 3])
    half = qtuning.prune_samples(ppl, ent, 0.5)
    same(half.keep, [F, T, T, F])  # supp 0 1/4 1/2 0
    same(half.backfilled, [F, T, T, F])
    same(half.prune_tokens, [F, F, F, F])  # Ent won: as Q4 (C9)
    three = qtuning.prune_samples(ppl, ent, 0.75)
    same(three.keep, [T, T, T, F])  # 0 and 3 tie: the first (C7)


def test_backfill_reaches_samples_in_no_corner():
    # Sample 3 has the middle PPL and the lowest entropy: in no corner, yet of the largest supp-score.
    ppl, ent = torch.tensor([1.0, 2, 4, 3, 5]), torch.tensor([1.0, 3.5, 3, 1, 5])
    pruning = qtuning.prune_samples(ppl, ent, 0.2)
    assert pruning.quadrant[3] == Quadrant.BETWEEN
    same(pruning.keep, [F, F, F, T, F])
    same(pruning.backfilled, [F, F, F, T, F])
    same(pruning.prune_tokens, [F, F, F, T, F])


def test_a_backfilled_sample_is_pruned_as_the_arm_of_the_max_that_won():
    # PPL constant: normalised 0. Of the backfilled, the one of normalised Ent 0 ties and counts as Q2 (C9).
    pruning = qtuning.prune_samples(torch.tensor([3.0, 3, 3]), torch.tensor([2.0, 1, 3]), 1.0)
    same(pruning.quadrant, [3, 3, 4])
    same(pruning.backfilled, [T, T, F])
    same(pruning.prune_tokens, [F, T, F])


def test_kept_corners_come_before_backfill():
    # Q4, Q2 at the ends of the falling diagonal; the rest is filled from between.
    ppl, ent = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])
    pruning = qtuning.prune_samples(ppl, ent, 0.75)
    same(pruning.quadrant, [4, 0, 0, 2])
    same(pruning.keep, [T, T, F, T])
    same(pruning.backfilled, [F, T, F, F])
    same(pruning.prune_tokens, [F, F, F, T])


# ---- Equation 7 (C10, C11, C12) -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [
        (0.0, [1.0, 2.0, 4.0, 8.0]),  # own perplexity only
        (0.5, [2.0, 3.5, 7.0, 10.0]),  # the ends count themselves for the missing neighbour
        (1.0, [3.0, 5.0, 10.0, 12.0]),  # neighbours only
        (0.25, [0.75 + 0.25 * 3, 1.5 + 0.25 * 5, 3 + 0.25 * 10, 6 + 0.25 * 12]),
    ],
)
def test_equation_7_adds_both_neighbours(smoothing, expected):
    token_ppl, mask = torch.tensor([[1.0, 2, 4, 8]]), torch.ones(1, 4, dtype=torch.bool)
    close(qtuning.smoothed_token_score(token_ppl, mask, smoothing), [expected])


def test_a_flat_sequence_scores_flat():
    score = qtuning.smoothed_token_score(torch.full((1, 5), 3.0), torch.ones(1, 5, dtype=torch.bool), 0.5)
    close(score, [[4.5] * 5])


def test_a_single_answer_token_stands_in_for_both_neighbours():
    mask = torch.tensor([[F, T, F]])
    score = qtuning.smoothed_token_score(torch.tensor([[100.0, 2, 100]]), mask, 0.5)
    assert float(score[0, 1]) == 3.0
    same(qtuning.prune_tokens(torch.tensor([[100.0, 2, 100]]), mask, 0.5, 0.5), [[F, T, F]])


def test_prompt_tokens_are_no_neighbours():
    # Two assistant turns: tokens 1, 2 and tokens 4, 5, 6.
    token_ppl = torch.tensor([[NAN, 2.0, 4.0, 1000.0, 8.0, 2.0, 6.0, INF]])
    mask = torch.tensor([[F, T, T, F, T, T, T, F]])
    score = qtuning.smoothed_token_score(token_ppl, mask, 0.5)
    expected = [1 + 0.5 * (2 + 4), 2 + 0.5 * (2 + 4), 4 + 0.5 * (8 + 2), 1 + 0.5 * (8 + 6), 3 + 0.5 * (2 + 6)]
    close(score[mask], expected)


def test_the_highest_scores_are_removed_and_reverse_keeps_them():
    token_ppl, mask = torch.tensor([[1.0, 2, 4, 8]]), torch.ones(1, 4, dtype=torch.bool)
    same(qtuning.prune_tokens(token_ppl, mask, 0.5, 0.5), [[T, T, F, F]])
    same(qtuning.prune_tokens(token_ppl, mask, 0.5, 0.5, reverse=True), [[F, F, T, T]])


def test_smoothing_spares_a_spike_beside_quiet_neighbours():
    # Own perplexity alone removes the spike of 9. Smoothed, the plateau goes: s = 5.5 5.5 8.5 7.5 10 9.5.
    token_ppl, mask = torch.tensor([[1.0, 9, 1, 7, 7, 6]]), torch.ones(1, 6, dtype=torch.bool)
    same(qtuning.prune_tokens(token_ppl, mask, 5 / 6, 0.0), [[T, F, T, T, T, T]])
    same(qtuning.prune_tokens(token_ppl, mask, 5 / 6, 0.5), [[T, T, T, T, F, T]])


@pytest.mark.parametrize(
    ("ratio", "tokens", "expected"),
    [
        (0.5, 4, 2),
        (0.5, 5, 2),
        (0.5, 1, 1),
        (0.29, 100, 29),
        (2 / 7, 7, 2),
        (0.1, 5, 1),
        (0.0, 5, 1),
        (1.0, 5, 5),
    ],
)
def test_the_token_budget_is_the_floor_over_answer_tokens_and_at_least_one(ratio, tokens, expected):
    mask = torch.tensor([[F] * 7 + [T] * tokens + [F] * 5])
    token_ppl = torch.arange(1.0, mask.shape[1] + 1)[None]
    kept = qtuning.prune_tokens(token_ppl, mask, ratio, 0.5)
    same(kept, [[F] * 7 + [T] * expected + [F] * (tokens - expected + 5)])


@pytest.mark.parametrize("reverse", [False, True])
def test_tied_tokens_are_kept_by_position(reverse):
    mask = torch.tensor([[F, T, T, T, T, F]])
    same(qtuning.prune_tokens(torch.full((1, 6), 2.0), mask, 0.5, 0.5, reverse=reverse), [[F, T, T, F, F, F]])


# ---- the whole of Algorithm 1 ---------------------------------------------------------------------------


def test_algorithm_1_on_four_samples():
    # PPL 1 2 4 8, Ent 4 3 2 1: sample 0 in Q4, sample 3 in Q2. Token 0 is the prompt.
    nll = LN2 * torch.tensor([[9.0, 0, 0, 0, 0], [9, 1, 1, 1, 1], [9, 2, 2, 2, 2], [9, 2, 4, 5, 1]])
    entropy = torch.tensor([[9.0] + [value] * 4 for value in (4.0, 3.0, 2.0, 1.0)])
    mask = torch.tensor([[F, T, T, T, T]] * 4)

    pruned = qtuning.prune_batch(nll, entropy, mask, 0.5, 0.5)
    close(pruned.ppl, [1.0, 2, 4, 8])
    close(pruned.ent, [4.0, 3, 2, 1])
    same(pruned.samples.quadrant, [4, 0, 0, 2])
    same(pruned.samples.keep, [T, F, F, T])
    same(pruned.samples.backfilled, [F, F, F, F])
    same(pruned.samples.prune_tokens, [F, F, F, T])
    # Token PPL 4 16 32 2: s = 2 + (4 + 16)/2, 8 + (4 + 32)/2, 16 + (16 + 2)/2, 1 + (32 + 2)/2 = 12 26 25 18.
    same(pruned.token_mask, [[F, T, T, T, T], [F] * 5, [F] * 5, [F, T, F, F, T]])

    fuller = qtuning.prune_batch(nll, entropy, mask, 0.75, 0.5, 0.0)
    # Normalised PPL 0 1/7 3/7 1, Ent 1 2/3 1/3 0: supp 1, 11/21, 2/21, 1. Sample 1 is backfilled, as Q4.
    same(fuller.samples.keep, [T, T, F, T])
    same(fuller.samples.backfilled, [F, T, F, F])
    same(fuller.token_mask, [[F, T, T, T, T], [F, T, T, T, T], [F] * 5, [F, T, F, F, T]])


def test_a_token_loss_too_large_for_a_float32_perplexity_is_the_worst_token():
    nll = torch.tensor([[1.0, 300, 2, 5]])
    pruned = qtuning.prune_batch(nll, torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), 1.0, 0.75, 0.0)
    same(pruned.token_mask, [[T, F, T, T]])


def test_smoothing_is_one_half_unless_said_otherwise():
    nll = LN2 * torch.tensor([[0.0, 3, 0, 2, 2, 2]])  # token PPL 1 8 1 4 4 4; s = 5 5 6.5 4.5 6 6
    entropy, mask = torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool)
    same(qtuning.prune_batch(nll, entropy, mask, 1.0, 5 / 6, 0.0).token_mask, [[T, F, T, T, T, T]])
    same(qtuning.prune_batch(nll, entropy, mask, 1.0, 5 / 6, 0.5).token_mask, [[T, T, F, T, T, T]])
    same(qtuning.prune_batch(nll, entropy, mask, 1.0, 5 / 6).token_mask, [[T, T, F, T, T, T]])
