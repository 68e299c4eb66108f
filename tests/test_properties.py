"""What holds for every mini-batch, around the bisect search: budgets, backfill, token masks, refusals.

Each test is named for its claim. `twin.py` is Algorithm 1 in plain Python; `strategies.py` says what is
drawn and why so many values are tied. A bug once found stays here as an @example.
"""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
import twin
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import (
    ablations,
    batches_and_ratios,
    keep_ratios,
    masks,
    order_is_clear,
    planes,
    planes_and_ratios,
    smoothings,
    supp_scores_are_clear,
    tensor,
    token_batches,
    token_rows,
    token_scores_are_clear,
)

import qtuning
from qtuning import Quadrant

INF, NAN = float("inf"), float("nan")


def budget(ratio, size):
    """floor(r * B) of the exact fraction r."""
    return math.floor(ratio * size)


def batch_is_clear(nll, token_entropy, loss_mask, smoothing):
    """Does rounding decide nothing in Algorithm 1 on this batch?"""
    rows = list(zip(nll.tolist(), token_entropy.tolist(), loss_mask.tolist(), strict=True))
    ppl = [twin.sample_perplexity(row, mask) for row, _, mask in rows]
    ent = [twin.sample_entropy(row, mask) for _, row, mask in rows]
    return (
        order_is_clear(ppl)
        and order_is_clear(ent)
        and supp_scores_are_clear(ppl, ent, input_error=1e-6)
        and all(token_scores_are_clear(row, mask, smoothing) for row, _, mask in rows)
    )


def assert_same_samples(actual, expected):
    """Two SamplePruning agree in every decision; the twin's holds lists."""
    for name in ("quadrant", "keep", "backfilled", "prune_tokens"):
        one, two = getattr(actual, name), getattr(expected, name)
        assert one.tolist() == (two if isinstance(two, list) else two.tolist()), name


def assert_same_pruning(actual, expected):
    """Two PrunedBatch agree in every decision."""
    assert_same_samples(actual.samples, expected.samples)
    assert torch.equal(actual.token_mask, expected.token_mask)


# ---- stage 1: which samples ------------------------------------------------------------------------------


@given(planes(max_size=64), keep_ratios(), ablations)
@example((torch.ones(3), torch.ones(3)), Fraction(1, 3), {})
@example((torch.ones(3), torch.ones(3)), Fraction(1, 3), {"keep_quadrants": (Quadrant.REDUNDANT_KNOWLEDGE,)})
def test_the_sample_budget_is_met_exactly_or_the_batch_refused(plane, ratio, ablation):
    """C6 and C14, for any batch, ties and constants included, whichever quadrants are kept."""
    size = len(plane[0])
    num_keep = budget(ratio, size)
    if num_keep >= 1:
        assert int(qtuning.prune_samples(*plane, float(ratio), **ablation).keep.sum()) == num_keep
    else:
        smallest = str(math.ceil(1 / ratio)) if ratio > 0 else "sample_keep_ratio"
        with pytest.raises(ValueError, match=rf"\b{smallest}\b"):
            qtuning.prune_samples(*plane, float(ratio))


@given(planes())
def test_keeping_all_keeps_every_sample(plane):
    assert bool(qtuning.prune_samples(*plane, 1.0).keep.all())


@given(planes_and_ratios())
def test_kept_is_q2_and_q4_and_what_backfill_adds(drawn):
    plane, ratio = drawn
    pruning = qtuning.prune_samples(*plane, float(ratio))
    corner = (pruning.quadrant == Quadrant.VALUABLE_MISCONCEPTION) | (pruning.quadrant == Quadrant.CALIBRATION_DATA)
    assert torch.equal(pruning.keep, corner | pruning.backfilled)
    assert not bool((corner & pruning.backfilled).any())


