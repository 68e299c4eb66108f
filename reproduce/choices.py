"""The effect of each choice in docs/CHOICES.md: its other reading, decided on the same scores and trained.

    python -m reproduce.choices [--runs runs/choices] [--seeds 3] [--log RUN] [--out reproduce/results/choices.json]
    python -m reproduce.choices --table [--out FILE]       print the table of a result file, run nothing

It runs the embedded default with the settings of the preset tiny, at 12.5 % x 50 %. Each variant is compared with the
default

- offline: in every step of a default run, each variant decides too, from the scores of that step. The weights are the
  same, so any difference comes from the choice. --log adds the selection.jsonl of another Q-Tuning run, which has what
  choosing samples needs; tokens are left out there.
- by training: both train with the same seeds and are scored as in `python -m reproduce`; gains with 95 % intervals.

A finished run is not made again; the result file is written after each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import pruners
import train
from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer
from eval.common import errors_in_one_line, positive_int
from model import Transformer
from qtuning import IGNORE_INDEX, SamplePruning, token_mask
from reproduce import runs as running
from reproduce.experiments import WIZARD
from reproduce.experiments import qtuning as qtuning_flags
from reproduce.presets import Preset, tiny
from reproduce.readings import DEFAULT, NO_VARIANT, VARIANTS, Variant, mode_difference, register
from reproduce.report import RESULTS, TINY_TASKS, Gain, gain, interval, values
from reproduce.selection import chosen_again, read_log
from reproduce.tables import markdown
from training.files import read_json, write_json
from training.ranks import Ranks
from training.scoring import RowScore, Scorer

BUDGET = "12.5x50"
TASKS = ("arc", "gsm8k", "held")  # `held`: the loss on held-out rows


@functools.cache
def config_of(variant: Variant) -> train.Config:
    """The variant's settings, without paths."""
    return train.resolve(train.parse_config([*qtuning_flags(BUDGET, *variant.all_flags), "--device", "cpu"]))


# --------------------------------------------------------------------------------------------- offline


@dataclass(frozen=True)
class Decided:
    """Decisions about the samples of a step: keep (B,), trim (B,), and tokens (B, T), those in the loss."""

    keep: Tensor
    trim: Tensor
    tokens: Tensor


def decide(variant: Variant, scorer: Scorer, **changes) -> Decided:
    """The variant's decisions about a step that has all rows of the scorer; changes: of its Config."""
    cfg, rows = dataclasses.replace(config_of(variant), **changes), range(len(scorer.samples))
    chosen = pruners.choose_samples(cfg, 0, rows, scorer)
    trimmed = pruners.choose_tokens(cfg, 0, rows, chosen, scorer)
    return Decided(chosen.keep, chosen.prune_tokens, token_mask(chosen, trimmed, scorer.loss_mask(rows)))


def compare(default: Iterable[Decided], other: Iterable[Decided]) -> dict[str, float | None]:
    """Differences of two decisions about the same steps.

    Returns:
        "samples": 1 - shared / larger number, of the kept samples of each step; "trimming": share of the samples kept
        by both that only one trims; "tokens": as "samples", of the tokens in the loss of samples that both keep and
        one trims; "kept_over_target": samples that the other keeps over the default's, which meets the budget exactly.
        None where there is nothing to compare.
    """
    shared = larger = unlike = same_tokens = more_tokens = kept = target = 0
    for a, b in zip(default, other, strict=True):
        both = a.keep & b.keep
        shared, unlike = shared + int(both.sum()), unlike + int((both & (a.trim != b.trim)).sum())
        target, kept = target + int(a.keep.sum()), kept + int(b.keep.sum())
        larger += max(int(a.keep.sum()), int(b.keep.sum()))
        ours, theirs = (decided.tokens[both & (a.trim | b.trim)] for decided in (a, b))
        same_tokens += int((ours & theirs).sum())
        more_tokens += int(torch.maximum(ours.sum(dim=1), theirs.sum(dim=1)).sum())
    return {
        "samples": round(1 - shared / larger, 4),
        "trimming": round(unlike / shared, 4) if shared else None,
        "tokens": round(1 - same_tokens / more_tokens, 4) if more_tokens else None,
        "kept_over_target": round(kept / target, 4),
    }


