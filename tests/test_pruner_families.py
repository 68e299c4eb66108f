"""The families of pruners/: budgets, weights and scores that each method promises."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import keep_ratios, token_batches

import qtuning
from pruners.attention import fastv_tokens, sparsevlm_text_tokens
from pruners.deita import centred_units, deita_rows
from pruners.ds2 import curate_labels, ds2_rows, merge_rare_classes, nearest_neighbours, transition_matrix
from pruners.infobatch import infobatch_weights
from pruners.less import adam_direction, count_sketch, influence
from pruners.samples import (
    alpagasus_rows,
    drop_longest_rows,
    entropy_samples,
    every_sample,
    longest_rows,
    random_samples,
    top_rows,
)
from pruners.tokens import highest_ppl_tokens, lowest_ppl_tokens, random_tokens, rho1_tokens, tokencleaning_tokens


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# ------------------------------------------------------------------------------------ rows by one score

scores = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=12)


@given(scores, st.data())
def test_no_row_left_out_scores_above_one_that_is_kept_and_ties_go_to_the_earlier(values, data):
    num_keep = data.draw(st.integers(1, len(values)))
    kept = top_rows(torch.tensor(values), num_keep).tolist()
    assert kept == sorted(kept) and len(set(kept)) == num_keep
    for out in set(range(len(values))) - set(kept):
        assert all(values[row] > values[out] or (values[row] == values[out] and row < out) for row in kept)


@given(scores, st.data())
def test_longest_and_drop_longest_of_different_lengths_share_the_rows_out(values, data):
    lengths = torch.tensor(values) * 100 + torch.arange(len(values))
    num_keep = data.draw(st.integers(1, len(values)))
    kept = longest_rows(lengths, num_keep).tolist()
    if num_keep < len(values):
        assert sorted(kept + drop_longest_rows(lengths, len(values) - num_keep).tolist()) == list(range(len(values)))


@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=12), keep_ratios())
def test_entropy_keeps_the_budget_of_highest_entropy_and_trims_all_of_it(values, ratio):
    ent = torch.tensor(values)
    assume(math.floor(float(ratio) * len(ent) + 1e-9) >= 1)
    chosen = entropy_samples(ent, float(ratio))
    assert int(chosen.keep.sum()) == qtuning.num_samples_to_keep(float(ratio), len(ent))
    assert torch.equal(chosen.prune_tokens, chosen.keep) and not chosen.backfilled.any()
    if not chosen.keep.all():
        assert ent[chosen.keep].min() >= ent[~chosen.keep].max()


@given(st.integers(1, 20), st.floats(0, 1), st.integers(0, 5))
def test_random_samples_keep_exactly_the_budget_and_follow_their_generator(num, ratio, seed):
    assume(math.floor(ratio * num + 1e-9) >= 1)
    chosen = random_samples(num, ratio, generator(seed))
    assert chosen.keep.sum() == qtuning.num_samples_to_keep(ratio, num)
    assert torch.equal(chosen.keep, random_samples(num, ratio, generator(seed)).keep)
    assert torch.equal(chosen.prune_tokens, chosen.keep)


@given(st.integers(1, 12), st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_decision_without_the_plane_keeps_and_trims_what_it_is_given(num, keep):
    assert every_sample(num).keep.tolist() == every_sample(num).prune_tokens.tolist() == [True] * num
    chosen = every_sample(len(keep), torch.tensor(keep))
    assert chosen.keep.tolist() == chosen.prune_tokens.tolist() == keep
    assert chosen.quadrant.tolist() == [qtuning.Quadrant.BETWEEN] * len(keep)
    assert not chosen.backfilled.any() and chosen.thresholds is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_by_row(value):
    with pytest.raises(ValueError, match="row 1: score must be finite"):
        alpagasus_rows(torch.tensor([1.0, value]), 1)


def test_more_rows_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match="between 1 and all of 2 rows, got 3"):
        alpagasus_rows(torch.tensor([1.0, 2.0]), 3)


# -------------------------------------------------------------------------------------------- InfoBatch


@given(st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30), st.floats(1, 8), st.data())
def test_infobatch_keeps_exactly_the_budget_and_its_weights_stand_for_every_row(losses, odds, data):
    num_keep = data.draw(st.integers(1, len(losses)))
    row_loss = torch.tensor(losses)
    weights = infobatch_weights(row_loss, num_keep, generator(), odds=odds)
    assert int((weights > 0).sum()) == num_keep
    assert weights.sum() == pytest.approx(num_keep)  # mean 1 over the kept: raw weights sum to N
    high = row_loss >= row_loss.double().mean()
    if num_keep > 1 and high.any() and not high.all():
        for stratum in (high, ~high):  # each stratum is drawn from, and its weights sum to its rows
            assert (weights[stratum] > 0).any()
            assert weights[stratum].sum() * len(losses) / num_keep == pytest.approx(int(stratum.sum()))
            assert len(weights[stratum & (weights > 0)].unique()) == 1


@given(st.integers(1, 20), st.data())
def test_infobatch_of_equal_losses_is_random(num, data):
    num_keep = data.draw(st.integers(1, num))
    weights = infobatch_weights(torch.full((num,), 0.1), num_keep, generator())
    assert torch.allclose(weights[weights > 0], torch.ones(1, dtype=torch.float64))


@given(st.lists(st.floats(0, 8, width=32), min_size=2, max_size=30), st.data())
def test_infobatch_at_odds_of_one_draws_as_random_does(losses, data):
    num_keep = data.draw(st.integers(2, len(losses)))
    row_loss = torch.tensor(losses)
    weights = infobatch_weights(row_loss, num_keep, generator(), odds=1.0)
    high = row_loss >= row_loss.double().mean()
    expected = num_keep * int(high.sum()) / len(losses)
    assert abs(int((weights[high] > 0).sum()) - expected) <= 1


@given(st.lists(st.floats(0, 8, width=32), min_size=1, max_size=30))
def test_infobatch_of_all_rows_is_plain_training(losses):
    weights = infobatch_weights(torch.tensor(losses), len(losses), generator())
    assert torch.allclose(weights, torch.ones(len(losses), dtype=torch.float64))


def test_infobatch_is_unbiased_reaches_every_row_and_prefers_high_losses():
    row_loss = normal(40, seed=1).exp()
    gradient = normal(40, seed=2).double() + row_loss
    draws = torch.stack([infobatch_weights(row_loss, 10, generator(seed)) for seed in range(4000)])
    estimate = draws @ gradient / 10  # of the mean gradient
    assert (draws > 0).any(dim=0).all()
    assert abs(estimate.mean() - gradient.mean()) < 4 * estimate.std() / 4000**0.5
    drawn = (draws > 0).double().mean(dim=0)
    high = row_loss >= row_loss.mean()
    assert drawn[high].mean() / drawn[~high].mean() == pytest.approx(2, abs=0.35)  # the odds, to whole rows


# --------------------------------------------------------------------------------------- DEITA and DS2


@given(st.integers(2, 14), st.integers(0, 50), st.sampled_from([0.0, 0.5, 0.9]), st.data())
@settings(max_examples=60)
def test_deita_takes_the_best_rows_that_are_unlike_each_other_and_then_the_best_of_the_rest(num, seed, threshold, data):
    num_keep = data.draw(st.integers(1, num))
    embedding, score = normal(num, 3, seed=seed), normal(num, seed=seed + 1).exp()
    embedding[num // 2] = embedding[0]  # one row twice
    rows = deita_rows(score, torch.ones(num), embedding, num_keep, threshold=threshold).tolist()
    assert len(set(rows)) == len(rows) == num_keep
    unit = centred_units(embedding)
    likeness = unit @ unit.T
    like_one_before = [
        place for place in range(num_keep) if any(likeness[rows[place], rows[:place]] > threshold + 1e-6)
    ]
    own = min(like_one_before, default=num_keep)  # from there on, rows that fill the budget
    taken = rows[:own]
    assert score[taken].tolist() == sorted(score[taken].tolist(), reverse=True)
    assert score[rows[own:]].tolist() == sorted(score[rows[own:]].tolist(), reverse=True)
    worst = score[taken[-1]] if own == num_keep else -1
    for row in range(num):  # a row that is passed over has a better one of its kind among the taken
        if row not in taken and score[row] > worst:
            assert any(likeness[row, t] > threshold - 1e-6 and score[t] >= score[row] for t in taken)


def test_deita_takes_a_row_that_stands_twice_once_unless_the_budget_asks_for_more():
    embedding = torch.eye(3)[[0, 0, 1, 2]]
    quality = torch.tensor([6.0, 5.0, 4.0, 3.0])
    assert deita_rows(torch.ones(4), quality, embedding, 3).tolist() == [0, 2, 3]
    assert deita_rows(torch.ones(4), quality, embedding, 4).tolist() == [0, 2, 3, 1]


def noisy_clusters(num, noise, seed=0):
    """(true class, rated class, embedding): tight clusters, each of one class; a share `noise` rated one up, mod 3."""
    random = generator(seed)
    true = torch.randint(3, (num,), generator=random)
    cluster = true * 10 + torch.randint(10, (num,), generator=random)
    centres = torch.randn(30, 16, generator=random)
    embedding = centres[cluster] + 0.05 * torch.randn(num, 16, generator=random)
    wrong = torch.rand(num, generator=random) < noise
    return true, torch.where(wrong, (true + 1) % 3, true), embedding


@given(st.integers(3, 12), st.integers(0, 30), st.data())
@settings(max_examples=30)
def test_neighbours_are_the_nearest_other_rows(num, seed, data):
    count = data.draw(st.integers(1, num - 1))
    embedding = normal(num, 4, seed=seed)
    index, distance = nearest_neighbours(embedding, count, block=4)
    cosine = centred_units(embedding) @ centred_units(embedding).T
    for row in range(num):
        others = sorted(1 - float(cosine[row, j]) for j in range(num) if j != row)[:count]
        assert row not in index[row].tolist()
        assert distance[row].tolist() == pytest.approx(others, abs=1e-5)


def test_the_transition_matrix_is_recovered_from_neighbours():
    true, rated, embedding = noisy_clusters(5000, 0.3)
    neighbours, _ = nearest_neighbours(embedding, 2)
    T, prior = transition_matrix(rated, neighbours, 3)
    expected = 0.7 * torch.eye(3) + 0.3 * torch.eye(3).roll(1, dims=1)
    assert (T - expected).abs().mean() < 0.05
    assert (prior - torch.bincount(true) / 5000).abs().max() < 0.05


def test_ratings_without_noise_are_left_alone_and_noisy_ones_mended():
    for noise in (0.0, 0.3):
        true, rated, embedding = noisy_clusters(600, noise)
        neighbours, distances = nearest_neighbours(embedding, 9)
        T, prior = transition_matrix(rated, neighbours, 3, steps=500)
        mended = curate_labels(rated, neighbours, distances, T, prior)
        if noise:
            assert (rated == true).float().mean() < 0.75 and (mended == true).float().mean() > 0.85
        else:
            assert torch.equal(mended, rated)
            assert (T.diagonal() > 0.97).all()


def test_where_raters_never_err_no_rating_is_mended_whatever_the_neighbours_say():
    _, rated, embedding = noisy_clusters(200, 0.3)
    share = torch.bincount(rated).double() / 200
    mended = curate_labels(rated, *nearest_neighbours(embedding, 9), torch.eye(3).double(), share)
    assert torch.equal(mended, rated)


def test_a_data_set_that_holds_every_row_twice_would_hide_all_noise():
    _, rated, embedding = noisy_clusters(600, 0.3)
    alone, _ = transition_matrix(rated, nearest_neighbours(embedding, 2)[0], 3, steps=500)
    assert alone.diagonal().mean() < 0.8
    copied, _ = nearest_neighbours(torch.cat([embedding, embedding]), 2)
    assert (copied[:, 0] % 600 == torch.arange(1200) % 600).all()  # what the official loader's duplication does
    assert (
        transition_matrix(rated.repeat(2), copied, 3, steps=500)[0].diagonal().mean() > alone.diagonal().mean() + 0.05
    )


@given(st.integers(12, 30), st.integers(0, 20), st.data())
@settings(max_examples=15)
def test_ds2_keeps_the_budget_and_of_one_class_the_most_unusual(num, seed, data):
    num_keep = data.draw(st.integers(1, num))
    embedding = normal(num, 4, seed=seed)
    rows = ds2_rows(torch.full((num,), 3.2), embedding, num_keep)
    unusual = nearest_neighbours(embedding, 10)[1].double().mean(-1)
    assert rows.tolist() == top_rows(unusual, num_keep).tolist()


def test_ds2_takes_the_better_class_first():
    true, _, embedding = noisy_clusters(600, 0.0)
    rows = ds2_rows(true.float() + 2, embedding, 300)
    assert (true[rows] == 2).sum() == (true == 2).sum()
    assert (true[rows] >= 1).all()


def test_rare_classes_join_the_nearest_common_one():
    rating = torch.tensor([0.0] * 1 + [1.4] * 100 + [3.0] * 120 + [5.0] * 2)
    assert merge_rare_classes(rating).tolist() == [0] * 101 + [1] * 122


def test_half_points_are_ratings_of_the_class_above():
    rating = torch.tensor([2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0])
    assert merge_rare_classes(rating).tolist() == [0, 1, 1, 2, 2, 3, 3]


# ------------------------------------------------------------------------------------------------- LESS


def test_a_copied_target_row_has_the_highest_influence_of_all():
    rows = normal(20, 50)
    targets = normal(1, 50, seed=1)
    both = torch.cat([rows, targets])
    scores = influence(both, [targets])
    assert scores.argmax() == 20 and scores[20] == pytest.approx(1)
    assert (influence(both, [normal(3, 50, seed=2), targets]) >= scores - 1e-9).all()  # the best task counts


@given(st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5))
def test_influence_does_not_depend_on_the_size_of_a_loss(scales):
    rows, targets = normal(5, 12), normal(3, 12, seed=1)
    scaled = influence(rows * torch.tensor(scales)[:, None], [targets])
    assert scaled.tolist() == pytest.approx(influence(rows, [targets]).tolist(), abs=1e-5)


def test_the_sketch_keeps_inner_products_on_average():
    a, b = normal(300, seed=1), normal(300, seed=2) + 0.5 * normal(300, seed=1)
    products = []
    for seed in range(2000):
        random = generator(seed)
        buckets = torch.randint(32, (300,), generator=random)
        signs = torch.randint(2, (300,), generator=random) * 2 - 1
        products.append(count_sketch(a, buckets, signs, 32) @ count_sketch(b, buckets, signs, 32))
    products = torch.stack(products)
    assert abs(products.mean() - a @ b) < 4 * products.std() / 2000**0.5


@given(st.integers(0, 20))
def test_adams_direction_is_the_step_that_adam_takes_but_for_its_bias_corrections(seed):
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=1e-12)
    gradients = normal(3, 4, seed=seed).double()
    for step, gradient in enumerate(gradients):
        if step == 2:
            state = optimizer.state[parameter]
            expected = adam_direction(gradient, state["exp_avg"], state["exp_avg_sq"], eps=0.0)
            before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
    corrections = (1 - 0.9**3) / (1 - 0.999**3) ** 0.5
    torch.testing.assert_close((before - parameter.detach()) * corrections, expected)


# ----------------------------------------------------------------------------------------- token pruners


def reference_of(nll):
    return nll.flip(1)


TOKEN_PRUNERS = {  # those that rank by a score given for every token
    "ppl-keep-low": lowest_ppl_tokens,
    "ppl-keep-high": highest_ppl_tokens,
    "fastv": fastv_tokens,
    "sparsevlm-text": sparsevlm_text_tokens,
    "rho1": lambda nll, mask, ratio: rho1_tokens(nll, reference_of(nll), mask, ratio),
    "tokencleaning-row": lambda nll, mask, ratio: tokencleaning_tokens(nll, reference_of(nll), mask, ratio),
}


@given(token_batches(), keep_ratios(), st.sampled_from(sorted(TOKEN_PRUNERS)))
def test_a_token_pruner_keeps_exactly_the_budget_of_answer_tokens_in_every_row(batch, ratio, name):
    nll, _, mask = batch
    kept = TOKEN_PRUNERS[name](nll, mask, float(ratio))
    assert not (kept & ~mask).any()
    assert kept.sum(-1).tolist() == [max(1, math.floor(ratio * n)) for n in mask.sum(-1).tolist()]


@given(token_batches(), keep_ratios(), st.sampled_from(sorted(TOKEN_PRUNERS)), st.data())
def test_padding_and_the_order_of_the_batch_change_no_tokens(batch, ratio, name, data):
    nll, reference, mask = batch
    pruner = {"rho1": rho1_tokens, "tokencleaning-row": tokencleaning_tokens}.get(name)
    scores = (nll,) if pruner is None else (nll, reference)
    pruner = pruner or TOKEN_PRUNERS[name]
    kept = pruner(*scores, mask, float(ratio))
    order = torch.tensor(data.draw(st.permutations(range(len(nll)))))
    assert torch.equal(pruner(*(s[order] for s in scores), mask[order], float(ratio)), kept[order])
    wider = [torch.nn.functional.pad(s, (0, 3), value=9.0) for s in scores]
    assert torch.equal(pruner(*wider, torch.nn.functional.pad(mask, (0, 3)), float(ratio))[:, :-3], kept)


@given(st.integers(1, 20), st.floats(0, 1), st.integers(0, 5))
def test_random_tokens_keep_exactly_the_budget_and_a_rows_draw_depends_on_its_generator_alone(num, ratio, seed):
    def draw(mask, first):
        return random_tokens(mask, ratio, [generator(seed + row) for row in range(first, first + len(mask))])

    mask = torch.rand(3, num, generator=generator(seed)) < 0.7
    mask[:, 0] = True
    tokens = draw(mask, 0)
    assert torch.equal(tokens, draw(mask, 0))
    assert not (tokens & ~mask).any()
    assert tokens.sum(-1).tolist() == [qtuning.num_tokens_to_keep(ratio, n) for n in mask.sum(-1).tolist()]
    wider = torch.nn.functional.pad(mask, (0, 30))
    for row in range(3):
        assert torch.equal(draw(mask[row : row + 1], row)[0], tokens[row])
    assert torch.equal(draw(wider, 0)[:, :num], tokens)


def test_random_tokens_are_uniform_over_the_answer():
    mask = torch.tensor([[False, True, True, True, True, False]])
    draws = torch.stack([random_tokens(mask, 0.5, [generator(seed)])[0] for seed in range(2000)])
    share = draws.float().mean(0)
    assert share[[0, 5]].tolist() == [0, 0]
    assert (share[1:5] - 0.5).abs().max() < 0.05


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(0, n))))
def test_the_low_and_the_high_share_of_perplexities_make_up_the_answer(case):
    order, num_low = case
    nll, mask = torch.tensor([order], dtype=torch.float32), torch.ones(1, len(order), dtype=torch.bool)
    if 0 < num_low < len(order):
        low = lowest_ppl_tokens(nll, mask, num_low / len(order))
        high = highest_ppl_tokens(nll, mask, (len(order) - num_low) / len(order))
        assert torch.equal(low, ~high)
        assert nll[low].max() < nll[high].min()


@given(token_batches(), keep_ratios())
def test_rho1_of_the_base_model_is_tokencleaning_within_rows_and_of_the_reference_ranks_nothing(batch, ratio):
    nll, reference, mask = batch
    first = rho1_tokens(nll, reference, mask, float(ratio))
    assert torch.equal(first, tokencleaning_tokens(nll, reference, mask, float(ratio)))
    flat = rho1_tokens(nll, nll, mask, float(ratio))
    assert torch.equal(flat, qtuning.keep_lowest(torch.zeros_like(nll), mask, float(ratio)))
