"""LESS: rows whose gradients point where the target tasks improve."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.samples import top_rows


def adam_direction(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps=1e-8
) -> Tensor:
    """The step that Adam would take for this gradient from these moments; all (P,).

        (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)          eps inside the root, no bias correction

    Source: LESS (Xia et al., ICML 2024), Sec. 2.2.
    """
    b1, b2 = betas
    return (b1 * exp_avg + (1 - b1) * gradient) / (b2 * exp_avg_sq + (1 - b2) * gradient.square() + eps).sqrt()


def count_sketch(vector: Tensor, buckets: Tensor, signs: Tensor, size: int) -> Tensor:
    """Project (P,) to (size,): every coordinate is added to one bucket with a sign. Inner products stay unbiased.

    Args:
        buckets: (P,) int64 in [0, size), and signs: (P,) of -1 and 1: drawn once, the same for all vectors that
            are to be compared.
    Source: Charikar et al., 2002, in place of LESS's dense random projection: the same unbiased inner product
        at P operations a row in place of P * size.
    """
    return torch.zeros(size, dtype=vector.dtype, device=vector.device).index_add_(0, buckets, vector * signs)


def influence(features: Tensor, targets: list[Tensor]) -> Tensor:
    """How much a step along each row's direction lowers the loss of the target task that it helps most.

        Inf_i = max_task < unit(feature_i), mean_{v in task} unit(feature_v) >

    Args:
        features: (N, d) the rows' projected Adam directions.
        targets:  one (rows, d) for each task: its rows' projected gradients.
    Returns:
        (N,) in [-1, 1].
    Original: LESS (Xia et al., ICML 2024) sums this over the checkpoints of a warm-up run, weighted by their
        learning rates. Paper: one sentence, and no target. Here: one checkpoint, the last; gradients of the rank
        that the warm-up run has; `count_sketch`; the targets are rows of training splits. LESS alone is told
        the tasks; the other pruners are not.
    """
    unit = F.normalize(features.double(), dim=-1)
    tasks = torch.stack([F.normalize(target.double(), dim=-1).mean(0) for target in targets])  # (tasks, d)
    return (unit @ tasks.T).max(dim=-1).values


def less_rows(influence: Tensor, num_keep: int) -> Tensor:
    """Keep the rows of the highest influence on the target tasks; `influence` says what that is."""
    return top_rows(influence, num_keep)
