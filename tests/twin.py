"""The literal twin: Q-Tuning's Algorithm 1 (arXiv 2509.23873) in plain Python, line by line.

The tests hold `qtuning.py` against this file; hold this file against the paper. It knows no tensors: lists,
loops and exact fractions, so that no rounding hides in it (but that of exp and log), written from the paper
and not from `qtuning.py`. Where the paper is silent the choices (C1 ... C15) are those of docs/CHOICES.md.
The functions stand in the order of Algorithm 1, and `line 5` in a comment is its line 5. Slow on purpose;
wrong input is not its business, but for a budget of no sample (C14).
"""

import math
from dataclasses import dataclass
from fractions import Fraction

BETWEEN, Q1, Q2, Q3, Q4 = range(5)  # Q1 harmful noise, Q2 valuable misconception, Q3 redundant, Q4 calibration


def fraction_meant(ratio):
    """0.29 as 29/100 and 1/3 as 1/3: the simple fraction that a float stands for (C6)."""
    return Fraction(ratio).limit_denominator(10**9)


# ---- line 4: Equations 4 and 5 -------------------------------------------------------------------------


def token_nll_and_entropy(logits, label):
    """-log p(label) and H(p) of one position, p = softmax(logits)."""
    largest = max(logits)
    log_total = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    log_p = [logit - log_total for logit in logits]
    return -log_p[label], -sum(math.exp(value) * value for value in log_p)


def answer_positions(loss_mask):
    """T(x): the positions of the trainable tokens."""
    return [position for position, trainable in enumerate(loss_mask) if trainable]


def sample_perplexity(nll, loss_mask):
    """Equation 4, one sample."""
    answer = answer_positions(loss_mask)
    return math.exp(sum(Fraction(nll[i]) for i in answer) / len(answer))


def sample_entropy(token_entropy, loss_mask):
    """Equation 5, one sample."""
    answer = answer_positions(loss_mask)
    return float(sum(Fraction(token_entropy[i]) for i in answer) / len(answer))


# ---- lines 5 to 16: Equation 6 ---------------------------------------------------------------------------


def quantile(values, gamma):
    """The smallest value q such that at least a fraction gamma of the values are <= q (C4)."""
    for count, q in enumerate(sorted(values), start=1):
        if count >= gamma * len(values):
            return q
    raise AssertionError("gamma is above 1")


@dataclass
class Thresholds:
    alpha: float
    beta: float
    ppl_low: float
    ppl_high: float
    ent_low: float
    ent_high: float


def thresholds_at(ppl, ent, alpha, beta):
    """Line 8."""
    a, b = fraction_meant(alpha), fraction_meant(beta)
    return Thresholds(alpha, beta, quantile(ppl, a), quantile(ppl, 1 - a), quantile(ent, b), quantile(ent, 1 - b))


def quadrant_of(ppl, ent, thresholds):
    """Line 9, one sample. High is strictly above, low is at or below (C5)."""
    high_ppl, low_ppl = ppl > thresholds.ppl_high, ppl <= thresholds.ppl_low
    high_ent, low_ent = ent > thresholds.ent_high, ent <= thresholds.ent_low
    if high_ppl and high_ent:
        return Q1
    if high_ppl and low_ent:
        return Q2
    if low_ppl and low_ent:
        return Q3
    if low_ppl and high_ent:
        return Q4
    return BETWEEN


def assign_quadrants(ppl, ent, thresholds):
    return [quadrant_of(p, h, thresholds) for p, h in zip(ppl, ent, strict=True)]


def num_kept_at(ppl, ent, alpha, beta, keep_quadrants):
    """|Q2| + |Q4| at (alpha, beta), or of the other quadrants that an ablation keeps."""
    quadrants = assign_quadrants(ppl, ent, thresholds_at(ppl, ent, alpha, beta))
    return sum(quadrants.count(q) for q in keep_quadrants)


def bisect_thresholds(ppl, ent, num_keep, upper=0.49, max_iters=20, keep_quadrants=(Q2, Q4)):
    alpha_low, alpha_high, beta_low, beta_high = 0.0, upper, 0.0, upper  # line 5, C1
    for _ in range(max_iters):  # line 6
        alpha = (alpha_low + alpha_high) / 2  # line 7
        beta = (beta_low + beta_high) / 2
        # lines 8 to 11, with Equation 6 on a hit (C2)
        if num_kept_at(ppl, ent, alpha, beta, keep_quadrants) > num_keep:
            alpha_high, beta_high = alpha, beta  # line 14
        else:
            alpha_low, beta_low = alpha, beta  # line 12
    return thresholds_at(ppl, ent, alpha_low, beta_low)  # C3


# ---- lines 17 to 21 --------------------------------------------------------------------------------------


def min_max_normalised(values):
    """Over the mini-batch; a constant axis normalises to 0 (C8)."""
    lowest, highest = Fraction(min(values)), Fraction(max(values))
    if lowest == highest:
        return [Fraction(0) for _ in values]
    return [(Fraction(value) - lowest) / (highest - lowest) for value in values]


