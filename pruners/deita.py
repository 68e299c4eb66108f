"""DEITA: the best rows by complexity x quality that are unlike each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.samples import check_enough, check_scores


def centred_units(embedding: Tensor) -> Tensor:
    """(N, D) -> (N, D) float32 of length 1, the mean row subtracted.

    A causal model's embeddings all point one way (mean cosine 0.9), which hides what tells rows apart.
    """
    embedding = embedding.float()
    return F.normalize(embedding - embedding.mean(dim=0), dim=-1)


def deita_rows(
    complexity: Tensor, quality: Tensor, embedding: Tensor, num_keep: int, *, threshold: float = 0.9
) -> Tensor:
    """The kept rows of a walk down complexity * quality that skips a row too similar to one already taken.

    Args:
        complexity, quality: (N,) float, above 0.
        embedding:           (N, D) float.
        threshold:           the highest cosine of two taken rows' embeddings.
    Returns:
        (num_keep,) int64: the rows that the walk took, then the skipped ones that fill the budget, each best first.
    Original: DEITA (Liu et al., 2023). Two tuned LLaMA scorers give 1 to 6; the 0.9 is a cosine *similarity*;
        where the pool ends first, fewer rows are kept. Paper: one sentence, no scorer. Here: the scores are
        from whoever wrote them (pruners.score_rows asks a local model for digits, of whole conversations); embeddings
        are centred first, without which 0.9 rejects nearly every row; and the budget is met.
    """
    check_scores("complexity", complexity)
    check_scores("quality", quality)
    check_enough(num_keep, len(complexity))
    unit = centred_units(embedding)
    order = (complexity.double() * quality.double()).sort(descending=True, stable=True).indices.tolist()
    taken, passed = [], []
    taken_units = torch.empty(num_keep, unit.shape[1])
    for row in order:
        if len(taken) == num_keep:
            break
        if taken and float((taken_units[: len(taken)] @ unit[row]).max()) > threshold:
            passed.append(row)
        else:
            taken_units[len(taken)] = unit[row]
            taken.append(row)
    return torch.tensor(taken + passed[: num_keep - len(taken)])
