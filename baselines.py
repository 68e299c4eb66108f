"""The pruners that the paper compares Q-Tuning with (Sec. B.3), at budgets that match Q-Tuning's own.

The paper gives each of them one sentence, and at times one that contradicts its name; none of their raters,
references or targets is named. So every docstring says what the original does, what the paper says, and what is
done here. A name that the original would not recognise says so: `sparsevlm-text`, `tokencleaning-row`.

    --sample-pruner     when           needs                        function
    random              mini-batch     -                            random_samples
    entropy             mini-batch     entropies                    entropy_samples
    infobatch           epoch          row losses                   infobatch_weights
    infobatch-official  epoch          row losses                   infobatch_official_weights
    random-static       once           -                            random_rows
    longest             once           answer lengths               longest_rows
    drop-longest        once           answer lengths               drop_longest_rows
    alpagasus           once           rating                       alpagasus_rows
    cond-gain           once           cond_gain                    cond_gain_rows
    deita               once           complexity, quality,         deita_rows
                                       embedding
    ds2                 once           rating, embedding            ds2_rows
    less                once           less                         less_rows

    --token-pruner        needs                                     function
    random                -                                         random_tokens
    ppl-keep-low          current NLL                               lowest_ppl_tokens
    ppl-keep-high         current NLL                               highest_ppl_tokens
    fastv                 attention of the last layer               received_attention, fastv_tokens
    sparsevlm-text        attention, hidden states                  sparsevlm_text_score, sparsevlm_text_tokens
    rho1                  current NLL, reference NLL                rho1_tokens
    tokencleaning-row     base NLL, reference NLL                   tokencleaning_tokens
    tokencleaning-global  base NLL, reference NLL                   tokencleaning_global_tokens

What a mini-batch's sample pruner returns is a `qtuning.SamplePruning`; a token pruner, a (B, T) bool mask. Those
that choose rows once return the indices of the kept rows, and InfoBatch the weight of every row. Where a function
says `num_keep`, it is floor(r_sample * N). Ties go to the earlier row or token: the caller orders rows by a hash
of seed and id, so that a tie between rows depends on the seed alone. What is random takes a `torch.Generator`.
Everything is pure, and what a model must be asked for is asked elsewhere (passes.py, score_rows.py).

Shapes: B samples of a mini-batch, N rows of the data, T label positions, L tokens of a row, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning import Quadrant, SamplePruning, keep_lowest, num_samples_to_keep, num_tokens_to_keep

# ------------------------------------------------------------------------- samples, in each mini-batch


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
    _check_scores("ent", ent)
    keep = torch.zeros(len(ent), dtype=torch.bool)
    keep[top_rows(ent, num_samples_to_keep(sample_keep_ratio, len(ent)))] = True
    return every_sample(len(ent), keep)


# ------------------------------------------------------------------------- samples, chosen once: by one score


def top_rows(score: Tensor, num_keep: int) -> Tensor:
    """Indices of the `num_keep` highest scores of `score` (N,), ascending; ties go to the earlier row.

    Raises:
        ValueError: a NaN or infinite score, or fewer rows than are to be kept.
    """
    _check_scores("score", score)
    _check_enough(num_keep, len(score))
    return score.cpu().sort(descending=True, stable=True).indices[:num_keep].sort().values


def random_rows(num_rows: int, num_keep: int, generator: torch.Generator) -> Tensor:
    """`num_keep` rows drawn uniformly without replacement, once: the random twin of every pruner below."""
    _check_enough(num_keep, num_rows)
    return torch.randperm(num_rows, generator=generator)[:num_keep].sort().values


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
        file, or a local model's digits by score_rows.py); the threshold becomes the budget. Ratings are coarse,
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


def less_rows(influence: Tensor, num_keep: int) -> Tensor:
    """Keep the rows of the highest influence on the target tasks; `influence` says what that is."""
    return top_rows(influence, num_keep)


# --------------------------------------------------------------------------- samples, each epoch: InfoBatch


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
        be met; see `infobatch_official_weights`. Paper: "information-theoretic", selecting "the largest gradient
        updates", at every budget; not how. Its early snapshot cut the official rule's rows at the budget in the
        order of the data: always the same rows, unweighted. Here: the same two strata, both sampled, so that any
        budget is met exactly and every row may come. The weight multiplies the row's token sum.
    """
    _check_scores("row_loss", row_loss)
    _check_enough(num_keep, len(row_loss))
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


