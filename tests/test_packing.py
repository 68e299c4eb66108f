"""training/packing.py: rows end to end against rows alone, and groups within the token budget."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import FAMILIES, families, small_model, token_ids
from torch.nn.attention import varlen

from training.packing import attend_packed, packed, packs, varlen_attention


def packed_and_alone(model, rows, device="cpu"):
    """The last hidden states of rows end to end, and of each row alone, (N, H) both."""
    input_ids = torch.tensor([list(itertools.chain(*rows))], device=device)
    together = model.hidden_states(input_ids, *packed(model, list(map(len, rows))))[0]
    alone = torch.cat([model.hidden_states(torch.tensor([row], device=device))[0] for row in rows])
    return together, alone


@given(families, st.lists(token_ids, min_size=1, max_size=5))
@settings(max_examples=30)
def test_packed_rows_have_the_hidden_states_of_rows_alone(family, rows):
    together, alone = packed_and_alone(small_model(**FAMILIES[family]), rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signature", ["torch 2.11", "torch 2.13"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_gpu_kernel_gets_the_arguments_under_which_it_computes_each_row_alone(monkeypatch, family, signature):
    """The kernel itself needs a GPU: here a function with its signature takes its place and computes row by row."""
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
            # Grouped heads: the kernel takes them; from torch 2.12 on, its Python side asks for enable_gqa.
            parts.append(F.scaled_dot_product_attention(*qkv, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
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
    expected = attend_packed(lengths, window, torch.device("cpu"))(0, q, k, v)
    torch.testing.assert_close(varlen_attention(q, k, v, ends, 4, window), expected)
    assert asked == [((2, 0) if window else (-1, 0), signature == "torch 2.13")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_rows_on_a_gpu_in_bf16_have_the_hidden_states_of_rows_alone():
    model = small_model(head_dim=16).to("cuda", torch.bfloat16)
    together, alone = packed_and_alone(model, [list(range(5)), [7], list(range(20))], "cuda")
    assert (together.float() - alone.float()).norm() <= 0.03 * alone.float().norm()


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_packs_are_a_partition_within_the_budget(lengths, max_tokens):
    groups = packs(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert all(total <= max_tokens or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    assert sum(2 * total <= max_tokens for total in sums) <= 1  # two half-empty ones would have been one