def offline(argv: list[str]) -> dict[str, dict]:
    """Variant's slug -> `compare` with the default, in all steps of a default run with these flags of train.py."""
    decided = {variant: [] for variant in (DEFAULT, *VARIANTS)}

    def decide_all(model, samples: list[Sample], pass_tokens: int, autocast) -> list[Tensor]:
        scorers = {}  # change_rows -> the scorer of the rows so changed
        for variant, found in decided.items():
            change = variant.change_rows
            if change not in scorers:
                rows = change(samples) if change else samples
                scorers[change] = Scorer(model, rows, Ranks(), config_of(DEFAULT), autocast, {})
            found.append(decide(variant, scorers[change]))
        return [torch.zeros(())] * len(samples)

    def choose(cfg, generator, size: int, ppl: Tensor, ent: Tensor, _) -> SamplePruning:
        return pruners.qtuning_samples(cfg, generator, size, ppl, ent)

    # A need that is a function is asked for once in each step, for all of its rows.
    pruners.SAMPLE_PRUNERS["default-and-all-variants"] = pruners.SamplePruner(("ppl", "ent", decide_all), choose=choose)
    train.main([*argv, "--sample-pruner", "default-and-all-variants"])
    return {variant.slug: compare(decided[DEFAULT], decided[variant]) for variant in VARIANTS}


def offline_log(folder: Path) -> dict[str, dict]:
    """The same for a run with --log-selection, without tokens and without variants that need more than PPL and Ent.

    Raises:
        ValueError: not a run of Q-Tuning with the default's prune batch, or its scores give other decisions.
    """
    log = read_log(folder)
    if log.config.prune_batch != config_of(DEFAULT).prune_batch:
        raise ValueError(f"{folder}: expected a run with --prune-batch 8, got {log.config.prune_batch}")
    decided = {
        variant: []
        for variant in (DEFAULT, *VARIANTS)
        if not variant.change_rows and set(variant.samples.needs if variant.samples else ()) <= {"ppl", "ent"}
    }
    for step in log.steps:
        list(chosen_again(log, step))  # refuses a step whose scores give other decisions
        rows = [Sample(sample["id"], [0, 0], [IGNORE_INDEX, 0]) for sample in step["samples"]]  # of one token each
        scorer = Scorer(None, rows, Ranks(), log.config, None, {})
        scorer.scores = {i: RowScore(s["ppl"], s["ent"], torch.zeros(1)) for i, s in enumerate(step["samples"])}
        for variant, found in decided.items():
            found.append(decide(variant, scorer, sample_keep_ratio=log.config.sample_keep_ratio))
    default = decided.pop(DEFAULT)
    return {variant.slug: compare(default, found) | {"tokens": None} for variant, found in decided.items()}


# ----------------------------------------------------------------------------------------------- result


def describe(made: dict[str, list[dict]], shares: dict[str, dict[str, dict]], mode: float) -> dict:
    """The result: made: slug -> its runs, one for each seed; shares: log -> slug -> `compare`; mode: of C18."""
    lines, default = [], made.get(DEFAULT.slug, [])
    for variant in VARIANTS:
        runs, line = made.get(variant.slug, []), {}
        line |= {name: getattr(variant, name) for name in ("choice", "name", "changes", "flags")}
        line |= {"offline": {log: found[variant.slug] for log, found in shares.items() if variant.slug in found}}
        line["seeds"] = len(runs)
        if runs:
            gains = {task: gain(runs, default[: len(runs)], task) for task in TASKS}  # of the same seeds
            line["gains"] = {
                task: {"mean": round(g.mean, 4), "margin": None if g.margin is None else round(g.margin, 4)}
                for task, g in gains.items()
            }
            line["runs"] = brief(runs)
        lines.append(line)
    return {
        "budget": BUDGET,
        "machine": default[0]["machine"] if default else None,
        "default": {"seeds": len(default), "runs": brief(default)},
        NO_VARIANT: {"largest_difference": mode},
        "variants": lines,
    }


def brief(runs: list[dict]) -> dict[str, list]:
    """What the result keeps of runs, one value for each seed."""
    totals = {name: [run[name] for run in runs] for name in ("samples_kept", "answer_tokens_kept")}
    return {task: values(runs, task) for task in TASKS} | totals


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}" if share >= 0.01 or share == 0 else "<1"


def shown(line: dict, task: str) -> str:
    """A gain with its interval; `~` marks a gain within it."""
    if "gains" not in line:
        return ""
    found = Gain(**line["gains"][task])
    return interval(found, task) + (" ~" if found.is_noise() else "")


