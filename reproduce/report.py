"""The page of all results, RESULTS.md, with its tables and figures.

    python -m reproduce.report [--out FILE.md]      make it from the committed result files

A table of scores has columns for the paper, ours and the difference. The models differ, so it compares gains over a
reference row, which is marked: the paper's gain, ours with its 95 % interval over seeds, and their difference. `~`
marks a gain of ours, or a difference from the paper's, within that interval. The gain of a loss is its decrease.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from eval.common import errors_in_one_line
from eval.statistics import wilson_interval
from reproduce import cases, efficiency, figures, front, noise, paper, plants, resemblance
from reproduce.experiments import BEYOND, EXPERIMENTS, MATH, SMALL, Experiment, Flags, qtuning, row, rows
from reproduce.presets import PRESETS, Preset
from reproduce.runs import Run, key, run_of
from reproduce.tables import markdown
from training.files import read_json, write_text

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).with_name("RESULTS.md")
TASKS = {
    "arc_easy": "ARC-Easy dev",
    "arc_challenge": "ARC-Challenge dev",
    "gsm8k": "GSM8K test",
    "squad": "SQuAD 2.0 dev",
    "triviaqa": "TriviaQA",
    "math": "MATH-500",
}
LOSSES = {  # nats per answer token
    "held": "held-out loss",
    "alpaca_nll": "loss on Alpaca",
    "gsm8k_nll": "loss on GSM8K's solutions",
    "lima_nll": "loss on LIMA",
}
TINY_TASKS = {"arc": "ARC form", "gsm8k": "GSM8K form"}
PAIRED = {  # task -> the paper's task beside it
    "arc": "ARC-E",
    "arc_easy": "ARC-E",
    "arc_challenge": "ARC-C",
    "gsm8k": "GSM8K",
    "squad": "SQuAD",
    "triviaqa": "TriviaQA",
    "math": "MATH",
}
# The reference of a section is the first of these rows that it has.
REFERENCES = ("Random-Random", "Random", "Q1 Q3 | Q2", "batch 8", "Q-Tuning", "Zero-Shot")
Values = list[float]  # one for each seed


# -------------------------------------------------------------------------------------- scores and gains


def split_flags(run: dict) -> tuple[str, ...] | None:
    """The flags of a run of a result file."""
    return None if run["flags"] is None else tuple(shlex.split(run["flags"]))


def key_of(preset: Preset, run: dict) -> str:
    """The name that the preset's settings give to a run of a result file."""
    return key(preset, Run(run["model"], run["data"], split_flags(run), run["seed"]))


@dataclass(frozen=True)
class Results:
    """The result file of a preset."""

    preset: Preset
    runs: dict[tuple, list[dict]]  # (model, data, flags) -> the runs, one for each seed

    @staticmethod
    def read(name: str, path: Path | None = None) -> Results | None:
        """The results of a preset, by default from its committed file; None if there is no file.

        Raises:
            ValueError: a run was made with other settings than the preset's.
        """
        path = path or RESULTS / f"{name}.json"
        if not path.exists():
            return None
        preset, found, runs = PRESETS[name](Path("runs") / name), read_json(path), {}
        for run in sorted(found["runs"], key=lambda run: run["seed"]):
            run["device"] = found["machines"][run["machine"]]["device_name"] if "machine" in run else None
            expected = key_of(preset, run)
            if run["key"] != expected:
                what = f"{run['model']}, {run['data']}, {run['flags'] or 'untuned'}, seed {run['seed']}"
                raise ValueError(
                    f"{path}: the run {run['key']} ({what}) was made with other settings than those of the preset "
                    f"{name}, which would name it {expected}; move the file away"
                )
            runs.setdefault((run["model"], run["data"], split_flags(run)), []).append(run)
        return Results(preset, runs)

    def of(self, experiment: Experiment, model: str, flags: Flags | None) -> list[dict]:
        """The runs of a row of an experiment."""
        run = run_of(self.preset, model, experiment.data, flags, 0)
        return self.runs.get((run.model, run.data, run.flags), [])

    def complete(self) -> list[str]:
        """The names of the experiments, without those of BEYOND, that have all of their runs for at least one seed."""
        return [
            name
            for name in self.preset.experiments
            if name not in BEYOND
            and all(
                self.of(EXPERIMENTS[name], model, flags)
                for model in EXPERIMENTS[name].models or self.preset.sizes
                for _, _, flags in rows(EXPERIMENTS[name])
            )
        ]

    def tasks(self, experiment: Experiment) -> list[str]:
        losses = [name for name in self.preset.losses if name in LOSSES]
        return [*self.preset.tests[experiment.data], *self.preset.ends, *losses, *(["held"] if not losses else [])]

    def name(self, task: str) -> str:
        return (LOSSES | (TINY_TASKS if self.preset.name == "tiny" else TASKS))[task]


