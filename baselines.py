"""The pruners that the paper compares Q-Tuning with, under the same budgets as Q-Tuning's own.

A sample pruner returns a `qtuning.SamplePruning`, a token pruner a (B, T) bool mask: what `qtuning`'s own
`prune_samples` and `prune_tokens` return, so that any sample pruner pairs with any token pruner. What is
random takes a `torch.Generator` and draws nothing from anywhere else.

Shapes: B samples, T label positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning import Quadrant, SamplePruning, keep_lowest, num_samples_to_keep


def random_samples(num_samples: int, sample_keep_ratio: float, generator: torch.Generator) -> SamplePruning:
    """Keep floor(r_sample * B) samples drawn uniformly without replacement; every kept one may be trimmed.

    Args:
        num_samples: B, the samples of the mini-batch. No score is needed.
    Raises:
        ValueError: the ratio is outside [0, 1] or too small to keep one sample.
    Source: "Random" of the paper's tables (Sec. B.3), redrawn for every mini-batch as Q-Tuning chooses anew.
    """
    num_keep = num_samples_to_keep(sample_keep_ratio, num_samples)
    keep = torch.zeros(num_samples, dtype=torch.bool)
    keep[torch.randperm(num_samples, generator=generator)[:num_keep]] = True
    return every_sample(num_samples, keep)


def every_sample(num_samples: int, keep: Tensor | None = None) -> SamplePruning:
    """No triage: keep all (or the given `keep`), none placed on the Error-Uncertainty plane, all to be trimmed."""
    keep = torch.ones(num_samples, dtype=torch.bool) if keep is None else keep
    return SamplePruning(
        keep=keep,
        quadrant=torch.full_like(keep, Quadrant.BETWEEN, dtype=torch.int64),
        backfilled=torch.zeros_like(keep),
        prune_tokens=keep,
        thresholds=None,
    )


def random_tokens(loss_mask: Tensor, token_keep_ratio: float, generator: torch.Generator) -> Tensor:
    """Keep max(1, floor(r_token * |T(x)|)) answer tokens of each row, drawn uniformly without replacement.

    Args:
        loss_mask: (B, T) bool, T(x).
    Returns:
        (B, T) bool, a subset of loss_mask with exactly the budget of `qtuning.prune_tokens` in every row.
    Source: "Random" of the paper's tables (Sec. B.3: "exclusively to the answers").
    """
    draw = torch.rand(loss_mask.shape, generator=generator).to(loss_mask.device)
    return keep_lowest(draw, loss_mask, token_keep_ratio)
