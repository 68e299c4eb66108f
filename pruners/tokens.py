"""Pruners of tokens by NLL or at random: each keeps its share of every kept sample's answer tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtuning import keep_lowest


def random_tokens(loss_mask: Tensor, token_keep_ratio: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Keep max(1, floor(r_token * |T(x)|)) answer tokens of each row, drawn uniformly without replacement.

    Args:
        loss_mask:  (B, T) bool, T(x).
        generators: one for each row, so that a row's draw does not depend on the others.
    Returns:
        (B, T) bool, a subset of loss_mask with exactly the budget of `qtuning.prune_tokens` in every row.
    Source: "Random" of the paper's tables (Sec. B.3: "exclusively to the answers"), redrawn at every visit.
    """
    draws = torch.stack([torch.rand(loss_mask.shape[1], generator=generator) for generator in generators])
    return keep_lowest(draws.to(loss_mask.device), loss_mask, token_keep_ratio)


def lowest_ppl_tokens(nll: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens of the lowest perplexity: "removed high-perplexity tokens" (Sec. B.3).

    Args:
        nll: (B, T) float, of the current model; its order is that of the perplexity, which may overflow.
    Source: Q-Tuning's own token score at lambda = 0, applied to every kept sample.
    """
    return keep_lowest(nll, loss_mask, token_keep_ratio)


def highest_ppl_tokens(nll: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens of the highest perplexity: what the paper's early snapshot did."""
    return keep_lowest(-nll, loss_mask, token_keep_ratio)


def rho1_tokens(nll: Tensor, reference_nll: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens of the highest excess loss over a reference model's.

        excess_ij = nll_ij(current) - nll_ij(reference)

    Args:
        nll, reference_nll: (B, T) float, of the same tokens.
    Original: Rho-1 (Lin et al., NeurIPS 2024), a pre-training method: the reference is the same base trained on
        a small clean corpus, and the share is of the batch's tokens. Paper: no reference named. Here: the reference
        is any model of the same tokenizer, scored once by pruners.score_rows (a LoRA adapter on the base needs no
        second model); the share is of each row's tokens, as for every pruner. A reference that has trained on the
        rows it scores has memorised them: keep its rows apart, or few.
    """
    return keep_lowest(reference_nll - nll, loss_mask, token_keep_ratio)


def tokencleaning_tokens(base_nll: Tensor, reference_nll: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens whose loss fell most from the base model to the reference: `tokencleaning-row`.

    Original: TokenCleaning (Pang et al., ICML 2025), fixed-model form, ranks the tokens of all rows together, so that
        a row may lose all of its tokens. Paper: "token-level statistics". Here: its score within each row, so that
        the budget is that of every other pruner. It is Rho-1's choice at step 0, and never changes.
    """
    return rho1_tokens(base_nll, reference_nll, loss_mask, token_keep_ratio)
