"""Does pruning pay on your data? Methods trained side by side at equal steps, and one table and picture of them.

    python -m reproduce compare --model DIR --data FILE [--methods none,random,qtuning,rho1] [--budgets 0.125,0.5]
                                [--seeds 3] [--tests TASK=FILE ...] [further flags of train.py, for every run]

A tenth of the rows, 500 at most, is held out: the same rows for every method and seed (equal rows stay together).
Each method trains on the others, for each budget and seed. A budget is the share of samples to keep; trimmed samples
keep --token-keep-ratio of their tokens. `none` prunes nothing and has no budget. A method is

    none, random, qtuning       this pruner for samples and for tokens
    another sample pruner       with random tokens (infobatch, entropy, longest, ...)
    another token pruner        with random samples (rho1, ppl-keep-low, ...)
    SAMPLE+TOKEN                any pair of train.py's pruners (qtuning+none)

Side files are made as for the paper's tables: the reference model of rho1 is the model tuned for three epochs on a
tenth of the training rows. Runs are made one at a time, so that their seconds compare. A finished run is not made
again, and an interrupted one continues; a run is known by its model's and rows' contents and its settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import train
from data.sft import load_samples
from data.tokenizer import TextTokenizer
from eval.common import errors_in_one_line, positive_int
from eval.during import BENCHMARKS
from pruners import SAMPLE_PRUNERS, TOKEN_PRUNERS
from reproduce import figures, report
from reproduce import runs as running
from reproduce.noise import mean_margin
from reproduce.presets import Preset, rows_of
from reproduce.runs import Run
from reproduce.tables import markdown
from training.files import read_json, read_jsonl, write_json, write_text

HELDOUT_SHARE, MOST_HELDOUT = 0.1, 500
OURS_TO_SET = ("model", "data", "out", "seed", "resume", "scores", "sample_pruner", "token_pruner", "sample_keep_ratio")
OURS_TO_SET += ("eval_every", "eval_sets", "eval_limit", "skip_bad_rows", "log_selection")
UNTUNED, FULL = "untuned", "none"
TINY_SETTINGS = ("--lora-rank", "0", "--lr", str(train.TINY["lr"]), "--max-length", str(train.TINY["max_length"]))


# ------------------------------------------------------------------------------------- methods and rows


def pruners_of(method: str) -> tuple[str, str]:
    """The sample pruner and the token pruner that a method's name means.

    Raises:
        ValueError: no pruner has this name; one that cannot be made here.
    """
    sample, plus, token = method.partition("+")
    if not plus:
        sample = method if method in SAMPLE_PRUNERS else "random"
        token = method if method in TOKEN_PRUNERS else "random"
    known = method in SAMPLE_PRUNERS or method in TOKEN_PRUNERS
    if not (sample in SAMPLE_PRUNERS and token in TOKEN_PRUNERS and (plus or known)):
        names = ", ".join(dict.fromkeys((*SAMPLE_PRUNERS, *TOKEN_PRUNERS)))
        raise ValueError(f"--methods: expected names of {names}, or SAMPLE+TOKEN, got {method!r}")
    if "less" in SAMPLE_PRUNERS[sample].needs:
        raise ValueError(
            f"--methods: {method} needs rows of a target task, which a comparison does not have; make its side file "
            "with `python -m pruners.score_rows less --targets FILE ...` and train with train.py --scores DIR"
        )
    return sample, token


def flags_of(method: str, budget: float) -> tuple[str, ...]:
    """Flags of train.py for a method at a budget."""
    sample, token = pruners_of(method)
    return ("--sample-pruner", sample, "--token-pruner", token, "--sample-keep-ratio", f"{budget:g}")


def methods_at(methods: Sequence[str], budgets: Sequence[float]) -> dict[str, tuple[str, ...] | None]:
    """Row of the table -> flags of train.py (None: the untuned model), full data first."""
    named: dict[str, tuple[str, ...] | None] = {UNTUNED: None}
    if FULL in methods:
        named[FULL] = ("--sample-pruner", "none", "--token-pruner", "none")
    for budget in budgets:
        named |= {f"{method} {budget:g}": flags_of(method, budget) for method in methods if method != FULL}
    return named


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and rows held out: a tenth of the rows, 500 at most, drawn with a fixed seed.

    Rows that differ in their id alone are on one side. A row without an id gets its number in the file.
    """
    rows = [row if row.get("id") is not None else {**row, "id": str(number)} for number, row in enumerate(rows)]
    same: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        text = json.dumps({key: value for key, value in row.items() if key != "id"}, sort_keys=True)
        same.setdefault(text, []).append(number)
    wanted, heldout = min(MOST_HELDOUT, int(HELDOUT_SHARE * len(rows))), set()
    for group in random.Random(0).sample(list(same.values()), len(same)):
        if len(heldout) + len(group) <= wanted:
            heldout.update(group)
    return (
        [row for number, row in enumerate(rows) if number not in heldout],
        [row for number, row in enumerate(rows) if number in heldout],
    )