@given(planes_and_ratios())
def test_kept_misconceptions_lose_tokens_and_kept_calibration_data_does_not(drawn):
    """C9: what backfill adds counts as Q2 where its perplexity stands out at least as much as its entropy."""
    plane, ratio = drawn
    assume(supp_scores_are_clear(plane[0].tolist(), plane[1].tolist()))
    pruning = qtuning.prune_samples(*plane, float(ratio))
    ppl, ent = (tensor(list(map(float, twin.min_max_normalised(axis.tolist())))) for axis in plane)
    as_q2 = (pruning.quadrant == Quadrant.VALUABLE_MISCONCEPTION) | (pruning.backfilled & (ppl >= ent))
    assert torch.equal(pruning.prune_tokens, as_q2)


@given(planes_and_ratios())
def test_without_a_word_on_quadrants_q2_and_q4_are_kept_and_q2_is_trimmed(drawn):
    plane, ratio = drawn
    q2, q4 = Quadrant.VALUABLE_MISCONCEPTION, Quadrant.CALIBRATION_DATA
    explicit = qtuning.prune_samples(*plane, float(ratio), keep_quadrants=[q4, q2], trim_quadrants=[q2])
    assert_same_samples(qtuning.prune_samples(*plane, float(ratio)), explicit)


@given(planes_and_ratios(), ablations)
def test_what_is_kept_or_trimmed_without_being_backfilled_lies_in_the_quadrants_asked_for(drawn, ablation):
    plane, ratio = drawn
    pruning = qtuning.prune_samples(*plane, float(ratio), **ablation)
    keep_quadrants = ablation.get("keep_quadrants", qtuning.KEEP_QUADRANTS)
    trim_quadrants = ablation.get("trim_quadrants", qtuning.TRIM_QUADRANTS)
    assert not bool((pruning.prune_tokens & ~pruning.keep).any())
    for x in (pruning.keep & ~pruning.backfilled).nonzero()[:, 0].tolist():
        assert pruning.quadrant[x] in keep_quadrants
        assert bool(pruning.prune_tokens[x]) == (pruning.quadrant[x] in trim_quadrants)
    if not trim_quadrants:
        assert not bool(pruning.prune_tokens.any())


@given(planes_and_ratios(max_size=40), ablations)
def test_backfill_takes_the_largest_supp_scores_and_ties_by_position(drawn, ablation):
    plane, ratio = drawn
    pruning = qtuning.prune_samples(*plane, float(ratio), **ablation)
    supp = qtuning.supp_score(*plane).tolist()
    taken = [x for x, backfilled in enumerate(pruning.backfilled.tolist()) if backfilled]
    left = [x for x, kept in enumerate(pruning.keep.tolist()) if not kept]
    assert all((supp[x], -x) > (supp[y], -y) for x in taken for y in left)


@given(planes_and_ratios(max_size=40), ablations)
@example((tensor([[2.0] * 4, [2.0] * 4]).unbind(), Fraction(1, 2)), {"keep_quadrants": (3,), "trim_quadrants": (3,)})
def test_sample_pruning_is_the_twins(drawn, ablation):
    plane, ratio = drawn
    ppl, ent = plane[0].tolist(), plane[1].tolist()
    assume(supp_scores_are_clear(ppl, ent))
    expected = twin.prune_samples(ppl, ent, float(ratio), **ablation)
    actual = qtuning.prune_samples(*plane, float(ratio), **ablation)
    assert_same_samples(actual, expected)
    assert float(actual.thresholds.alpha) == float(actual.thresholds.beta) == expected.thresholds.alpha


@given(planes())
def test_supp_score_is_the_twins(plane):
    expected = tensor(list(map(float, twin.supp_score(plane[0].tolist(), plane[1].tolist()))))
    actual = qtuning.supp_score(*plane)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert bool(((actual >= 0) & (actual <= 1)).all())


