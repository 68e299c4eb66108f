"""Q-Tuning: joint sample and token pruning for supervised fine-tuning (Wang et al., arXiv 2509.23873).

At every step Q-Tuning scores a mini-batch with a gradient-free forward pass and trains on what is left:

    1. error and uncertainty of each sample: perplexity (Eq. 4) and predictive entropy (Eq. 5);
    2. a bisect search over quantile thresholds (Eq. 6) splits the Error-Uncertainty plane into quadrants:
         Q1 harmful noise      PPL high, Ent high   dropped
         Q2 misconceptions     PPL high, Ent low    kept, their worst tokens trimmed
         Q3 redundant          PPL low,  Ent low    dropped
         Q4 calibration data   PPL low,  Ent high   kept whole;
    3. where too few are kept, the supp-score fills up to the budget;
    4. the tokens trimmed from Q2 are those of the highest neighbour-smoothed perplexity (Eq. 7).

`prune_batch` is all of Algorithm 1; the functions above it are its parts, in the paper's order. They are
pure: tensors on any device in, new tensors out, no randomness, ties broken by position. "Choice C1-C15"
marks what the paper leaves open; docs/CHOICES.md lists the choices with their reasons.

Shapes: B samples, T label positions, V vocabulary. `nll[b, t]` belongs to the label at t (the caller has
shifted). Masks are bool, True = trainable or kept. Ratios say what is kept; logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label of a position that is not trainable, as in torch's cross_entropy
ROUNDING = 1e-9  # ratios are floats: 0.29 * 100 comes to 28.999999999999996 and means 29


class Quadrant(IntEnum):
    """A sample's place on the Error-Uncertainty plane (Sec. 3.1); BETWEEN is in no corner."""

    BETWEEN = 0
    HARMFUL_NOISE = 1  # Q1
    VALUABLE_MISCONCEPTION = 2  # Q2
    REDUNDANT_KNOWLEDGE = 3  # Q3
    CALIBRATION_DATA = 4  # Q4


KEEP_QUADRANTS = (Quadrant.VALUABLE_MISCONCEPTION, Quadrant.CALIBRATION_DATA)  # the method's: Algorithm 1 line 17
TRIM_QUADRANTS = (Quadrant.VALUABLE_MISCONCEPTION,)  # line 27
BACKFILL_QUADRANTS = tuple(Quadrant)  # line 19, as choice C7 reads it


# ----------------------------------------------------------- Sec. 3.1: the Error-Uncertainty plane


