"""Pruners of samples by one score or by none: random, entropy, longest, ratings.

In a mini-batch a pruner returns a `qtuning.SamplePruning`. One that chooses once returns the indices of the kept rows;
`num_keep` is floor(r_sample * N). Ties go to the earlier row: the caller orders rows by a hash of seed and id, so
that a tie depends on the seed alone.

Shapes: B samples of a mini-batch, N rows of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning import Quadrant, SamplePruning, num_samples_to_keep


def every_sample(num_samples: int, keep: Tensor | None = None) -> SamplePruning:
    """A decision without the Error-Uncertainty plane: keep all samples, or the given `keep`, and trim what is kept."""
    keep = torch.ones(num_samples, dtype=torch.bool) if keep is None else keep
    return SamplePruning(
        keep=keep,
        quadrant=torch.full_like(keep, Quadrant.BETWEEN, dtype=torch.int64),
        backfilled=torch.zeros_like(keep),
        prune_tokens=keep,
        thresholds=None,
    )


def random_samples(num_samples: int, sample_keep_ratio: float, generator: torch.Generator) -> SamplePruning:
    """Keep floor(r_sample * B) samples drawn uniformly without replacement; every kept one may be trimmed.

    Args:
        num_samples: B, the samples of the mini-batch. No score is needed.
    Raises:
        ValueError: the ratio is outside [0, 1] or too small to keep one sample.
    Source: "Random" of the paper's tables (Sec. B.3), redrawn for every mini-batch as Q-Tuning chooses anew:
        over three epochs at 12.5 % it reaches a third of the rows. `random_rows` is the one that does not.
    """
    num_keep = num_samples_to_keep(sample_keep_ratio, num_samples)
    keep = torch.zeros(num_samples, dtype=torch.bool)
    keep[torch.randperm(num_samples, generator=generator)[:num_keep]] = True
    return every_sample(num_samples, keep)


def entropy_samples(ent: Tensor, sample_keep_ratio: float) -> SamplePruning:
    """Keep the floor(r_sample * B) samples of the highest predictive entropy.

    Args:
        ent: (B,) float, Eq. (5) of a mini-batch under the current model.
    Raises:
        ValueError: a NaN or infinite value; a ratio outside [0, 1] or too small to keep one sample.
    Paper: "retained high-entropy samples" (Sec. B.3). Its early snapshot kept the lowest entropy instead, and of
        the instruction's characters, with no model. Here: the sentence, with the paper's own entropy, chosen
        anew in every mini-batch, from the same scoring pass as Q-Tuning's.
    """
    check_scores("ent", ent)
    keep = torch.zeros(len(ent), dtype=torch.bool)
    keep[top_rows(ent, num_samples_to_keep(sample_keep_ratio, len(ent)))] = True
    return every_sample(len(ent), keep)


def top_rows(score: Tensor, num_keep: int) -> Tensor:
    """Indices of the `num_keep` highest scores of `score` (N,), ascending; ties go to the earlier row.

    Raises:
        ValueError: a NaN or infinite score, or fewer rows than are to be kept.
    """
    check_scores("score", score)
    check_enough(num_keep, len(score))
    return score.cpu().sort(descending=True, stable=True).indices[:num_keep].sort().values


def random_rows(num_keep: int) -> Tensor:
    """The first `num_keep` rows: a uniform draw, since rows come in an order that the seed alone sets.

    The random twin of every pruner below: drawn once, where `random_samples` draws in every mini-batch.
    """
    return torch.arange(num_keep)


def longest_rows(num_answer_tokens: Tensor, num_keep: int) -> Tensor:
    """Keep the rows of the longest answers.

    Original: "Long Is More for Alignment" (Zhao et al., ICML 2024) keeps the longest responses.
    Paper: calls its baseline Longest, and says that it "removed the longest sequences" (Sec. B.3).
    Here: both, by the answer's tokens: this one follows the name and the original, `drop_longest_rows` the
        sentence. At the same number of rows it trains on more tokens than any other pruner.
    """
    return top_rows(num_answer_tokens, num_keep)


def drop_longest_rows(num_answer_tokens: Tensor, num_keep: int) -> Tensor:
    """Remove the rows of the longest answers: the paper's sentence about Longest; see `longest_rows`.

    The paper's early snapshot kept the shortest instructions, in characters; here the answer's tokens count.
    """
    return top_rows(-num_answer_tokens, num_keep)


def alpagasus_rows(rating: Tensor, num_keep: int) -> Tensor:
    """Keep the best-rated rows.

    Args:
        rating: (N,) float, any rising scale.
    Original: AlpaGasus (Chen et al., 2023) lets a strong model rate each answer from 0 to 5 and keeps 4.5 and up.
    Paper: one sentence, no rater. Here: the rater is whoever wrote the ratings (a field of the data, a side
        file, or a local model's digits by pruners.score_rows); the threshold becomes the budget. Ratings are coarse,
        so the last place is shared by many rows and the seed decides: compare several seeds.
    """
    return top_rows(rating, num_keep)


def cond_gain_rows(cond_gain: Tensor, num_keep: int) -> Tensor:
    """Keep the rows whose answer becomes most predictable by its instruction. Not AlpaGasus, and not in the paper.

    Args:
        cond_gain: (N,) nats a token: mean NLL of the answer alone less its mean NLL behind the prompt.
    Original: of the family of Instruction-Following Difficulty (Li et al., 2024).
    Here: a stand-in for a rating where the model is too small to rate.
    """
    return top_rows(cond_gain, num_keep)


def check_scores(name: str, values: Tensor) -> None:
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{name} must be (N,), N >= 1, got {tuple(values.shape)}")
    bad = ~values.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"row {row}: {name} must be finite, got {values[row].item()}")


def check_enough(num_keep: int, num_rows: int) -> None:
    if not 1 <= num_keep <= num_rows:
        raise ValueError(f"expected to keep between 1 and all of {num_rows} rows, got {num_keep}")
