"""Supervised fine-tuning with Q-Tuning: score, prune, train on what is left.

    python train.py                                             the embedded default, on one device
    python train.py --model DIR --data FILE --out runs/mine     a checkpoint and data of your own
    torchrun --standalone --nproc_per_node=8 train.py ...       the same on 8 devices

One optimizer step takes grad_accum micro-batches for each rank, scores them all without gradients, lets every
prune batch choose what it keeps, and trains on the kept samples in as few passes as fit. Every rank holds all
rows: what is scored, and then what is trained on, is dealt out by length so that ranks finish together; scores
travel (perplexity, entropy, the answer tokens' NLL), and every rank makes the same choice. The loss of a step is
the sum over its kept tokens on all ranks, divided by their number.

A sample pruner that chooses its rows ahead, once or for an epoch, fills a step with as many of them as Q-Tuning
would keep of it, so that every method takes as many optimizer steps, of as many kept samples. What such a pruner
goes by is in the data's fields or in side files that score_rows.py writes (--scores).

The run folder: config.json, metrics.jsonl (one object a step; README.md explains each key), selection.jsonl on
request, checkpoint/, and at the end model/ (full fine-tuning) or adapter/ (LoRA).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import baselines
from baselines import every_sample, random_samples, random_tokens
from data.sft import Sample, load_samples, share, stream_order
from data.tokenizer import TextTokenizer
from eval.common import code_version, over_ranks
from model import Transformer, add_lora, save_adapter, write_aside, write_json
from passes import TokenLoss, attention_score, pack, packs, score
from qtuning import (
    IGNORE_INDEX,
    Quadrant,
    SamplePruning,
    num_samples_to_keep,
    prune_samples,
    prune_tokens,
    sample_entropy,
    sample_perplexity,
    token_perplexity,
)
from score_rows import chunks_of, decode_vector, mean_nll, read_side_file, row_values

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------- settings

SCORES_OF = {  # sample pruners that choose their rows once, and what they go by
    "random-static": (),
    "longest": (),
    "drop-longest": (),
    "alpagasus": ("rating",),
    "cond-gain": ("cond_gain",),
    "deita": ("complexity", "quality", "embedding"),
    "ds2": ("rating", "embedding"),
    "less": ("less",),
}
SAMPLE_PRUNERS = ("qtuning", "random", "none", "entropy", "infobatch", "infobatch-official", *SCORES_OF)
SCORING_PRUNERS = ("qtuning", "entropy")  # of samples; they score every row of a step
NLL_PRUNERS, ATTENTION_PRUNERS = ("qtuning", "ppl-keep-low", "ppl-keep-high", "rho1"), ("fastv", "sparsevlm-text")
CLEANING_PRUNERS = ("tokencleaning-row", "tokencleaning-global")
TOKEN_PRUNERS = ("qtuning", "random", "none", *NLL_PRUNERS[1:], *ATTENTION_PRUNERS, *CLEANING_PRUNERS)


def flag(default, help: str, choices: tuple[str, ...] | None = None):
    """A field of Config and the command-line flag that sets it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each field is a flag; the defaults are the paper's (Table 7)."""

    model: str | None = flag(None, "checkpoint folder in Hugging Face layout; none: the embedded default")
    data: str | None = flag(None, "rows to train on, .json or .jsonl")
    out: str = flag("runs/default", "run folder")
    seed: int = flag(0, "of the order of rows, the LoRA weights and random pruners")
    resume: bool = flag(False, "go on from the run folder's last checkpoint")

    sample_pruner: str = flag("qtuning", "how samples are chosen", SAMPLE_PRUNERS)
    token_pruner: str = flag("qtuning", "how their tokens are chosen", TOKEN_PRUNERS)
    sample_keep_ratio: float = flag(0.125, "r_sample: share of a prune batch's samples to keep, (0, 1]")
    token_keep_ratio: float = flag(0.5, "r_token: share of a trimmed sample's answer tokens to keep, [0, 1]")
    smoothing: float = flag(0.5, "lambda of Eq. 7: weight of a token's neighbours, [0, 1]")
    reverse: bool = flag(False, "keep the tokens of the highest score: the ablation of Table 5")
    keep_quadrants: str = flag("2,4", "quadrants that qtuning keeps, of 1 to 4: the ablation of Tables 4 and 15")
    trim_quadrants: str = flag("2", "quadrants of which qtuning has the kept samples trimmed; '': none")
    token_pruning: str = flag("mask", "pruned tokens leave the loss, or the input too", ("mask", "drop"))
    scores: str | None = flag(None, "folder of side files (score_rows.py), for the pruners that need them")
    drop_unscored: bool = flag(False, "never choose a row without a score; otherwise the first one ends the run")
    prune_batch: int | None = flag(None, "samples that compete: a multiple of --micro-batch; none: --micro-batch")

    micro_batch: int = flag(8, "samples per device in each micro-batch")
    grad_accum: int = flag(4, "micro-batches per device in each optimizer step")
    score_bf16: bool = flag(False, "inexact: score in bf16 where training computes in fp32")
    reuse_scores: int = flag(1, "inexact: score a row on every K-th visit, and go by that in between")
    check_scores: int = flag(50, "steps between exact scores beside inexact ones: kept_agreement in metrics.jsonl")
    pass_tokens: int | None = flag(None, "tokens of one forward pass; none: 2048 on cpu, 16384 on cuda")
    epochs: float = flag(3.0, "passes over the rows; they set the length of the learning-rate schedule")
    max_steps: int | None = flag(None, "stop after this many steps of that schedule")
    lr: float = flag(1e-4, "peak learning rate, cosine to 0")
    lora_rank: int = flag(8, "rank of the LoRA updates (alpha is twice that); 0: full fine-tuning")
    activation_checkpointing: bool = flag(False, "keep only the layers' inputs for the backward pass: slower, smaller")
    reuse_forward: bool = flag(False, "with --activation-checkpointing: train on the layer outputs that scoring left")
    max_length: int = flag(2048, "tokens of a row at most, the rest is cut")
    template: str = flag("auto", "chat template; auto: the tokenizer's own, else 'default'")
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "computing dtype; auto: bf16 on cuda, fp32 on cpu", ("auto", "bf16", "fp32"))
    save_every: int = flag(500, "steps between checkpoints")
    eval_every: int | None = flag(None, "steps between scores of --eval-sets, which metrics.jsonl gets as eval_TASK")
    eval_sets: str | None = flag(
        None, "TASK=FILE,... of the scorers in eval/, by the paper's protocol, 0-shot; rows=FILE: loss on held rows"
    )
    eval_limit: int | None = flag(None, "rows of each set to score, from the first; none: all")
    log_selection: bool = flag(False, "write selection.jsonl: each step's scores, quadrants and kept tokens")
    skip_bad_rows: bool = flag(False, "count unusable rows and go on; otherwise the first one ends the run")

    def __post_init__(self):
        def check(name: str, ok: bool, expected: str):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

        for name in ("token_keep_ratio", "smoothing", "sample_keep_ratio"):
            check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("micro_batch", "grad_accum", "save_every", "reuse_scores", "check_scores"):
            check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("prune_batch", "pass_tokens", "max_steps", "eval_every", "eval_limit"):
            check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name, least in (("keep_quadrants", 1), ("trim_quadrants", 0)):
            named = getattr(self, name).split(",") if getattr(self, name) else []
            ok = len(named) == len(set(named)) >= least and set(named) <= set("1234")
            check(name, ok, f"{'one or more' if least else 'any'} of 1,2,3,4, none of them twice")
        if self.reuse_forward:
            exact = self.reuse_scores == 1 and not self.score_bf16
            scored = self.sample_pruner in SCORING_PRUNERS or self.token_pruner in NLL_PRUNERS
            fits = self.activation_checkpointing and self.token_pruning == "mask" and exact and scored
            check("reuse_forward", fits, "with --activation-checkpointing, --token-pruning mask and exact scores")
        check("max_length", self.max_length >= 2, "at least 2")
        check("lora_rank", self.lora_rank >= 0, "at least 0")
        check("epochs", 0 < self.epochs < math.inf, "above 0")
        check("lr", 0 < self.lr < math.inf, "above 0")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices:
                check(field.name, getattr(self, field.name) in choices, f"one of {', '.join(choices)}")