def table(results: dict) -> str:
    """Markdown: one row for each variant, with what it changes offline (percent) and its gains over the default."""
    logs = list(dict.fromkeys(log for line in results["variants"] for log in line["offline"]))
    head = ["", "other reading"]
    head += [f"{log}: {what}" for log in logs for what in ("samples", "trimming", "tokens", "kept / target")]
    head += [*({"held": "held-out loss", **TINY_TASKS}[task] for task in TASKS), "seeds"]
    rows = []
    for line in results["variants"]:
        row = [line["choice"], line["changes"]]
        for log in logs:
            found = line["offline"].get(log, {})
            row += [percent(found.get(what)) for what in ("samples", "trimming", "tokens")]
            row.append(f"{found['kept_over_target']:.2f}" if found else "")
        rows.append([*row, *(shown(line, task) for task in TASKS), str(line["seeds"] or "")])
    filled = [key for key in range(len(head)) if any(row[key] for row in rows)]
    return markdown([[row[key] for key in filled] for row in (head, *rows)])


def cell(results: dict, choice: str) -> str:
    """A summary of a choice's first two variants, for docs/CHOICES.md.

    It has what they change on the embedded default, and their gain in held-out loss over the default; `same` marks a
    variant that was not trained, since it decides as the default does.
    """
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
        text += f"; gain {' / '.join(shown(line, 'held') or 'same' for line in lines)}"
    return f"{' / '.join(line['name'] for line in lines)}: {text}" if len(lines) > 1 else text


# ---------------------------------------------------------------------------------------------- command


def make(preset: Preset, variant: Variant, seed: int, root: Path) -> dict:
    """The summary of the variant's run of a seed, trained and scored; each variant has a folder of its own."""

    def main(argv: list[str]) -> None:
        cfg = train.resolve(train.parse_config(argv))
        with Ranks.joined(cfg.device) as ranks:
            train.train_on(cfg, ranks, make_loss=variant.make_loss, change_rows=variant.change_rows)

    run = running.run_of(preset, "embedded", WIZARD, qtuning_flags(BUDGET, *variant.all_flags), seed)
    return running.make(preset, run, root / variant.slug, main)


def measure(root: Path, seeds: int, log: Path | None, out: Path) -> None:
    """Measure everything, offline first; `out` is written after each run."""
    preset, shares, cfg = tiny(root), {}, config_of(DEFAULT)
    preset.make_files(preset, set())
    found = root / "offline.json"
    if not found.exists():
        shutil.rmtree(root / "offline", ignore_errors=True)  # an interrupted run has lost the decisions of its steps
        write_json(found, offline([*preset.settings, *qtuning_flags(BUDGET), "--out", str(root / "offline")]))
    shares["embedded"] = read_json(found)
    if log:
        shares[Path(read_json(log / "config.json")["model"]).name] = offline_log(log)
    rows, _ = load_samples(cfg.data, TextTokenizer.from_pretrained(cfg.model), cfg.template, cfg.max_length)
    mode = mode_difference(Transformer.from_pretrained(cfg.model), rows[:64])

    made: dict[str, list[dict]] = {}
    trained = [variant for variant in (DEFAULT, *VARIANTS) if variant.trains]
    todo = [(seed, variant) for seed in range(seeds) for variant in trained]
    for seed, variant in tqdm(todo, desc="runs", mininterval=0.5 if sys.stderr.isatty() else 60):
        made.setdefault(variant.slug, []).append(make(preset, variant, seed, root))
        running.write_by_line(out, describe(made, shares, mode), "variants")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.choices", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/choices"), help="folder of the runs")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs of each variant, seeds 0, 1, ...")
    parser.add_argument("--log", type=Path, help="folder of another Q-Tuning run with --log-selection")
    parser.add_argument("--out", type=Path, default=RESULTS / "choices.json", help="result file (JSON)")
    parser.add_argument("--table", action="store_true", help="print the result file's table, run nothing")
    args = parser.parse_args(argv)
    with errors_in_one_line(parser.prog):
        if not args.table:
            torch.set_num_threads(1)
            register()
            measure(args.runs, args.seeds, args.log, args.out)
        results = read_json(args.out)
    print(table(results))


if __name__ == "__main__":
    main()
