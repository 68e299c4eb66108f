"""The two tables of pruners, and the two stages of a step that run them.

A method is one entry in one of the tables, and one function. train.py, the reports and the cost model read the tables;
they know no method by name. Each need of an entry is a score that `training.scoring.Scorer` answers, except for a
sample pruner with `rows`: it is asked before training, so it may need fields and side files only.

The functions themselves are in the files of their families. They are pure; the caller passes their randomness in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.sft import Sample
from data.stream import Stream
from pruners.attention import fastv_scores, fastv_tokens, sparsevlm_text_scores, sparsevlm_text_tokens
from pruners.deita import deita_rows
from pruners.ds2 import ds2_rows
from pruners.infobatch import infobatch_weights
from pruners.less import less_rows
from pruners.samples import (
    alpagasus_rows,
    cond_gain_rows,
    drop_longest_rows,
    entropy_samples,
    every_sample,
    longest_rows,
    random_rows,
    random_samples,
)
from pruners.side_files import sample_values, token_values
from pruners.tokens import highest_ppl_tokens, lowest_ppl_tokens, random_tokens, rho1_tokens, tokencleaning_tokens
from qtuning import (
    Quadrant,
    SamplePruning,
    num_samples_to_keep,
    prune_samples,
    prune_tokens,
    token_perplexity,
)
from training.ranks import seeded
from training.scoring import Need, Scorer


@dataclass(frozen=True)
class SamplePruner:
    """How a method chooses samples, at one of three moments; with none of them, every sample trains.

    Attributes:
        needs:  the scores that it is given, in this order.
        choose: in each prune batch: (cfg, generator, size, *scores (size,)) -> SamplePruning.
        rows:   once, before training: (*scores (N,), num_keep) -> the kept rows' indices.
        draw:   before each epoch: (row_loss (N,), num_keep, generator) -> loss weights (N,), 0 = left out.
    """

    needs: tuple[Need, ...] = ()
    choose: Callable[..., SamplePruning] | None = None
    rows: Callable[..., Tensor] | None = None
    draw: Callable[..., Tensor] | None = None


def keep_all(cfg, generators, loss_mask: Tensor) -> Tensor:
    """Every answer token: no token pruning."""
    return loss_mask


@dataclass(frozen=True)
class TokenPruner:
    """How a method chooses tokens of the samples that are trimmed.

    Attributes:
        needs:  the scores that it is given, in this order, (B, T) each.
        decide: (cfg, generators, loss_mask (B, T), *scores) -> (B, T) bool, the tokens to keep; one generator per row.
    """

    needs: tuple[Need, ...] = ()
    decide: Callable[..., Tensor] = keep_all


def quadrants(text: str) -> list[Quadrant]:
    """The quadrants in a flag's value, such as "2,4"."""
    return [Quadrant(int(number)) for number in text.split(",") if number]


def qtuning_samples(cfg, generator, size: int, ppl: Tensor, ent: Tensor) -> SamplePruning:
    """Stage 1 of Algorithm 1, with the settings of a run."""
    return prune_samples(
        ppl,
        ent,
        cfg.sample_keep_ratio,
        keep_quadrants=quadrants(cfg.keep_quadrants),
        trim_quadrants=quadrants(cfg.trim_quadrants),
        backfill_quadrants=quadrants(cfg.backfill_quadrants),
    )


def qtuning_tokens(cfg, generators, loss_mask: Tensor, nll: Tensor) -> Tensor:
    """Stage 2 of Algorithm 1, with the settings of a run."""
    return prune_tokens(token_perplexity(nll), loss_mask, cfg.token_keep_ratio, cfg.smoothing, reverse=cfg.reverse)