# The embedded default: without --model these take the place of Config's defaults. A model this small is tuned
# whole, on short rows. The rate is the middle one of three tried (3e-4, 5e-4, 1e-3; seed 0): full data did best
# at the highest, pruned runs at the lowest.
TINY = {
    "model": str(HERE / "data" / "tiny" / "base"),
    "data": str(HERE / "data" / "tiny" / "sft.json"),
    "lora_rank": 0,
    "lr": 5e-4,
    "max_length": 512,
    "eval_sets": ",".join(f"{task}={HERE / 'data' / 'tiny' / task}_test.jsonl" for task in ("arc", "gsm8k")),
}


def resolve(cfg: Config) -> Config:
    """Put what `auto` and the unset flags come to on this machine in their place."""
    on_cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return dataclasses.replace(
        cfg,
        device="cuda" if on_cuda else "cpu",
        dtype=("bf16" if on_cuda else "fp32") if cfg.dtype == "auto" else cfg.dtype,
        prune_batch=cfg.prune_batch or cfg.micro_batch,
        pass_tokens=cfg.pass_tokens or (16_384 if on_cuda else 2_048),
    )


def parse_config(argv: list[str] | None = None) -> Config:
    """The command line as a Config."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    types = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(Config):
        name, help = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        if field.type == "bool":
            parser.add_argument(name, action="store_true", help=help)
        else:
            kind = types[field.type.removesuffix(" | None")]
            choices, help = field.metadata["choices"], f"{help} [{field.default}]"
            parser.add_argument(name, type=kind, default=field.default, choices=choices, help=help)
    if parser.parse_args(argv).model is None:
        parser.set_defaults(**TINY)
    config = Config(**vars(parser.parse_args(argv)))
    if config.data is None:
        raise ValueError("--data is required with --model")
    return config


# ------------------------------------------------------------------------------------------- selection


def seeded(*key: int) -> torch.Generator:
    """A generator that depends on the key alone: the same draw on every rank, and after --resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def num_answer_tokens(sample: Sample) -> int:
    """|T(x)|: the labels that something predicts."""
    return sum(label != IGNORE_INDEX for label in sample.labels[1:])