def digest(*paths: Path) -> str:
    """Eight hex digits of the names and contents of files."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:8]


def tests_of(given: Sequence[str], limit: int | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Task and digest of its file -> a module of eval/ and its flags.

    Raises:
        ValueError: not TASK=FILE, no such task, or rows that the task cannot read.
    """
    found = {}
    for text in given:
        task, _, path = text.partition("=")
        if task not in BENCHMARKS or not path:
            raise ValueError(f"--tests: expected TASK=FILE with TASK one of {', '.join(BENCHMARKS)}, got {text!r}")
        importlib.import_module(f"eval.{task}").read_items(path)  # now, not after hours of training
        flags = ["--data", path] + (["--limit", str(limit)] if limit else [])
        found[f"{task}-{digest(Path(path))}" + (f"-{limit}" if limit else "")] = (f"eval.{task}", tuple(flags))
    return found


def preset_of(args: argparse.Namespace, settings: list[str]) -> Preset:
    """The comparison as a preset of one model and one file; it writes the two files of rows."""
    model, data = Path(args.model or train.TINY["model"]), Path(args.data or train.TINY["data"])
    if not model.is_dir():
        raise FileNotFoundError(f"--model {model}: no such folder")
    if not args.model:
        settings = [*TINY_SETTINGS, *settings]
    config = train.resolve(train.parse_config(["--model", str(model), "--data", str(data), *settings]))
    load_samples(data, TextTokenizer.from_pretrained(model), config.template, config.max_length)  # names a bad row
    train_rows, heldout_rows = split(rows_of(data))
    if not heldout_rows:
        raise ValueError(
            f"{data}: expected ten rows or more, a tenth of them without a double; nothing can be held out"
        )
    files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
    model_name, data_name = f"{model.name}-{digest(*files)}", f"{data.stem}-{digest(data)}"
    root = args.out / f"{model_name}-{data_name}"
    for name, rows in (("train", train_rows), ("heldout", heldout_rows)):
        write_json(root / f"{name}.json", rows)
    return Preset(
        name="compare",
        models={model_name: model},
        data={data_name: root / "train.json"},
        tests={data_name: tests_of(args.tests, args.limit)},
        settings=tuple(settings),
        lr=config.lr,
        heldout=root / "heldout.json",
        targets=(),
        experiments=(),
        make_files=lambda preset, models: None,
        devices=torch.cuda.device_count() if config.device == "cuda" else 0,
    )


# --------------------------------------------------------------------------------- what it costs, and runs


def run_of(preset: Preset, flags: tuple[str, ...] | None, seed: int) -> Run:
    (model,), (data,) = preset.models, preset.data
    return Run(model, data, flags, 0 if flags is None else seed)


def steps_of(preset: Preset, run: Run, num_rows: int) -> int:
    """Optimizer steps of a run.

    Raises:
        ValueError: its rows do not fill a step, or a batch is too small for the budget.
    """
    return train.plan(train.resolve(running.config_of(preset, run)), num_rows, max(1, preset.devices))[3]