@given(planes_and_ratios(), st.data())
def test_permuting_the_batch_permutes_what_is_kept(drawn, data):
    """Where supp-scores tie, position decides: then the scores kept are the same, not the samples."""
    plane, ratio = drawn
    order = torch.tensor(data.draw(st.permutations(range(len(plane[0])))))
    pruning = qtuning.prune_samples(*plane, float(ratio))
    permuted = qtuning.prune_samples(plane[0][order], plane[1][order], float(ratio))
    assert torch.equal(pruning.quadrant[order], permuted.quadrant)
    supp = qtuning.supp_score(*plane)
    assert sorted(supp[pruning.keep].tolist()) == sorted(supp[order][permuted.keep].tolist())
    if len(supp.unique()) == len(supp):
        assert torch.equal(pruning.keep[order], permuted.keep)
        assert torch.equal(pruning.prune_tokens[order], permuted.prune_tokens)


scales = st.sampled_from([2.0**-30, 0.5, 8.0])


@given(planes_and_ratios(), scales, scales)
def test_scaling_either_axis_by_a_power_of_two_changes_nothing(drawn, scale_ppl, scale_ent):
    """Quadrants look at order only, and min-max normalisation takes the scale out of backfill."""
    (ppl, ent), ratio = drawn
    pruning = qtuning.prune_samples(ppl, ent, float(ratio))
    scaled = qtuning.prune_samples(ppl.double() * scale_ppl, ent.double() * scale_ent, float(ratio))
    assert_same_samples(scaled, pruning)


@given(planes_and_ratios(), st.sampled_from([0.49, 0.5, 0.3, 0.0]), st.integers(1, 20))
def test_upper_and_max_iters_are_those_of_the_search(drawn, upper, max_iters):
    plane, ratio = drawn
    pruning = qtuning.prune_samples(*plane, float(ratio), upper=upper, max_iters=max_iters)
    num_keep = budget(ratio, len(plane[0]))
    assert pruning.thresholds == qtuning.bisect_thresholds(*plane, num_keep, upper=upper, max_iters=max_iters)
    assert torch.equal(pruning.quadrant, qtuning.assign_quadrants(*plane, pruning.thresholds))


# ---- stage 2: which tokens -------------------------------------------------------------------------------


@given(token_rows(), smoothings)
def test_token_scores_are_the_twins(rows, smoothing):
    token_ppl, mask = rows
    score = qtuning.smoothed_token_score(token_ppl, mask, smoothing)
    for x, row in enumerate(mask.tolist()):
        for position, expected in twin.smoothed_token_score(token_ppl[x].tolist(), row, smoothing).items():
            assert Fraction(float(score[x, position])) == expected


@given(token_rows(), keep_ratios(), smoothings, st.booleans())
def test_token_masks_are_the_twins(rows, ratio, smoothing, reverse):
    """Scores are exact here, so ties are ties. The lowest stay (`reverse`: the highest), ties: the first."""
    token_ppl, mask = rows
    kept = qtuning.prune_tokens(token_ppl, mask, float(ratio), smoothing, reverse=reverse)
    for x, row in enumerate(mask.tolist()):
        assert kept[x].tolist() == twin.prune_tokens(token_ppl[x].tolist(), row, float(ratio), smoothing, reverse)


@given(token_rows(), keep_ratios(), smoothings, st.booleans())
@example((torch.ones(1, 7), torch.ones(1, 7, dtype=torch.bool)), Fraction(2, 7), 0.5, False)
def test_a_token_mask_keeps_the_floor_of_the_answer_tokens_and_at_least_one(rows, ratio, smoothing, reverse):
    token_ppl, mask = rows
    kept = qtuning.prune_tokens(token_ppl, mask, float(ratio), smoothing, reverse=reverse)
    assert kept.dtype == torch.bool and kept.shape == mask.shape
    assert not bool((kept & ~mask).any())
    assert kept.sum(1).tolist() == [max(1, budget(ratio, answer)) for answer in mask.sum(1).tolist()]