def choose_rows(cfg: Config, samples: list[Sample]) -> tuple[list[int], str]:
    """The floor(r_sample * N) rows of a pruner that chooses once, ascending, and what is worth telling of them.

    The rows are shown to it in the order of a hash of seed and id: where it breaks ties by place, the seed decides,
    and not the order of the file.

    Raises:
        ValueError: a row without a score (unless --drop-unscored), or too few rows.
    """
    num_keep = num_samples_to_keep(cfg.sample_keep_ratio, len(samples))
    keys = [hashlib.blake2b(f"{cfg.seed} {sample.id}".encode()).digest() for sample in samples]
    order = sorted(range(len(samples)), key=keys.__getitem__)
    ids = [samples[i].id for i in order]
    columns = []
    for field in SCORES_OF[cfg.sample_pruner]:
        if field != "embedding":
            columns.append(row_values(field, ids, cfg.data, cfg.scores))
            continue
        vectors = read_side_file(scores_folder(cfg, cfg.sample_pruner), field, decode_vector)
        columns.append([vectors.get(row_id) for row_id in ids])
    scored = [place for place in range(len(order)) if all(column[place] is not None for column in columns)]
    if len(scored) < len(order) and not cfg.drop_unscored:
        place = min(set(range(len(order))) - set(scored), key=order.__getitem__)
        field = next(f for f, c in zip(SCORES_OF[cfg.sample_pruner], columns, strict=True) if c[place] is None)
        raise ValueError(
            f"--sample-pruner {cfg.sample_pruner}: {len(order) - len(scored)} of {len(order)} rows lack a score, the "
            f"first is {ids[place]!r} without {field!r}; --drop-unscored leaves them out"
        )
    order = [order[place] for place in scored]
    columns = [
        torch.stack(values) if torch.is_tensor(values[0]) else torch.tensor(values, dtype=torch.float64)
        for values in ([column[place] for place in scored] for column in columns)
    ]
    lengths = torch.tensor([num_answer_tokens(samples[i]) for i in order])

    name, note = cfg.sample_pruner, ""
    if name == "random-static":
        rows = baselines.random_rows(len(order), num_keep, seeded(cfg.seed))
    elif name == "longest":
        rows = baselines.longest_rows(lengths, num_keep)
    elif name == "drop-longest":
        rows = baselines.drop_longest_rows(lengths, num_keep)
    elif name == "alpagasus":
        rows = baselines.alpagasus_rows(*columns, num_keep)
    elif name == "cond-gain":
        rows = baselines.cond_gain_rows(*columns, num_keep)
    elif name == "deita":
        rows, num_own = baselines.deita_rows(*columns, num_keep)
        note = f": {num_own} unlike each other, {num_keep - num_own} filled up"
    elif name == "ds2":
        rows = baselines.ds2_rows(*columns, num_keep)
    else:
        rows = baselines.less_rows(*columns, num_keep)
    ranked = {"longest": lengths, "drop-longest": -lengths}.get(name, columns[0] if len(columns) == 1 else None)
    if ranked is not None:
        last = ranked[rows].min()
        note = f": {(ranked[rows] == last).sum()} of the {(ranked == last).sum()} that share the last place"
    return sorted(order[row] for row in rows.tolist()), f"{name} chose {num_keep} rows{note}"


def scores_folder(cfg: Config, pruner: str) -> str:
    if cfg.scores is None:
        raise ValueError(f"{pruner} needs --scores, a folder of side files; score_rows.py writes them")
    return cfg.scores


@dataclass
class Pool:
    """The rows that an epoch of the stream runs over, with their weights in the loss; 0: left out of it.

    InfoBatch draws them anew for each epoch by `row_loss` (N,), each row's mean NLL when last seen; None for others.
    """

    rows: Sequence[int]
    weights: Sequence[float]
    epoch: int = 0
    row_loss: Tensor | None = None


def draw_epoch(cfg: Config, epoch: int, row_loss: Tensor) -> Pool:
    """InfoBatch's rows of an epoch."""
    generator = seeded(cfg.seed, epoch)
    if cfg.sample_pruner == "infobatch":
        num_keep = num_samples_to_keep(cfg.sample_keep_ratio, len(row_loss))
        weights = baselines.infobatch_weights(row_loss, num_keep, generator)
        rows = weights.nonzero()[:, 0].tolist()
        return Pool(rows, weights[rows].tolist(), epoch, row_loss)
    if baselines.infobatch_anneals(epoch, cfg.epochs):
        return Pool(range(len(row_loss)), [1.0] * len(row_loss), epoch, row_loss)
    weights = baselines.infobatch_official_weights(row_loss, generator)
    return Pool(range(len(row_loss)), weights.tolist(), epoch, row_loss)


def take(cfg: Config, pool: Pool, start: int, stop: int) -> tuple[list[int], list[float], Pool]:
    """Rows and weights at places start..stop-1 of the stream of reshuffled epochs, and the pool of the last place."""
    order, weights, size = [], [], len(pool.rows)
    while start < stop:
        epoch = start // size
        if pool.row_loss is not None and pool.epoch != epoch:
            pool = draw_epoch(cfg, epoch, pool.row_loss)
        last = min(stop, (epoch + 1) * size)
        picked = stream_order(size, start, last, cfg.seed)
        order += [pool.rows[i] for i in picked]
        weights += [pool.weights[i] for i in picked]
        start = last
    return order, weights, pool


def quadrants_of(text: str) -> list[Quadrant]:
    """The quadrants that --keep-quadrants or --trim-quadrants names."""
    return [Quadrant(int(number)) for number in text.split(",") if number]


def choose_samples(cfg: Config, step: int, num: int, ppl: Tensor | None, ent: Tensor | None) -> list[SamplePruning]:
    """Stage 1 on each prune batch of the step's `num` samples, in order; ppl and ent (num,) if it needs them."""
    size = cfg.prune_batch
    chosen = []
    for start in range(0, num, size):
        part = slice(start, min(start + size, num))
        if cfg.sample_pruner == "qtuning":
            quadrants = {name: quadrants_of(getattr(cfg, name)) for name in ("keep_quadrants", "trim_quadrants")}
            chosen.append(prune_samples(ppl[part], ent[part], cfg.sample_keep_ratio, **quadrants))
        elif cfg.sample_pruner == "entropy":
            chosen.append(baselines.entropy_samples(ent[part], cfg.sample_keep_ratio))
        elif cfg.sample_pruner == "random":
            generator = seeded(cfg.seed, step, start)
            chosen.append(random_samples(part.stop - start, cfg.sample_keep_ratio, generator))
        else:
            chosen.append(every_sample(part.stop - start))
    return chosen


