"""passes.py: packed passes and tiled heads against their definitions, one row and one whole softmax at a time."""

import inspect
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import FAMILIES, VOCAB, lora_model, small_model
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
import passes
import qtuning
from data.sft import Sample, share

tokens = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=12)


@st.composite
def samples(draw, max_size=6):
    """Rows of which some tokens after the first are answers, at least one."""
    rows = []
    for i, ids in enumerate(draw(st.lists(tokens, min_size=1, max_size=max_size))):
        answer = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1).filter(any))
        labels = [-100, *(token if is_answer else -100 for token, is_answer in zip(ids[1:], answer, strict=True))]
        rows.append(Sample(str(i), ids, labels))
    return rows


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest tensor made has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def assert_same_gradients(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 2e-5 * q.grad.norm() + 2e-5, name


# ------------------------------------------------------------------------------------------ packed rows


@given(st.sampled_from(list(FAMILIES)), st.lists(tokens, min_size=1, max_size=5))
@settings(max_examples=30)
def test_packed_rows_have_the_hidden_states_of_rows_alone(family, rows):
    model = small_model(**FAMILIES[family])
    packed = model.hidden_states(torch.tensor([list(itertools.chain(*rows))]), lengths=list(map(len, rows)))[0]
    alone = torch.cat([model.hidden_states(torch.tensor([row]))[0] for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@given(st.sampled_from(list(FAMILIES)), samples(), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_the_packed_loss_has_the_gradients_of_rows_one_by_one(family, rows, lora, checkpointing):
    make = lora_model if lora else small_model
    packed, plain = make(**FAMILIES[family]), make(**FAMILIES[family])
    packed.activation_checkpointing = checkpointing
    loss, _ = passes.TokenLoss(packed)(*passes.pack(rows, "cpu"))
    loss.backward()
    expected = torch.zeros(())
    for row in rows:
        logits = plain(torch.tensor([row.input_ids[:-1]]))[0]
        expected = expected + F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(packed, plain)


@given(st.sampled_from(list(FAMILIES)), samples(), st.booleans(), st.data())
@settings(max_examples=20)
def test_rows_trained_on_what_scoring_left_have_the_gradients_of_a_forward_of_their_own(family, rows, lora, data):
    make = lora_model if lora else small_model
    reused, plain = make(**FAMILIES[family]), make(**FAMILIES[family])
    outputs = {}
    passes.score(reused, rows, data.draw(st.sampled_from([1, 15, 1000])), nullcontext(), outputs)
    kept = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    known = [torch.cat(parts) for parts in zip(*(outputs[i] for i in kept), strict=True)]
    batch = passes.pack([rows[i] for i in kept], "cpu")
    calls = []
    for layer in reused.model["layers"]:
        layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss, nll = passes.TokenLoss(reused)(*batch, known=known)
    assert not calls  # the way forward is there already
    loss.backward()
    assert calls == [True] * len(known)
    expected, expected_nll = passes.TokenLoss(plain)(*batch)
    expected.backward()
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-5)
    assert_same_gradients(reused, plain)


@pytest.mark.parametrize("signature", ["torch 2.11", "torch 2.13"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_gpu_kernel_is_asked_for_what_the_rows_alone_would_compute(monkeypatch, family, signature):
    """The kernel itself needs a GPU: here one with its signature stands in, and computes row by row."""
    asked = []

    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == max(cu_seq_q.diff())
        asked.append((window_size, enable_gqa))
        parts = []
        for start, stop in itertools.pairwise(cu_seq_q):
            distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
            left, right = (n if n >= 0 else 10**9 for n in window_size)
            seen = (distance <= left) & (-distance <= right)
            qkv = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*qkv, attn_mask=seen, enable_gqa=enable_gqa)[0].transpose(0, 1))
        return torch.cat(parts)

    def older(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        return kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    real = inspect.signature(varlen.varlen_attn).parameters
    assert list(real)[3:7] == list(inspect.signature(kernel).parameters)[3:7]
    assert {"window_size", "enable_gqa"} <= real.keys()
    monkeypatch.setattr(varlen, "varlen_attn", kernel if signature == "torch 2.13" else older)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 6), torch.randn(1, 2, 9, 6), torch.randn(1, 2, 9, 6)
    window, lengths = FAMILIES[family].get("sliding_window"), [4, 1, 4]
    ends = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    expected = model_file.attend_packed(lengths, window, torch.device("cpu"))(0, q, k, v)
    torch.testing.assert_close(model_file.varlen_attention(q, k, v, ends, 4, window), expected)
    assert asked == [((2, 0) if window else (-1, 0), signature == "torch 2.13")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_rows_on_a_gpu_in_bf16_have_the_hidden_states_of_rows_alone():
    model = small_model(head_dim=16).to("cuda", torch.bfloat16)
    rows = [list(range(5)), [7], list(range(20))]
    packed = model.hidden_states(
        torch.tensor([list(itertools.chain(*rows))], device="cuda"), lengths=list(map(len, rows))
    )[0]
    alone = torch.cat([model.hidden_states(torch.tensor([row], device="cuda"))[0] for row in rows])
    assert (packed.float() - alone.float()).norm() <= 0.03 * alone.float().norm()


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_packs_are_a_partition_within_the_budget(lengths, max_tokens):
    groups = passes.packs(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert all(total <= max_tokens or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    assert sum(2 * total <= max_tokens for total in sums) <= 1  # two half-empty ones would have been one


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5))
def test_shares_are_a_partition_and_no_rank_has_more_to_do_than_another_and_one_item(costs, world):
    hands = share(costs, world)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    load = [sum(costs[i] for i in hand) for hand in hands]
    assert max(load) - min(load) <= max(costs, default=0)


# ------------------------------------------------------------------------------------------ the head


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.floats(0, 60), st.integers(0, 99)
)
def test_the_tiled_head_equals_the_definition_in_float64(num_tokens, vocab, rows, columns, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (num_tokens, vocab))
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    hidden *= scale / 6  # up to logits far apart: almost no entropy, NLLs of hundreds
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(passes.TILE, "cpu", (rows, columns))
        nll, entropy = passes.head_nll_and_entropy(hidden, weight, labels)
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
                patch.setitem(passes.LOSS_ROWS, "cpu", rows)
                loss, nll = passes.HeadLoss.apply(h, w, labels, token_weights)
        else:
            nll = F.cross_entropy(h @ w.T, labels, reduction="none")
            loss = (nll * token_weights).sum()
        (3 * loss).backward()
        results.append([loss.detach(), nll.detach(), h.grad, *([w.grad] if trained else [])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_labelled_token_has_loss_zero_and_zero_gradients():
    for model in (small_model(), lora_model()):
        loss, nll = passes.TokenLoss(model)(*passes.pack([Sample("", [0, 0, 0], [-100] * 3)], "cpu"))
        loss.backward()
        assert (loss.item(), len(nll)) == (0, 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trained)


def test_no_tensor_of_all_tokens_times_the_vocabulary_is_made(monkeypatch):
    """Here V is large: a (tokens, V) tensor would have 40 x 5000 elements, the weights have 5000 x 16."""
    monkeypatch.setitem(passes.TILE, "cpu", (8, 64))
    monkeypatch.setitem(passes.LOSS_ROWS, "cpu", 8)
    rows = [Sample(str(i), list(range(11)), [-100, *range(1, 11)]) for i in range(4)]
    model = small_model(vocab_size=5000)
    with LargestTensor() as scoring:
        passes.score(model, rows, 1000, nullcontext())
    assert scoring.elements < 40 * 64
    with LargestTensor() as training:
        loss, _ = passes.TokenLoss(model)(*passes.pack(rows, "cpu"))
        loss.backward()
    assert training.elements == 5000 * 16


# ---------------------------------------------------------------------------------- scores of samples


@given(samples(), st.integers(1, 40))
@settings(max_examples=30)
def test_scores_are_those_of_the_definition_whatever_the_passes(rows, pass_tokens):
    model = small_model()
    nll, entropy, loss_mask = passes.score(model, rows, pass_tokens, nullcontext())
    for i, row in enumerate(rows):
        labels, T = torch.tensor([row.labels[1:]]), len(row.labels) - 1
        expected = qtuning.token_nll_and_entropy(model(torch.tensor([row.input_ids[:-1]])), labels)
        torch.testing.assert_close((nll[i, None, :T], entropy[i, None, :T]), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(loss_mask[i, :T], labels[0] != -100)
        assert not loss_mask[i, T:].any()
        assert not nll[i][~loss_mask[i]].any()


@given(st.lists(st.integers(3, 20), min_size=8, max_size=16), st.integers(0, 999), st.integers(1, 40))
@settings(max_examples=30)
def test_scoring_the_window_at_once_keeps_the_sets_of_scoring_each_mini_batch(lengths, seed, pass_tokens):
    """Of rows that differ: between equal scores the last bit of a product decides, and that depends on its company."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(VOCAB, generator=generator)[:length].tolist() for length in lengths]
    rows = [Sample(str(i), ids, [-100, *ids[1:]]) for i, ids in enumerate(shuffled[: len(shuffled) // 4 * 4])]
    size, model = 4, small_model(seed)
    nll, entropy, loss_mask = passes.score(model, rows, pass_tokens, nullcontext())
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        alone = passes.score(model, rows[part], 1000, nullcontext())
        width = alone[0].shape[1]
        kept = [
            qtuning.prune_batch(*scores, 0.5, 0.5)
            for scores in (alone, (nll[part, :width], entropy[part, :width], loss_mask[part, :width]))
        ]
        assert torch.equal(kept[0].samples.keep, kept[1].samples.keep)
        assert torch.equal(kept[0].token_mask, kept[1].token_mask)