def measured_step(preset: Preset, run: Run, root: Path) -> float:
    """Seconds of a step of a run: the second of two, which are made if they are not known yet."""
    folder = root / "measured" / running.key(preset, run)
    if not (folder / "seconds.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        module, argv = running.train_command(preset, run, folder.parent)
        argv[argv.index("--out") + 1] = str(folder)
        argv = argv[: argv.index("--eval-every")]
        running.execute(preset, (module, [*argv, "--max-steps", "2"]), folder / "log.txt")
        last = read_jsonl(folder / "metrics.jsonl")[-1]
        write_json(folder / "seconds.json", last["score_s"] + last["train_s"])
        for name in ("model", "adapter", "checkpoint"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return read_json(folder / "seconds.json")


def costs(preset: Preset, runs: Sequence[Run], num_rows: int, root: Path) -> dict[Run, float]:
    """Run -> estimated seconds to train it. A method that needs side files counts as full data."""
    full = run_of(preset, ("--sample-pruner", "none", "--token-pruner", "none"), 0)
    found, step = {}, {}
    for run in runs:
        like = full if running.side_files(preset, run) else dataclasses.replace(run, seed=0)
        if run.flags is None:
            found[run] = 0.0
            continue
        if like not in step:
            step[like] = measured_step(preset, like, root)
        found[run] = steps_of(preset, run, num_rows) * step[like]
    return found


def finished(preset: Preset, run: Run, root: Path) -> bool:
    """Whether a run is trained and scored on all tests; a summary without one of them is dropped."""
    summary = root / running.key(preset, run) / "summary.json"
    if summary.exists() and set(read_json(summary)["scores"]) != set(preset.tests[run.data]):
        summary.unlink()
    return summary.exists()


def make_all(preset: Preset, cost: dict[Run, float], root: Path) -> None:
    """Make the runs that are not finished, one after another."""
    todo = [run for run in cost if not finished(preset, run, root)]
    every = 0.5 if sys.stderr.isatty() else 60
    spent = estimated = scoring = 0.0  # of the tuned runs; scoring: the untuned model's seconds
    with tqdm(total=len(todo), desc="compare", unit="run", mininterval=every, disable=not todo) as bar:
        needy = [run for run in todo if running.side_files(preset, run)]
        if needy:
            bar.set_postfix_str("side files")
            running.make_side_files(preset, needy, root)
        for number, run in enumerate(todo):
            rate = spent / estimated if estimated else 1.0
            left = sum(cost[other] + scoring for other in todo[number:])
            end = at(time.time() + rate * left)
            bar.set_postfix_str(f"{' '.join(run.flags or (UNTUNED,))}, seed {run.seed}, all end {end}")
            started = time.time()
            running.make(preset, run, root)
            took = time.time() - started
            if run.flags is None:
                scoring = took
            else:
                spent, estimated = spent + took, estimated + cost[run] + scoring
            bar.update()


def at(moment: float) -> str:
    return time.strftime("%a %H:%M", time.localtime(moment))


def in_words(seconds: float) -> str:
    """A duration, in the unit that suits it."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"


# -------------------------------------------------------------------------------------------- the answer

Rows = dict[str, list[dict]]  # row of the table -> its runs' summaries, one for each seed


def title(task: str) -> str:
    return "held-out loss" if task == "held" else task.partition("-")[0]


def level(rows: Rows, task: str) -> tuple[str, list[str], list[str]]:
    """The best tuned row on a task, those within the noise of it, and those beyond."""
    tuned = {name: runs for name, runs in rows.items() if name != UNTUNED}
    mean = {name: statistics.mean(report.values(runs, task)) for name, runs in tuned.items()}
    best = max(mean, key=lambda name: report.better(task) * mean[name])
    others = sorted((name for name in tuned if name != best), key=lambda name: -report.better(task) * mean[name])
    within = [name for name in others if report.gain(tuned[best], tuned[name], task).is_noise()]
    return best, within, [name for name in others if name not in within]


def sentence(rows: Rows, task: str) -> str:
    """Which rows are level on a task. With one seed the noise of a loss is unknown, and the sentence says so."""
    best, within, beyond = level(rows, task)
    shown = f"{title(task)[0].upper()}{title(task)[1:]}: best is {best} ({report.with_margin(rows[best], task)})"
    if task == "held" and all(len(runs) == 1 for runs in rows.values()):
        return f"{shown}; with one seed the noise is unknown, so it does not say which methods are level."
    parts = [f"level with it within noise: {', '.join(within)}" if within else "no other is level with it within noise"]
    parts += [f"worse beyond noise: {', '.join(beyond)}"] if beyond else []
    return "; ".join([shown, *parts]) + "."


def seconds(runs: Sequence[dict]) -> list[float]:
    """Training seconds of each run, scoring for the pruner included; none for the untuned model."""
    return [run["seconds"] for run in runs if "seconds" in run]


def table(rows: Rows, tasks: Sequence[str]) -> str:
    """Markdown: steps, cost and scores of every row."""
    lines = [["method, share of samples", "seeds", "steps", "training seconds", "samples kept", "answer tokens kept"]]
    lines[0] += [title(task) for task in tasks]
    for name, runs in rows.items():
        line = [name, "", "", "", "", ""]
        if seconds(runs):
            margin = mean_margin(seconds(runs))
            line = [name, str(len(runs)), str(runs[0]["steps"]), f"{statistics.mean(seconds(runs)):.1f}"]
            line[3] += "" if margin is None else f" ± {margin:.1f}"
            for part in ("samples", "answer_tokens"):
                kept, seen = (sum(run[f"{part}_{what}"] for run in runs) for what in ("kept", "seen"))
                line.append(f"{100 * kept / seen:.1f} %")
        lines.append([*line, *(report.with_margin(runs, task) for task in tasks)])
    return markdown(lines)


def draw(rows: Rows, tasks: Sequence[str], path: Path) -> None:
    """Write the picture (SVG): scores against training seconds, means over seeds with 95 % intervals."""
    import matplotlib

    with matplotlib.rc_context(figures.STYLE):
        note = figures.seeds(runs for name, runs in rows.items() if name != UNTUNED)
        heading = f"Scores against training seconds; the number is the share of samples kept\n{note}"
        figure, ((part, axes),) = figures.panels(heading, [""], len(tasks), 2.9)
        methods = list(dict.fromkeys(name.split()[0] for name in rows if name not in (UNTUNED, FULL)))
        for axis, task in zip(axes, tasks, strict=True):
            for name, runs in rows.items():
                if name == UNTUNED:  # far from the others: they would be one point
                    continue
                method, _, budget = name.partition(" ")
                x, y = statistics.mean(seconds(runs)), statistics.mean(report.values(runs, task))
                bars = [[mean_margin(found) or 0.0] for found in (seconds(runs), report.values(runs, task))]
                look = {"color": "black", "marker": "*"} if name == FULL else look_of(method, methods)
                known = axis.get_legend_handles_labels()[1]
                label = "full data" if name == FULL else method
                axis.errorbar(
                    [x],
                    [y],
                    xerr=bars[0],
                    yerr=bars[1],
                    linestyle="",
                    markersize=6,
                    elinewidth=1,
                    label=None if label in known else label,
                    **look,
                )
                place = (5, -10) if method in methods[1::2] else (5, 4)  # beside another method's, not on it
                axis.annotate(budget, (x, y), place, textcoords="offset points", fontsize=8, color=look["color"])
            axis.set_title(f"{title(task)}{', nats a token (lower is better)' if task == 'held' else ', %'}")
            axis.set_xlabel("training seconds")
            axis.set_xlim(left=0)
            axis.margins(y=0.15)
        figures.add_legend(part, axes[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def look_of(method: str, methods: Sequence[str]) -> dict:
    """Colour and marker of a method; Q-Tuning's are those of the other figures."""
    if method == "qtuning":
        return figures.LOOKS[figures.OURS]
    others = [name for name in methods if name != "qtuning"]
    place = others.index(method)
    colours = figures.OTHER_COLOURS
    return {"color": colours[place % len(colours)], "marker": "s^Dv"[place // len(colours) % 4]}


def page(rows: Rows, tasks: Sequence[str], about: str, picture: bool) -> str:
    """Markdown: what was compared, the sentences, the table, the picture."""
    reading = (
        "Means over seeds ± half the 95 % interval (Student's t); a test of one seed has its interval over items. "
        "Each row is compared with the best one alone, without a correction for the number of comparisons."
    )
    parts = [about, "\n".join(f"- {sentence(rows, task)}" for task in tasks), table(rows, tasks), reading]
    return "\n\n".join(parts + (["![scores against training seconds](compare.svg)"] if picture else [])) + "\n"


# ---------------------------------------------------------------------------------------- command line


def compare(args: argparse.Namespace, settings: list[str], say: Callable[[str], None] = print) -> None:
    """Print the cost, make the runs, write compare.md and compare.svg, and print the table."""
    preset = preset_of(args, settings)
    root = preset.heldout.parent
    num_rows, num_heldout = len(rows_of(root / "train.json")), len(rows_of(preset.heldout))
    named = methods_at(args.methods, args.budgets)
    runs_of = {
        name: list(dict.fromkeys(run_of(preset, flags, seed) for seed in range(args.seeds)))
        for name, flags in named.items()
    }
    every = sorted((run for runs in runs_of.values() for run in runs), key=lambda run: run.seed)
    steps = [steps_of(preset, run, num_rows) for run in every if run.flags is not None]
    about = (
        f"{num_rows} rows to train on, {num_heldout} held out (a tenth, {MOST_HELDOUT} at most, seed 0); "
        f"{max(steps)} steps for each of {len(steps)} runs."
    )
    say(about)
    cost = costs(preset, every, num_rows, root)
    left = [run for run in every if not finished(preset, run, root)]
    total = sum(cost[run] for run in left)
    say(f"{len(left)} runs to make, about {in_words(total)} of training by a measured step; scores come on top")
    needy = sorted({field for run in left for field in running.side_files(preset, run)})
    if needy:
        say(f"first the side files {', '.join(needy)}; with a reference model, about a third of a full-data run more")
    if args.dry_run:
        return
    make_all(preset, cost, root)
    rows = {name: [running.make(preset, run, root) for run in runs] for name, runs in runs_of.items()}
    tasks = ["held", *preset.tests[every[0].data]]
    try:
        draw(rows, tasks, root / "compare.svg")
    except ImportError:
        print("reproduce: matplotlib (the plot extra) is not installed; no picture", file=sys.stderr)
    text = page(rows, tasks, about, (root / "compare.svg").exists())
    write_text(root / "compare.md", text)
    write_json(root / "compare.json", rows)
    say(f"\n{text}\n{root / 'compare.md'}")


def listed(convert: Callable) -> Callable[[str], list]:
    """An argparse type: values with commas between, each through `convert`, none of them twice."""

    def read(text: str) -> list:
        try:
            return list(dict.fromkeys(convert(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def budget_of(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(f"expected shares of samples in (0, 1], got {text}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="reproduce compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help="checkpoint folder; default: the embedded model and rows")
    add("--data", help="rows, .json or .jsonl; required with --model")
    add("--methods", type=listed(str), default="none,random,qtuning", help="default: %(default)s")
    add("--budgets", type=listed(budget_of), default="0.125,0.5", help="shares of samples; default: %(default)s")
    add("--seeds", type=positive_int, default=3, help="runs of each method and budget; default: %(default)s")
    add("--tests", nargs="+", default=[], metavar="TASK=FILE", help=f"TASK: {', '.join(BENCHMARKS)}; paper's protocol")
    add("--limit", type=positive_int, help="score only the first N rows of each test")
    add("--out", type=Path, default=Path("runs/compare"), help="parent of the comparison's folder; %(default)s")
    add("--dry-run", action="store_true", help="measure and print the cost, and stop")
    args, settings = parser.parse_known_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data are given together, or neither for the embedded default")
    given = [flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in settings if flag[:2] == "--"]
    for name in given:
        if name in OURS_TO_SET:
            parser.error(f"--{name.replace('_', '-')} is set by the comparison itself")
    with errors_in_one_line("reproduce compare"):
        compare(args, settings)


if __name__ == "__main__":
    main()