@given(token_rows(), keep_ratios(), st.booleans())
def test_without_smoothing_tokens_are_ranked_by_their_own_perplexity(rows, ratio, reverse):
    token_ppl, mask = rows
    kept = qtuning.prune_tokens(token_ppl, mask, float(ratio), 0.0, reverse=reverse)
    for x in range(len(mask)):
        answer = mask[x].nonzero().flatten().tolist()
        ranked = sorted(answer, key=lambda i: -token_ppl[x, i] if reverse else token_ppl[x, i])
        assert kept[x].nonzero().flatten().tolist() == sorted(ranked[: int(kept[x].sum())])


@given(token_rows(), smoothings)
def test_reversing_a_sequence_reverses_its_scores(rows, smoothing):
    token_ppl, mask = rows
    score = qtuning.smoothed_token_score(token_ppl, mask, smoothing)
    reversed_score = qtuning.smoothed_token_score(token_ppl.flip(1), mask.flip(1), smoothing)
    assert torch.equal(score.flip(1)[mask.flip(1)], reversed_score[mask.flip(1)])


@given(token_rows(), keep_ratios(), smoothings, st.booleans())
def test_reversing_a_tie_free_sequence_reverses_its_mask(rows, ratio, smoothing, reverse):
    token_ppl, mask = rows
    kept = qtuning.prune_tokens(token_ppl, mask, float(ratio), smoothing, reverse=reverse)
    kept_reversed = qtuning.prune_tokens(token_ppl.flip(1), mask.flip(1), float(ratio), smoothing, reverse=reverse)
    score = qtuning.smoothed_token_score(token_ppl, mask, smoothing)
    for x in range(len(mask)):
        if len(set(score[x][mask[x]].tolist())) == int(mask[x].sum()):
            assert torch.equal(kept[x].flip(0), kept_reversed[x])


@given(st.floats(1, 1e6, width=32), st.floats(0, 1), st.data())
def test_a_flat_sequence_scores_flat_whatever_the_holes(value, smoothing, data):
    mask = tensor(data.draw(masks(1, 10)), torch.bool)
    score = qtuning.smoothed_token_score(torch.full((1, 10), value), mask, smoothing)
    assert len(set(score[mask].tolist())) == 1


@given(token_rows(), keep_ratios(), smoothings)
def test_reverse_keeps_what_is_otherwise_removed(rows, ratio, smoothing):
    """Table 5's ablation: without ties, and with a budget of half, the two masks part the answer."""
    token_ppl, mask = rows
    lowest = qtuning.prune_tokens(token_ppl, mask, 0.5, smoothing)
    highest = qtuning.prune_tokens(token_ppl, mask, 0.5, smoothing, reverse=True)
    score = qtuning.smoothed_token_score(token_ppl, mask, smoothing)
    for x in range(len(mask)):
        answer = int(mask[x].sum())
        if answer % 2 == 0 and len(set(score[x][mask[x]].tolist())) == answer:
            assert torch.equal(lowest[x] ^ highest[x], mask[x])


# ---- Algorithm 1 as a whole ------------------------------------------------------------------------------


@given(batches_and_ratios(), smoothings, st.booleans(), ablations)
def test_algorithm_1_is_the_twins(drawn, smoothing, reverse, ablation):
    batch, sample_ratio, token_ratio = drawn
    assume(batch_is_clear(*batch, smoothing))
    arguments = (float(sample_ratio), float(token_ratio), smoothing)
    actual = qtuning.prune_batch(*batch, *arguments, reverse=reverse, **ablation)
    expected = twin.prune_batch(*(each.tolist() for each in batch), *arguments, reverse, **ablation)
    assert_same_samples(actual.samples, expected.samples)
    assert actual.token_mask.tolist() == expected.token_mask
    torch.testing.assert_close(actual.ppl, tensor(expected.ppl), rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.ent, tensor(expected.ent), rtol=1e-5, atol=1e-7)


