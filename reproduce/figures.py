"""The paper's figures of scores, drawn from a preset's result file for the page of reproduce/report.py.

A figure has a panel for each task, and a row of panels for each model if its models differ. Points are means over
seeds, bars their 95 % intervals. Missing runs are left out; without any run of a method there is no figure. Needs
matplotlib (the plot extra).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from reproduce import noise, report
from reproduce.experiments import BATCHES, EXPERIMENTS, LAMBDAS, Experiment
from reproduce.runs import run_of

STYLE = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # an SVG names them at every text
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "errorbar.capsize": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "reproduce",  # makes the file a function of the results
}
WIDTH, COLUMNS = 9.3, 3  # inches (893 pixels of an SVG), panels side by side
UNTUNED, FULL, OURS = "Zero-Shot", "Full Dataset", "Q-Tuning"
WORDS = {UNTUNED: "untuned", FULL: "full data"}
ENDS = {UNTUNED: {"color": "#777777", "linestyle": ":"}, FULL: {"color": "black", "linestyle": "--"}}
OUR_COLOUR, OTHER_COLOURS = "#d55e00", ("#0072b2", "#cc79a7", "#009e73", "#56b4e9")  # Okabe and Ito's
LOOKS = {OURS: {"color": OUR_COLOUR, "marker": "o"}} | {
    name: {"color": colour, "marker": marker}
    for names in (("Random", "Longest", "InfoBatch", "Entropy"), ("Random", "PPL", "FastV", "SparseVLM"))
    for name, colour, marker in zip(names, OTHER_COLOURS, "s^Dv", strict=True)
}
OUR_LOOKS = (  # of several budgets
    {"color": OUR_COLOUR, "marker": "o"},
    {"color": "#f5a65b", "marker": "^"},
    {"color": "#7a3600", "marker": "s"},
)
MEASURES = {"rows_ppl": "perplexity", "rows_ent": "entropy, nats", "rows_nll": "NLL, nats a token"}


def draw(results: report.Results, folder: str | Path, names: Collection[str] | None = None) -> list[str]:
    """Write figure3.svg, figure4.svg, ... into `folder`, those with runs to show; returns their files' names.

    Args:
        names: of the figures to draw; default: those of the preset.
    """
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        for figure_of in (figure3, figure4, figure5, figure6, figure8):
            name = figure_of.__name__
            figure = figure_of(results) if name in (results.preset.experiments if names is None else names) else None
            if figure:
                written.append(f"{name}.svg")
                figure.savefig(Path(folder) / written[-1], metadata={"Date": None})
    return written


# ------------------------------------------------------------------------------------------------ parts


def models(results: report.Results, experiment: Experiment) -> dict[str, str]:
    """An experiment's models, each checkpoint once -> its title, "" if it is the only one."""
    first = {}
    for model in experiment.models:
        first.setdefault(run_of(results.preset, model, experiment.data, None, 0).model, model)
    return {model: model if len(first) > 1 else "" for model in first.values()}


def budgets(experiment: Experiment) -> list[str]:
    return [section for section in experiment.sections if section]


def ends(results: report.Results, experiment: Experiment, model: str) -> dict[str, list[dict]]:
    """The runs of the untuned model and of full data, as far as there are any."""
    found = {name: results.of(experiment, model, flags) for name, flags in experiment.sections[""].items()}
    return {name: runs for name, runs in found.items() if runs}


def mean_and_margin(runs: list[dict], task: str) -> tuple[float, float]:
    """The mean score and half its 95 % interval: 0 for one seed, which draws no bar; NaN without runs, a gap."""
    found = report.values(runs, task)
    return (statistics.mean(found), noise.mean_margin(found) or 0.0) if found else (math.nan, 0.0)


def seeds(every: Iterable[list[dict]]) -> str:
    """A legend for the points of tuned models: the number of seeds."""
    counts = sorted({len(runs) for runs in every if runs and runs[0]["flags"] is not None})
    if counts[-1] == 1:
        return "one seed"
    return f"mean of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds, bars: 95 % interval"