def values(runs: list[dict], task: str) -> Values:
    """Each run's score on a task, or its loss after the last step; empty where it has not been scored on it.

    `held` is the loss on the held-out rows of the curves, nats per token.
    """
    if task == "held":
        return [run["held"]["rows_nll"][-1] for run in runs]
    return [found[task] for found in (run if task in LOSSES else run["scores"] for run in runs) if task in found]


def better(task: str) -> int:
    """1 if a higher score is better, -1 if a lower one is."""
    return -1 if task in LOSSES else 1


def digits(task: str) -> int:
    """Decimals of a score."""
    return 3 if task in LOSSES else 1


@dataclass(frozen=True)
class Gain:
    """The mean of one row less that of another, positive where it is better, and half its 95 % interval."""

    mean: float
    margin: float | None

    def is_noise(self, expected: float = 0.0) -> bool:
        return self.margin is None or abs(self.mean - expected) <= self.margin


def gain(runs: list[dict], over: list[dict], task: str) -> Gain:
    """The gain of runs over others; its interval is over seeds, or over the test's items for one run of each.

    The untuned model has no seed, so its score counts as exact beside those of several runs.
    """
    ours, theirs = values(runs, task), values(over, task)
    seeded = [found for found, of in ((ours, runs), (theirs, over)) if of[0]["flags"] is not None]
    margin = noise.difference_margin(ours, theirs) if len(seeded) == 2 else noise.mean_margin(*(seeded or [ours]))
    if margin is None and task not in LOSSES:
        margin = noise.proportions_margin(*((run[0]["scores"][task], run[0]["n"][task]) for run in (runs, over)))
    return Gain(better(task) * (statistics.mean(ours) - statistics.mean(theirs)), margin)


# ----------------------------------------------------------------------------------------------- tables


def with_margin(runs: list[dict], task: str) -> str:
    """The mean and half its 95 % interval over seeds; for a single run the interval over the test's items.

    Empty where no run has been scored on the task.
    """
    found = values(runs, task)
    if not found:
        return ""
    margin = noise.mean_margin(found)
    shown = f"{statistics.mean(found):.{digits(task)}f}"
    if margin is not None:
        return f"{shown} ± {margin:.{digits(task)}f}"
    if task in LOSSES:
        return shown
    n = runs[0]["n"][task]
    low, high = wilson_interval(round(found[0] * n / 100), n)
    return f"{shown} [{low:.1f}, {high:.1f}]"


def shown_gain(found: Gain, task: str, expected: float = 0.0) -> str:
    return f"{found.mean - expected:+.{digits(task)}f}{' ~' if found.is_noise(expected) else ''}"


