"""InfoBatch: rows drawn for each epoch by their loss, with weights that undo the bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pruners.samples import check_enough, check_scores


def infobatch_weights(row_loss: Tensor, num_keep: int, generator: torch.Generator, *, odds: float = 2.0) -> Tensor:
    """Draw an epoch of exactly `num_keep` rows, those of a high loss more often, with weights that undo the bias.

        high = {loss >= mean}, h = n_high / N;  pi_low = r / (1 + (odds - 1) h), pi_high = odds * pi_low <= 1

    k_high = pi_high * n_high and k_low = num_keep - k_high rows are drawn without replacement; a row then stands
    for n_high / k_high rows of its stratum (or n_low / k_low), and these weights sum to N.

    Args:
        row_loss:  (N,) float, each row's mean NLL when it was last seen.
        num_keep:  K in [1, N].
        odds:      how much likelier a high row is to be drawn; 1 is uniform.
    Returns:
        (N,) float64: the weight in the loss, 0 where the row is left out. Scaled by K / N, so that the mean over
        the kept rows is 1: as many optimizer steps are taken as by every other pruner, and the whole factor N / K
        would only fight with gradient clipping.
    Raises:
        ValueError: a NaN or infinite loss; num_keep or odds out of range.
    Original: InfoBatch (Qin et al., ICLR 2024) drops half of the rows below the mean loss and weights the rest
        of them by 2. It never drops a row above the mean (two fifths of the rows or more), so no small budget can
        be met and that rule is not offered here. Paper: "information-theoretic", selecting "the largest gradient
        updates", at every budget; not how. Its early snapshot cut the official rule's rows at the budget in the
        order of the data: always the same rows, unweighted. Here: the same two strata, both sampled, so that any
        budget is met exactly and every row may come. The weight multiplies the row's token sum.
    """
    check_scores("row_loss", row_loss)
    check_enough(num_keep, len(row_loss))
    if not 1 <= odds < math.inf:
        raise ValueError(f"odds must be at least 1, got {odds}")
    high = ~_below_mean(row_loss)
    num_high, num_rows = int(high.sum()), len(row_loss)
    num_low = num_rows - num_high
    if num_keep == 1 or num_low == 0:  # one row cannot stand for two strata
        high, num_high, num_low = torch.ones_like(high), num_rows, 0
    share_high = odds * num_keep / (num_rows + (odds - 1) * num_high)
    keep_high = round(min(1.0, share_high) * num_high)
    keep_high = max(min(keep_high, num_high, num_keep - (num_low > 0)), num_keep - num_low, 1)
    weights = torch.zeros(num_rows, dtype=torch.float64)
    for stratum, count, keep in ((high, num_high, keep_high), (~high, num_low, num_keep - keep_high)):
        if keep:
            rows = stratum.nonzero()[:, 0]
            drawn = rows[torch.randperm(count, generator=generator)[:keep]]
            weights[drawn] = count / keep * num_keep / num_rows
    return weights


def _below_mean(values: Tensor) -> Tensor:
    """Which values are below their mean; none where all are alike."""
    values = values.double()
    return (values < values.mean()) & (values < values.max())