@given(batches_and_ratios())
def test_dropped_samples_lose_all_tokens_kept_ones_only_as_misconceptions(drawn):
    (nll, token_entropy, mask), sample_ratio, token_ratio = drawn
    pruned = qtuning.prune_batch(nll, token_entropy, mask, float(sample_ratio), float(token_ratio))
    for x in range(len(nll)):
        answer, kept = mask[x], pruned.token_mask[x]
        if not pruned.samples.keep[x]:
            assert not bool(kept.any())
        elif pruned.samples.prune_tokens[x]:
            assert not bool((kept & ~answer).any())
            assert int(kept.sum()) == max(1, budget(token_ratio, int(answer.sum())))
        else:
            assert torch.equal(kept, answer)


@given(token_batches())
def test_keeping_all_samples_and_tokens_is_plain_fine_tuning(batch):
    assert torch.equal(qtuning.prune_batch(*batch, 1.0, 1.0).token_mask, batch[2])


@given(batches_and_ratios(), st.sampled_from([NAN, INF, -INF, -1.0, 1e30]))
def test_nothing_at_masked_positions_matters(drawn, value):
    (nll, token_entropy, mask), *ratios = drawn
    expected = qtuning.prune_batch(nll, token_entropy, mask, *map(float, ratios))
    overwritten = (nll.masked_fill(~mask, value), token_entropy.masked_fill(~mask, value), mask)
    actual = qtuning.prune_batch(*overwritten, *map(float, ratios))
    assert_same_pruning(actual, expected)
    assert torch.equal(actual.ppl, expected.ppl) and torch.equal(actual.ent, expected.ent)


@given(batches_and_ratios(), st.integers(0, 5), st.integers(0, 5))
def test_padding_on_either_side_changes_nothing(drawn, left, right):
    (nll, token_entropy, mask), *ratios = drawn
    expected = qtuning.prune_batch(nll, token_entropy, mask, *map(float, ratios))
    padded = (F.pad(each, (left, right), value=7.0) for each in (nll, token_entropy))
    actual = qtuning.prune_batch(*padded, F.pad(mask, (left, right)), *map(float, ratios))
    assert_same_samples(actual.samples, expected.samples)
    assert torch.equal(actual.token_mask, F.pad(expected.token_mask, (left, right)))


@given(batches_and_ratios(), st.data())
def test_permuting_the_rows_permutes_the_token_masks(drawn, data):
    """Unless supp-scores tie: then position decides which samples are kept."""
    batch, *ratios = drawn
    order = torch.tensor(data.draw(st.permutations(range(len(batch[0])))))
    expected = qtuning.prune_batch(*batch, *map(float, ratios))
    actual = qtuning.prune_batch(*(each[order] for each in batch), *map(float, ratios))
    assert torch.equal(expected.samples.quadrant[order], actual.samples.quadrant)
    supp = qtuning.supp_score(expected.ppl, expected.ent)
    if len(supp.unique()) == len(supp) or not bool(expected.samples.backfilled.any()):
        assert torch.equal(expected.token_mask[order], actual.token_mask)