def panels(title: str, rows: list[str], each: int, height: float):
    """(figure, [(subfigure, axes), ...]): a figure with `each` panels in every row.

    Args:
        rows:   titles of the rows, "" for none.
        height: of a panel with its labels, inches.
    """
    from matplotlib.figure import Figure

    lines = math.ceil(each / COLUMNS)
    inches = 0.4 + sum(lines * height + 0.3 + 0.2 * bool(row) for row in rows)
    figure = Figure(figsize=(WIDTH, inches), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    found = []
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        if row:
            part.suptitle(row, x=0.01, ha="left", fontsize=9, weight="bold")
        axes = part.subplots(lines, min(each, COLUMNS), squeeze=False).flatten()
        for axis in axes[each:]:
            axis.remove()
        found.append((part, axes[:each]))
    return figure, found


def name_task(axis, results: report.Results, task: str) -> None:
    axis.set_title(results.name(task) + (" (lower is better)" if report.better(task) < 0 else ", %"))


def add_legend(part, axis) -> None:
    """Add one legend below all panels, which have the same names."""
    handles, names = axis.get_legend_handles_labels()
    if names:
        part.legend(handles, names, loc="outside lower center", ncols=len(names))


@dataclass(frozen=True)
class Chart:
    """Lines over the values of one setting, in a panel for each task."""

    title: str
    xlabel: str
    ticks: list[str]
    lines: dict[str, list[list[dict]]]  # name -> the runs at each tick
    looks: dict[str, dict]
    across: dict[str, list[dict]]  # horizontal lines: runs that the setting does not change

    def methods(self) -> list[list[dict]]:
        return [runs for name, points in self.lines.items() if name not in ENDS for runs in points if runs]


def line_figure(results: report.Results, experiment: Experiment, title: str, charts: list[Chart]):
    charts = [chart for chart in charts if chart.methods()]
    if not charts:
        return None
    tasks = results.tasks(experiment)
    note = seeds(runs for chart in charts for runs in chart.methods())
    figure, parts = panels(f"{title}\n{note}", [chart.title for chart in charts], len(tasks), 2.3)
    for (part, axes), chart in zip(parts, charts, strict=True):
        for axis, task in zip(axes, tasks, strict=True):
            for name, runs in chart.across.items():
                axis.axhline(mean_and_margin(runs, task)[0], label=WORDS[name], linewidth=1.2, **ENDS[name])
            lines = {name: points for name, points in chart.lines.items() if any(points)}
            for number, (name, points) in enumerate(lines.items()):
                shift = 0.06 * (number - (len(lines) - 1) / 2)  # bars beside one another
                means, margins = zip(*(mean_and_margin(runs, task) for runs in points), strict=True)
                places = [place + shift for place in range(len(points))]
                bars = margins if any(margins) else None
                look = {"markersize": 4.5, "linewidth": 1.5, "elinewidth": 1, **chart.looks[name]}
                axis.errorbar(places, means, bars, label=WORDS.get(name, name), **look)
            name_task(axis, results, task)
            axis.set_xlabel(chart.xlabel)
            axis.set_xticks(range(len(chart.ticks)), chart.ticks)
            axis.set_xlim(-0.3, len(chart.ticks) - 0.7)
        add_legend(part, axes[0])
    return figure


# ---------------------------------------------------------------------------------------------- figures


def figure3(results: report.Results):
    """Stronger pruners of samples and of tokens at 12.5x50, one line for each; a small stroke is a seed."""
    experiment = EXPERIMENTS["figure3"]
    (budget,) = budgets(experiment)
    named = dict(sorted(experiment.sections[budget].items(), key=lambda item: item[0] == OURS))  # ours last
    found = {}
    for model, title in models(results, experiment).items():
        rows = {name: results.of(experiment, model, flags) for name, flags in named.items()}
        if any(rows.values()):
            found[model, title] = {name: runs for name, runs in rows.items() if runs}
    if not found:
        return None
    tasks = results.tasks(experiment)
    note = seeds(runs for rows in found.values() for runs in rows.values())
    note = f"sample pruner-token pruner; {note}{'' if note == 'one seed' else ', strokes: seeds'}"
    title = "Stronger pruners, {} % of the samples and {} % of their tokens kept".format(*budget.split("x"))
    height = 0.6 + 0.2 * max(len(rows) for rows in found.values())
    figure, parts = panels(f"{title}\n{note}", [title for _, title in found], len(tasks), height)
    for (part, axes), ((model, _), rows) in zip(parts, found.items(), strict=True):
        for number, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
            for name, runs in ends(results, experiment, model).items():
                axis.axvline(mean_and_margin(runs, task)[0], label=WORDS[name], linewidth=1.2, **ENDS[name])
            for place, (name, runs) in enumerate(rows.items()):
                mean, margin = mean_and_margin(runs, task)
                colour = OUR_COLOUR if name == OURS else OTHER_COLOURS[0]
                axis.errorbar([mean], [place], xerr=[margin], fmt="o", color=colour, markersize=5.5, elinewidth=1.2)
                if len(runs) > 1:
                    axis.plot(report.values(runs, task), [place] * len(runs), "|", color=colour, markersize=7)
            name_task(axis, results, task)
            axis.set_yticks(range(len(rows)), list(rows) if number % COLUMNS == 0 else [])
            axis.set_ylim(len(rows) - 0.5, -0.5)
        add_legend(part, axes[0])
    return figure


def figure4(results: report.Results):
    """Score against model size."""
    experiment, sizes = EXPERIMENTS["figure4"], list(results.preset.sizes)
    rows = experiment.sections[""] | {
        f"{OURS} {budget}": experiment.sections[budget][OURS] for budget in budgets(experiment)
    }
    lines = {name: [results.of(experiment, size, flags) for size in sizes] for name, flags in rows.items()}
    looks = {name: {**look, "marker": "."} for name, look in ENDS.items()}
    looks |= dict(zip([name for name in rows if name not in ENDS], OUR_LOOKS, strict=False))
    title = "Models of different sizes (Q-Tuning: % of the samples x % of their tokens kept)"
    return line_figure(results, experiment, title, [Chart("", "model", sizes, lines, looks, {})])


def figure5(results: report.Results):
    """Q-Tuning's batch size and lambda at three budgets (Figures 5 and 9)."""
    experiment = EXPERIMENTS["figure5"]
    charts = []
    for model, title in models(results, experiment).items():
        across = {name: runs for name, runs in ends(results, experiment, model).items() if name == FULL}
        for xlabel, variants in (("batch size, learning rate in proportion", BATCHES), ("lambda", LAMBDAS)):
            lines = {
                budget: [results.of(experiment, model, experiment.sections[budget][name]) for name in variants]
                for budget in budgets(experiment)
            }
            looks = dict(zip(lines, OUR_LOOKS, strict=True))
            charts.append(Chart(title, xlabel, [name.split()[1] for name in variants], lines, looks, across))
    title = "Q-Tuning's batch size and lambda (% of the samples x % of their tokens kept)"
    return line_figure(results, experiment, title, charts)


def figure6(results: report.Results):
    """Pruning along one axis: some samples with whole answers, or some tokens of all samples."""
    experiment = EXPERIMENTS["figure6"]
    charts = []
    for model, title in models(results, experiment).items():
        for side, words in ((0, "whole answers of some samples"), (1, "some tokens of all samples")):
            found = [budget for budget in budgets(experiment) if budget.split("x")[1 - side] == "100"]
            lines = {
                name: [results.of(experiment, model, experiment.sections[budget][name]) for budget in found]
                for name in experiment.sections[found[0]]
            }
            ticks, xlabel = [budget.split("x")[side] for budget in found], f"{('samples', 'tokens')[side]} kept, %"
            heading = f"{title}: {words}" if title else words.capitalize()
            charts.append(Chart(heading, xlabel, ticks, lines, LOOKS, ends(results, experiment, model)))
    return line_figure(results, experiment, "Pruning samples alone, or tokens alone", charts)


def figure8(results: report.Results):
    """Perplexity, entropy and NLL of the held-out rows during training; step 0 is the untuned model."""
    experiment = EXPERIMENTS["figure8"]
    (budget,), (model,) = budgets(experiment), models(results, experiment)
    rows = {name: results.of(experiment, model, flags) for name, flags in experiment.sections[budget].items()}
    if not any(rows.values()):
        return None
    known = ends(results, experiment, model)
    start = [run["held"] for run in known.pop(UNTUNED, [])]  # `held`: measures of the held-out rows
    found = known | {name: runs for name, runs in rows.items() if runs}
    title = "Held-out rows during training, {} % of the samples and {} % of their tokens kept".format(
        *budget.split("x")
    )
    many = any(len(runs) > 1 for runs in found.values())
    note = "lines: mean of the seeds, bands: lowest to highest seed" if many else "one seed"
    figure, ((part, axes),) = panels(f"{title}\n{note}", [""], len(MEASURES), 2.7)
    for axis, (measure, words) in zip(axes, MEASURES.items(), strict=True):
        for name, runs in found.items():
            steps = [step for held in (*start, runs[0]["held"]) for step in held["step"]]
            at_steps = list(zip(*([v for h in (*start, run["held"]) for v in h[measure]] for run in runs), strict=True))
            look = ENDS.get(name) or {**LOOKS[name], "markersize": 4, "markevery": math.ceil(len(steps) / 8)}
            means = [statistics.mean(at) for at in at_steps]
            axis.plot(steps, means, linewidth=2 if name == OURS else 1.3, label=WORDS.get(name, name), **look)
            if len(runs) > 1:
                low, high = map(min, at_steps), map(max, at_steps)
                axis.fill_between(steps, list(low), list(high), color=look["color"], alpha=0.15, linewidth=0)
        axis.set_title(words)
        axis.set_xlabel("step")
    add_legend(part, axes[0])
    return figure