def token_nll_and_entropy(logits: Tensor, labels: Tensor, *, chunk_size: int = 256) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, and entropy of the distribution that predicts it.

        nll_i = -log p(y_i | x, y_<i)        entropy_i = -sum_v p(v | x, y_<i) log p(v | x, y_<i)

    Args:
        logits: (..., V), any float dtype; logits[b, t] predict labels[b, t].
        labels: (...,) int64 in [0, V), or -100 where not trainable.
        chunk_size: positions at a time; beside the logits, about three (chunk_size, V) fp32 tensors exist at once.
    Returns:
        nll and entropy, each (...,) float32, nats; 0 where the label is -100. 0 <= entropy <= log V.
    Raises:
        ValueError: shapes differ, a label is out of range, or chunk_size is below 1.
    Source: the terms of Eq. 4 and Eq. 5. Choice C15: fp32 whatever the model computes in.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be labels' shape {tuple(labels.shape)} and a vocabulary")
    trainable = labels != IGNORE_INDEX
    outside = trainable & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(outside.any()):
        at, got = outside.nonzero()[0].tolist(), labels[outside][0].item()
        raise ValueError(f"labels must be in [0, {logits.shape[-1]}) or {IGNORE_INDEX}, got {got} at {at}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    nll, entropy = _nll_and_entropy(logits, labels.clamp(min=0), chunk_size)
    zero = torch.zeros_like(nll)
    return torch.where(trainable, nll, zero), torch.where(trainable, entropy, zero)


def sample_perplexity(nll: Tensor, loss_mask: Tensor) -> Tensor:
    """Error of each sample: the perplexity of its answer, Eq. (4).

        PPL(x, y) = exp( 1/|T(x)| * sum_{i in T(x)} nll_i )

    Args:
        nll:       (B, T) float, nats. Ignored where loss_mask is False.
        loss_mask: (B, T) bool, T(x): True on the answer's tokens.
    Returns:
        (B,) float32, at least 1 for a true NLL.
    Raises:
        ValueError: shapes differ; a row without a trainable token; a NaN or infinite NLL in T(x).
    """
    return _mean_over_answer("nll", nll, loss_mask).exp().float()  # Eq. (4)


def sample_entropy(token_entropy: Tensor, loss_mask: Tensor) -> Tensor:
    """Uncertainty of each sample: the mean predictive entropy over its answer, Eq. (5).

        Ent(x, y) = 1/|T(x)| * sum_{i in T(x)} H( p(. | x, y_<i) )

    Args, Raises: as `sample_perplexity`, of token_entropy (B, T), nats.
    Returns:
        (B,) float32, nats.
    """
    return _mean_over_answer("token_entropy", token_entropy, loss_mask).float()  # Eq. (5)


# --------------------------------------------------- Sec. 3.2, stage 1: bisect search and quadrants


def quantile(values: Tensor, gamma: float) -> Tensor:
    """The smallest value q such that at least a fraction gamma of `values` (N,) are <= q: a scalar.

    Source: Sec. 3.2. Choice C4: one of the values, no interpolation; gamma = 0 gives the smallest.
    """
    _check_fraction("gamma", gamma)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"values must be (N,), N >= 1, got {tuple(values.shape)}")
    return values.sort().values[_rank(gamma, len(values)) - 1]


@dataclass(frozen=True)
class Thresholds:
    """Quantile levels alpha (of PPL) and beta (of Ent), and the values they cut at."""

    alpha: float
    beta: float
    ppl_low: float
    ppl_high: float
    ent_low: float
    ent_high: float


def thresholds_at(ppl: Tensor, ent: Tensor, alpha: float, beta: float) -> Thresholds:
    """Cut both axes at their lower and upper quantiles, Algorithm 1 line 8.

    ppl_low = Q_alpha(PPL), ppl_high = Q_{1-alpha}(PPL); ent_low = Q_beta(Ent), ent_high = Q_{1-beta}(Ent).

    Args:
        ppl, ent:    (B,) float.
        alpha, beta: in [0, 1]; at most 0.5 for the low and the high side not to overlap.
    """
    _check_plane(ppl, ent)
    _check_fraction("alpha", alpha)
    _check_fraction("beta", beta)
    return Thresholds(
        alpha,
        beta,
        ppl_low=float(quantile(ppl, alpha)),
        ppl_high=float(quantile(ppl, 1 - alpha)),
        ent_low=float(quantile(ent, beta)),
        ent_high=float(quantile(ent, 1 - beta)),
    )


def assign_quadrants(ppl: Tensor, ent: Tensor, thresholds: Thresholds) -> Tensor:
    """Each sample's quadrant: (B,) int64 of `Quadrant` values, Algorithm 1 line 9.

    Choice C5: the high side is strict (>), the low side inclusive (<=); what is in no corner is BETWEEN.
    """
    _check_plane(ppl, ent)
    ppl_high, ppl_low = ppl > thresholds.ppl_high, ppl <= thresholds.ppl_low
    ent_high, ent_low = ent > thresholds.ent_high, ent <= thresholds.ent_low
    quadrant = torch.full_like(ppl, Quadrant.BETWEEN, dtype=torch.int64)
    quadrant[ppl_high & ent_high] = Quadrant.HARMFUL_NOISE
    quadrant[ppl_high & ent_low] = Quadrant.VALUABLE_MISCONCEPTION
    quadrant[ppl_low & ent_low] = Quadrant.REDUNDANT_KNOWLEDGE
    quadrant[ppl_low & ent_high] = Quadrant.CALIBRATION_DATA
    return quadrant