def score_table(results: Results, name: str, model: str) -> str | None:
    """Markdown: the rows of an experiment for one of its models; None if none of them has run."""
    experiment = EXPERIMENTS[name]
    tasks, printed = results.tasks(experiment), experiment.table
    head = ["budget", "row", "seeds"]
    for task in tasks:
        paired = printed and PAIRED.get(task) in paper.load()["tables"][printed]["tasks"]
        head += [f"{PAIRED[task]}: paper", "gain"] if paired else []
        head += [f"{results.name(task)}: ours", "gain"] + (["difference"] if paired else [])
    lines = []
    for section, named in experiment.sections.items():
        at, reference = reference_of(experiment, section)
        over = results.of(experiment, model, experiment.sections[at][reference])
        for label, flags in named.items():
            runs = results.of(experiment, model, flags)
            if not runs:
                continue
            is_reference = (section, label) == (at, reference)
            line = [section, label + " (reference)" * is_reference, str(len(runs)) if flags else ""]
            for task in tasks:
                expected, paired = None, printed and PAIRED.get(task) in paper.load()["tables"][printed]["tasks"]
                if paired:
                    theirs = paper.paper_score(printed, model, section, label, PAIRED[task])
                    base = paper.paper_score(printed, model, at, reference, PAIRED[task])
                    known = theirs is not None and base is not None and not is_reference
                    expected = theirs - base if known else None
                    line += ["" if theirs is None else f"{theirs:.2f}", "" if expected is None else f"{expected:+.2f}"]
                line.append(with_margin(runs, task))
                scored = over and not is_reference and values(runs, task) and values(over, task)
                found = gain(runs, over, task) if scored else None
                line.append(shown_gain(found, task) if found else "")
                if paired:
                    line.append(shown_gain(found, task, expected) if found and expected is not None else "")
            lines.append(line)
    return markdown([head, *lines]) if lines else None


def reference_of(experiment: Experiment, section: str) -> tuple[str, str]:
    """Section and row of a section's reference: a row of its own, or full data if it has a single row."""
    named = experiment.sections[section]
    if len(named) == 1 and "" in experiment.sections:
        return "", next(label for label in experiment.sections[""] if label.lower().startswith("full data"))
    return section, next((label for label in REFERENCES if label in named), next(iter(named)))


def share(runs: list[dict], part: str, whole: str) -> float:
    return sum(run[part] for run in runs) / sum(run[whole] for run in runs)


# ----------------------------------------------------------------------------------------- questions

BUDGETS = ("12.5x50", "12.5x70", "25x50", "25x70", "50x50", "50x70")
# question -> the row that should score higher, the row that it is compared with
QUESTIONS: dict[str, tuple[Flags, Flags]] = {
    **{f"Q-Tuning over random x random, {b}": (qtuning(b), row("Random", "Random", b)) for b in BUDGETS},
    **{f"Q-Tuning over full data, {b}": (qtuning(b), qtuning("100x100")) for b in BUDGETS},
    **{f"trimmed answers over whole ones, {b}x50": (qtuning(f"{b}x50"), qtuning(f"{b}x100")) for b in ("12.5", "25")},
    "both axes over its tokens alone, 50": (qtuning("12.5x50"), qtuning("100x50")),
    **{
        f"{question}, {b}": (qtuning(b, *ours), qtuning(b, *theirs))
        for question, ours, theirs in (
            ("`drop` over `mask`", ("--token-pruning", "drop"), ()),
            ("the lowest scores stay over the highest (`--reverse`)", (), ("--reverse",)),
            ("lambda 0.5 over 0", (), ("--smoothing", "0")),
            ("prune batch 16 over 8", ("--prune-batch", "16"), ()),
            ("prune batch 32 over 8", ("--prune-batch", "32"), ()),
            ("Q1 dropped over Q1 kept", (), ("--keep-quadrants", "1,2,4")),
            ("Q4 whole over Q4 trimmed too", (), ("--trim-quadrants", "2,4")),
        )
        for b in ("12.5x50", "25x50")
    },
}


def answers(results: Results) -> str:
    """Markdown: the gain that answers each question, and whether it exceeds noise."""
    experiment = EXPERIMENTS["choices"]
    tasks = results.tasks(experiment)
    lines = [["does it gain?", *(results.name(task) for task in tasks), "beyond noise"]]
    for question, (ours, theirs) in QUESTIONS.items():
        first, second = (results.of(experiment, experiment.models[0], flags) for flags in (ours, theirs))
        if not first or not second:
            continue
        gains = {task: gain(first, second, task) for task in tasks}
        words = [
            f"{'better' if found.mean > 0 else 'worse'} on {results.name(task)}"
            for task, found in gains.items()
            if not found.is_noise()
        ]
        words += ["one run"] if words and min(len(first), len(second)) == 1 else []
        lines.append([question, *(interval(gains[task], task) for task in tasks), ", ".join(words) or "nothing"])
    return markdown(lines)


def interval(found: Gain, task: str) -> str:
    margin = "" if found.margin is None else f" ± {found.margin:.{digits(task)}f}"
    return f"{found.mean:+.{digits(task)}f}{margin}"