def token_side_scores(cfg: Config, samples: list[Sample], rows: Sequence[int]) -> dict[int, Tensor]:
    """What the token pruner reads from side files for each of these rows, one value an answer token.

    Rho-1: the reference's NLL. TokenCleaning: whether the token is kept; `tokencleaning-global` ranks the tokens
    of all these rows together.

    Raises:
        FileNotFoundError: no such side file. ValueError: a row that it lacks or tells another length of.
    """
    if cfg.token_pruner not in ("rho1", *CLEANING_PRUNERS):
        return {}
    folder, lengths, parts = scores_folder(cfg, cfg.token_pruner), {}, []
    for field in ("reference_nll",) if cfg.token_pruner == "rho1" else ("base_nll", "reference_nll"):
        by_id = read_side_file(folder, field, lambda values: torch.tensor(values, dtype=torch.float32))
        for i in rows:
            lengths[i] = num_answer_tokens(samples[i])
            got = by_id.get(samples[i].id)
            if got is None or got.shape != (lengths[i],) or not bool(got.isfinite().all()):
                got = "none" if got is None else f"{len(got)}" if bool(got.isfinite().all()) else "one not finite"
                raise ValueError(
                    f"{folder}/{field}.jsonl: expected {lengths[i]} values for row {samples[i].id!r}, got {got}"
                )
        parts.append([by_id[samples[i].id] for i in rows])
    if cfg.token_pruner == "rho1":
        return dict(zip(rows, parts[0], strict=True))
    base, reference = parts
    if cfg.token_pruner == "tokencleaning-global":
        kept = baselines.tokencleaning_global_tokens(torch.cat(base), torch.cat(reference), cfg.token_keep_ratio)
        return dict(zip(rows, kept.split([lengths[i] for i in rows]), strict=True))
    return {
        i: baselines.tokencleaning_tokens(b[None], r[None], torch.ones(1, len(b)).bool(), cfg.token_keep_ratio)[0]
        for i, b, r in zip(rows, base, reference, strict=True)
    }


def choose_tokens(
    cfg: Config,
    step: int,
    position: int,
    loss_mask: Tensor,
    nll: Tensor | None = None,
    attention: Tensor | None = None,
    side: Tensor | None = None,
) -> Tensor:
    """Stage 2 for the sample at `position` of the step: the mask (1, T) of what a trimmed sample keeps.

    nll, attention: (1, T); side: of `token_side_scores`; each where the pruner needs it.
    """
    ratio = cfg.token_keep_ratio
    if cfg.token_pruner == "qtuning":
        return prune_tokens(token_perplexity(nll), loss_mask, ratio, cfg.smoothing, reverse=cfg.reverse)
    if cfg.token_pruner == "random":
        return random_tokens(loss_mask, ratio, seeded(cfg.seed, step, position, 1))
    if cfg.token_pruner == "ppl-keep-low":
        return baselines.lowest_ppl_tokens(nll, loss_mask, ratio)
    if cfg.token_pruner == "ppl-keep-high":
        return baselines.highest_ppl_tokens(nll, loss_mask, ratio)
    if cfg.token_pruner == "fastv":
        return baselines.fastv_tokens(attention, loss_mask, ratio)
    if cfg.token_pruner == "sparsevlm-text":
        return baselines.sparsevlm_text_tokens(attention, loss_mask, ratio)
    if cfg.token_pruner == "rho1":
        reference = torch.zeros_like(nll)
        reference[loss_mask] = side
        return baselines.rho1_tokens(nll, reference, loss_mask, ratio)
    if cfg.token_pruner in CLEANING_PRUNERS:
        return torch.zeros_like(loss_mask).masked_scatter(loss_mask, side)
    return loss_mask


def pruned_sample(sample: Sample, kept: Tensor, token_pruning: str) -> Sample:
    """The sample with only the answer tokens in `kept` (T,) left in the loss, or (drop) in the input at all.

    Choice C13: `mask` leaves the context whole; `drop` shortens the row, and the loss is next-token prediction
    on what remains.
    """
    keeps = [False, *kept.tolist()]  # column t of the mask is token t + 1
    pairs = list(zip(sample.input_ids, sample.labels, keeps, strict=False))
    if token_pruning == "drop":
        pairs = [pair for pair in pairs if pair[1] == IGNORE_INDEX or pair[2]]
    input_ids = [token for token, _, _ in pairs]
    labels = [label if keep else IGNORE_INDEX for _, label, keep in pairs]
    return dataclasses.replace(sample, input_ids=input_ids, labels=labels)


def selection_counts(chosen: list[SamplePruning]) -> dict[str, int]:
    """How many samples of a step each quadrant and the backfill gave; the keys of metrics.jsonl."""
    keep, quadrant, backfilled, as_q2 = (
        torch.cat([getattr(c, name) for c in chosen]) for name in ("keep", "quadrant", "backfilled", "prune_tokens")
    )
    counts = {
        "samples_seen": torch.ones_like(keep),
        "samples_kept": keep,
        "kept_q2": keep & ~backfilled & (quadrant == Quadrant.VALUABLE_MISCONCEPTION),
        "kept_q4": keep & ~backfilled & (quadrant == Quadrant.CALIBRATION_DATA),
        "backfilled_q2": backfilled & as_q2,
        "backfilled_q4": backfilled & ~as_q2,
        "in_q1": quadrant == Quadrant.HARMFUL_NOISE,
        "in_q3": quadrant == Quadrant.REDUNDANT_KNOWLEDGE,
    }
    return {name: int(mask.sum()) for name, mask in counts.items()}


# ---------------------------------------------------------------------------------- scores while training

SCORERS = ("arc", "gsm8k", "math", "squad", "triviaqa")