def bisect_thresholds(
    ppl: Tensor,
    ent: Tensor,
    num_keep: int,
    *,
    upper: float = 0.49,
    max_iters: int = 20,
    keep_quadrants: Collection[Quadrant] = KEEP_QUADRANTS,
) -> Thresholds:
    """Search the quantile levels at which Q2 and Q4 hold as many samples as possible up to `num_keep`, Eq. (6).

    Every corner grows with alpha and beta, so the number kept is monotone and bisection finds the level:

        (alpha_low, alpha_high) <- (alpha_low, alpha)    if more than num_keep are kept
                                   (alpha, alpha_high)   otherwise;    beta likewise

    Args:
        ppl, ent:  (B,) float.
        num_keep:  the target, r_sample * B rounded down.
        upper:     the search interval is [0, upper]; at most 0.5, where the low side meets the high side.
        max_iters: halvings; the default ends with a bracket of 5e-7, far below 1/B of any mini-batch.
        keep_quadrants: the corners whose samples count; others than Q2 and Q4 are the ablations of Tables 4 and 15.
    Returns:
        Thresholds at the lower end of the last bracket: they keep at most num_keep samples. Only Q3 is not empty at
        alpha = 0: it holds what is lowest on both axes, and where more than num_keep samples tie there, it keeps more.
    Source: Eq. (6), Algorithm 1 lines 5-16. Choices C1: upper = 0.49, as in Algorithm 1 (Sec. 3.2: 0.5).
        C2: exactly on target raises the lower bound, as in Eq. (6). C3: the lower bracket is returned, since
        the last midpoint may keep too many; alpha and beta start alike and so move in lockstep.
    """
    _check_plane(ppl, ent)
    if not 0 <= upper <= 0.5:
        raise ValueError(f"upper must be in [0, 0.5], got {upper}")
    if not keep_quadrants:
        raise ValueError("keep_quadrants must name one quadrant at least, got none")
    _check_quadrants("keep_quadrants", keep_quadrants)
    ppl, ent = ppl.cpu(), ent.cpu()  # one copy from a GPU, not a wait in every halving
    low, high = 0.0, upper  # alpha_low = beta_low, alpha_high = beta_high
    for _ in range(max_iters):
        alpha = (low + high) / 2
        quadrant = assign_quadrants(ppl, ent, thresholds_at(ppl, ent, alpha, alpha))
        if int(_in_any(quadrant, keep_quadrants).sum()) > num_keep:  # Eq. (6): too many kept, tighten
            high = alpha
        else:  # relax
            low = alpha
    return thresholds_at(ppl, ent, low, low)


def supp_score(ppl: Tensor, ent: Tensor) -> Tensor:
    """How one-sided a sample is: the score that decides who fills up the budget, Algorithm 1 line 19.

        supp(x) = max( PPL^ - Ent^, Ent^ - PPL^ ),    ^ = min-max normalisation

    Args:
        ppl, ent: (B,) float, of the whole mini-batch.
    Returns:
        (B,) float64 in [0, 1].
    Choice C8: normalised over the whole mini-batch; an axis on which all agree normalises to 0.
    """
    _check_plane(ppl, ent)
    difference = _min_max(ppl) - _min_max(ent)
    return torch.maximum(difference, -difference)


@dataclass(frozen=True)
class SamplePruning:
    """What stage 1 decided about each of B samples.

    Attributes:
        keep:         (B,) bool, the samples to train on.
        quadrant:     (B,) int64, `Quadrant` values.
        backfilled:   (B,) bool, kept by the supp-score and not for their quadrant.
        prune_tokens: (B,) bool, kept samples whose tokens stage 2 trims (by default Q2 and what counts as Q2).
        thresholds:   where the plane was cut; None from a pruner that does not cut it.
    """

    keep: Tensor
    quadrant: Tensor
    backfilled: Tensor
    prune_tokens: Tensor
    thresholds: Thresholds | None