def infobatch_official_weights(row_loss: Tensor, generator: torch.Generator, *, low_keep_ratio: float = 0.5) -> Tensor:
    """InfoBatch's own rule, at the budget that it comes to: all rows at or above the mean loss, half of the rest.

    Args:
        row_loss:       (N,) float, each row's mean NLL when it was last seen; alike for all before the first epoch.
        low_keep_ratio: q, the share of the low rows to draw.
    Returns:
        (N,) float64: the weight in the loss, 0 where the row is left out of this epoch; 1 for high rows, 1/q (to
        the rounding of q * n_low) for low ones, scaled to a mean of 1 over the kept (see `infobatch_weights`).
    Original: Qin et al., ICLR 2024; r = 1 - q = 0.5, and whole epochs at the end (`infobatch_anneals`). The
        weights of those whole epochs are 1 here; in the official sampler they stay 1/q unless the last pruned
        epoch ends on a whole number.
    """
    _check_scores("row_loss", row_loss)
    low = _below_mean(row_loss).nonzero()[:, 0]
    weights = torch.ones(len(row_loss), dtype=torch.float64)
    if len(low):
        num_keep = num_tokens_to_keep(low_keep_ratio, len(low))  # the same floor, and at least one
        weights[low] = 0
        weights[low[torch.randperm(len(low), generator=generator)[:num_keep]]] = len(low) / num_keep
    return weights * (weights > 0).sum() / len(row_loss)


def infobatch_anneals(epoch: int, num_epochs: float, delta: float = 0.875) -> bool:
    """Whether InfoBatch trains on every row in this epoch (0-based): the last ones, past delta * num_epochs."""
    return epoch + 1 > delta * num_epochs


def _below_mean(values: Tensor) -> Tensor:
    """Which values are below their mean; none where all are alike."""
    values = values.double()
    return (values < values.mean()) & (values < values.max())


# ----------------------------------------------------------------- samples, chosen once: DEITA and DS2


def centred_units(embedding: Tensor) -> Tensor:
    """(N, D) -> (N, D) float32 of length 1, the mean row subtracted.

    A causal model's embeddings all point one way (mean cosine 0.9), which hides what tells rows apart.
    """
    embedding = embedding.float()
    return F.normalize(embedding - embedding.mean(dim=0), dim=-1)


def deita_rows(
    complexity: Tensor, quality: Tensor, embedding: Tensor, num_keep: int, *, threshold: float = 0.9
) -> tuple[Tensor, int]:
    """Walk down complexity * quality; take a row unless one that is taken already is too much like it.

    Args:
        complexity, quality: (N,) float, above 0.
        embedding:           (N, D) float.
        threshold:           the highest cosine of two taken rows' embeddings.
    Returns:
        the kept rows (num_keep,), the walk's own first, each in the order of the score; how many are the walk's
        own. The others fill the budget up from those that the walk passed over, best first.
    Original: DEITA (Liu et al., 2023). Two tuned LLaMA scorers give 1 to 6; the 0.9 is a cosine *similarity*;
        where the pool ends first, fewer rows are kept. Paper: one sentence, no scorer. Here: the scores are
        whoever's wrote them (score_rows.py asks a local model for digits, of whole conversations); embeddings
        are centred first, without which 0.9 rejects nearly every row; and the budget is met.
    """
    _check_scores("complexity", complexity)
    _check_scores("quality", quality)
    _check_enough(num_keep, len(complexity))
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
    rows = taken + passed[: num_keep - len(taken)]
    return torch.tensor(rows), len(taken)