def sources(results: Results) -> str:
    """Markdown: sources of the samples that Q-Tuning kept, by budget and prune batch."""
    lines = [["budget", "prune batch", "Q2", "Q4", "backfill, trimmed", "backfill, whole", "answer tokens kept"]]
    experiment = EXPERIMENTS["choices"]
    for budget in BUDGETS:
        for size in (8, 16, 32):
            flags = qtuning(budget, *(("--prune-batch", str(size)) if size > 8 else ()))
            runs = results.of(experiment, experiment.models[0], flags)
            if runs:
                parts = ("kept_q2", "kept_q4", "backfilled_q2", "backfilled_q4")
                cells = [f"{100 * share(runs, part, 'samples_kept'):.0f} %" for part in parts]
                cells.append(f"{100 * share(runs, 'answer_tokens_kept', 'answer_tokens_seen'):.1f} %")
                lines.append([budget, str(size), *cells])
    return markdown(lines)


def grid(results: Results, task: str) -> str:
    """Markdown: the mean score of sample pruners (rows) with token pruners (columns) at 12.5x50."""
    experiment = EXPERIMENTS["pairings"]
    named = experiment.sections["12.5x50"]
    tokens = list(dict.fromkeys(name.partition("-")[2] for name in named if name != "Q-Tuning"))
    lines = [["", *tokens]]
    for sample in dict.fromkeys(name.partition("-")[0] for name in named if name != "Q-Tuning"):
        cells = [results.of(experiment, experiment.models[0], named[f"{sample}-{token}"]) for token in tokens]
        lines.append([sample, *("" if not runs else with_margin(runs, task) for runs in cells)])
    return markdown(lines)


def grid_ends(results: Results) -> str:
    """Markdown: the scores beside which `grid` is read: the untuned model, full data and Q-Tuning."""
    experiment = EXPERIMENTS["pairings"]
    tasks = results.tasks(experiment)
    named = experiment.sections[""] | {"Q-Tuning, 12.5x50": experiment.sections["12.5x50"]["Q-Tuning"]}
    lines = [["", *(results.name(task) for task in tasks)]]
    for name, flags in named.items():
        runs = results.of(experiment, experiment.models[0], flags)
        lines.append([name, *(with_margin(runs, task) for task in tasks)])
    return markdown(lines)


# ------------------------------------------------------------------------------------------------ page