def prune_samples(
    ppl: Tensor,
    ent: Tensor,
    sample_keep_ratio: float,
    *,
    upper: float = 0.49,
    max_iters: int = 20,
    keep_quadrants: Collection[Quadrant] = KEEP_QUADRANTS,
    trim_quadrants: Collection[Quadrant] = TRIM_QUADRANTS,
    backfill_quadrants: Collection[Quadrant] = BACKFILL_QUADRANTS,
    keep_one: bool = False,
) -> SamplePruning:
    """Stage 1: keep Q2 and Q4, fill up to the budget by the supp-score. Algorithm 1 lines 5-21.

    Args:
        ppl, ent:          (B,) float, finite: Eq. (4) and (5) of a mini-batch.
        sample_keep_ratio: r_sample in [0, 1]; exactly floor(r_sample * B) samples are kept.
        upper, max_iters:  of the bisect search.
        keep_quadrants:    whose samples are kept, not empty; the ablations of Tables 4 and 15 keep others.
        trim_quadrants:    whose kept samples lose tokens in stage 2; may be empty.
        backfill_quadrants: where the budget is filled up from first, BETWEEN included, not empty. If they hold too few
            samples, the others follow by the same score. Beyond the paper: without HARMFUL_NOISE, the backfill
            does not bring back what Q1 has dropped.
        keep_one:          keep one sample of a mini-batch too small for the ratio, as the last one of an epoch may
            be; by default such a mini-batch is refused.
    Raises:
        ValueError: shapes differ; a NaN or infinite value; a ratio outside [0, 1] or too small to keep one;
            values that are no quadrants.
    Choices C6: the budget is met exactly. C7: every sample not kept may be filled in, whether of Q1, Q3 or
        BETWEEN; the largest supp-score first, ties by position. C9: a filled-in sample's tokens are trimmed
        as in Q2 if its normalised PPL is at least its normalised Ent, else it stays whole as in Q4.
    """
    _check_plane(ppl, ent)
    _check_quadrants("trim_quadrants", trim_quadrants)
    if not backfill_quadrants or not set(backfill_quadrants) <= set(Quadrant):
        raise ValueError(f"backfill_quadrants must be of Quadrant 0 to 4, at least one, got {list(backfill_quadrants)}")
    num_keep = num_samples_to_keep(sample_keep_ratio, len(ppl), keep_one=keep_one)
    thresholds = bisect_thresholds(ppl, ent, num_keep, upper=upper, max_iters=max_iters, keep_quadrants=keep_quadrants)
    quadrant = assign_quadrants(ppl, ent, thresholds)
    in_kept = _in_any(quadrant, keep_quadrants)  # line 17
    in_kept &= in_kept.cumsum(0) <= num_keep  # too many only where Q3 is kept and its samples tie: by position

    num_missing = num_keep - int(in_kept.sum())  # lines 18-21
    candidates = supp_score(ppl, ent).masked_fill(in_kept, -math.inf)
    largest_first = candidates.sort(descending=True, stable=True).indices
    allowed = _in_any(quadrant, backfill_quadrants) & ~in_kept  # these come before the others
    largest_first = largest_first[allowed[largest_first].sort(descending=True, stable=True).indices]
    backfilled = torch.zeros_like(in_kept)
    backfilled[largest_first[:num_missing]] = True

    like_q2 = _min_max(ppl) >= _min_max(ent)
    nearer = torch.where(like_q2, Quadrant.VALUABLE_MISCONCEPTION, Quadrant.CALIBRATION_DATA)
    keep = in_kept | backfilled
    return SamplePruning(
        keep=keep,
        quadrant=quadrant,
        backfilled=backfilled,
        prune_tokens=keep & _in_any(torch.where(backfilled, nearer, quadrant), trim_quadrants),
        thresholds=thresholds,
    )


