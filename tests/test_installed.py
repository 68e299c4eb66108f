"""What qtuning.py offers to other trainers beside Algorithm 1: logits in chunks, mini-batches of any size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qtuning


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_chunk_size_changes_nothing(rows, positions, chunk_size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, positions + 1, 7, generator=generator)[:, :-1]
    labels = torch.randint(-1, 7, (rows, positions), generator=generator)
    labels[labels < 0] = qtuning.IGNORE_INDEX
    whole = qtuning.token_nll_and_entropy(logits, labels, chunk_size=10_000)
    for a, b in zip(whole, qtuning.token_nll_and_entropy(logits, labels, chunk_size=chunk_size), strict=True):
        assert torch.equal(a, b)


def test_the_chunks_are_all_that_is_made_beside_the_logits(monkeypatch):
    logits, labels = torch.randn(4, 51, 1000)[:, :-1], torch.zeros(4, 50, dtype=torch.int64)
    sizes, log_softmax = [], torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: (sizes.append(len(x)), log_softmax(x, dim))[1])
    nll, entropy = qtuning.token_nll_and_entropy(logits, labels, chunk_size=20)
    assert nll.shape == entropy.shape == (4, 50)
    assert sizes == [20, 20, 10] * 4


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 2, 3), (0, 3), (2, 0)])
def test_labels_of_any_number_of_dimensions_are_scored(shape):
    logits, labels = torch.randn(*shape, 5), torch.zeros(shape, dtype=torch.int64)
    nll, entropy = qtuning.token_nll_and_entropy(logits, labels)
    assert nll.shape == entropy.shape == shape
    torch.testing.assert_close(nll, -logits.log_softmax(-1)[..., 0])


def test_gradients_pass_through_the_chunks():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    nll, _ = qtuning.token_nll_and_entropy(logits, labels, chunk_size=2)
    (got,) = torch.autograd.grad(nll.sum(), logits)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0])


def test_a_chunk_size_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        qtuning.token_nll_and_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), chunk_size=0)


@given(st.integers(1, 9), st.sampled_from([0.0, 0.01, 0.125, 0.5, 1.0]), st.integers(0, 2**32 - 1))
def test_with_keep_one_a_mini_batch_of_any_size_keeps_its_budget_or_one(size, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    nll, entropy = (torch.rand(size, 4, generator=generator) for _ in range(2))
    mask = torch.ones(size, 4, dtype=torch.bool)
    pruned = qtuning.prune_batch(nll, entropy, mask, ratio, 0.5, keep_one=True)
    assert pruned.samples.keep.sum() == max(1, int(ratio * size))
    if ratio * size < 1:
        with pytest.raises(ValueError, match="keeps none of"):
            qtuning.prune_batch(nll, entropy, mask, ratio, 0.5)