def nearest_neighbours(embedding: Tensor, num: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Each row's `num` nearest other rows by centred cosine: their indices and distances 1 - cos, (N, num) each.

    A row is no neighbour of itself; a copy of it is.
    """
    if not 1 <= num < len(embedding):
        raise ValueError(f"expected more than {num} rows to find {num} neighbours, got {len(embedding)}")
    unit, indices, distances = centred_units(embedding), [], []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T  # (block, N)
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -math.inf
        nearest = cosine.topk(num, dim=-1)
        indices.append(nearest.indices)
        distances.append(1 - nearest.values)
    return torch.cat(indices), torch.cat(distances)


def merge_rare_classes(rating: Tensor, min_share: float = 0.01) -> Tensor:
    """Ratings (N,) to the nearest whole number, then to classes 0, 1, ... in their order; int64.

    A class of less than `min_share` of the rows joins the nearest that is not: too few rows to tell how it is
    confused with others.
    """
    classes, place, count = rating.double().round().unique(return_inverse=True, return_counts=True)
    common = classes[(count >= min_share * len(rating)) | (count == count.max())]
    nearest = (classes[:, None] - common).abs().argmin(dim=-1)  # (classes,) -> common
    return nearest[place]


def transition_matrix(
    label: Tensor, neighbours: Tensor, num_classes: int, *, steps: int = 1501
) -> tuple[Tensor, Tensor]:
    """How raters confuse the classes, from how often a row and its two nearest neighbours agree.

        c1_a = sum_i p_i T_ia,  c2_ab = sum_i p_i T_ia T_ib,  c3_abc = sum_i p_i T_ia T_ib T_ic

    T and p are those that come nearest to the frequencies seen, if a row and its neighbours share their true class.

    Args:
        label:      (N,) int64 in [0, num_classes), as rated.
        neighbours: (N, 2 or more) int64, the nearest first.
    Returns:
        T (K, K), T[a, b] = P(rated b | truly a), and p (K,), P(truly a). float64.
    Source: the higher-order consensus of DS2 (Pang et al., ICLR 2025): the sum of three Frobenius norms, Adam
        at 0.1. One pass over all rows in place of means over 50 random subsets. Rows stand once: a copy of the
        data, as in the official loader, would make every row its own neighbour, and T the identity.
    """
    one_hot = F.one_hot(label, num_classes).double()
    first, second = one_hot[neighbours[:, 0]], one_hot[neighbours[:, 1]]
    seen = (
        one_hot.mean(0),
        torch.einsum("na,nb->ab", one_hot, first) / len(label),
        torch.einsum("na,nb,nc->abc", one_hot, first, second) / len(label),
    )
    logits = (5 * torch.eye(num_classes, dtype=torch.float64) - 1).requires_grad_()
    prior = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, prior], lr=0.1)
    for _ in range(steps):
        T, p = logits.softmax(-1), prior.softmax(-1)
        model = (p @ T, torch.einsum("i,ia,ib->ab", p, T, T), torch.einsum("i,ia,ib,ic->abc", p, T, T, T))
        distance = sum(torch.linalg.vector_norm(m - s) for m, s in zip(model, seen, strict=True))
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    return logits.softmax(-1).detach(), prior.softmax(-1).detach()


def curate_labels(label: Tensor, neighbours: Tensor, distances: Tensor, T: Tensor, prior: Tensor) -> Tensor:
    """Replace the ratings that a row's neighbours contradict, in each class as many as T says are wrong.

    A row's neighbours, and itself at the distance 2 d_1 - d_2, vote for their classes with 1 - distance. In the
    rows rated b the share 1 - T_bb p_b / P(rated b) of the weakest own vote is flagged; a flagged row takes the
    class of the most votes, if that has more than its own.

    Args:
        label:      (N,) int64 in [0, K).
        neighbours, distances: (N, k) of `nearest_neighbours`, k >= 2.
        T, prior:   of `transition_matrix`.
    Returns:
        (N,) int64.
    Source: DS2's ranking by neighbour votes. It repeats this on 51 random subsets and replaces what is flagged
        in most; here one pass over all rows, which draws nothing, and the votes' majority in that place.
    """
    num_classes = len(prior)
    votes = torch.zeros(len(label), num_classes, dtype=torch.float64)
    votes.scatter_add_(1, label[neighbours], 1 - distances.double())
    own_distance = 2 * distances[:, :1].double() - distances[:, 1:2].double()
    votes.scatter_add_(1, label[:, None], 1 - own_distance)
    support = F.normalize(votes, dim=-1).gather(1, label[:, None])[:, 0]  # -log of it is the badness
    flagged = torch.zeros(len(label), dtype=torch.bool)
    for rated in range(num_classes):
        rows = (label == rated).nonzero()[:, 0]
        if len(rows):
            right = float(T[rated, rated] * prior[rated]) * len(label) / len(rows)
            num_wrong = round(min(max(1 - right, 0.0), 1.0) * len(rows))
            flagged[rows[support[rows].sort(stable=True).indices[:num_wrong]]] = True
    suggested = votes.argmax(dim=-1)
    return torch.where(flagged, suggested, label)


def ds2_rows(rating: Tensor, embedding: Tensor, num_keep: int, *, num_neighbours: int = 10) -> Tensor:
    """Correct the ratings by their neighbours, then keep the best class down, in the last one the most unusual rows.

    Args:
        rating:    (N,) float on a scale of whole numbers, best highest (DS2: 0 to 5).
        embedding: (N, D) float.
    Returns:
        the kept rows (num_keep,), ascending.
    Original: DS2 (Pang et al., ICLR 2025): ratings of three LLMs in 6 classes, sentence embeddings, score
        curation by a transition matrix, long-tail diversity. Paper: one sentence. Here: ratings and embeddings
        are whoever's wrote them (score_rows.py: a local model's), a rating counts to the nearest whole number,
        neighbours are by centred cosine; what else differs stands in the parts. A row is the more unusual, the
        larger its mean distance to its neighbours. (A US patent application, 2026/0093981, names the pipeline.)
    """
    _check_scores("rating", rating)
    _check_enough(num_keep, len(rating))
    label = merge_rare_classes(rating)
    neighbours, distances = nearest_neighbours(embedding, num_neighbours)
    num_classes = int(label.max()) + 1
    if num_classes > 1:
        T, prior = transition_matrix(label, neighbours, num_classes)
        others = num_neighbours - 1  # with itself a row has num_neighbours votes
        label = curate_labels(label, neighbours[:, :others], distances[:, :others], T, prior)
    unusual = distances.double().mean(dim=-1)
    by_unusual = unusual.sort(descending=True, stable=True).indices
    order = by_unusual[label[by_unusual].sort(descending=True, stable=True).indices]
    return order[:num_keep].sort().values


# ------------------------------------------------------------------------ samples, chosen once: LESS


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


# --------------------------------------------------------------------------------- tokens, of kept samples


def random_tokens(loss_mask: Tensor, token_keep_ratio: float, generator: torch.Generator) -> Tensor:
    """Keep max(1, floor(r_token * |T(x)|)) answer tokens of each row, drawn uniformly without replacement.

    Args:
        loss_mask: (B, T) bool, T(x).
    Returns:
        (B, T) bool, a subset of loss_mask with exactly the budget of `qtuning.prune_tokens` in every row.
    Source: "Random" of the paper's tables (Sec. B.3: "exclusively to the answers"), redrawn at every visit.
    """
    draw = torch.rand(loss_mask.shape, generator=generator).to(loss_mask.device)
    return keep_lowest(draw, loss_mask, token_keep_ratio)


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


def sparsevlm_text_tokens(score: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens of the highest `sparsevlm_text_score` ((B, T): its first column dropped)."""
    return keep_lowest(-score, loss_mask, token_keep_ratio)


