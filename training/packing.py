"""Rows end to end, with nothing padded: the linear layers see one long row, attention sees each row alone.

Shapes: B rows, N tokens of all rows, T positions, d head size.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from data.sft import Sample
from model import Attend, Transformer, attend_rows


def packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups of row indices with at most max_tokens tokens each, by first fit; a longer row is a group of its own.

    The longest row comes first, in a group and among groups; ties by index.
    """
    groups, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((g for g, room in enumerate(free) if lengths[i] <= room), None)
        if place is None:
            groups.append([])
            free.append(max_tokens)
            place = -1
        groups[place].append(i)
        free[place] -= lengths[i]
    return groups


def end_to_end(rows: Sequence[list[int]], device: str | torch.device) -> tuple[Tensor, list[int]]:
    """Token ids of all rows as one row, (1, N) int64, and the length of each."""
    return torch.tensor([[token for row in rows for token in row]], device=device), [len(row) for row in rows]


def pack(samples: Sequence[Sample], device: str | torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Samples end to end, shifted: label n belongs to the token after input n.

    Returns:
        input_ids (1, N) int64, labels (N,) int64, and the length of each row (one less than the sample's).
    """
    input_ids, lengths = end_to_end([s.input_ids[:-1] for s in samples], device)
    return input_ids, torch.tensor([label for s in samples for label in s.labels[1:]], device=device), lengths


def packed(model: Transformer, lengths: list[int]) -> tuple[Tensor, Attend]:
    """Positions (1, N) and attention of rows of these lengths, for `Transformer.hidden_states`."""
    device = model.lm_head.weight.device
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    return position_ids, attend_packed(lengths, model.config.sliding_window, device)


def attend_packed(lengths: list[int], window: int | None, device: torch.device) -> Attend:
    """Causal attention within each of the rows of these lengths, which stand end to end.

    On a GPU in 16 bits it is one varlen_attn call, where its kernel takes heads of this size. Otherwise it is one call
    per row: a mask over all pairs of tokens costs far more.
    """
    each = functools.cache(lambda length: attend_rows(length, window, device))  # a mask only for a row that reads it
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and fits_varlen(q.shape[-1]):
            return varlen_attention(q, k, v, ends, max(lengths), window)
        if len(lengths) == 1:
            return each(lengths[0])(layer, q, k, v)
        rows = zip(lengths, *(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([each(length)(layer, *qkv) for length, *qkv in rows], dim=2)

    return attend


def fits_varlen(head_dim: int) -> bool:
    """Whether the kernel of `varlen_attention` takes heads of this size; attention row by row pads them."""
    return head_dim % 8 == 0 and head_dim <= 256


def check_varlen() -> None:
    """Make sure that this torch has the kernel of `varlen_attention`.

    Raises:
        ValueError: it has not; the version that has.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn

        fits = "window_size" in inspect.signature(varlen_attn).parameters
    except ImportError:
        fits = False
    if not fits:
        raise ValueError(
            f"bf16 on a GPU needs torch 2.11 or newer (torch.nn.attention.varlen.varlen_attn with window_size), found "
            f"{torch.__version__}; --dtype fp32 runs without it"
        )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: int | None) -> Tensor:
    """`attend_packed` on torch's kernel for rows of unequal length; (1, heads, N, d) in and out."""
    from torch.nn.attention import varlen  # see check_varlen

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, heads, d)
    options = {"window_size": (-1 if window is None else window - 1, 0)}  # how many are seen to the left, to the right
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:  # torch 2.11 takes grouped heads unasked
        options["enable_gqa"] = True
    return varlen.varlen_attn(q, k, v, ends, ends, longest, longest, **options).transpose(0, 1)[None]