def read_eval_sets(cfg: Config, tokenizer: TextTokenizer) -> dict[str, tuple]:
    """Task -> (its scorer's `evaluate`, items), of --eval-sets; none without --eval-every.

    `rows` has no scorer and goes to `rows_scores`: rows in any form of --data, under the run's template and length.

    Raises:
        ValueError: no set, no such task, or a row that its scorer refuses. FileNotFoundError: no such file.
    """
    sets = {}
    if cfg.eval_every:
        if not cfg.eval_sets:
            raise ValueError("--eval-every needs --eval-sets TASK=FILE,...")
        for part in cfg.eval_sets.split(","):
            task, _, path = part.partition("=")
            tasks = (*SCORERS, "rows")
            if task not in tasks or not path:
                raise ValueError(f"--eval-sets: expected TASK=FILE with TASK one of {', '.join(tasks)}, got {part!r}")
            if task == "rows":
                evaluate, items = None, load_samples(path, tokenizer, cfg.template, cfg.max_length)[0]
            else:
                scorer = importlib.import_module(f"eval.{task}")
                evaluate, items = scorer.evaluate, scorer.read_items(path)
            sets[task] = evaluate, items[: cfg.eval_limit]
    return sets


def rows_scores(model: Transformer, samples: Sequence[Sample], pass_tokens: int, autocast) -> dict[str, float]:
    """What the model makes of held rows, without gradients; all ranks share the work, and each gets the result.

    Returns:
        rows_nll: summed NLL over the number of answer tokens of all rows, nats; rows_ppl, rows_ent: the means over
        rows of Eq. 4 and of Eq. 5.
    Source: Figure 8.
    """

    def work(group: list[int]) -> list[list[float]]:
        nll, entropy, loss_mask = score(model, [samples[i] for i in group], pass_tokens, autocast)
        ppl, ent = sample_perplexity(nll, loss_mask), sample_entropy(entropy, loss_mask)
        return torch.stack([nll.double().sum(dim=-1), loss_mask.sum(dim=-1), ppl, ent], dim=1).tolist()

    lengths = [len(sample.input_ids) - 1 for sample in samples]
    of_rows = over_ranks(packs(lengths, pass_tokens), lengths, work, "scoring rows")
    nll, tokens, ppl, ent = (math.fsum(column) for column in zip(*of_rows, strict=True))
    return {"rows_nll": nll / tokens, "rows_ppl": ppl / len(samples), "rows_ent": ent / len(samples)}


def eval_scores(
    model: Transformer, tokenizer: TextTokenizer, sets: dict[str, tuple], pass_tokens: int, autocast
) -> dict[str, float]:
    """eval_TASK -> percent, of every set, and eval_rows_... of `rows_scores`; all ranks share the work."""
    scores = {}
    for task, (evaluate, items) in sets.items():
        model.eval()  # for each: scoring rows ends in train()
        if task == "rows":
            found = rows_scores(model, items, pass_tokens, autocast)
        else:
            found = {task: evaluate(model, tokenizer, items)["score"]}
        scores |= {f"eval_{name}": value for name, value in found.items()}
    model.train()
    return scores


# ------------------------------------------------------------------------------------------ run folder


def describe_run(cfg: Config, world: int, device: torch.device, samples: int) -> dict:
    """config.json: everything that a reader needs to run it again."""
    return {
        **dataclasses.asdict(cfg),
        "world_size": world,
        "num_samples": samples,
        **code_version(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cpu cores",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, numpy, safetensors, tokenizers)},
        },
    }


def open_run(cfg: Config, description: dict) -> Path | None:
    """Start the run folder, or find the checkpoint to go on from; only rank 0 writes.

    Raises:
        ValueError: the folder holds a run and --resume is not given, or the other way round, or the run there
            was made with other settings.
    """
    out = Path(cfg.out)
    config_file = out / "config.json"
    if not config_file.exists():
        if cfg.resume:
            raise ValueError(f"--resume: {out} holds no run (no config.json)")
        out.mkdir(parents=True, exist_ok=True)
        write_json(config_file, description)
        return None
    if not cfg.resume:
        raise ValueError(f"--out {out} holds a run already; give --resume to go on with it, or another folder")
    before = json.loads(config_file.read_text(encoding="utf-8"))
    for key in ("num_samples", *(field.name for field in dataclasses.fields(Config))):
        may_change = (
            "out",
            "resume",
            "max_steps",
            "save_every",
            "grad_accum",
            "pass_tokens",
            "activation_checkpointing",
            "reuse_forward",
            "eval_every",
            "eval_sets",
            "eval_limit",
        )
        if key not in may_change and before.get(key) != description[key]:
            raise ValueError(f"--resume: the run in {out} has {key} {before.get(key)!r}, got {description[key]!r}")
    ours, theirs = (d["micro_batch"] * d["grad_accum"] * d["world_size"] for d in (description, before))
    if ours != theirs:
        raise ValueError(f"--resume: the run in {out} takes {theirs} samples a step, these settings take {ours}")
    checkpoint_file = out / "checkpoint" / "state.pt"
    return checkpoint_file if checkpoint_file.exists() else None