# ------------------------------------------------------------ Sec. 3.2, stage 2: token-level pruning


def smoothed_token_score(token_ppl: Tensor, loss_mask: Tensor, smoothing: float) -> Tensor:
    """How surprising each answer token and its neighbours are, Eq. (7).

        s_i = (1 - lambda) PPL_i + lambda (PPL_{i-1} + PPL_{i+1})

    Args:
        token_ppl: (B, T) float, PPL_i = exp(nll_i). Ignored where loss_mask is False.
        loss_mask: (B, T) bool, T(x).
        smoothing: lambda in [0, 1].
    Returns:
        (B, T) in token_ppl's dtype; 0 where loss_mask is False.
    Raises:
        ValueError: shapes differ; a row without a trainable token; a NaN or infinite PPL; lambda out of range.
    Choice C12: a neighbour outside T(x) - past an end, or a prompt token - takes PPL_i itself, so that a
        flat sequence scores flat.
    """
    _check_answer("token_ppl", token_ppl, loss_mask)
    _check_fraction("smoothing", smoothing)
    own = torch.where(loss_mask, token_ppl, torch.zeros_like(token_ppl))
    before = torch.where(F.pad(loss_mask, (1, 0))[:, :-1], F.pad(own, (1, 0))[:, :-1], own)  # PPL_{i-1}
    after = torch.where(F.pad(loss_mask, (0, 1))[:, 1:], F.pad(own, (0, 1))[:, 1:], own)  # PPL_{i+1}
    score = (1 - smoothing) * own + smoothing * (before + after)  # Eq. (7)
    return torch.where(loss_mask, score, torch.zeros_like(score))


def prune_tokens(
    token_ppl: Tensor, loss_mask: Tensor, token_keep_ratio: float, smoothing: float, *, reverse: bool = False
) -> Tensor:
    """Stage 2 for one sample per row: keep the answer tokens of the lowest smoothed score.

    Args:
        token_ppl, loss_mask, smoothing: as in `smoothed_token_score`.
        token_keep_ratio: r_token in [0, 1]; max(1, floor(r_token * |T(x)|)) tokens of a row are kept.
        reverse:          keep the highest scores: "Reversed PPL", the ablation of Table 5.
    Returns:
        (B, T) bool, m(x): True = kept; False wherever loss_mask is.
    Source: Algorithm 1 lines 28-29. Choices C10: the highest scores go, as in Fig. 2 ("tokens with high local
        PPL are removed"), though line 29 reads "keep top". C11: |T(x)| counts answer tokens only; ties go by
        position, the earlier token stays.
    """
    score = smoothed_token_score(token_ppl, loss_mask, smoothing)
    return keep_lowest(-score if reverse else score, loss_mask, token_keep_ratio)