HEAD = """# Results

`python -m reproduce.report` makes this page from the files in [`results/`](results).

How to read a table: scores are in percent and losses in nats per token. They are means over seeds ± half the 95 %
interval (Student's t, Welch's for a difference); for a single run the interval is over the test's items. Where one row
has a single run and the other several, the single run gets their spread, which may be far off. A *gain* is over the
marked row (reference) of the same budget. Where a budget has one row, it is over full data. The gain of a loss is its
decrease. *Difference* is our gain less the paper's. Scores themselves do not compare, since models, rows and tests
differ. `~` marks what is within the noise, and losses of two single runs, whose noise is unknown. The paper's numbers
are as printed; [`paper.json`](paper.json) lists its misprints.
"""
TINY = """## The embedded default

Two epochs of the embedded default (5,120 rows, 64 steps of 160, a model of a million parameters) on a CPU, one thread a
run: `python -m reproduce spread front --seeds 5`, `best trimmed parts`, and all else with `--seeds 1`. Tables 9, 11 and
12, `trimmed` and the further seeds of the noise experiments ran on another processor than the rest (AVX2). World and
base were frozen at commit b712f5e. Six bases were dropped before that:

- On the first base tuning changed no score (4 runs).
- On the second base tuning lowered no loss. It has 81 runs, and some of them compared methods.
- Two bases were never tuned, because their rows were less like real ones.
- One base forgot in tuning what it knew (7 runs).
- On one base the corrected score spread too widely (26 runs). 15 of these runs are of `front`, which was stopped.
  Nobody looked at their scores.

On the present base 12 runs had rows with fewer descriptions, whose token PPL was too low. Two of these were stopped. On
the present world six runs at 2e-4 were made before it was frozen: one of full data, and five of random x random. The
spread of their test scores over seeds decided the rate.
"""
RESEMBLANCE = """### Does it resemble real rows?

`python -m reproduce.resemblance`: what the method looks at, for the embedded base on its rows and for SmolLM2-135M on
real ones. Quantiles over rows, and over tokens for the token PPL. The medians of PPL and Ent and their rank correlation
are close to real ones. The upper tails are not: with noise a tenth of the rows have a PPL above 3,900, and the median
token PPL is twice that of real rows.
"""
SPREAD = """### Noise between seeds
"""
RATES = """### Learning rates

Loss on the validation rows after training with seed 0; the lowest of a line is bold. The other tables are made at 2e-4.
The second table has each of these methods at its best rate in the first (`python -m reproduce best`). It includes
seed 0, which chose the rate. Two lines are lowest at the lowest rate, so a lower one may suit them. At 2e-3 full data
has the lowest loss of all. It loses 20 points of what the base knew; the methods at 50x100 lose 18 to 23, and 50x50 at
6e-4 loses 7.
"""
FRONT = """### What pruning pays

Scores are over 560 learned, 390 corrected and 570 retained items (two thirds likelihood, one third generated). Seconds
are the fewest of a method's runs over all learning rates, on a machine that other work shared. Most runs take up to 1.5
times as long. The runs at 50x50 were made on another processor, so they have no seconds. `Q1 barred` is Q-Tuning with
`--backfill-quadrants 0,2,3,4`; *scored once* adds `--reuse-scores 2`, which scores a row in the first epoch alone.

LESS has the lowest held-out loss of the sample pruners in Table 13. Of the two token pruners in Table 14 Rho-1 has the
lower loss; neither beats random tokens. LESS and Rho-1 were picked by this test's loss, which favours them. LESS is
given 16 rows that are known to be right; its tokens are random, and so are the samples of Rho-1. Their seconds leave
out their side files. All seeds share one set of these, so the intervals leave out how the chosen rows vary. Where two
methods are equal, one interval in twenty excludes 0 by chance.
"""
PARTS = """### What each part contributes

Q-Tuning at 25 % of the samples and 50 % of the tokens of trimmed ones. A prune batch of 160 is the whole step.
"""
NOISE = """### When does pruning win?

Gain in held-out loss over full data and over random pruning, by share and kind of the noise among the rows, and the
losses themselves (`python -m reproduce noise-all-0.6`, `noise-garbled-0.3` and so on). *Every kind* has equal shares of
all five kinds, which `data/tiny/make.py` explains. The lowest loss of a line is bold, also within noise. A gain has an
interval where both rows have several seeds, and is bold where the interval excludes 0. Lines with one seed have no
interval: there differences of a hundredth may be noise. At 50 % the seeds are three for 0 and 60 % of every kind and
for garbled and wrong rows.

With Q1 barred, pruning beats random pruning at every budget with garbled rows and with gibberish, most with garbled
rows. It beats full data there too, but for 12.5 % with gibberish. With wrong, swapped or truncated rows, and without
noise, it beats neither.
"""
PRESENT = """## The paper's tables

The paper's tables and figures, and three tables of ours, made with the embedded default. It replaces all of the paper's
models, and its word problems replace MathInstruct. Two tests of its world are shown beside ARC-E and GSM8K: the *ARC
form* (1,020 multiple-choice items) and the *GSM8K form* (500 generated answers). They are the same 1,520 items as
learned, corrected and retained. Rows that other tables share have up to five seeds, the others have seed 0 alone.
"""
SELECTED = """## What is selected

Figures 1, 2 and 7 and Appendix E, for Q-Tuning at 12.5x50 on the embedded default, seed 0
(`python -m reproduce cases`). Rules give each token its kind (`reproduce/cases.py`); the paper asked a language model.
"""
PRUNED = "Rows with their pruned tokens: [as text](results/cases/pruned.md), [as HTML](results/cases/pruned.html)."
REAL_ROWS = """## SmolLM2-135M on real rows

`python -m reproduce smollm2 smollm2-noise --preset small`: SmolLM2-135M-Instruct (weights dequantised from 4 bits) on
3,200 rows of Alpaca and GSM8K, half each. `smollm2-noise` has 30 % planted noise (`reproduce/planted.py`). LoRA with
the paper's settings at a rate of 2e-4, one epoch (100 steps of 32 rows), bf16. Losses are over the answers of clean
rows that no run trains on: 100 of Alpaca, 100 of GSM8K, 30 of LIMA. ARC-Easy and SQuAD (200 questions, exact match) are
scored for the untuned model and for full data.

One seed of `smollm2-noise` has been run, without Entropy and Rho-1 at 50x50. There Q-Tuning trains on 1.8 times as
many answer tokens as random does, since it trims an eighth of the kept samples.
"""
PLANTED = """## Planted noise among real rows

`python -m reproduce plants --model DIR --alpaca FILE --gsm8k FILE`: {rows} rows of Alpaca and GSM8K, as many of each
planted kind (`reproduce/planted.py`), scored once by {model} and not trained. Shares are in percent, means ± standard
deviations over {orders} random orders. *As printed*, the backfill draws from all quadrants; the other rules say where
it draws from first, and *Q1 barred* draws from Q1 last. PPL and Ent have a rank correlation of {rank_correlation:.2f}.
"""
SAVED = """`python -m reproduce.efficiency`: medians of a step on a CPU. The full-data run packs its rows and makes no
full logits either. First SmolLM2-135M on Alpaca rows (steps of 32, two threads), then the embedded default (steps of
160, one thread).
"""