def supp_score(ppl, ent):
    """Line 19."""
    return [max(p - h, h - p) for p, h in zip(min_max_normalised(ppl), min_max_normalised(ent), strict=True)]


@dataclass
class SamplePruning:
    keep: list
    quadrant: list
    backfilled: list
    prune_tokens: list
    thresholds: Thresholds


EVERYWHERE = (BETWEEN, Q1, Q2, Q3, Q4)


def prune_samples(
    ppl, ent, sample_keep_ratio, keep_quadrants=(Q2, Q4), trim_quadrants=(Q2,), backfill_quadrants=EVERYWHERE
):
    """Lines 5 to 21. Lists of one entry a sample. Other quadrants: the ablations of Tables 4 and 15."""
    num_keep = math.floor(fraction_meant(sample_keep_ratio) * len(ppl))  # Equation 1, C6
    if num_keep < 1:
        raise ValueError("nothing would be kept")  # C14
    thresholds = bisect_thresholds(ppl, ent, num_keep, keep_quadrants=keep_quadrants)
    quadrant = assign_quadrants(ppl, ent, thresholds)

    keep = []  # line 17
    for q in quadrant:  # Q3 alone can hold more than asked for at alpha = 0, all of them ties: the first ones
        keep.append(q in keep_quadrants and sum(keep) < num_keep)
    prune_tokens = [kept and q in trim_quadrants for kept, q in zip(keep, quadrant, strict=True)]
    backfilled = [False for _ in quadrant]
    supp, norm_ppl, norm_ent = supp_score(ppl, ent), min_max_normalised(ppl), min_max_normalised(ent)
    while sum(keep) < num_keep:  # line 18
        left = [x for x in range(len(ppl)) if not keep[x]]  # line 19: Q1, Q3 and BETWEEN (C7)
        left = [x for x in left if quadrant[x] in backfill_quadrants] or left  # beyond the paper
        best = max(left, key=supp.__getitem__)  # ties: the first one
        keep[best] = backfilled[best] = True  # line 20
        nearer = Q2 if norm_ppl[best] >= norm_ent[best] else Q4  # the arm of the max that won (C9)
        prune_tokens[best] = nearer in trim_quadrants
    return SamplePruning(keep, quadrant, backfilled, prune_tokens, thresholds)


# ---- lines 22 to 33: Equation 7 --------------------------------------------------------------------------


def smoothed_token_score(token_ppl, loss_mask, smoothing):
    """Equation 7, one sample: {position: s_i} over T(x)."""
    answer = answer_positions(loss_mask)
    smoothing = Fraction(smoothing)
    score = {}
    for i in answer:  # line 28
        own = Fraction(token_ppl[i])
        before = Fraction(token_ppl[i - 1]) if i - 1 in answer else own  # C12
        after = Fraction(token_ppl[i + 1]) if i + 1 in answer else own
        score[i] = (1 - smoothing) * own + smoothing * (before + after)
    return score


def prune_tokens(token_ppl, loss_mask, token_keep_ratio, smoothing, reverse=False):
    """Line 29, one sample: m(x). The lowest scores stay (C10; `reverse`: the highest), ties: the first."""
    score = smoothed_token_score(token_ppl, loss_mask, smoothing)
    num_keep = max(1, math.floor(fraction_meant(token_keep_ratio) * len(score)))  # C11
    kept = set()
    while len(kept) < num_keep:
        best = None
        for i in answer_positions(loss_mask):
            better = best is None or (score[i] > score[best] if reverse else score[i] < score[best])
            if i not in kept and better:
                best = i
        kept.add(best)
    return [i in kept for i in range(len(loss_mask))]


@dataclass
class PrunedBatch:
    samples: SamplePruning
    token_mask: list
    ppl: list
    ent: list


def prune_batch(
    nll,
    token_entropy,
    loss_mask,
    sample_keep_ratio,
    token_keep_ratio,
    smoothing=0.5,
    reverse=False,
    keep_quadrants=(Q2, Q4),
    trim_quadrants=(Q2,),
    backfill_quadrants=EVERYWHERE,
):
    """Algorithm 1. Lists of B lists of T entries."""
    ppl = [sample_perplexity(row, mask) for row, mask in zip(nll, loss_mask, strict=True)]  # line 4
    ent = [sample_entropy(row, mask) for row, mask in zip(token_entropy, loss_mask, strict=True)]
    samples = prune_samples(  # lines 5 to 21
        ppl, ent, sample_keep_ratio, keep_quadrants, trim_quadrants, backfill_quadrants
    )
    token_mask = []  # line 23
    for x, mask in enumerate(loss_mask):  # line 24
        if not samples.keep[x]:
            token_mask.append([False for _ in mask])
        elif samples.prune_tokens[x]:  # line 27: Q2, or backfilled as Q2 (by default)
            token_ppl = [math.exp(nll[x][i]) if mask[i] else None for i in range(len(mask))]
            token_mask.append(prune_tokens(token_ppl, mask, token_keep_ratio, smoothing, reverse))
        else:  # line 25: Q4, or backfilled as Q4
            token_mask.append(list(mask))
    return PrunedBatch(samples, token_mask, ppl, ent)  # line 33
