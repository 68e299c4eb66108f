"""training/head.py: tiled heads against their definitions, one whole softmax at a time."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import FAMILIES, assert_same_gradients, families, lora_model, samples, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qtuning
from data.sft import Sample
from training import head
from training.head import HeadLoss, TokenLoss, head_nll_and_entropy
from training.packing import pack
from training.scoring import score


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest tensor made has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.floats(0, 60), st.integers(0, 99)
)
def test_the_tiled_head_equals_the_definition_in_float64(num_tokens, vocab, rows, columns, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (num_tokens, vocab))
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    hidden *= scale / 6  # up to logits far apart: almost no entropy, NLLs of hundreds
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.TILE, "cpu", (rows, columns))
        nll, entropy = head_nll_and_entropy(hidden, weight, labels)
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    exact_nll = -log_p.gather(1, labels[:, None])[:, 0]
    exact_entropy = -(log_p.exp() * log_p).sum(-1)
    assert (nll.double() - exact_nll).abs().max() <= 5e-5 * max(1.0, scale / 6)
    assert (entropy.double() - exact_entropy).abs().max() <= 5e-5 * max(1.0, scale / 6)
    literal = qtuning.token_nll_and_entropy((hidden @ weight.T)[None], labels[None])
    torch.testing.assert_close(torch.stack([nll, entropy]), torch.stack(literal)[:, 0], rtol=1e-4, atol=1e-4)


@given(st.integers(0, 9), st.integers(2, 20), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_the_heads_loss_and_gradients_equal_the_plain_ones(num_tokens, vocab, rows, trained, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (num_tokens, vocab))
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    token_weights = torch.rand(num_tokens, generator=generator)
    results = []
    for tiled in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        if tiled:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(head.LOSS_ROWS, "cpu", rows)
                loss, nll = HeadLoss.apply(h, w, labels, token_weights)
        else:
            nll = F.cross_entropy(h @ w.T, labels, reduction="none")
            loss = (nll * token_weights).sum()
        (3 * loss).backward()
        results.append([loss.detach(), nll.detach(), h.grad, *([w.grad] if trained else [])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@given(families, samples(), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_the_packed_loss_has_the_gradients_of_rows_one_by_one(family, rows, lora, checkpointing):
    make = lora_model if lora else small_model
    packed, plain = make(**FAMILIES[family]), make(**FAMILIES[family])
    loss, _ = TokenLoss(packed, checkpointing)(*pack(rows, "cpu"))
    loss.backward()
    expected = torch.zeros(())
    for row in rows:
        logits = plain(torch.tensor([row.input_ids[:-1]]))[0]
        expected = expected + F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(packed, plain)


def test_a_batch_without_a_labelled_token_has_loss_zero_and_zero_gradients():
    for model in (small_model(), lora_model()):
        loss, nll = TokenLoss(model)(*pack([Sample("", [0, 0, 0], [-100] * 3)], "cpu"))
        loss.backward()
        assert (loss.item(), len(nll)) == (0, 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trained)


def test_no_tensor_of_all_tokens_times_the_vocabulary_is_made(monkeypatch):
    """Here V is large: a (tokens, V) tensor would have 40 x 5000 elements, the weights have 5000 x 16."""
    monkeypatch.setitem(head.TILE, "cpu", (8, 64))
    monkeypatch.setitem(head.LOSS_ROWS, "cpu", 8)
    rows = [Sample(str(i), list(range(11)), [-100, *range(1, 11)]) for i in range(4)]
    model = small_model(vocab_size=5000)
    with LargestTensor() as scoring:
        score(model, rows, 1000, nullcontext())
    assert scoring.elements < 40 * 64
    with LargestTensor() as training:
        loss, _ = TokenLoss(model)(*pack(rows, "cpu"))
        loss.backward()
    assert training.elements == 5000 * 16
