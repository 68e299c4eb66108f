"""training/ranks.py: shares of work, and draws that are the same on every rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.ranks import Ranks, chosen_device, seeded, share


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5))
def test_shares_are_a_partition_and_no_rank_has_more_to_do_than_another_and_one_item(costs, world):
    hands = share(costs, world)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    load = [sum(costs[i] for i in hand) for hand in hands]
    assert max(load) - min(load) <= max(costs, default=0)
    assert [Ranks(rank, world).share(costs) for rank in range(world)] == hands


keys = st.lists(st.one_of(st.integers(0, 9), st.text("ab1", max_size=2)), min_size=1, max_size=3).map(tuple)


@given(keys, keys)
def test_draws_depend_on_the_key_alone_and_leave_the_global_generator_as_it_was(one, two):
    state = torch.get_rng_state()

    def draw(key):
        return torch.randint(2**62, (2,), generator=seeded(*key)).tolist()

    assert (draw(one) == draw(two)) == (one == two)
    assert torch.equal(state, torch.get_rng_state())


def test_one_rank_alone_shares_with_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with Ranks.joined("cpu") as ranks:
        assert ranks == Ranks.current() == Ranks()
        assert (ranks.gather([1, 2]), ranks.sum(0.5), ranks.first(lambda: "a")) == ([1, 2], 0.5, "a")


def test_a_device_that_torch_does_not_find_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == chosen_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: torch finds no CUDA device"):
        chosen_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen_device(name) for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
