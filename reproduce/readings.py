"""Other readings of the choices in docs/CHOICES.md: the variants that reproduce/choices.py compares with the default.

A variant is a pruner, which `register` adds to the tables of pruners/, flags of train.py, a loss, or a change of the
rows. C18 has none: `mode_difference` measures what it could change.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qtuning
import train
from data.sft import Sample, collate
from model import Transformer
from pruners import SAMPLE_PRUNERS, TOKEN_PRUNERS, SamplePruner, TokenPruner, qtuning_samples
from qtuning import IGNORE_INDEX, KEEP_QUADRANTS, ROUNDING, Quadrant, SamplePruning, Thresholds
from training.head import TokenLoss
from training.scoring import score

# ----------------------------------------------------------------------------------- C1 to C9: samples


def search(num_kept, num_keep, *, upper=0.49, halvings=20, lowers=False, stops=False, last=False) -> float:
    """The level that the bisect search of Eq. 6 returns, with num_kept: level -> samples in the kept quadrants.

    Args:
        upper:  C1: end of the search interval.
        lowers: C2: a midpoint exactly on target lowers the upper bound.
        stops:  C2: the search ends at the first midpoint on target.
        last:   C3: it returns the last midpoint.
    """
    low, high = 0.0, upper
    for _ in range(halvings):
        level = (low + high) / 2
        kept = num_kept(level)
        if stops and kept == num_keep:
            return level
        if kept > num_keep or (lowers and kept == num_keep):
            high = level
        else:
            low = level
    return level if last else low


def stage_1(
    ppl: Tensor, ent: Tensor, num_keep: int, *, quantile=qtuning.quantile, assign=qtuning.assign_quadrants,
    fill_from=tuple(Quadrant), normalised=None, trim_filled=None, **how,
) -> SamplePruning:  # fmt: skip
    """`qtuning.prune_samples` with the choices as arguments; it keeps all of Q2 and Q4, also if they are too many.

    Args:
        quantile:    C4: (values, gamma) -> scalar.
        assign:      C5: (ppl, ent, thresholds) -> (B,) quadrants.
        fill_from:   C7: quadrants that the backfill may draw from.
        normalised:  C8: PPL and Ent in [0, 1], (B,) each; default: over the mini-batch.
        trim_filled: C9: whether backfilled samples are trimmed; default: where PPL is the larger of these two.
        how:         of `search`.
    """

    def cut(level: float) -> Thresholds:
        ends = (float(quantile(values, at)) for values in (ppl, ent) for at in (level, 1 - level))
        return Thresholds(level, level, *ends)

    def in_kept(level: float) -> Tensor:
        return in_any(assign(ppl, ent, cut(level)), KEEP_QUADRANTS)

    level = search(lambda level: int(in_kept(level).sum()), num_keep, **how)
    quadrant, kept = assign(ppl, ent, cut(level)), in_kept(level)
    ppl_norm, ent_norm = normalised or (min_max(ppl), min_max(ent))
    may_fill = in_any(quadrant, fill_from) & ~kept
    supp_score = (ppl_norm - ent_norm).abs().masked_fill(~may_fill, -math.inf)
    backfilled = torch.zeros_like(kept)
    backfilled[supp_score.sort(descending=True, stable=True).indices[: max(0, num_keep - int(kept.sum()))]] = True
    backfilled &= may_fill
    like_q2 = ppl_norm >= ent_norm if trim_filled is None else torch.full_like(kept, trim_filled)
    trim = torch.where(backfilled, like_q2, quadrant == Quadrant.VALUABLE_MISCONCEPTION)
    keep = kept | backfilled
    return SamplePruning(keep, quadrant, backfilled, keep & trim, cut(level))


def in_any(quadrant: Tensor, quadrants: Iterable[int]) -> Tensor:
    return torch.isin(quadrant, torch.tensor([int(q) for q in quadrants]))


def min_max(values: Tensor) -> Tensor:
    """Values scaled to [0, 1]; 0 where all are the same."""
    values = values.double() - values.min()
    return values / values.max() if values.max() > 0 else values


def samples(num_keep: Callable[[float, int], int] = qtuning.num_samples_to_keep, **how) -> SamplePruner:
    """A pruner by `stage_1`; C6: num_keep(ratio, number of samples)."""
    return SamplePruner(
        ("ppl", "ent"),
        choose=lambda cfg, _, size, ppl, ent: stage_1(ppl, ent, num_keep(cfg.sample_keep_ratio, size), **how),
    )


def rounded(ratio: float, size: int) -> int:
    """C6: the nearest number of samples in place of the floor."""
    return max(1, round(ratio * size))


def interpolated(values: Tensor, gamma: float) -> Tensor:
    """C4: a quantile between two values."""
    return values.double().quantile(gamma)


def other_edges(ppl: Tensor, ent: Tensor, cut: Thresholds) -> Tensor:
    """C5: high is >=, low is <: quadrants of the plane turned by 180 degrees, turned back."""
    turned = Thresholds(cut.alpha, cut.beta, -cut.ppl_high, -cut.ppl_low, -cut.ent_high, -cut.ent_low)
    return torch.tensor([0, 3, 4, 1, 2])[qtuning.assign_quadrants(-ppl, -ent, turned)]


def by_micro_batch(cfg, size: int, choose: Callable[[slice], SamplePruning]) -> SamplePruning:
    """Decisions in each micro-batch of a prune batch, for variants that also look beyond the micro-batch."""
    parts = [choose(slice(start, start + cfg.micro_batch)) for start in range(0, size, cfg.micro_batch)]
    fields = ("keep", "quadrant", "backfilled", "prune_tokens")
    return SamplePruning(*(torch.cat([getattr(part, name) for part in parts]) for name in fields), thresholds=None)


def normalised_over_the_step(cfg, generator, size: int, ppl: Tensor, ent: Tensor) -> SamplePruning:
    """C8: each micro-batch is decided with values normalised over the step, which is the prune batch."""
    ppl_norm, ent_norm = min_max(ppl), min_max(ent)

    def choose(part: slice) -> SamplePruning:
        num_keep = qtuning.num_samples_to_keep(cfg.sample_keep_ratio, len(ppl[part]))
        return stage_1(ppl[part], ent[part], num_keep, normalised=(ppl_norm[part], ent_norm[part]))

    return by_micro_batch(cfg, size, choose)


# --------------------------------------------------------------------------------- C11 and C12: tokens


def tokens(
    num_keep: Callable[[float, int], int] = qtuning.num_tokens_to_keep,
    token_score: Callable[[Tensor, Tensor, float], Tensor] = qtuning.smoothed_token_score,
) -> TokenPruner:
    """`qtuning.prune_tokens` as a pruner; C11: num_keep(ratio, answer tokens), C12: Eq. 7."""

    def decide(cfg, generators, loss_mask: Tensor, nll: Tensor) -> Tensor:
        found = token_score(qtuning.token_perplexity(nll), loss_mask, cfg.smoothing)
        return lowest(found, loss_mask, [num_keep(cfg.token_keep_ratio, n) for n in loss_mask.sum(dim=1).tolist()])

    return TokenPruner(("nll",), decide)


def lowest(token_score: Tensor, loss_mask: Tensor, num_keep: list[int]) -> Tensor:
    """`qtuning.keep_lowest` with the number of tokens to keep in each row."""
    rank = token_score.masked_fill(~loss_mask, math.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return loss_mask & (rank < torch.tensor(num_keep)[:, None])


def ceiling(ratio: float, num_tokens: int) -> int:
    """C11: ceil in place of floor."""
    return max(1, math.ceil(ratio * num_tokens - ROUNDING))


def no_neighbour_is_0(token_ppl: Tensor, loss_mask: Tensor, smoothing: float) -> Tensor:
    """C12: Eq. 7 in which a missing neighbour counts 0."""
    own = torch.where(loss_mask, token_ppl, 0.0)
    neighbours = F.pad(own, (1, 0))[:, :-1] + F.pad(own, (0, 1))[:, 1:]
    return torch.where(loss_mask, (1 - smoothing) * own + smoothing * neighbours, 0.0)


class BatchBudget:
    """C11: a token budget over a micro-batch, prompts counted: a sample pruner that leaves notes for a token pruner.

    A trimmed row loses as many answer tokens as it is longer than r_sample * r_token of its micro-batch's tokens.
    """

    def choose(self, cfg, generator, size: int, ppl: Tensor, ent: Tensor, lengths: Tensor) -> SamplePruning:
        shares = lengths.split(cfg.micro_batch)
        budgets = [round(int(part.sum()) * cfg.sample_keep_ratio * cfg.token_keep_ratio) for part in shares]
        chosen = by_micro_batch(
            cfg, size, lambda part: qtuning.prune_samples(ppl[part], ent[part], cfg.sample_keep_ratio)
        )
        if any(part.sum() != 1 for part in chosen.keep.split(cfg.micro_batch)):
            raise ValueError("the batch budget needs one kept sample in each micro-batch")
        places = chosen.prune_tokens.nonzero()[:, 0].tolist()
        self.excess = [int(lengths[place]) - budgets[place // cfg.micro_batch] for place in places]
        return chosen

    def decide(self, cfg, generators, loss_mask: Tensor, nll: Tensor) -> Tensor:
        found = qtuning.smoothed_token_score(qtuning.token_perplexity(nll), loss_mask, cfg.smoothing)
        left = zip(loss_mask.sum(dim=1).tolist(), self.excess, strict=True)
        return lowest(found, loss_mask, [max(0, num - excess) for num, excess in left])


def row_lengths(model, samples: Sequence[Sample], *_) -> list[Tensor]:
    """A need: the number of tokens that the model predicts from."""
    return [torch.tensor(len(sample.input_ids) - 1) for sample in samples]


# ------------------------------------------------------------------- C15 to C18: scores, loss, EOS, mode


def entropy_of_all_tokens(model, samples: Sequence[Sample], pass_tokens: int, autocast) -> list[Tensor]:
    """C15, a need: the mean entropy over prompt and answer."""
    whole = [dataclasses.replace(sample, labels=sample.input_ids) for sample in samples]
    _, entropy, mask = score(model, whole, pass_tokens, autocast)
    return list(entropy.sum(dim=1) / mask.sum(dim=1))


class MeanOfMeans(TokenLoss):
    """C16: the mean over rows of the mean over a row's kept tokens, or of their sum over all tokens of the row.

    That is the mean over micro-batches if a step is one pass (ONE_PASS) and keeps one sample of each.
    """

    def __init__(self, model: Transformer, checkpointing: bool = False, *, over_answer: bool):
        super().__init__(model, checkpointing)
        self.over_answer = over_answer

    def forward(self, input_ids, labels, lengths, token_weights, known=None):
        sizes = torch.tensor(lengths, device=labels.device)
        row = torch.arange(len(lengths), device=labels.device).repeat_interleave(sizes)[labels != IGNORE_INDEX]
        sizes = row.bincount(minlength=len(lengths)) if self.over_answer else sizes
        token_weights = token_weights * len(row) / len(lengths) / sizes[row]  # train.py divides by len(row)
        return super().forward(input_ids, labels, lengths, token_weights, known)


def without_eos(samples: list[Sample]) -> list[Sample]:
    """C17: rows whose last token is not trained."""
    return [dataclasses.replace(sample, labels=[*sample.labels[:-1], IGNORE_INDEX]) for sample in samples]


@torch.no_grad()
def mode_difference(model: Transformer, samples: list[Sample]) -> float:
    """C18: the largest difference of a token's NLL or entropy between train() and eval() mode."""
    (input_ids, labels), found = collate(samples), []
    for training in (True, False):
        model.train(training)
        found.append(torch.stack(qtuning.token_nll_and_entropy(model(input_ids), labels)))
    return (found[0] - found[1]).abs().max().item()