def page(tiny: Results | None, small: Results | None, folder: Path) -> str:
    """The page; `folder` holds figures/, cases/ and resemblance.json."""
    parts = [HEAD]
    if tiny:
        parts += [TINY]
        columns = read_json(folder / "resemblance.json") if (folder / "resemblance.json").exists() else {}
        if "real" in columns:
            parts += [RESEMBLANCE.rstrip(), resemblance.table(columns)]
        parts += front_parts(tiny, folder / "figures")
        parts += paper_parts(tiny, folder / "figures")
    if (folder / "cases").exists():
        quadrants = (folder / "cases" / "quadrants.md").read_text(encoding="utf-8").strip()
        parts += [SELECTED, *selected_part(folder / "cases"), PRUNED, quadrants]
    if small:
        tables = {name: score_table(small, name, "SmolLM2-135M") for name in SMALL}
        parts += [REAL_ROWS.rstrip()]
        parts += [part for name, table in tables.items() if table for part in (f"### {name}", table)]
    if (folder / "cases-smollm2").exists():  # counts alone: the rows are not ours to publish
        parts += [
            "### What is selected of 1,280 such rows without noise, Q-Tuning at 12.5x50",
            *selected_part(folder / "cases-smollm2"),
        ]
    if (folder / "plants.json").exists():
        parts += planted_part(read_json(folder / "plants.json"))
    parts += ["## Table 6: what it saves", SAVED]
    for name in ("smollm2", "tiny"):
        parts += [efficiency.table(read_json(RESULTS / f"efficiency_{name}.json"))]
    return "\n\n".join(parts) + "\n"


def front_parts(tiny: Results, figures_folder: Path) -> list[str]:
    """The sections of the experiments beyond the paper, those that have run."""
    parts, pictures = [], [name for name in front.PAID if (figures_folder / f"{name}.svg").exists()]
    shown = [f"![Score against {front.PAID[name][1]}](results/figures/{name}.svg)" for name in pictures]
    for text, *tables in (
        (SPREAD, front.spread_table(tiny)),
        (RATES, front.rates_table(tiny), front.best_table(tiny)),
        (FRONT, front.front_table(tiny), *shown, front.answers(tiny)),
        (PARTS, front.parts_table(tiny)),
    ):
        if tables[0]:
            parts += [text.rstrip(), *(table for table in tables if table)]
    if (figures_folder / "noise.svg").exists():
        parts += [NOISE.rstrip(), "![Gain by share of noise](results/figures/noise.svg)"]
        parts += [front.noise_table(tiny), front.noise_gains_table(tiny)]
    return parts


