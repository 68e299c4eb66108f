"""Pruners of tokens by attention: FastV and SparseVLM, as far as they carry over to text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sft import Sample
from model import Attend, Transformer
from qtuning import IGNORE_INDEX, keep_lowest
from training.packing import end_to_end, packed, packs


def queries_and_keys(
    model: Transformer, input_ids: Tensor, position_ids: Tensor | None = None, attend: Attend | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, T, d) and keys (B, kv_heads, T, d) of the last layer, both rotated, and its normalised
    input (B, T, H).
    """
    last, found = len(model.model["layers"]) - 1, ()

    def run(number: int, layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        nonlocal found
        if number < last:
            return layer(x, cos, sin, attend)
        normed = layer.input_layernorm(x)
        found = (*layer.self_attn.qkv(normed, cos, sin)[:2], normed)
        return x

    model.hidden_states(input_ids, position_ids, attend, run)
    return found


@torch.no_grad()
def last_layer_scores(
    model: Transformer, samples: Sequence[Sample], pass_tokens: int, autocast, values: Callable[..., Tensor]
) -> list[Tensor]:
    """A score of each sample's answer tokens from the last layer of the current model: (A,) each, on the CPU.

    Args:
        values: (queries, keys, hidden, answer (1, L) bool) of one row -> its scores (1, L).
    Raises:
        ValueError: a row is longer than the model's sliding window; the attention here is causal over the whole row.
    """
    longest, window = max(len(s.input_ids) for s in samples), model.config.sliding_window
    if window is not None and longest > window:
        raise ValueError(
            f"--token-pruner: a row has {longest} tokens, and the model attends to windows of {window}; "
            f"--max-length {window} would cut it"
        )
    model.eval()
    device, found = model.lm_head.weight.device, {}
    for group in packs([len(s.input_ids) for s in samples], pass_tokens):
        input_ids, lengths = end_to_end([samples[i].input_ids for i in group], device)
        with autocast:
            queries, keys, hidden = queries_and_keys(model, input_ids, *packed(model, lengths))
        rows = zip(group, queries.split(lengths, 2), keys.split(lengths, 2), hidden.split(lengths, 1), strict=True)
        for i, q, k, x in rows:
            answer = torch.tensor([samples[i].labels], device=device) != IGNORE_INDEX
            # Column 0 has no token before it: nothing predicts it, and it collects much of the attention.
            found[i] = values(q, k, x, answer)[0, 1:][answer[0, 1:]].cpu()
    model.train()
    return [found[i] for i in range(len(samples))]


def attention_maps(queries: Tensor, keys: Tensor) -> Iterator[Tensor]:
    """The causal attention of one layer, a head at a time: (B, L, L) float32 each, never all heads at once.

    Args:
        queries: (B, heads, L, d), keys: (B, kv_heads, L, d), both rotated; kv_heads divides heads.
    """
    heads, length, size = queries.shape[1:]
    group = heads // keys.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    for head in range(heads):
        logits = queries[:, head].float() @ keys[:, head // group].float().transpose(-1, -2) / math.sqrt(size)
        yield logits.masked_fill(future, -math.inf).softmax(dim=-1)


def received_attention(queries: Tensor, keys: Tensor, attended: Tensor) -> Tensor:
    """How much attention each token receives: the mean over heads and over all queries of the row.

        phi_j = 1 / (H L) * sum_h sum_q A_h[q, j]

    Args:
        queries, keys: of `attention_maps`.
        attended:      (B, L) bool: True on tokens, False on the padding right of them.
    Returns:
        (B, L) float32; a row sums to 1; 0 on padding.
    """
    total = sum((A * attended[:, :, None]).sum(dim=1) for A in attention_maps(queries, keys))
    return total / (queries.shape[1] * attended.sum(dim=-1, keepdim=True))


def fastv_scores(model: Transformer, samples: Sequence[Sample], pass_tokens: int, autocast) -> list[Tensor]:
    """`received_attention` of each sample's answer tokens in the last layer: (A,) each, on the CPU."""

    def values(queries, keys, hidden, answer):
        return received_attention(queries, keys, torch.ones_like(answer))

    return last_layer_scores(model, samples, pass_tokens, autocast, values)


def fastv_tokens(received: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens that receive the most attention in the last layer.

    Args:
        received: (B, T) float: `received_attention` of the label's own token, so its first column dropped. That
            also leaves out the first token, where much of the attention of late layers goes.
    Original: FastV (Chen et al., ECCV 2024) drops *image* tokens, at inference, from layer 2 on, by the attention
        of the last query. Paper: removes the tokens that receive the least final-layer attention (Sec. B.3).
        Here: the paper's rule over real queries (the snapshot counted padding), on the loss. Two caveats: under
        a causal mask an early token is seen by more queries, so the score is in good part the position; and a
        token that is little read may still be worth predicting.
    """
    return keep_lowest(-received, loss_mask, token_keep_ratio)


def sparsevlm_text_score(queries: Tensor, keys: Tensor, hidden: Tensor, attended: Tensor, answer: Tensor) -> Tensor:
    """How much each answer token reads, and is like, the part of the prompt that matters for the answer.

        score_j = 1/2 z(P_j) + 1/2 z(S_j)
        P_j = mean over heads and raters i of A_h[j, i],   S_j = mean over raters of cos(h_j - mean h, h_i - mean h)

    Raters are the prompt tokens (the first left out) to which the answer's tokens are similar above average:
    softmax over the prompt of h_j . h_i / sqrt(H), averaged over the answer. z standardises within the answer.

    Args:
        queries, keys: of `attention_maps`, of one layer; hidden: (B, L, H), that layer's normalised input.
        attended:      (B, L) bool, False on padding.
        answer:        (B, L) bool, the answer's tokens.
    Returns:
        (B, L) float32, 0 outside the answer. Where the prompt has no second token, all 0.
    Original: SparseVLM (Zhang et al., ICML 2025) prunes *image* tokens at inference by the attention that chosen
        text tokens pay them, as many as a matrix rank says. Paper: "combined attention and hidden-state features"
        (Sec. B.3). Neither carries over: an answer comes after its prompt, so the prompt's attention to it is
        exactly 0, and the rank of a causal matrix is always full (the snapshot's count then keeps one token,
        whatever r_token). Here: the guide is the prompt, and the attention is read the other way.
    """
    hidden, seen = hidden.float(), attended[..., None]
    prompt = attended & ~answer
    prompt[:, 0] = False
    count = answer.sum(dim=-1, keepdim=True).clamp(min=1)

    likeness = hidden @ hidden.transpose(-1, -2) / math.sqrt(hidden.shape[-1])  # (B, L, L)
    relevance = likeness.masked_fill(~prompt[:, None], -math.inf).softmax(dim=-1).nan_to_num(0.0)  # no prompt: 0
    relevance = (relevance * answer[..., None]).sum(dim=1) / count  # (B, L)
    mean = relevance.sum(dim=-1, keepdim=True) / prompt.sum(dim=-1, keepdim=True).clamp(min=1)
    best = relevance.max(dim=-1, keepdim=True).values
    raters = prompt & (relevance >= torch.minimum(mean, best))  # rounding must not leave a flat prompt without one
    num_raters = raters.sum(dim=-1, keepdim=True).clamp(min=1)

    reading = sum((A * raters[:, None]).sum(dim=-1) for A in attention_maps(queries, keys))
    reading = reading / (queries.shape[1] * num_raters)  # P, (B, L)
    centre = (hidden * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True).clamp(min=1)
    unit = F.normalize(hidden - centre, dim=-1)
    guide = (unit * raters[..., None]).sum(dim=1) / num_raters  # (B, H)
    similarity = (unit @ guide[..., None])[..., 0]  # S, (B, L)
    return 0.5 * _standardised(reading, answer) + 0.5 * _standardised(similarity, answer)


def sparsevlm_text_scores(model: Transformer, samples: Sequence[Sample], pass_tokens: int, autocast) -> list[Tensor]:
    """`sparsevlm_text_score` of each sample's answer tokens in the last layer: (A,) each, on the CPU."""

    def values(queries, keys, hidden, answer):
        return sparsevlm_text_score(queries, keys, hidden, torch.ones_like(answer), answer)

    return last_layer_scores(model, samples, pass_tokens, autocast, values)


def sparsevlm_text_tokens(score: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens of the highest `sparsevlm_text_score` ((B, T): its first column dropped)."""
    return keep_lowest(-score, loss_mask, token_keep_ratio)


def _standardised(values: Tensor, answer: Tensor) -> Tensor:
    """(values - mean) / standard deviation over the answer of each row; 0 outside it, and where all are alike."""
    count = answer.sum(dim=-1, keepdim=True).clamp(min=1)
    values = values.double()
    mean = torch.where(answer, values, 0.0).sum(dim=-1, keepdim=True) / count
    centred = torch.where(answer, values - mean, 0.0)
    deviation = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred)).float()