def ranked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The `decide` of a method that ranks tokens by its scores: function(*scores, loss_mask, token_keep_ratio)."""
    return lambda cfg, generators, loss_mask, *scores: function(*scores, loss_mask, cfg.token_keep_ratio)


SAMPLE_PRUNERS = {
    "qtuning": SamplePruner(("ppl", "ent"), choose=qtuning_samples),
    "none": SamplePruner(),
    "random": SamplePruner(choose=lambda cfg, gen, size: random_samples(size, cfg.sample_keep_ratio, gen)),
    "entropy": SamplePruner(("ent",), choose=lambda cfg, gen, size, ent: entropy_samples(ent, cfg.sample_keep_ratio)),
    "infobatch": SamplePruner(draw=infobatch_weights),
    "random-static": SamplePruner(rows=random_rows),
    "longest": SamplePruner(("num_answer_tokens",), rows=longest_rows),
    "drop-longest": SamplePruner(("num_answer_tokens",), rows=drop_longest_rows),
    "alpagasus": SamplePruner(("rating",), rows=alpagasus_rows),
    "cond-gain": SamplePruner(("cond_gain",), rows=cond_gain_rows),
    "deita": SamplePruner(("complexity", "quality", "embedding"), rows=deita_rows),
    "ds2": SamplePruner(("rating", "embedding"), rows=ds2_rows),
    "less": SamplePruner(("less",), rows=less_rows),
}
TOKEN_PRUNERS = {
    "qtuning": TokenPruner(("nll",), qtuning_tokens),
    "none": TokenPruner(),
    "random": TokenPruner(decide=lambda cfg, gens, mask: random_tokens(mask, cfg.token_keep_ratio, gens)),
    "ppl-keep-low": TokenPruner(("nll",), ranked(lowest_ppl_tokens)),
    "ppl-keep-high": TokenPruner(("nll",), ranked(highest_ppl_tokens)),
    "fastv": TokenPruner((fastv_scores,), ranked(fastv_tokens)),
    "sparsevlm-text": TokenPruner((sparsevlm_text_scores,), ranked(sparsevlm_text_tokens)),
    "rho1": TokenPruner(("nll", "reference_nll"), ranked(rho1_tokens)),
    "tokencleaning-row": TokenPruner(("base_nll", "reference_nll"), ranked(tokencleaning_tokens)),
}
COMPUTED = ("ppl", "ent", "nll")  # needs that the current weights answer; any other text is a field or a side file


# ----------------------------------------------------------------------------- the two stages of a step


CHOICES = ("keep", "quadrant", "backfilled", "prune_tokens")  # of a SamplePruning, as they travel between ranks


def choose_samples(cfg, step: int, rows: Sequence[int], scorer: Scorer) -> SamplePruning:
    """Stage 1 in each prune batch of the step's rows, joined: the decision about every row.

    Each rank decides about its share of the prune batches.
    """
    pruner, ranks = SAMPLE_PRUNERS[cfg.sample_pruner], scorer.ranks
    if pruner.choose is None:  # the stream gives chosen rows
        return every_sample(len(rows))
    scores, mine = [scorer.per_sample(need, rows) for need in pruner.needs], {}
    parts = [slice(start, start + cfg.prune_batch) for start in range(0, len(rows), cfg.prune_batch)]
    sizes = [len(rows[part]) for part in parts]
    for i in range(ranks.rank, len(parts), ranks.world):
        generator, of_part = seeded(cfg.seed, step, parts[i].start), [values[parts[i]] for values in scores]
        chosen = pruner.choose(cfg, generator, sizes[i], *of_part)
        mine[i] = torch.cat([getattr(chosen, name).to(torch.uint8) for name in CHOICES])
    found = ranks.exchange([len(CHOICES) * size for size in sizes], mine, torch.uint8)
    keep, quadrant, backfilled, prune_tokens = torch.cat([part.view(len(CHOICES), -1) for part in found], dim=1)
    return SamplePruning(keep.bool(), quadrant.long(), backfilled.bool(), prune_tokens.bool(), thresholds=None)


def choose_tokens(cfg, step: int, rows: Sequence[int], chosen: SamplePruning, scorer: Scorer) -> Tensor:
    """Stage 2 for the samples to be trimmed: (B, T) bool, their kept tokens; the whole answer of every other sample.

    Each rank decides about its share of the samples.
    """
    pruner, tokens, ranks = TOKEN_PRUNERS[cfg.token_pruner], scorer.loss_mask(rows), scorer.ranks
    places = chosen.prune_tokens.nonzero()[:, 0].tolist()
    if places:
        trimmed, width = [rows[place] for place in places], tokens.shape[1]
        scores = [scorer.per_token(need, trimmed) for need in pruner.needs]
        scores = [F.pad(table, (0, width - table.shape[1])) for table in scores]
        masks, mine, decided = tokens[places], list(range(ranks.rank, len(places), ranks.world)), {}
        if mine:
            generators = [seeded(cfg.seed, step, places[i], 1) for i in mine]
            kept = pruner.decide(cfg, generators, masks[mine], *(table[mine] for table in scores))
            decided = {i: of_row[masks[i]].to(torch.uint8) for i, of_row in zip(mine, kept, strict=True)}
        bits = ranks.exchange(masks.sum(dim=1).tolist(), decided, torch.uint8)
        tokens[places] = masks.masked_scatter(masks, torch.cat(bits).bool())
    return tokens


# ------------------------------------------------------------------------------------- before training


def row_stream(cfg, samples: Sequence[Sample], first_losses: Callable[[], Tensor]) -> tuple[Stream, str]:
    """The stream of rows that the sample pruner leaves, and a line about its choice ("" where it makes none)."""
    pruner, num_keep, note = SAMPLE_PRUNERS[cfg.sample_pruner], None, ""
    rows, draw = range(len(samples)), None
    if pruner.rows or pruner.draw:
        num_keep = num_samples_to_keep(cfg.sample_keep_ratio, len(samples))
    if pruner.rows:
        rows, note = chosen_rows(cfg, samples, num_keep)
    if pruner.draw:

        def draw(row_loss: Tensor, epoch: int) -> Tensor:
            return pruner.draw(row_loss, num_keep, seeded(cfg.seed, epoch))

    return Stream(rows, cfg.seed, draw, first_losses), note


def chosen_rows(cfg, samples: Sequence[Sample], num_keep: int) -> tuple[list[int], str]:
    """The rows of a pruner that chooses once, ascending, and a line about the choice.

    The pruner sees the rows in the order of a hash of seed and id: where it breaks ties by place, the seed decides,
    and not the order of the file.

    Raises:
        ValueError: a row without a score, or too few rows.
    """
    pruner = SAMPLE_PRUNERS[cfg.sample_pruner]
    keys = [hashlib.blake2b(f"{cfg.seed} {sample.id}".encode()).digest() for sample in samples]
    order = sorted(range(len(samples)), key=keys.__getitem__)
    columns = [sample_values(need, [samples[i] for i in order], cfg.data, cfg.scores) for need in pruner.needs]
    for need, values in zip(pruner.needs, columns, strict=True):
        missing = [i for i, value in zip(order, values, strict=True) if value is None]
        if missing:
            raise ValueError(
                f"--sample-pruner {cfg.sample_pruner}: {len(missing)} of {len(order)} rows lack a score, the first is "
                f"{samples[min(missing)].id!r} without {need!r}"
            )
    columns = [torch.stack(values) for values in columns]
    kept = pruner.rows(*columns, num_keep)
    note = f"{cfg.sample_pruner} chose {num_keep} rows"
    if len(columns) == 1 and columns[0].dim() == 1:
        out = torch.ones(len(order), dtype=torch.bool)
        out[kept] = False
        last = torch.isin(columns[0], columns[0][kept]) & torch.isin(columns[0], columns[0][out])
        note += f": {int(last[kept].sum())} of the {int(last.sum())} that share the last place" if last.any() else ""
    return sorted(order[place] for place in kept.tolist()), note


def read_side_values(cfg, samples: Sequence[Sample], rows: Sequence[int]) -> dict[str, dict[int, Tensor]]:
    """need -> row -> value, for the needs of both pruners that fields and side files answer during training.

    Raises:
        FileNotFoundError: there is no such side file.
        ValueError: it lacks a row, or has another number of values for it.
    """
    found, some = {}, [samples[row] for row in rows]
    pruner = SAMPLE_PRUNERS[cfg.sample_pruner]
    for need in pruner.needs if pruner.choose else ():
        if isinstance(need, str) and need not in COMPUTED:
            values = sample_values(need, some, cfg.data, cfg.scores)
            if None in values:
                raise ValueError(
                    f"--sample-pruner {cfg.sample_pruner}: row {some[values.index(None)].id!r} lacks {need!r}"
                )
            found[need] = dict(zip(rows, values, strict=True))
    for need in TOKEN_PRUNERS[cfg.token_pruner].needs:
        if isinstance(need, str) and need not in COMPUTED:
            found[need] = dict(zip(rows, token_values(need, some, cfg.scores), strict=True))
    return found