def cut_log(path: Path, last_step: int) -> None:
    """Drop the lines after the checkpoint's step; the resumed run writes them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a last line without its end was cut off
        write_aside(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= last_step))


def append_json(path: Path, value: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


# ------------------------------------------------------------------------------------------------ loop


def train(cfg: Config) -> None:
    """Run what `cfg` says, under torchrun or alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cfg = resolve(cfg)
    on_cuda, bf16 = cfg.device == "cuda", cfg.dtype == "bf16"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if on_cuda else "gloo")
    autocast = torch.autocast(cfg.device, dtype=torch.bfloat16, enabled=bf16)

    # Rows and schedule. The stream of reshuffled epochs is cut into global batches; less than one may be left over.
    tokenizer = TextTokenizer.from_pretrained(cfg.model)
    samples, skipped = load_samples(cfg.data, tokenizer, cfg.template, cfg.max_length, cfg.skip_bad_rows)
    answer_lengths = [num_answer_tokens(sample) for sample in samples]
    row_lengths = [len(sample.input_ids) for sample in samples]
    global_batch = cfg.micro_batch * cfg.grad_accum * world
    schedule_steps = int(cfg.epochs * len(samples)) // global_batch
    if schedule_steps < 1:
        raise ValueError(
            f"{cfg.epochs} epochs of {len(samples)} rows do not fill one step of {global_batch} samples "
            f"(--micro-batch {cfg.micro_batch} x --grad-accum {cfg.grad_accum} x {world} ranks)"
        )
    last_step = min(schedule_steps, cfg.max_steps or schedule_steps)
    if cfg.prune_batch % cfg.micro_batch or cfg.prune_batch > global_batch:
        raise ValueError(
            f"--prune-batch must be a multiple of --micro-batch {cfg.micro_batch}, at most the {global_batch} "
            f"samples of a step, got {cfg.prune_batch}"
        )
    per_step, per_epoch, note = global_batch, range(len(samples)), ""  # what a step takes of the stream, and whence
    if cfg.sample_pruner not in ("none", "infobatch-official"):  # refuse a budget of no sample before writing anything
        batches = [min(cfg.prune_batch, global_batch - start) for start in range(0, global_batch, cfg.prune_batch)]
        budget = sum(num_samples_to_keep(cfg.sample_keep_ratio, size) for size in batches)
    if cfg.sample_pruner in SCORES_OF:
        per_step, (per_epoch, note) = budget, choose_rows(cfg, samples)
    elif cfg.sample_pruner == "infobatch":
        per_step = budget
    side = token_side_scores(cfg, samples, per_epoch)
    eval_sets = read_eval_sets(cfg, tokenizer)
    pool = Pool(per_epoch, [1.0] * len(per_epoch))

    # Model and optimizer. Full fine-tuning keeps fp32 weights under autocast; LoRA puts fp32 adapters on a bf16 base.
    base_dtype = torch.bfloat16 if bf16 and cfg.lora_rank else torch.float32
    model = Transformer.from_pretrained(cfg.model, dtype=base_dtype, device=device)
    model.activation_checkpointing = cfg.activation_checkpointing
    torch.manual_seed(cfg.seed)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, alpha=2 * cfg.lora_rank)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=cfg.lr, weight_decay=0.0, fused=True)

    # Run folder and checkpoint. Rank 0 decides, so that no rank reads what another has just written.
    found = [open_run(cfg, describe_run(cfg, world, device, len(samples))) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)
    out, first_step = Path(cfg.out), 1
    if cfg.sample_pruner == "infobatch-official":  # all alike, so that the first epoch is whole
        pool.row_loss = torch.zeros(len(samples))
    elif cfg.sample_pruner == "infobatch" and not found[0]:  # a pass over all rows: at small budgets few are ever seen
        pool = draw_epoch(cfg, 0, first_losses(model, samples, cfg, rank, world, device, autocast))
    if found[0]:
        state = torch.load(found[0], map_location=device, weights_only=True)
        for name, parameter in trainable.items():
            parameter.data.copy_(state["trainable"][name])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"] + 1
        if "infobatch" in state:
            pool = Pool(**state["infobatch"])
            pool.row_loss = pool.row_loss.cpu()
    if rank == 0:
        for log in ("metrics.jsonl", "selection.jsonl"):
            cut_log(out / log, first_step - 1)
        print(f"{len(samples)} rows ({skipped} skipped), {last_step} steps of {global_batch}, {world} x {cfg.device}")
        if note:
            print(note)
        context = model.config.max_position_embeddings
        too_long = sum(len(sample.input_ids) > context for sample in samples)
        if too_long:
            print(f"warning: {too_long} rows pass the model's context; --max-length {context} would cut them")

    token_loss = TokenLoss(model)
    if world > 1:
        token_loss = DistributedDataParallel(token_loss, device_ids=[device] if on_cuda else None)
    score_autocast = torch.autocast(cfg.device, dtype=torch.bfloat16, enabled=bf16 or cfg.score_bf16)
    memory: dict[int, RowScores] = {}  # of --reuse-scores; not in the checkpoint: a resumed run scores all rows anew
    on_terminal = sys.stderr.isatty()
    steps = range(first_step, last_step + 1)
    bar = tqdm(steps, desc="train", initial=first_step - 1, total=last_step, disable=rank > 0 or not on_terminal)
    for step in bar:
        started = time.perf_counter()
        order, weights, pool = take(cfg, pool, (step - 1) * per_step, step * per_step)

        # Stage 1. Every rank sees every sample's score, and so makes the same choice.
        memory = memory if cfg.reuse_scores > 1 else {}
        scores, passed, ppl, ent, agreement = {}, [], None, None, {}
        outputs = {}  # with --reuse-forward: of the layers, for each row that this rank scored
        keep_outputs = outputs if cfg.reuse_forward else None
        if cfg.sample_pruner in SCORING_PRUNERS:
            scores, passed = row_scores(order, memory, cfg, model, samples, rank, world, score_autocast, keep_outputs)
            ppl, ent = on_plane(scores, order)
        scored = time.perf_counter()
        if pool.row_loss is not None or cfg.sample_pruner in SCORES_OF:
            chosen = [every_sample(per_step, torch.tensor(weights) > 0)]
        else:
            chosen = choose_samples(cfg, step, per_step, ppl, ent)
        if ppl is not None and (cfg.score_bf16 or cfg.reuse_scores > 1) and step % cfg.check_scores == 0:
            exact, _ = row_scores(order, {}, cfg, model, samples, rank, world, autocast)
            exact = choose_samples(cfg, step, per_step, *on_plane(exact, order))
            agreement = {"kept_agreement": kept_agreement(exact, chosen)}
        keep, trim = (torch.cat([getattr(c, name) for c in chosen]).tolist() for name in ("keep", "prune_tokens"))

        # Stage 2: the mask (T,) of each kept sample's tokens that stay in the loss.
        kept_places = [place for place in range(per_step) if keep[place]]
        trimmed = [place for place in kept_places if trim[place]]
        rows, attention = list(dict.fromkeys(order[place] for place in trimmed)), {}
        if cfg.token_pruner in NLL_PRUNERS and ppl is None:
            scores, passed = row_scores(rows, memory, cfg, model, samples, rank, world, score_autocast, keep_outputs)
        if cfg.token_pruner in ATTENTION_PRUNERS:
            attention = row_attention(rows, cfg, model, samples, rank, world, autocast)
            passed = [*passed, *rows]
        kept_tokens = {}
        for place in kept_places:
            row = order[place]
            tokens = torch.tensor([samples[row].labels[1:]]) != IGNORE_INDEX  # (1, T)
            if trim[place]:
                nll = torch.zeros(tokens.shape).masked_scatter(tokens, scores[row].nll) if row in scores else None
                tokens = choose_tokens(cfg, step, place, tokens, nll, attention.get(row), side.get(row))
            kept_tokens[place] = tokens[0]
        num_kept = sum(int(tokens.sum()) for tokens in kept_tokens.values())
        tokens_scored = sum(row_lengths[row] - 1 for row in passed)
        selected = time.perf_counter()

        # Train: the step's loss is the mean over the tokens kept on all ranks (choice C16).
        lr = cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / schedule_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # A sample without a kept token (tokencleaning-global may leave one) is not passed through the model.
        trained = [place for place in kept_places if bool(kept_tokens[place].any())]
        short = [pruned_sample(samples[order[place]], kept_tokens[place], cfg.token_pruning) for place in trained]
        mine = share([len(sample.input_ids) for sample in short], world)[rank]
        # Of the layers' outputs, copies of the kept rows', so that the rest is freed.
        known_rows = {i: outputs[order[trained[i]]] for i in mine if order[trained[i]] in outputs}
        known_rows = {i: [output.clone() for output in of_layers] for i, of_layers in known_rows.items()}
        outputs.clear()
        batches = []
        for part in ([i for i in mine if i in known_rows], [i for i in mine if i not in known_rows]):
            groups = packs([len(short[i].input_ids) - 1 for i in part], cfg.pass_tokens)
            batches += [[part[i] for i in group] for group in groups]
        loss_sum, seen_losses = torch.zeros((), device=device), []
        for number, batch in enumerate(batches or [[]], start=1):
            known = None
            if batch and batch[0] in known_rows:
                known = [torch.cat(parts) for parts in zip(*(known_rows.pop(i) for i in batch), strict=True)]
            counts = [int(kept_tokens[trained[i]].sum()) for i in batch]
            row_weights = torch.tensor([weights[trained[i]] for i in batch])
            token_weights = row_weights.repeat_interleave(torch.tensor(counts, dtype=torch.long)).to(device)
            waits = world > 1 and number < len(batches)  # ranks exchange gradients once a step, on the last pass
            with token_loss.no_sync() if waits else nullcontext():
                with autocast:
                    loss, nll = token_loss(*pack([short[i] for i in batch] or [NOTHING], device), token_weights, known)
                (loss * (world / max(num_kept, 1))).backward()  # DDP takes the mean over ranks
            loss_sum += loss.detach()
            if pool.row_loss is not None:
                for i, row_nll in zip(batch, nll.split(counts), strict=True):
                    seen_losses.append((trained[i], order[trained[i]], row_nll.mean().item()))
        grad_norm = nn.utils.clip_grad_norm_(trainable.values(), 1.0).item()
        loss_mean = reduce_sum(loss_sum.item(), world, device) / max(num_kept, 1)
        differentiated = time.perf_counter()
        if not (math.isfinite(loss_mean) and math.isfinite(grad_norm)):
            raise ValueError(f"step {step}: loss is {loss_mean} and its gradient's norm {grad_norm}; try a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        if on_cuda:  # so that the seconds below are those of the work
            torch.cuda.synchronize()
        done = time.perf_counter()
        if pool.row_loss is not None:
            for _, row, loss in sorted(gather_lists(seen_losses, world)):
                pool.row_loss[row] = loss

        evaluated = {}
        if eval_sets and (step % cfg.eval_every == 0 or step == last_step):
            evaluated = eval_scores(model, tokenizer, eval_sets, cfg.pass_tokens, autocast)
        if cfg.log_selection and rank == 0:
            records = describe_selection(order, samples, chosen, ppl, ent, weights, kept_tokens)
            append_json(out / "selection.jsonl", {"step": step, "samples": records})
        if rank == 0:
            metrics = {
                "step": step,
                "loss": loss_mean,
                "lr": lr,
                "grad_norm": grad_norm,
                **selection_counts(chosen),
                "answer_tokens_seen": sum(answer_lengths[i] for i in order),
                "answer_tokens_kept": num_kept,
                "weight_sum": sum(weight for weight, kept in zip(weights, keep, strict=True) if kept),
                "tokens_scored": tokens_scored,
                "tokens_trained": sum(len(sample.input_ids) - 1 for sample in short),
                "score_s": selected - started,
                "select_s": selected - scored,
                "train_s": done - selected,
                "optimizer_s": done - differentiated,
                "peak_mem_gib": peak_mem_gib(device),
                **agreement,
                **evaluated,
            }
            append_json(out / "metrics.jsonl", metrics)
            line = {"loss": f"{loss_mean:.3f}", "kept": f"{metrics['samples_kept']}/{per_step}", "tokens": num_kept}
            line |= {name: f"{value:.4g}" for name, value in evaluated.items()}
            bar.set_postfix(line)
            if not on_terminal:
                print(f"step {step}/{last_step}", *(f"{name} {value}" for name, value in line.items()), flush=True)
            if step % cfg.save_every == 0 or step == last_step:
                save_checkpoint(out, step, trainable, optimizer, pool)
    if rank == 0:
        if cfg.lora_rank:
            save_adapter(model, out / "adapter")
        else:
            model.save_pretrained(out / "model")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


NOTHING = Sample(id="", input_ids=[0, 0], labels=[IGNORE_INDEX, IGNORE_INDEX])  # a rank that keeps none trains on this


@dataclass
class RowScores:
    """What scoring a row found: Eq. 4, Eq. 5, and the NLL (|T(x)|,) of its answer tokens; and how often it was used."""

    ppl: float
    ent: float
    nll: Tensor
    visits: int = 0


def row_scores(
    rows, memory, cfg, model, samples, rank, world, autocast, outputs: dict[int, list[Tensor]] | None = None
) -> tuple[dict[int, RowScores], list[int]]:
    """The scores of these rows on every rank, by row, in `memory`: those that it lacks, or that served often enough,
    anew. Also returns which these were. `outputs` takes, by row, what the layers gave for those that this rank scored.
    """
    stale = [row for row in dict.fromkeys(rows) if row not in memory or memory[row].visits >= cfg.reuse_scores]
    mine = [stale[i] for i in share([len(samples[row].input_ids) for row in stale], world)[rank]]
    found = []
    if mine:
        of_layers = None if outputs is None else {}
        nll, entropy, loss_mask = score(model, [samples[row] for row in mine], cfg.pass_tokens, autocast, of_layers)
        if outputs is not None:
            outputs.update((mine[i], of_row) for i, of_row in of_layers.items())
        ppl, ent = sample_perplexity(nll, loss_mask).tolist(), sample_entropy(entropy, loss_mask).tolist()
        found = [(row, RowScores(ppl[i], ent[i], nll[i, loss_mask[i]])) for i, row in enumerate(mine)]
    memory.update(gather_lists(found, world))
    for row in rows:
        memory[row].visits += 1
    return memory, stale


def on_plane(scores: dict[int, RowScores], rows: list[int]) -> tuple[Tensor, Tensor]:
    """ppl and ent (len(rows),) of these rows."""
    return torch.tensor([scores[row].ppl for row in rows]), torch.tensor([scores[row].ent for row in rows])


def row_attention(rows, cfg, model, samples, rank, world, autocast) -> dict[int, Tensor]:
    """The scores (1, T) of `fastv` or `sparsevlm-text` of these rows on every rank, by row."""
    mine = [rows[i] for i in share([len(samples[row].input_ids) for row in rows], world)[rank]]
    found = []
    if mine:
        table = attention_score(model, [samples[row] for row in mine], cfg.token_pruner, cfg.pass_tokens, autocast)
        found = [(row, table[i, None, : len(samples[row].input_ids) - 1]) for i, row in enumerate(mine)]
    return dict(gather_lists(found, world))


def kept_agreement(exact: list[SamplePruning], chosen: list[SamplePruning]) -> float:
    """Of the samples that exact scores keep, the share that was kept."""
    truth, kept = (torch.cat([c.keep for c in part]) for part in (exact, chosen))
    return (truth & kept).sum().item() / truth.sum().item()


def gather_lists(local: list, world: int) -> list:
    """The lists of all ranks, one behind the other."""
    if world == 1:
        return local
    parts = [None] * world
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part]