def paper_parts(tiny: Results, figures_folder: Path) -> list[str]:
    """The sections of the paper's experiments that have all of their runs, and the names of the others."""
    present = [name for name in tiny.complete() if name != "cases"]  # which has a section of its own
    missing = [name for name in tiny.preset.experiments if name not in (*present, "cases", *BEYOND)]
    parts = [PRESENT.rstrip()] if present else []
    if "choices" in present:
        parts += ["### What gains, and what does not", answers(tiny), "### Sources of the kept samples", sources(tiny)]
    for name in present:
        parts += experiment_part(tiny, name, figures_folder / f"{name}.svg")
    if present and missing:
        parts += [f"Not made: {', '.join(missing)} (`python -m reproduce NAME`)."]
    return parts


def table_name(results: Results, experiment: Experiment, model: str) -> str:
    """What a table shows; the preset tiny has one model and its rows in place of the paper's."""
    if results.preset.name != "tiny":
        return f"{model}, {experiment.data}"
    if not experiment.models:
        return f"{model} base"
    ours = "the embedded default" + (", its word problems" if experiment.data == MATH else "")
    return f"the paper's {model} on {experiment.data}; ours: {ours}" if experiment.table else ours


def experiment_part(results: Results, name: str, figure: Path | None = None) -> list[str]:
    """The heading, figure (if it exists) and tables of an experiment; empty if none of it has run."""
    experiment = EXPERIMENTS[name]
    models = experiment.models or results.preset.sizes
    tables = {table_name(results, experiment, model): score_table(results, name, model) for model in models}
    parts = [f"![{experiment.title}](results/figures/{figure.name})"] if figure and figure.exists() else []
    parts += [
        f"<details><summary>{called}</summary>\n\n{table}\n\n</details>" for called, table in tables.items() if table
    ]
    called = name.replace("table", "Table ").replace("figure", "Figure ")
    return (
        [f"### {called}: {experiment.title}" if called != name else f"### {experiment.title}", *parts] if parts else []
    )


def selected_part(folder: Path) -> list[str]:
    pictures = [f"![{name}](results/{folder.name}/{name}.svg)" for name in ("plane", "tokens")]
    return [*pictures, cases.token_table(read_json(folder / "tokens.json"))]


def planted_part(results: dict) -> list[str]:
    pictures = [f"![{name}](results/figures/plants_{name}.svg)" for name in ("plane", "bars")]
    return [PLANTED.format(**results), plants.kept_table(results), *pictures, plants.kinds_table(results)]


def scores_table(results: dict) -> str:
    """Markdown: one row for each task and protocol, with the score, its 95 % interval, further metrics and seconds."""
    lines = [["", "protocol", "n", "score, 95 % interval", "further metrics", "seconds"]]
    for task in ("arc_easy", "arc_challenge", "gsm8k", "squad", "triviaqa", "math"):
        for protocol in ("paper", "standard"):
            found = results[task].get(protocol)
            if found is None:
                continue
            low, high = found["interval95"]
            further = {key: part for key, part in found.get("metrics", {}).items() if task != "math"}
            line = [TASKS[task], found["protocol"], str(found["n"])]
            line.append(f"{found['metric']} {found['score']:.1f} [{low:.1f}, {high:.1f}]")
            line.append(", ".join(f"{key} {part['score']:.1f}" for key, part in further.items()))
            lines.append([*line, f"{found['seconds']:.0f}"])
    return markdown(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write; figures go into results/figures")
    args = parser.parse_args(argv)
    with errors_in_one_line(parser.prog):
        tiny, small = Results.read("tiny"), Results.read("small")
    if tiny is None and small is None:
        parser.error(f"{RESULTS}: expected tiny.json or small.json, got neither; `python -m reproduce` makes them")
    (RESULTS / "figures").mkdir(exist_ok=True)
    try:
        if tiny:
            figures.draw(tiny, RESULTS / "figures", tiny.complete())
            for name in front.PAID:
                front.draw_front(tiny, RESULTS / "figures" / f"{name}.svg")
            front.draw_noise(tiny, RESULTS / "figures" / "noise.svg")
        if (RESULTS / "plants.json").exists():
            plants.draw(read_json(RESULTS / "plants.json"), RESULTS / "figures")
    except ImportError:
        print("reproduce.report: matplotlib (the plot extra) is not installed; figures stay", file=sys.stderr)
    write_text(args.out, page(tiny, small, RESULTS))
    print(args.out)


if __name__ == "__main__":
    main()
