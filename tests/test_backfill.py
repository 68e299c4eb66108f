"""Where the backfill draws from: `backfill_quadrants`, an extension of Algorithm 1 line 19."""

import pytest
import torch
import twin
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import planes_and_ratios, supp_scores_are_clear

import qtuning
from qtuning import Quadrant

places = st.lists(st.sampled_from(list(Quadrant)), min_size=1, max_size=5, unique=True)
NOT_Q1 = [q for q in Quadrant if q != Quadrant.HARMFUL_NOISE]


def pruned(drawn, **options):
    plane, ratio = drawn
    return qtuning.prune_samples(*plane, float(ratio), **options)


@given(planes_and_ratios(), places)
def test_the_budget_is_met_exactly_wherever_the_backfill_draws_from(drawn, allowed):
    (ppl, _), ratio = drawn
    num_keep = qtuning.num_samples_to_keep(float(ratio), len(ppl))
    assert pruned(drawn, backfill_quadrants=allowed).keep.sum() == num_keep


@given(planes_and_ratios(), places)
def test_no_other_quadrant_is_drawn_from_while_the_named_ones_hold_a_sample(drawn, allowed):
    found = pruned(drawn, backfill_quadrants=allowed)
    named = torch.isin(found.quadrant, torch.tensor(allowed))
    if bool((found.backfilled & ~named).any()):
        assert bool(found.keep[named].all())


@given(planes_and_ratios(), places)
def test_the_named_quadrants_change_the_backfill_alone(drawn, allowed):
    found, default = pruned(drawn, backfill_quadrants=allowed), pruned(drawn)
    assert torch.equal(found.quadrant, default.quadrant)
    assert torch.equal(found.keep & ~found.backfilled, default.keep & ~default.backfilled)
    assert found.thresholds == default.thresholds


@given(planes_and_ratios())
def test_by_default_the_backfill_draws_from_everywhere(drawn):
    found, default = pruned(drawn, backfill_quadrants=tuple(Quadrant)), pruned(drawn)
    assert torch.equal(found.backfilled, default.backfilled)


@given(planes_and_ratios(), places)
def test_within_the_named_and_the_other_quadrants_the_largest_supp_scores_come_first(drawn, allowed):
    found, score = pruned(drawn, backfill_quadrants=allowed), qtuning.supp_score(*drawn[0])
    named = torch.isin(found.quadrant, torch.tensor(allowed))
    for part in (named, ~named):
        taken, left = score[part & found.backfilled], score[part & ~found.keep]
        assert not len(taken) or not len(left) or taken.min() >= left.max()


@given(planes_and_ratios(), places)
def test_the_backfill_is_the_twins(drawn, allowed):
    plane, ratio = drawn
    ppl, ent = plane[0].tolist(), plane[1].tolist()
    assume(supp_scores_are_clear(ppl, ent))
    found = pruned(drawn, backfill_quadrants=allowed)
    expected = twin.prune_samples(ppl, ent, float(ratio), backfill_quadrants=allowed)
    for name in ("keep", "quadrant", "backfilled", "prune_tokens"):
        assert getattr(found, name).tolist() == getattr(expected, name), name


# Eight samples, two to keep, nothing in Q2 or Q4: the last one is one-sided by the measure of an outlier.
PPL, ENT = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 100]), torch.tensor([1.0, 1.5, 2, 2.5, 3, 3.5, 4, 4.5])


def harmful(samples):
    return bool((samples.keep & (samples.quadrant == Quadrant.HARMFUL_NOISE)).any())


def test_noise_is_not_brought_back_when_q1_is_barred():
    assert harmful(qtuning.prune_samples(PPL, ENT, 0.25))
    assert not harmful(qtuning.prune_samples(PPL, ENT, 0.25, backfill_quadrants=NOT_Q1))


def test_a_mini_batch_passes_its_quadrants_on():
    nll, entropy, mask = PPL.log()[:, None].expand(8, 3), ENT[:, None].expand(8, 3), torch.ones(8, 3, dtype=torch.bool)
    assert harmful(qtuning.prune_batch(nll, entropy, mask, 0.25, 0.5).samples)
    assert not harmful(qtuning.prune_batch(nll, entropy, mask, 0.25, 0.5, backfill_quadrants=NOT_Q1).samples)


@pytest.mark.parametrize("wrong", [[], [5], [-1, 2]])
def test_what_is_no_quadrant_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="backfill_quadrants must be of Quadrant 0 to 4"):
        qtuning.prune_samples(PPL, ENT, 0.5, backfill_quadrants=wrong)