def keep_lowest(score: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """The budgeted number of lowest-scored answer tokens in each row, (B, T) bool; ties go to the earlier token."""
    rank = score.masked_fill(~loss_mask, math.inf).argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 = kept first
    num_keep = [num_tokens_to_keep(token_keep_ratio, n) for n in loss_mask.sum(dim=-1).tolist()]
    return loss_mask & (rank < torch.tensor(num_keep, device=rank.device)[:, None])


# --------------------------------------------------------------------------------- Algorithm 1, whole


@dataclass(frozen=True)
class PrunedBatch:
    """What Algorithm 1 leaves of a mini-batch.

    Attributes:
        samples:    stage 1's decisions.
        token_mask: (B, T) bool, the tokens that carry loss; no token of a dropped sample.
        ppl, ent:   (B,) float32, the samples' places on the Error-Uncertainty plane.
    """

    samples: SamplePruning
    token_mask: Tensor
    ppl: Tensor
    ent: Tensor


def prune_batch(
    nll: Tensor,
    token_entropy: Tensor,
    loss_mask: Tensor,
    sample_keep_ratio: float,
    token_keep_ratio: float,
    smoothing: float = 0.5,
    *,
    reverse: bool = False,
    upper: float = 0.49,
    max_iters: int = 20,
    keep_quadrants: Collection[Quadrant] = KEEP_QUADRANTS,
    trim_quadrants: Collection[Quadrant] = TRIM_QUADRANTS,
    backfill_quadrants: Collection[Quadrant] = BACKFILL_QUADRANTS,
    keep_one: bool = False,
) -> PrunedBatch:
    """Q-Tuning's decisions for one mini-batch: Algorithm 1.

    Args:
        nll, token_entropy: (B, T) float, of `token_nll_and_entropy` with the current weights.
        loss_mask:          (B, T) bool, T(x); a row has at least one trainable token.
        sample_keep_ratio:  r_sample in [0, 1]: floor(r_sample * B) samples are kept.
        token_keep_ratio:   r_token in [0, 1]: the share of its answer tokens that a trimmed sample keeps.
        smoothing:          lambda in [0, 1].
        reverse, upper, max_iters: of `prune_tokens` and `bisect_thresholds`.
        keep_quadrants, trim_quadrants, backfill_quadrants, keep_one: of `prune_samples`.
    Raises:
        ValueError: what the parts refuse, by name and row.
    """
    ppl = sample_perplexity(nll, loss_mask)  # line 4
    ent = sample_entropy(token_entropy, loss_mask)
    samples = prune_samples(  # lines 5-21
        ppl,
        ent,
        sample_keep_ratio,
        upper=upper,
        max_iters=max_iters,
        keep_quadrants=keep_quadrants,
        trim_quadrants=trim_quadrants,
        backfill_quadrants=backfill_quadrants,
        keep_one=keep_one,
    )
    trimmed = prune_tokens(token_perplexity(nll), loss_mask, token_keep_ratio, smoothing, reverse=reverse)
    return PrunedBatch(samples, token_mask(samples, trimmed, loss_mask), ppl, ent)  # lines 23-33


def token_perplexity(nll: Tensor) -> Tensor:
    """PPL_i = exp(nll_i), in float64: a single token's may pass what float32 holds."""
    return nll.double().exp()


def token_mask(samples: SamplePruning, trimmed: Tensor, loss_mask: Tensor) -> Tensor:
    """Trim what is to be trimmed, keep other kept samples whole, drop the rest: (B, T) bool, lines 23-33."""
    tokens = torch.where(samples.prune_tokens[:, None], trimmed, loss_mask)
    return tokens & samples.keep[:, None]


# -------------------------------------------------------------------------------- budgets and checks


def num_samples_to_keep(sample_keep_ratio: float, num_samples: int, *, keep_one: bool = False) -> int:
    """|B'| = floor(r_sample * B), Eq. (1); where that is 0: 1 with keep_one, else refused (choices C6, C14)."""
    _check_fraction("sample_keep_ratio", sample_keep_ratio)
    num_keep = math.floor(sample_keep_ratio * num_samples + ROUNDING)
    if num_keep < 1 and keep_one:
        return 1
    if num_keep < 1:
        smallest = 1 / sample_keep_ratio if sample_keep_ratio else math.inf
        smallest = smallest if math.isinf(smallest) else math.ceil(smallest - ROUNDING)
        raise ValueError(
            f"sample_keep_ratio {sample_keep_ratio} keeps none of {num_samples} samples; "
            f"the smallest batch that would do is {smallest}"
        )
    return num_keep


def num_tokens_to_keep(token_keep_ratio: float, num_tokens: int) -> int:
    """max(1, floor(r_token * |T(x)|)), after Eq. (2): a kept sample never loses its last token (choice C11)."""
    _check_fraction("token_keep_ratio", token_keep_ratio)
    return max(1, math.floor(token_keep_ratio * num_tokens + ROUNDING))


def _nll_and_entropy(logits: Tensor, labels: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """NLL and entropy of all positions; row by row, since flattening a slice such as logits[:, :-1] would copy it."""
    if labels.numel() == 0:
        return torch.zeros_like(labels, dtype=torch.float32), torch.zeros_like(labels, dtype=torch.float32)
    if labels.dim() != 1:
        rows = zip(logits, labels, strict=True) if labels.dim() else [(logits[None], labels[None])]
        parts = [_nll_and_entropy(*row, chunk_size) for row in rows]
        nll, entropy = (torch.stack(values) for values in zip(*parts, strict=True))
        return (nll, entropy) if labels.dim() else (nll[0, 0], entropy[0, 0])
    nll, entropy = [], []
    for z, y in zip(logits.split(chunk_size), labels.split(chunk_size), strict=True):
        log_p = z.float().log_softmax(dim=-1)
        nll.append(-log_p.gather(-1, y[:, None])[:, 0])
        entropy.append(torch.special.entr(log_p.exp()).sum(dim=-1))
    return torch.cat(nll), torch.cat(entropy)


def _rank(gamma: float, num_values: int) -> int:
    """The place from 1, in ascending order, of the gamma-quantile (choice C4)."""
    return max(math.ceil(gamma * num_values - ROUNDING), 1)


def _in_any(quadrant: Tensor, quadrants: Collection[Quadrant]) -> Tensor:
    return torch.isin(quadrant, torch.tensor(list(quadrants), dtype=torch.int64, device=quadrant.device))


def _min_max(values: Tensor) -> Tensor:
    """Scale to [0, 1]; all zeros where every value is the same."""
    values = values.double()
    spread = values.max() - values.min()
    return (values - values.min()) / torch.where(spread > 0, spread, torch.ones_like(spread))


def _mean_over_answer(name: str, values: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean over T(x) of each row, summed in float64 so that padding cannot change its rounding."""
    _check_answer(name, values, loss_mask)
    values = torch.where(loss_mask, values.double(), 0.0)
    return values.sum(dim=-1) / loss_mask.sum(dim=-1)


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _check_quadrants(name: str, quadrants: Collection[Quadrant]) -> None:
    if not set(quadrants) <= set(Quadrant) - {Quadrant.BETWEEN}:
        raise ValueError(f"{name} must be of Quadrant 1 to 4, got {list(quadrants)}")


def _check_plane(ppl: Tensor, ent: Tensor) -> None:
    if ppl.dim() != 1 or ppl.shape != ent.shape or len(ppl) == 0:
        raise ValueError(f"ppl and ent must be (B,) alike, B >= 1, got {tuple(ppl.shape)} and {tuple(ent.shape)}")
    for name, values in (("ppl", ppl), ("ent", ent)):
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).nonzero()[0])
            raise ValueError(f"row {row}: {name} must be finite, got {values[row].item()}")


def _check_answer(name: str, values: Tensor, loss_mask: Tensor) -> None:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool (True = trainable), got {loss_mask.dtype}")
    if values.dim() != 2 or values.shape != loss_mask.shape:
        shapes = f"{tuple(values.shape)} and {tuple(loss_mask.shape)}"
        raise ValueError(f"{name} and loss_mask must be (B, T) alike, got {shapes}")
    empty = ~loss_mask.any(dim=-1)
    if bool(empty.any()):
        raise ValueError(f"row {int(empty.nonzero()[0])}: loss_mask has no trainable token, expected at least one")
    bad = loss_mask & ~values.isfinite()
    if bool(bad.any()):
        row, position = bad.nonzero()[0].tolist()
        got = values[row, position].item()
        raise ValueError(f"row {row}, position {position}: {name} must be finite, got {got}")
