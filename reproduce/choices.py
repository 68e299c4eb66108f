"""What each choice of README.md does: its other reading put in place, the same scores decided again, the run again.

    python -m reproduce.choices [--runs runs/choices] [--seeds 3] [--log RUN] [--out reproduce/results/choices.json]
    python -m reproduce.choices --table [--out FILE]       print the table of a result file, run nothing

On the embedded default at the tiny preset's settings, 12.5 % x 50 %, each variant alone against the default:

- offline: every step of a finished default run is decided again from the scores that it had at that step. What
  differs is then the choice's own doing, for the weights are the same. --log adds another Q-Tuning run's
  selection.jsonl, which holds what choosing samples needs; tokens are left out there.
- by training: the same seeds of both, scored as `python -m reproduce` scores them; gains with their 95 % intervals.

A variant is a flag of train.py, or functions of train, qtuning and passes replaced while it runs. A finished run is
not made again; the result file is written anew after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import passes
import qtuning
import train
from data.sft import IGNORE_INDEX, Sample, load_samples
from data.tokenizer import TextTokenizer
from model import Transformer, read_json, write_aside
from qtuning import KEEP_QUADRANTS, Quadrant, SamplePruning, Thresholds
from reproduce import runs as running
from reproduce.experiments import WIZARD, Flags
from reproduce.experiments import qtuning as qtuning_flags
from reproduce.presets import Preset, tiny
from reproduce.quickstart import read_jsonl
from reproduce.report import RESULTS, TINY_TASKS, Gain, gain, interval, markdown

BUDGET = "12.5x50"
TASKS = ("arc", "gsm8k", "held")
Patch = Callable[[], AbstractContextManager]


# ------------------------------------------------------------------------------------- C1 to C5: search


def search(lowers: bool = False, stops: bool = False, last: bool = False, halvings: int = 20) -> Callable:
    """`bisect_thresholds` with: on target lowers the upper bound; stops on target; gives the last midpoint."""

    def bisect_thresholds(
        ppl: Tensor, ent: Tensor, num_keep: int, *, upper=0.49, max_iters=20, keep_quadrants=KEEP_QUADRANTS
    ) -> Thresholds:
        low, high = 0.0, upper
        for _ in range(halvings):
            alpha = (low + high) / 2
            quadrant = qtuning.assign_quadrants(ppl, ent, qtuning.thresholds_at(ppl, ent, alpha, alpha))
            num_kept = int(in_any(quadrant, keep_quadrants).sum())
            if stops and num_kept == num_keep:
                return qtuning.thresholds_at(ppl, ent, alpha, alpha)
            if num_kept > num_keep or (lowers and num_kept == num_keep):
                high = alpha
            else:
                low = alpha
        level = alpha if last else low
        return qtuning.thresholds_at(ppl, ent, level, level)

    return bisect_thresholds


def in_any(quadrant: Tensor, quadrants) -> Tensor:
    return torch.isin(quadrant, torch.tensor([int(q) for q in quadrants]))


def searched(**how) -> AbstractContextManager:
    return patch.multiple(qtuning, bisect_thresholds=search(**how))


@contextmanager
def last_midpoint(**how):
    """Also keeps all of Q2 and Q4 where the midpoint holds too many: Alg. 1 takes none away."""

    def whole(chosen: SamplePruning, ppl: Tensor, ent: Tensor) -> SamplePruning:
        more = in_any(chosen.quadrant, KEEP_QUADRANTS) & ~chosen.keep
        trim = chosen.prune_tokens | (more & (chosen.quadrant == Quadrant.VALUABLE_MISCONCEPTION))
        return dataclasses.replace(chosen, keep=chosen.keep | more, prune_tokens=trim)

    with searched(last=True, **how), then(whole):
        yield


def then(change: Callable[[SamplePruning, Tensor, Tensor], SamplePruning]) -> AbstractContextManager:
    """Changes what stage 1 decided about a prune batch."""
    original = train.prune_samples

    def prune_samples(ppl: Tensor, ent: Tensor, *args, **kwargs) -> SamplePruning:
        return change(original(ppl, ent, *args, **kwargs), ppl, ent)

    return patch.multiple(train, prune_samples=prune_samples)


def wider() -> AbstractContextManager:
    return patch.multiple(train, prune_samples=partial(train.prune_samples, upper=0.5))


def interpolated() -> AbstractContextManager:
    """Every level then cuts elsewhere, so that none stands for another in the search."""
    quantile = {"quantile": lambda values, gamma: values.double().quantile(gamma), "_rank": lambda gamma, num: gamma}
    return patch.multiple(qtuning, **quantile)


def other_edges() -> AbstractContextManager:
    """The plane turned by half: what was strict on the high side is then so on the low one."""
    original, turned_back = qtuning.assign_quadrants, torch.tensor([0, 3, 4, 1, 2])

    def assign_quadrants(ppl: Tensor, ent: Tensor, cut: Thresholds) -> Tensor:
        low_and_high = (-cut.ppl_high, -cut.ppl_low, -cut.ent_high, -cut.ent_low)
        return turned_back[original(-ppl, -ent, Thresholds(cut.alpha, cut.beta, *low_and_high))]

    return patch.multiple(qtuning, assign_quadrants=assign_quadrants)


# -------------------------------------------------------------------------- C6 to C9: how many, and who


@contextmanager
def rounded():
    def num_samples_to_keep(sample_keep_ratio: float, num_samples: int) -> int:
        return max(1, round(sample_keep_ratio * num_samples))

    with (
        patch.multiple(qtuning, num_samples_to_keep=num_samples_to_keep),
        patch.multiple(train, num_samples_to_keep=num_samples_to_keep),
    ):
        yield


def fill_from_q1_q3() -> AbstractContextManager:
    def refill(chosen: SamplePruning, ppl: Tensor, ent: Tensor) -> SamplePruning:
        in_kept = chosen.keep & ~chosen.backfilled
        may = in_any(chosen.quadrant, (Quadrant.HARMFUL_NOISE, Quadrant.REDUNDANT_KNOWLEDGE)) & ~in_kept
        largest = qtuning.supp_score(ppl, ent).masked_fill(~may, -math.inf).sort(descending=True, stable=True).indices
        backfilled = torch.zeros_like(in_kept)
        backfilled[largest[: int(chosen.backfilled.sum())]] = True
        backfilled &= may  # fewer where too few are in Q1 and Q3
        like_q2 = qtuning._min_max(ppl) >= qtuning._min_max(ent)
        trim = torch.where(backfilled, like_q2, chosen.prune_tokens & in_kept)
        return dataclasses.replace(chosen, keep=in_kept | backfilled, backfilled=backfilled, prune_tokens=trim)

    return then(refill)


def normalised_over_the_step() -> AbstractContextManager:
    choose, prune = train.choose_samples, train.prune_samples

    def choose_samples(cfg, step: int, num: int, ppl: Tensor, ent: Tensor) -> list[SamplePruning]:
        def prune_samples(part_ppl: Tensor, part_ent: Tensor, *args, **kwargs) -> SamplePruning:
            def min_max(values: Tensor) -> Tensor:
                whole, values = (ppl if values is part_ppl else ent).double(), values.double()
                spread = whole.max() - whole.min()
                return (values - whole.min()) / torch.where(spread > 0, spread, torch.ones_like(spread))

            with patch.multiple(qtuning, _min_max=min_max):
                return prune(part_ppl, part_ent, *args, **kwargs)

        with patch.multiple(train, prune_samples=prune_samples):
            return choose(cfg, step, num, ppl, ent)

    return patch.multiple(train, choose_samples=choose_samples)


def filled_in_whole() -> AbstractContextManager:
    return then(lambda c, *_: dataclasses.replace(c, prune_tokens=c.prune_tokens & ~c.backfilled))


def filled_in_trimmed() -> AbstractContextManager:
    return then(lambda c, *_: dataclasses.replace(c, prune_tokens=c.prune_tokens | c.backfilled))


# --------------------------------------------------------------------------------- C11 and C12: tokens


def ceiling() -> AbstractContextManager:
    def num_tokens_to_keep(token_keep_ratio: float, num_tokens: int) -> int:
        return max(1, math.ceil(token_keep_ratio * num_tokens - qtuning.ROUNDING))

    return patch.multiple(qtuning, num_tokens_to_keep=num_tokens_to_keep)


@contextmanager
def batch_budget():
    """Written for one kept sample a prune batch, where nothing is ranked across samples."""
    lengths: list[int] = []
    score, choose = train.row_scores, train.choose_tokens

    def row_scores(rows, memory, cfg, model, samples, *rest):
        lengths[:] = [len(samples[row].input_ids) - 1 for row in rows]
        return score(rows, memory, cfg, model, samples, *rest)

    def choose_tokens(cfg, step, position, loss_mask, nll=None, *rest) -> Tensor:
        size, (num,) = cfg.prune_batch, loss_mask.sum(dim=1).tolist()
        if math.floor(cfg.sample_keep_ratio * size) != 1:
            raise ValueError(f"a budget over the batch is only written for one kept sample of {size}")
        start = position - position % size
        target = round(sum(lengths[start : start + size]) * cfg.sample_keep_ratio * cfg.token_keep_ratio)
        num_kept = max(0, num - max(0, lengths[position] - target))
        with patch.multiple(qtuning, num_tokens_to_keep=lambda ratio, num_tokens: num_kept):
            return choose(cfg, step, position, loss_mask, nll, *rest)

    with patch.multiple(train, row_scores=row_scores, choose_tokens=choose_tokens):
        yield


def no_neighbour_is_0() -> AbstractContextManager:
    def smoothed_token_score(token_ppl: Tensor, loss_mask: Tensor, smoothing: float) -> Tensor:
        own = torch.where(loss_mask, token_ppl, torch.zeros_like(token_ppl))
        neighbours = F.pad(own, (1, 0))[:, :-1] + F.pad(own, (0, 1))[:, 1:]
        return torch.where(loss_mask, (1 - smoothing) * own + smoothing * neighbours, torch.zeros_like(own))

    return patch.multiple(qtuning, smoothed_token_score=smoothed_token_score)


# ------------------------------------------------------------------- C15 to C18: scores, loss, EOS, mode


def entropy_over_all_tokens() -> AbstractContextManager:
    original = train.score

    def score(model, samples, pass_tokens, autocast, outputs=None) -> tuple[Tensor, Tensor, Tensor]:
        everywhere = [dataclasses.replace(sample, labels=sample.input_ids) for sample in samples]
        nll, entropy, tokens = original(model, everywhere, pass_tokens, autocast, outputs)
        loss_mask = torch.zeros_like(tokens)
        for row, sample in enumerate(samples):
            loss_mask[row, : len(sample.labels) - 1] = torch.tensor(sample.labels[1:]) != IGNORE_INDEX
        mean = entropy.sum(dim=1, keepdim=True) / tokens.sum(dim=1, keepdim=True)
        return nll * loss_mask, mean * loss_mask, loss_mask  # whose mean over the answer is the mean over all

    return patch.multiple(train, score=score)


def mean_of_means(over_answer: bool) -> AbstractContextManager:
    """Written for a step that is one pass and keeps one sample of each micro-batch, as the embedded default's do."""
    original = passes.TokenLoss.forward

    def forward(self, input_ids, labels, lengths, token_weights, known=None):
        device = labels.device
        row = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        row = row[labels != IGNORE_INDEX]
        sizes = row.bincount(minlength=len(lengths)) if over_answer else torch.tensor(lengths, device=device)
        # train.py divides by the number of kept tokens
        return original(self, input_ids, labels, lengths, token_weights * len(row) / len(lengths) / sizes[row], known)

    return patch.multiple(passes.TokenLoss, forward=forward)