# -------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """Another reading of a choice.

    Attributes:
        changes:         what differs from the default.
        flags:           of train.py.
        samples, tokens: pruners in place of Q-Tuning's.
        make_loss, change_rows: of `train.train_on`.
        trains:          False: it keeps what the default keeps, so that training it shows nothing.
    """

    choice: str
    name: str
    changes: str
    flags: tuple[str, ...] = ()
    samples: SamplePruner | None = None
    tokens: TokenPruner | None = None
    make_loss: Callable[..., nn.Module] = TokenLoss
    change_rows: Callable[[list[Sample]], list[Sample]] | None = None
    trains: bool = True

    @property
    def slug(self) -> str:
        """The name of its pruners and of its folder."""
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{self.choice} {self.name}").strip("-")

    @property
    def all_flags(self) -> tuple[str, ...]:
        named = (("--sample-pruner", self.samples), ("--token-pruner", self.tokens))
        return (*self.flags, *(word for flag, pruner in named if pruner for word in (flag, self.slug)))


STEP = ("--prune-batch", str(train.TINY["grad_accum"] * train.Config.micro_batch))  # of the embedded default
ONE_PASS = ("--pass-tokens", str(2**17))  # more than a step's kept rows
budget = BatchBudget()
BUDGETED = {
    "samples": SamplePruner(("ppl", "ent", row_lengths), choose=budget.choose),
    "tokens": TokenPruner(("nll",), budget.decide),
}
OVER_STEP = SamplePruner(("ppl", "ent"), choose=normalised_over_the_step)
ALL_TOKENS = SamplePruner(("ppl", entropy_of_all_tokens), choose=qtuning_samples)
OVER_ANSWER, OVER_ROW = (partial(MeanOfMeans, over_answer=over_answer) for over_answer in (True, False))
LAST_10, ALG_1 = samples(last=True, halvings=10), samples(last=True, lowers=True, halvings=10)

DEFAULT = Variant("default", "", "nothing")
VARIANTS = (
    Variant("C1", "to 0.5", "the search interval is [0, 0.5]", samples=samples(upper=0.5)),
    Variant("C2", "lowers upper", "on target lowers the upper bound (Alg. 1)", samples=samples(lowers=True)),
    # Sets at rising levels are nested: as many kept samples are the same samples.
    Variant("C2", "stops", "the first midpoint on target", samples=samples(stops=True), trains=False),
    Variant("C3", "10 halvings", "last of 10 midpoints, nothing cut", samples=LAST_10),
    # With 8 samples the sets change at three levels, and the 20th midpoint is below each of them.
    Variant("C3", "20 halvings", "last of 20 midpoints, nothing cut", samples=samples(last=True), trains=False),
    Variant("C3", "Alg. 1", "last of 10, on target lowers the upper", samples=ALG_1),
    Variant("C4", "interpolated", "quantiles are interpolated linearly", samples=samples(quantile=interpolated)),
    Variant("C5", "other edges", "high is >=, low is <", samples=samples(assign=other_edges)),
    Variant("C6", "rounded", "max(1, round(r B)) samples are kept", samples=samples(rounded), trains=False),
    Variant("C7", "Q1, Q3", "only Q1 and Q3 may fill up", samples=samples(fill_from=(1, 3))),
    Variant("C8", "step", "min-max over the step's samples", STEP, samples=OVER_STEP),
    Variant("C9", "all whole", "every filled-in sample stays whole", samples=samples(trim_filled=False)),
    Variant("C9", "all trimmed", "every filled-in sample is trimmed", samples=samples(trim_filled=True)),
    Variant("C10", "reversed", "the tokens of the highest scores stay", ("--reverse",)),
    Variant("C11", "ceil", "ceil in place of floor", tokens=tokens(ceiling)),
    Variant("C11", "batch budget", "a budget over the batch, prompts counted", STEP, **BUDGETED),
    Variant("C12", "0", "a missing neighbour counts 0", tokens=tokens(token_score=no_neighbour_is_0)),
    Variant("C13", "drop", "pruned tokens leave the input", ("--token-pruning", "drop")),
    Variant("C14", "16", "the prune batch is 16", ("--prune-batch", "16")),
    Variant("C14", "32", "the prune batch is 32", ("--prune-batch", "32")),
    Variant("C15", "all tokens", "Ent is the mean over prompt and answer", samples=ALL_TOKENS),
    Variant("C16", "answer", "mean over micro-batches of the mean over kept tokens", ONE_PASS, make_loss=OVER_ANSWER),
    Variant("C16", "row", "the same, divided by all tokens of the row", ONE_PASS, make_loss=OVER_ROW),
    Variant("C17", "EOS untrained", "the answer's EOS is no answer token", change_rows=without_eos),
)
NO_VARIANT = "C18"


def register() -> None:
    """Add the variants' pruners to the tables."""
    SAMPLE_PRUNERS.update({variant.slug: variant.samples for variant in VARIANTS if variant.samples})
    TOKEN_PRUNERS.update({variant.slug: variant.tokens for variant in VARIANTS if variant.tokens})