@given(batches_and_ratios(), smoothings)
def test_inputs_stay_as_they_are_and_the_same_inputs_give_the_same_result(drawn, smoothing):
    (nll, token_entropy, mask), *ratios = drawn
    batch = (nll.masked_fill(~mask, NAN), token_entropy.masked_fill(~mask, NAN), mask)
    before = [each.clone() for each in batch]
    first = qtuning.prune_batch(*batch, *map(float, ratios), smoothing)
    for one, two in zip(batch, before, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    assert_same_pruning(qtuning.prune_batch(*batch, *map(float, ratios), smoothing), first)


@given(batches_and_ratios(), st.sampled_from([0.49, 0.3]), st.integers(1, 20))
def test_upper_and_max_iters_reach_the_search(drawn, upper, max_iters):
    batch, *ratios = drawn
    pruned = qtuning.prune_batch(*batch, *map(float, ratios), upper=upper, max_iters=max_iters)
    samples = qtuning.prune_samples(pruned.ppl, pruned.ent, float(ratios[0]), upper=upper, max_iters=max_iters)
    assert pruned.samples.thresholds == samples.thresholds
    assert_same_samples(pruned.samples, samples)


@given(st.floats(2.0**-10, 20, width=32), st.data())
def test_the_perplexity_of_a_constant_loss_does_not_depend_on_its_length(nll, data):
    """Means of equal numbers are equal: rounding must not make a longer row look worse than a shorter one."""
    mask = tensor(data.draw(masks(9, 12)), torch.bool)
    assert len(set(qtuning.sample_perplexity(torch.full((9, 12), nll), mask).tolist())) == 1
    assert len(set(qtuning.sample_entropy(torch.full((9, 12), nll), mask).tolist())) == 1


@given(token_batches())
def test_perplexity_and_entropy_are_the_twins(batch):
    nll, token_entropy, mask = batch
    ppl = [twin.sample_perplexity(row, answer) for row, answer in zip(nll.tolist(), mask.tolist(), strict=True)]
    ent = [twin.sample_entropy(row, answer) for row, answer in zip(token_entropy.tolist(), mask.tolist(), strict=True)]
    torch.testing.assert_close(qtuning.sample_perplexity(nll, mask), tensor(ppl), rtol=1e-5, atol=0, check_dtype=False)
    torch.testing.assert_close(
        qtuning.sample_entropy(token_entropy, mask), tensor(ent), rtol=1e-5, atol=1e-7, check_dtype=False
    )
    assert bool((qtuning.sample_perplexity(nll, mask) >= 1).all())


# ---- token losses and entropies from logits --------------------------------------------------------------


@st.composite
def logits_and_labels(draw, max_rows=4, max_columns=6, max_vocabulary=9):
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    vocabulary = draw(st.integers(2, max_vocabulary))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, columns, vocabulary, generator=generator)
    labels = st.lists(st.one_of(st.integers(0, vocabulary - 1), st.just(-100)), min_size=columns, max_size=columns)
    labels = draw(st.lists(labels.filter(lambda row: row != [-100] * columns), min_size=rows, max_size=rows))
    return logits, torch.tensor(labels)


@given(logits_and_labels())
def test_nll_is_cross_entropy(drawn):
    logits, labels = drawn
    nll, _ = qtuning.token_nll_and_entropy(logits, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(nll, expected.view_as(labels), rtol=1e-5, atol=1e-5)
    mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(nll.sum() / (labels != -100).sum(), mean, rtol=1e-5, atol=1e-5)


@given(logits_and_labels())
def test_nll_and_entropy_are_the_twins(drawn):
    logits, labels = drawn
    nll, entropy = qtuning.token_nll_and_entropy(logits, labels)
    for x, row in enumerate(labels.tolist()):
        for position, label in enumerate(row):
            expected = (0.0, 0.0) if label == -100 else twin.token_nll_and_entropy(logits[x, position].tolist(), label)
            actual = (float(nll[x, position]), float(entropy[x, position]))
            assert actual == pytest.approx(expected, rel=1e-5, abs=1e-4)


@given(logits_and_labels())
def test_perplexity_is_at_least_one_and_entropy_between_zero_and_log_v(drawn):
    logits, labels = drawn
    nll, entropy = qtuning.token_nll_and_entropy(logits, labels)
    mask = labels != -100
    rounding = 1e-5 * (1 + float(logits.abs().max()))
    assert bool((qtuning.sample_perplexity(nll, mask) >= 1 - rounding).all())
    assert bool((entropy >= -rounding).all())
    assert bool((entropy <= math.log(logits.shape[-1]) + rounding).all())


@given(logits_and_labels(), st.sampled_from([-64.0, -1.0, 0.5, 256.0]))
def test_adding_a_constant_to_the_logits_changes_nothing_but_rounding(drawn, constant):
    logits, labels = drawn
    rounding = 1e-6 * (float(logits.abs().max()) + abs(constant)) + 1e-6
    for one, two in zip(
        qtuning.token_nll_and_entropy(logits, labels),
        qtuning.token_nll_and_entropy(logits + constant, labels),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=4 * rounding)


@given(logits_and_labels())
def test_bf16_logits_are_scored_in_fp32(drawn):
    """C15: the result is that of the same logits in fp32, to the last bit that fp32 holds."""
    logits, labels = drawn
    logits = logits.bfloat16()
    for low, full in zip(
        qtuning.token_nll_and_entropy(logits, labels),
        qtuning.token_nll_and_entropy(logits.float(), labels),
        strict=True,
    ):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, full, rtol=1e-6, atol=1e-6)