def rho1_tokens(nll: Tensor, reference_nll: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens of the highest excess loss over a reference model's.

        excess_ij = nll_ij(current) - nll_ij(reference)

    Args:
        nll, reference_nll: (B, T) float, of the same tokens.
    Original: Rho-1 (Lin et al., NeurIPS 2024), a pre-training method: the reference is the same base trained on
        a small clean corpus, and the share is of the batch's tokens. Paper: no reference named. Here: the reference
        is any model of the same tokenizer, scored once by score_rows.py (a LoRA adapter on the base costs no second
        model); the share is of each row's tokens, as for every pruner. A reference that has trained on the rows
        it scores has memorised them: keep its rows apart, or few.
    """
    return keep_lowest(reference_nll - nll, loss_mask, token_keep_ratio)


def tokencleaning_tokens(base_nll: Tensor, reference_nll: Tensor, loss_mask: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep each row's answer tokens whose loss fell most from the base model to the reference: `tokencleaning-row`.

    Original: TokenCleaning (Pang et al., ICML 2025), fixed-model form, which ranks the tokens of all rows together
        (`tokencleaning_global_tokens`). Paper: "token-level statistics". Here: its score within each row, so that
        the budget is every other pruner's. It is Rho-1's choice as of step 0, and never changes.
    """
    return rho1_tokens(base_nll, reference_nll, loss_mask, token_keep_ratio)


def tokencleaning_global_tokens(base_nll: Tensor, reference_nll: Tensor, token_keep_ratio: float) -> Tensor:
    """Keep the share r_token of all rows' answer tokens whose loss fell most: `tokencleaning-global`.

    Args:
        base_nll, reference_nll: (M,) float, the answer tokens of the whole pool, end to end.
    Returns:
        (M,) bool, exactly max(1, floor(r_token * M)) True. A row may keep all of its tokens or none.
    Source: as TokenCleaning's own scripts; see `tokencleaning_tokens`. The budget holds over the pool and not in
        a row, so that a run's realised budget depends on which rows are visited.
    """
    every = torch.ones(1, len(base_nll), dtype=torch.bool)
    return tokencleaning_tokens(base_nll[None], reference_nll[None], every, token_keep_ratio)[0]


# ------------------------------------------------------------------------------------------------ parts


def _standardised(values: Tensor, answer: Tensor) -> Tensor:
    """(values - mean) / standard deviation over the answer of each row; 0 outside it, and where all are alike."""
    count = answer.sum(dim=-1, keepdim=True).clamp(min=1)
    values = values.double()
    mean = torch.where(answer, values, 0.0).sum(dim=-1, keepdim=True) / count
    centred = torch.where(answer, values - mean, 0.0)
    deviation = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred)).float()


def _check_scores(name: str, values: Tensor) -> None:
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{name} must be (N,), N >= 1, got {tuple(values.shape)}")
    bad = ~values.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"row {row}: {name} must be finite, got {values[row].item()}")


def _check_enough(num_keep: int, num_rows: int) -> None:
    if not 1 <= num_keep <= num_rows:
        raise ValueError(f"expected to keep between 1 and all of {num_rows} rows, got {num_keep}")