def first_losses(
    model: Transformer, samples: list[Sample], cfg: Config, rank: int, world: int, device: torch.device, autocast
) -> Tensor:
    """Every row's mean NLL before training, (N,), for InfoBatch: the one pass over all rows that it takes here."""
    losses = torch.zeros(len(samples), dtype=torch.float64)
    chunks, every = list(chunks_of(range(rank, len(samples), world), 256)), 0.1 if sys.stderr.isatty() else 30
    for rows in tqdm(chunks, desc="losses of all rows", delay=2, disable=rank > 0, mininterval=every):
        losses[list(rows)] = mean_nll(model, [samples[i] for i in rows], cfg.pass_tokens, autocast).double()
    if world > 1:
        losses = losses.to(device)
        dist.all_reduce(losses)
    return losses.cpu()


def reduce_sum(value: float, world: int, device: torch.device) -> float:
    """Sum of a number over all ranks."""
    if world == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def describe_selection(order, samples, chosen, ppl, ent, weights, kept_tokens) -> list[dict]:
    """selection.jsonl: what was decided about each sample of a step, and why."""
    names = ("quadrant", "keep", "backfilled", "prune_tokens")
    quadrant, keep, backfilled, trimmed = (torch.cat([getattr(c, name) for c in chosen]).tolist() for name in names)
    records = []
    for place in range(len(order)):
        sample = samples[order[place]]
        record = {"place": place, "id": sample.id, "quadrant": quadrant[place], "kept": keep[place]}
        record |= {"backfilled": backfilled[place], "trimmed": trimmed[place]}
        if ppl is not None:
            record |= {"ppl": ppl[place].item(), "ent": ent[place].item()}
        if keep[place]:  # one digit for each answer token in order, 1 = in the loss
            answer = torch.tensor(sample.labels[1:]) != IGNORE_INDEX
            record |= {"weight": weights[place]} if weights[place] != 1 else {}
            record["tokens"] = "".join(str(int(kept)) for kept in kept_tokens[place][answer])
        records.append(record)
    return records


def save_checkpoint(out: Path, step: int, trainable: dict[str, nn.Parameter], optimizer, pool: Pool) -> None:
    """What --resume needs: the weights that train, the optimizer, how many steps are done, InfoBatch's rows."""
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in trainable.items()}
    state = {"step": step, "trainable": weights, "optimizer": optimizer.state_dict()}
    if pool.row_loss is not None:
        state["infobatch"] = {name: getattr(pool, name) for name in ("rows", "weights", "epoch", "row_loss")}
        state["infobatch"]["rows"] = list(pool.rows)
    torch.save(state, folder / "state.pt.tmp")
    os.replace(folder / "state.pt.tmp", folder / "state.pt")


def peak_mem_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on a GPU; resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_config(argv))
    except (ValueError, OSError) as error:  # wrong input; every rank meets the same, one of them says so
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