@given(logits_and_labels(), st.sampled_from([NAN, INF, -INF]))
def test_logits_of_untrainable_labels_do_not_matter_and_score_zero(drawn, value):
    logits, labels = drawn
    expected = qtuning.token_nll_and_entropy(logits, labels)
    overwritten = logits.masked_fill((labels == -100)[..., None], value)
    for one, two in zip(qtuning.token_nll_and_entropy(overwritten, labels), expected, strict=True):
        assert torch.equal(one, two)
        assert not bool(one[labels == -100].any())


@given(logits_and_labels())
def test_logits_and_labels_stay_as_they_are(drawn):
    logits, labels = drawn
    before = logits.clone(), labels.clone()
    qtuning.token_nll_and_entropy(logits, labels)
    assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])


# ---- refusals: one clear message, naming the row and what came -------------------------------------------


@given(token_batches(), st.sampled_from([NAN, INF, -INF]), st.booleans(), st.data())
def test_a_loss_or_entropy_that_is_not_finite_is_refused_with_its_row(batch, value, in_nll, data):
    nll, token_entropy, mask = batch
    row = data.draw(st.integers(0, len(nll) - 1))
    position = data.draw(st.sampled_from(mask[row].nonzero().flatten().tolist()))
    (nll if in_nll else token_entropy)[row, position] = value
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{row}\b)(?=.*{value})"):
        qtuning.prune_batch(nll, token_entropy, mask, 1.0, 0.5)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{row}\b)(?=.*{value})"):
        qtuning.sample_perplexity(nll, mask) if in_nll else qtuning.sample_entropy(token_entropy, mask)


@given(planes(), st.sampled_from([NAN, INF, -INF]), st.booleans(), st.data())
def test_a_perplexity_or_entropy_that_is_not_finite_is_refused_with_its_row(plane, value, in_ppl, data):
    ppl, ent = plane
    row = data.draw(st.integers(0, len(ppl) - 1))
    (ppl if in_ppl else ent)[row] = value
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{row}\b)(?=.*{value})"):
        qtuning.prune_samples(ppl, ent, 1.0)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{row}\b)(?=.*{value})"):
        qtuning.bisect_thresholds(ppl, ent, 1)


@given(token_rows(), st.sampled_from([NAN, INF, -INF]), st.data())
def test_a_token_perplexity_that_is_not_finite_is_refused_with_its_row(rows, value, data):
    token_ppl, mask = rows
    row = data.draw(st.integers(0, len(mask) - 1))
    token_ppl[row, data.draw(st.sampled_from(mask[row].nonzero().flatten().tolist()))] = value
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{row}\b)(?=.*{value})"):
        qtuning.prune_tokens(token_ppl, mask, 0.5, 0.5)


@given(token_batches(), st.data())
def test_a_row_without_a_trainable_token_is_refused(batch, data):
    nll, token_entropy, mask = batch
    row = data.draw(st.integers(0, len(nll) - 1))
    mask[row] = False
    for refused in (
        lambda: qtuning.prune_batch(nll, token_entropy, mask, 1.0, 0.5),
        lambda: qtuning.sample_perplexity(nll, mask),
        lambda: qtuning.sample_entropy(token_entropy, mask),
        lambda: qtuning.prune_tokens(nll.exp(), mask, 0.5, 0.5),
    ):
        with pytest.raises(ValueError, match=rf"\b{row}\b"):
            refused()


