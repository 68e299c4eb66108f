"""data/stream.py: the order of rows as a function of the seed, and streams that draw their rows for each epoch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.stream import Stream, stream_order


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_the_stream_is_one_sequence_whatever_slices_it_is_read_in(num_samples, start, first, second, seed):
    middle, stop = start + first, start + first + second
    whole = stream_order(num_samples, start, stop, seed)
    assert whole == stream_order(num_samples, start, middle, seed) + stream_order(num_samples, middle, stop, seed)
    assert whole == stream_order(num_samples, 0, stop, seed)[start:]


@given(st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 2**70))
def test_every_epoch_of_the_stream_is_a_permutation(num_samples, epoch, seed):
    order = stream_order(num_samples, epoch * num_samples, (epoch + 1) * num_samples, seed)
    assert sorted(order) == list(range(num_samples))


def test_epochs_and_seeds_shuffle_differently_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epochs = {tuple(stream_order(50, 50 * e, 50 * e + 50, seed)) for e in range(4) for seed in range(4)}
    assert len(epochs) == 16 and tuple(range(50)) not in epochs
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("arguments", [(0, 0, 1, 0), (3, -1, 1, 0), (3, 2, 1, 0)])
def test_impossible_slices_of_the_stream_are_refused(arguments):
    with pytest.raises(ValueError, match="stream_order: expected num_samples >= 1 and 0 <= start <= stop"):
        stream_order(*arguments)


# ---------------------------------------------------------------------------------------------- Stream


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True), st.integers(0, 30), st.integers(1, 30))
def test_a_stream_of_chosen_rows_gives_them_in_the_order_of_the_seed_at_weight_one(rows, start, size):
    taken, weights = Stream(rows, seed=3).take(start, start + size)
    assert taken == [rows[i] for i in stream_order(len(rows), start, start + size, 3)]
    assert weights.tolist() == [1] * size


class Draws:
    """Draws two rows for each epoch, at weights that depend on the losses, and notes what it was called with."""

    def __init__(self, num_rows):
        self.num_rows, self.calls = num_rows, []

    def __call__(self, row_loss, epoch):
        self.calls.append((epoch, row_loss.tolist()))
        weights = torch.zeros(self.num_rows, dtype=torch.float64)
        drawn = [epoch % self.num_rows, (epoch + 1) % self.num_rows]
        weights[drawn] = torch.tensor([0.5, 1.5]).double() * row_loss.mean()
        return weights


def test_a_stream_that_draws_its_rows_asks_once_per_epoch_with_the_losses_learnt_so_far():
    draws, asked = Draws(4), []

    def first_losses():
        asked.append(True)
        return torch.ones(4, dtype=torch.float64)

    stream = Stream(range(4), 0, draws, first_losses)
    rows, weights = stream.take(0, 3)  # the epoch of rows 0 and 1, and a row of the next
    assert sorted(rows[:2]) == [0, 1] and rows[2] in (1, 2)
    assert [weight for _, weight in sorted(zip(rows[:2], weights.tolist(), strict=False))] == [0.5, 1.5]
    stream.learn([(0, 3.0), (1, 2.0), (0, 4.0)])
    assert {rows[2], *stream.take(3, 4)[0]} == {1, 2}
    stream.take(4, 6)
    assert draws.calls == [(0, [1.0] * 4), (1, [1.0] * 4), (2, [4.0, 2.0, 1.0, 1.0])]
    assert asked == [True]


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_stream_that_loads_its_state_continues_as_if_it_had_not_been_cut(before, after):
    def refuse():
        raise AssertionError("the losses are in the checkpoint")

    whole = Stream(range(5), 0, Draws(5), lambda: torch.arange(5.0, dtype=torch.float64))
    whole.take(0, before)
    whole.learn([(1, 7.0)])
    cut = Stream(range(5), 0, Draws(5), refuse)
    cut.load(copy.deepcopy(whole.state()))
    rows, weights = whole.take(before, before + after)
    rows_after_cut, weights_after_cut = cut.take(before, before + after)
    assert rows_after_cut == rows
    assert torch.equal(weights_after_cut, weights)
    assert torch.equal(cut.row_loss, whole.row_loss)


def test_a_stream_that_draws_nothing_has_nothing_to_save():
    stream = Stream([3, 1], 0)
    stream.take(0, 5)
    assert stream.state() is None
    stream.load(None)
    assert stream.take(5, 7)[0] == Stream([3, 1], 0).take(5, 7)[0]