def without_eos(sample: Sample) -> Sample:
    return dataclasses.replace(sample, labels=[*sample.labels[:-1], IGNORE_INDEX])


@contextmanager
def eos_not_trained():
    load, read = train.load_samples, train.read_eval_sets

    def load_rows(*args) -> tuple[list[Sample], int]:
        samples, skipped = load(*args)
        return [without_eos(sample) for sample in samples], skipped

    def read_eval_sets(*args) -> dict:  # the held rows stay what they are for all
        with patch.multiple(train, load_samples=load):
            return read(*args)

    with patch.multiple(train, load_samples=load_rows, read_eval_sets=read_eval_sets):
        yield


@torch.no_grad()
def mode_difference(model: Transformer, samples: list[Sample]) -> float:
    """The largest difference of a token's NLL or entropy scored in train() and in eval() mode."""
    evaluated = passes.score(model, samples, 2048, nullcontext())
    model.eval = model.train
    trained = passes.score(model, samples, 2048, nullcontext())
    del model.eval
    return max((a - b).abs().max().item() for a, b in zip(evaluated[:2], trained[:2], strict=True))


# -------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """Another reading of a choice."""

    choice: str
    name: str  # beside the choice's other variants
    changes: str  # what the flags or the patch change, in a line
    flags: Flags = ()
    patch: Patch = nullcontext
    trains: bool = True

    @property
    def slug(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{self.choice} {self.name}").strip("-")


DEFAULT = Variant("default", "", "nothing")
VARIANTS = (
    Variant("C1", "to 0.5", "the search interval is [0, 0.5]", patch=wider),
    Variant("C2", "lowers upper", "on target lowers the upper bound (Alg. 1)", patch=partial(searched, lowers=True)),
    # Sets at rising levels are nested: as many kept means the same kept.
    Variant("C2", "stops", "the first midpoint on target", patch=partial(searched, stops=True), trains=False),
    Variant("C3", "10 halvings", "last of 10 midpoints, nothing cut", patch=partial(last_midpoint, halvings=10)),
    # A prune batch of 8 has three levels where sets change, and the 20th midpoint lies below each of them.
    Variant("C3", "20 halvings", "last of 20 midpoints, nothing cut", patch=last_midpoint, trains=False),
    Variant(
        "C3", "Alg. 1", "last of 10, on target lowers the upper", patch=partial(last_midpoint, lowers=True, halvings=10)
    ),
    Variant("C4", "interpolated", "quantiles are interpolated linearly", patch=interpolated),
    Variant("C5", "other edges", "high is >=, low is <", patch=other_edges),
    Variant("C6", "rounded", "max(1, round(r B)) samples are kept", patch=rounded, trains=False),
    Variant("C7", "Q1, Q3", "only Q1 and Q3 may fill up", patch=fill_from_q1_q3),
    Variant("C8", "step", "min-max over the step's 32 samples", patch=normalised_over_the_step),
    Variant("C9", "all whole", "every filled-in sample stays whole", patch=filled_in_whole),
    Variant("C9", "all trimmed", "every filled-in sample is trimmed", patch=filled_in_trimmed),
    Variant("C10", "reversed", "the tokens of the highest scores stay", ("--reverse",)),
    Variant("C11", "ceil", "ceil in place of floor", patch=ceiling),
    Variant("C11", "batch budget", "a budget over the batch, prompts counted", patch=batch_budget),
    Variant("C12", "0", "a missing neighbour counts 0", patch=no_neighbour_is_0),
    Variant("C13", "drop", "pruned tokens leave the input", ("--token-pruning", "drop")),
    Variant("C14", "16", "the prune batch is 16", ("--prune-batch", "16")),
    Variant("C14", "32", "the prune batch is 32", ("--prune-batch", "32")),
    Variant("C15", "all tokens", "Ent is the mean over prompt and answer", patch=entropy_over_all_tokens),
    Variant(
        "C16", "answer", "mean over micro-batches of the mean over kept tokens", patch=partial(mean_of_means, True)
    ),
    Variant("C16", "row", "the same, divided by all tokens of the row", patch=partial(mean_of_means, False)),
    Variant("C17", "EOS untrained", "the answer's EOS is no answer token", patch=eos_not_trained),
)
NO_VARIANT = "C18"


def run_of(preset: Preset, variant: Variant, seed: int) -> running.Run:
    return running.run_of(preset, "embedded", WIZARD, qtuning_flags(BUDGET, *variant.flags), seed)


def make(preset: Preset, variant: Variant, seed: int, root: Path) -> dict:
    """The variant's run of a seed, trained and scored; its folder is its own, for its name is the default's."""
    with variant.patch():
        return running.make(preset, run_of(preset, variant, seed), root / variant.slug)


# --------------------------------------------------------------------------------------------- offline

# Variants that score otherwise: what else a recorded run is scored by.
RESCORED: dict[str, Patch] = {"C15": entropy_over_all_tokens, "C17": nullcontext}
VIEW = {"C17": without_eos}  # and on what rows
Scores = dict[int, train.RowScores]


@dataclass(frozen=True)
class Log:
    """The scores of a Q-Tuning run at every step: the step's rows in order, and way of scoring -> row -> scores."""

    sample_keep_ratio: float
    steps: list[tuple[list[int], dict[str, Scores]]]
    samples: list[Sample] | None = None  # none: rows are places in the step, and NLLs are not known


def record(argv: list[str], path: Path) -> None:
    """Train by train.py's flags, and write what was scored at each step, also in the ways of RESCORED."""
    original, steps = train.row_scores, []

    def row_scores(rows, memory, cfg, model, samples, *rest):
        found, scored = original(rows, memory, cfg, model, samples, *rest)
        ways = {"": {row: found[row] for row in rows}}
        for choice, rescored in RESCORED.items():
            seen = {row: VIEW.get(choice, lambda sample: sample)(samples[row]) for row in rows}
            with rescored():
                ways[choice], _ = original(rows, {}, cfg, model, seen, *rest)
        plain = {way: {row: (s.ppl, s.ent, s.nll) for row, s in scores.items()} for way, scores in ways.items()}
        steps.append((list(rows), plain))
        return found, scored

    with patch.multiple(train, row_scores=row_scores):
        train.main(argv)
    torch.save(steps, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def recorded(path: Path, cfg: train.Config) -> Log:
    """What `record` wrote of a run of these settings."""
    samples, _ = load_samples(cfg.data, TextTokenizer.from_pretrained(cfg.model), cfg.template, cfg.max_length)
    steps = [
        (rows, {way: {row: train.RowScores(*s) for row, s in scores.items()} for way, scores in ways.items()})
        for rows, ways in torch.load(path, weights_only=True)
    ]
    return Log(cfg.sample_keep_ratio, steps, samples)


def logged(folder: Path) -> Log:
    """The log of a run with --log-selection.

    Raises: ValueError: not a run of Q-Tuning at the default's prune batch, or its decisions are not the default's.
    """
    told, steps = read_json(folder / "config.json"), []
    if told["sample_pruner"] != "qtuning" or told["prune_batch"] != 8:
        raise ValueError(f"{folder}: expected a run of --sample-pruner qtuning with a prune batch of 8")
    lines = read_jsonl(folder / "selection.jsonl")
    for line in lines:
        scores = {i: train.RowScores(s["ppl"], s["ent"], None) for i, s in enumerate(line["samples"])}
        steps.append((list(scores), {"": scores}))
    log = Log(told["sample_keep_ratio"], steps)
    for line, decided in zip(lines, decide(log, DEFAULT), strict=True):
        if decided.keep.tolist() != [sample["kept"] for sample in line["samples"]]:
            raise ValueError(f"{folder}: what step {line['step']} kept is not what its scores give")
    return log


@dataclass(frozen=True)
class Decided:
    """What was decided about the samples of a step; tokens: place of a kept sample -> its mask (T,), True = trained."""

    keep: Tensor
    trim: Tensor
    target: int
    tokens: dict[int, Tensor]


def config_of(variant: Variant) -> train.Config:
    return train.resolve(train.parse_config([*qtuning_flags(BUDGET, *variant.flags), "--device", "cpu"]))


def decide(log: Log, variant: Variant) -> list[Decided]:
    """The decisions that the variant makes on the scores of every step of the log."""
    cfg = dataclasses.replace(config_of(variant), sample_keep_ratio=log.sample_keep_ratio)
    found, view = [], VIEW.get(variant.choice, lambda sample: sample)
    with variant.patch():
        for step, (rows, ways) in enumerate(log.steps, start=1):
            scores = {row: dataclasses.replace(s, visits=0) for row, s in ways.get(variant.choice, ways[""]).items()}
            if log.samples:  # for what else a patch of it does: `scores` has every row, so that no model is asked
                scores, _ = train.row_scores(rows, scores, cfg, None, log.samples, 0, 1, None)
            chosen = train.choose_samples(cfg, step, len(rows), *train.on_plane(scores, rows))
            keep, trim = (torch.cat([getattr(c, name) for c in chosen]) for name in ("keep", "prune_tokens"))
            tokens = {}
            for place in keep.nonzero()[:, 0].tolist() if log.samples else ():
                row = rows[place]
                mask = torch.tensor([view(log.samples[row]).labels[1:]]) != IGNORE_INDEX
                if trim[place]:
                    nll = torch.zeros(mask.shape).masked_scatter(mask, scores[row].nll)
                    mask = train.choose_tokens(cfg, step, place, mask, nll)
                tokens[place] = mask[0]
            target = sum(math.floor(cfg.sample_keep_ratio * len(c.keep) + qtuning.ROUNDING) for c in chosen)
            found.append(Decided(keep, trim, target, tokens))
    return found


def compare(default: list[Decided], other: list[Decided]) -> dict[str, float | None]:
    """How far two decisions about the same steps differ.

    Returns: "samples": 1 - shared / larger number, of the kept samples of each step; "trimming": of the samples kept
        by both, those trimmed by one alone; "tokens": as "samples", of the tokens in the loss of samples that both keep
        and one trims (None without tokens); "kept_over_target": of `other`.
    """
    shared, larger, both, unlike, same_tokens, more_tokens = (0,) * 6
    for a, b in zip(default, other, strict=True):
        common = a.keep & b.keep
        shared += int(common.sum())
        larger += max(int(a.keep.sum()), int(b.keep.sum()))
        both += int(common.sum())
        unlike += int((common & (a.trim != b.trim)).sum())
        for place in (common & (a.trim | b.trim)).nonzero()[:, 0].tolist() if a.tokens else ():
            ours, theirs = a.tokens[place], b.tokens[place]
            same_tokens += int((ours & theirs).sum())
            more_tokens += max(int(ours.sum()), int(theirs.sum()))
    return {
        "samples": round(1 - shared / larger, 4),
        "trimming": round(unlike / both, 4) if both else None,
        "tokens": round(1 - same_tokens / more_tokens, 4) if more_tokens else None,
        "kept_over_target": round(sum(int(b.keep.sum()) for b in other) / sum(b.target for b in other), 4),
    }


def offline(log: Log, variants=VARIANTS) -> dict[str, dict]:
    """Variant's slug -> `compare` with the default; without those that the log has no scores for."""
    default = decide(log, DEFAULT)
    known = [v for v in variants if v.choice not in RESCORED or v.choice in log.steps[0][1]]
    return {
        v.slug: compare(default, decide(log, v))
        for v in tqdm(known, desc="offline", delay=2, mininterval=0.1 if sys.stderr.isatty() else 30)
        if log.samples or v.patch is not batch_budget
    }


# ----------------------------------------------------------------------------------------------- result


def describe(made: dict[str, list[dict]], shares: dict[str, dict[str, dict]], mode: float) -> dict:
    """The result: slug -> its runs, a seed each; log -> slug -> `compare`; the difference of C18."""
    lines = []
    for variant in VARIANTS:
        line = {name: getattr(variant, name) for name in ("choice", "name", "changes", "flags")}
        line |= {"offline": {log: found[variant.slug] for log, found in shares.items() if variant.slug in found}}
        done = made.get(variant.slug, [])
        line["seeds"] = len(done)
        if done:
            over = made[DEFAULT.slug][: len(done)]  # the same seeds
            gains = {task: gain(done, over, task) for task in TASKS}
            line["gains"] = {
                t: {"mean": round(g.mean, 4), "margin": None if g.margin is None else round(g.margin, 4)}
                for t, g in gains.items()
            }
            line["runs"] = brief(done)
        lines.append(line)
    default = made.get(DEFAULT.slug, [])
    return {
        "budget": BUDGET,
        "machine": default[0]["machine"] if default else None,
        "default": {"seeds": len(default), "runs": brief(default)},
        "variants": lines,
        NO_VARIANT: {"largest_difference": mode},
    }


def brief(runs: list[dict]) -> dict[str, list]:
    """What a table needs of runs, and what shows how they were made; one value a seed."""
    return {
        **{task: [run["scores"][task] for run in runs] for task in TASKS if task != "held"},
        "held": [run["held"]["rows_nll"][-1] for run in runs],
        "samples_kept": [run["samples_kept"] for run in runs],
        "answer_tokens_kept": [run["answer_tokens_kept"] for run in runs],
    }


def write(path: Path, results: dict) -> None:
    """A line a variant."""
    lines = ",\n".join("  " + json.dumps(line, ensure_ascii=False) for line in results["variants"])
    head = json.dumps({**results, "variants": None}, indent=1, ensure_ascii=False)
    write_aside(path, head.replace('"variants": null', f'"variants": [\n{lines}\n ]') + "\n")


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}" if share >= 0.01 or share == 0 else "<1"


def shown(line: dict, task: str) -> str:
    """A gain with its interval; `~`: within it."""
    if "gains" not in line:
        return ""
    found = Gain(**line["gains"][task])
    return interval(found, task) + (" ~" if found.is_noise() else "")


def table(results: dict) -> str:
    """Markdown, a row a variant: what it changes offline (percent), and its gains over the default."""
    logs = list(dict.fromkeys(log for line in results["variants"] for log in line["offline"]))
    head = ["", "other reading"]
    head += [f"{log}: {what}" for log in logs for what in ("samples", "trimming", "tokens", "kept / target")]
    head += [*({"held": "held-out loss", **TINY_TASKS}[task] for task in TASKS), "seeds"]
    rows = [head]
    for line in results["variants"]:
        row = [line["choice"], line["changes"]]
        for log in logs:
            found = line["offline"].get(log, {})
            row += [percent(found.get(what)) for what in ("samples", "trimming", "tokens")]
            row.append(f"{found['kept_over_target']:.2f}" if found else "")
        rows.append([*row, *(shown(line, task) for task in TASKS), str(line["seeds"] or "")])
    empty = [key for key in range(len(head)) if all(not row[key] for row in rows[1:])]
    return markdown([[cell for key, cell in enumerate(row) if key not in empty] for row in rows])


def cell(results: dict, choice: str) -> str:
    """A choice's first two variants in a few words, on the embedded default: what they change, and the GSM8K form's
    gain over the default (`same`: what decides alike was not trained)."""
    if choice == NO_VARIANT:
        return f"scores in train() and eval() differ by {results[NO_VARIANT]['largest_difference']:g} (no dropout)"
    lines = [line for line in results["variants"] if line["choice"] == choice][:2]
    if not lines:
        raise ValueError(f"expected one of C1 to {NO_VARIANT}, got {choice!r}")
    found = [next(iter(line["offline"].values()), {}) for line in lines]
    what = next((w for w in ("samples", "tokens") if any(f.get(w) for f in found)), None)
    text = f"{' / '.join(percent(f[what]) for f in found)} % other {what}" if what else "keeps the same"
    over = [f["kept_over_target"] for f in found]
    if any(abs(ratio - 1) > 0.005 for ratio in over):
        text += f", {' / '.join(f'{ratio:.2f}' for ratio in over)} x budget"
    if lines[0]["seeds"]:
        text += f"; GSM8K {' / '.join(shown(line, 'gsm8k') or 'same' for line in lines)}"
    return f"{' / '.join(line['name'] for line in lines)}: {text}" if len(lines) > 1 else text


# ---------------------------------------------------------------------------------------------- command


def measure(root: Path, seeds: int, log: Path | None, out: Path) -> None:
    """Everything, the cheap first; `out` is written anew after each run."""
    preset = tiny(root)
    preset.make_files(preset, set())
    folder = root / "recorded"
    scores = folder / "scores.pt"
    if not scores.exists():
        shutil.rmtree(folder, ignore_errors=True)  # one that was cut
        record([*preset.settings, *qtuning_flags(BUDGET), "--out", str(folder)], scores)
    cfg = config_of(DEFAULT)
    embedded = recorded(scores, cfg)
    shares = {"embedded": offline(embedded)}
    if log:
        shares[Path(read_json(log / "config.json")["model"]).name] = offline(logged(log))
    mode = mode_difference(Transformer.from_pretrained(cfg.model), embedded.samples[:64])

    made: dict[str, list[dict]] = {}
    trained = [variant for variant in (DEFAULT, *VARIANTS) if variant.trains]
    todo = [(seed, variant) for seed in range(seeds) for variant in trained]
    for seed, variant in tqdm(todo, desc="runs", mininterval=0.5 if sys.stderr.isatty() else 60):
        made.setdefault(variant.slug, []).append(make(preset, variant, seed, root))
        write(out, describe(made, shares, mode))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.choices", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/choices"), help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, seeds 0, 1, ...")
    parser.add_argument("--log", type=Path, help="folder of another Q-Tuning run with --log-selection")
    parser.add_argument("--out", type=Path, default=RESULTS / "choices.json", help="result file (JSON)")
    parser.add_argument("--table", action="store_true", help="print the result file's table, run nothing")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    try:
        if not args.table:
            torch.set_num_threads(1)
            measure(args.runs, args.seeds, args.log, args.out)
        print(table(read_json(args.out)))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