GOOD = (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        ((GOOD[0][:, :2], GOOD[1], GOOD[2]), r"\(2, 2\)"),
        ((GOOD[0], GOOD[1][:1], GOOD[2]), r"\(1, 3\)"),
        ((GOOD[0], GOOD[1], GOOD[2].T), r"\(3, 2\)"),
        ((GOOD[0][0], GOOD[1][0], GOOD[2][0]), r"\(3,\)"),
        ((GOOD[0], GOOD[1], GOOD[2].long()), "int64"),
        ((GOOD[0], GOOD[1], GOOD[2].float()), "float32"),
    ],
)
def test_wrong_shapes_and_types_are_refused_with_what_came(batch, came):
    with pytest.raises(ValueError, match=came):
        qtuning.prune_batch(*batch, 0.5, 0.5)


@pytest.mark.parametrize("name", ["sample_keep_ratio", "token_keep_ratio", "smoothing"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF])
def test_ratios_and_smoothing_outside_zero_to_one_are_refused_by_name(name, value):
    arguments = {"sample_keep_ratio": 0.5, "token_keep_ratio": 0.5, "smoothing": 0.5, name: value}
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{name})(?=.*{value})"):
        qtuning.prune_batch(*GOOD, **arguments)


def test_sample_axes_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"(?s)(?=.*\(3,\))(?=.*\(4,\))"):
        qtuning.prune_samples(torch.ones(3), torch.ones(4), 1.0)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        qtuning.prune_samples(torch.ones(2, 2), torch.ones(2, 2), 1.0)


def test_labels_outside_the_vocabulary_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"in \[0, 5\) or -100, got 7 at \[0, 1\]"):
        qtuning.token_nll_and_entropy(torch.zeros(1, 2, 5), torch.tensor([[0, 7]]))
    with pytest.raises(ValueError, match="got 5 at"):
        qtuning.token_nll_and_entropy(torch.zeros(1, 2, 5), torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="-1"):
        qtuning.token_nll_and_entropy(torch.zeros(1, 2, 5), torch.tensor([[0, -1]]))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        qtuning.token_nll_and_entropy(torch.zeros(1, 2, 5), torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("upper", [-0.01, 0.51, NAN])
def test_a_search_interval_beyond_one_half_is_refused(upper):
    with pytest.raises(ValueError, match=str(upper)):
        qtuning.bisect_thresholds(torch.ones(3), torch.ones(3), 1, upper=upper)


@pytest.mark.parametrize("quadrants", [[Quadrant.BETWEEN], [2, 0], [5]])
def test_quadrants_other_than_the_four_are_refused(quadrants):
    for name in ("keep_quadrants", "trim_quadrants"):
        with pytest.raises(ValueError, match=rf"(?s){name} .*\b{int(quadrants[-1])}\b"):
            qtuning.prune_batch(*GOOD, 0.5, 0.5, **{name: quadrants})
    with pytest.raises(ValueError, match="keep_quadrants must name one"):
        qtuning.prune_batch(*GOOD, 0.5, 0.5, keep_quadrants=())


@pytest.mark.parametrize("gamma", [-0.1, 1.1, NAN])
def test_a_quantile_outside_zero_to_one_is_refused(gamma):
    with pytest.raises(ValueError, match=str(gamma)):
        qtuning.quantile(torch.ones(3), gamma)


def test_a_quantile_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"\(0,\)"):
        qtuning.quantile(torch.ones(0), 0.5)


# ---- devices ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(batches_and_ratios(), smoothings)
def test_decisions_do_not_depend_on_the_device(drawn, smoothing):
    batch, *ratios = drawn
    assume(batch_is_clear(*batch, smoothing))
    arguments = (*map(float, ratios), smoothing)
    on_gpu = qtuning.prune_batch(*(each.cuda() for each in batch), *arguments)
    on_cpu = qtuning.prune_batch(*batch, *arguments)
    assert_same_samples(on_gpu.samples, on_cpu.samples)
    assert torch.equal(on_gpu.token_mask.cpu(), on_cpu.token_mask)
