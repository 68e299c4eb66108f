"""What pruning pays on the embedded default: noise between seeds, learning rates, score against seconds, noisy rows.

Tables and pictures of the experiments `spread`, `rates`, `front` and `noise-...`, for the page of reproduce/report.py.
A method's seconds are the fewest that any of its runs took to train, at any rate: runs share a machine, and a
neighbour only adds.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from reproduce import figures, noise, report
from reproduce.experiments import (
    BEST_RATES,
    COMPARED,
    EMBEDDED,
    EXPERIMENTS,
    FULL_DATA,
    HIGHER,
    METHODS,
    NOISY,
    PARTS,
    SIDE_FILES,
    WHOLE,
    Flags,
    at_rate,
    rates_at,
)
from reproduce.quickstart import GROUPS
from reproduce.tables import markdown

TASKS = (*GROUPS, "held")
BUDGETS = (*WHOLE, "12.5x50")
FULL, UNTUNED = "full data", "before tuning"
SHARES = {"noise-all-0": 0, "noise-all-0.15": 15, "WizardLM": 30, "noise-all-0.45": 45, "noise-all-0.6": 60}


def variants() -> dict[tuple[str, str], Flags]:
    """(budget, method) -> flags at the preset's rate, in the order of the experiment."""
    found = {("", FULL): FULL_DATA}
    for section, named in EXPERIMENTS["front"].sections.items():
        if section:
            found |= {(section, name.rpartition(", rate")[0]): flags for name, flags in named.items()}
    return found


def runs_of(results: report.Results, flags: Flags | None, experiment: str = "front") -> list[dict]:
    return results.of(EXPERIMENTS[experiment], EMBEDDED, flags)


def seconds(results: report.Results, flags: Flags) -> float:
    """The fewest seconds of a method's runs at any rate, which does not change the work."""
    return min(run["seconds"] for factor in HIGHER for run in runs_of(results, at_rate(flags, factor)))


def tokens(results: report.Results, flags: Flags) -> float:
    """Thousands of answer tokens that a run trained on, the mean over seeds."""
    return statistics.mean(run["answer_tokens_kept"] for run in runs_of(results, flags)) / 1000


def called(task: str) -> str:
    return "held-out loss" if task == "held" else task


# ----------------------------------------------------------------------------------------------- tables


def spread_table(results: report.Results) -> str:
    """Markdown: mean and standard deviation over seeds of random x random at 12.5x50; empty without runs."""
    runs = runs_of(results, METHODS["random"]("12.5x50"))
    if len(runs) < 2:
        return ""
    lines = [["random x random, 12.5x50", "seeds", "mean", "standard deviation"]]
    for task in TASKS:
        found, shown = report.values(runs, task), report.digits(task)
        cells = [f"{measure(found):.{shown + 1}f}" for measure in (statistics.mean, statistics.stdev)]
        lines.append([called(task), str(len(runs)), *cells])
    return markdown(lines)


def rate_losses(results: report.Results, budget: str, flags: Flags) -> dict[float, float]:
    """Factor of the rate -> loss on the validation rows of the run of seed 0; empty if a run is missing."""
    losses = {}
    for factor in rates_at(budget):
        runs = runs_of(results, at_rate(flags, factor), "rates")
        if not runs:
            return {}
        losses[factor] = next(run["valid"] for run in runs if run["seed"] == 0)
    return losses


def best_rates(results: report.Results) -> dict[tuple[str, str], float]:
    """(budget, method) -> the factor of the rate with the lowest loss on the validation rows."""
    every = {name: rate_losses(results, name[0], flags) for name, flags in variants().items()}
    return {name: min(losses, key=losses.get) for name, losses in every.items() if losses}


def rates_table(results: report.Results) -> str:
    """Markdown: loss on validation rows at each rate, seed 0; the lowest is bold."""
    lines = [["budget", "method", *(f"rate {factor * results.preset.lr:g}" for factor in HIGHER)]]
    for (budget, method), flags in variants().items():
        losses = rate_losses(results, budget, flags)
        if losses:
            shown = {factor: f"{loss:.3f}" for factor, loss in losses.items()}
            best = min(losses, key=losses.get)
            shown[best] = f"**{shown[best]}**"
            lines.append([budget, method, *(shown.get(factor, "") for factor in HIGHER)])
    return markdown(lines) if len(lines) > 1 else ""


def best_table(results: report.Results) -> str:
    """Markdown: the methods of `rates_table`, each at its best rate; empty unless two of them have further seeds."""
    lines, seed_counts = [["budget", "method", "rate", *COSTS, *map(called, TASKS)]], []
    for (budget, method), flags in variants().items():
        factor = BEST_RATES.get((budget, method))
        runs = runs_of(results, at_rate(flags, factor), "best") if factor else []
        if runs:
            seed_counts.append(len(runs))
            lines.append([budget, method, f"{factor * results.preset.lr:g}", *costs_and_scores(results, flags, runs)])
    return markdown(lines) if sum(count > 1 for count in seed_counts) > 1 else ""


def front_table(results: report.Results) -> str:
    """Markdown: every method at every budget at the common rate: seconds, answer tokens and the four scores."""
    lines = [["budget", "method", *COSTS, *map(called, TASKS)]]
    untuned = runs_of(results, None)
    if untuned:
        lines.append(["", UNTUNED, "", "", "", *(report.with_margin(untuned, task) for task in TASKS)])
    for (budget, method), flags in variants().items():
        runs = runs_of(results, flags)
        if runs:
            lines.append([budget, method, *costs_and_scores(results, flags, runs)])
    return markdown(lines)


COSTS = ("seeds", "seconds", "answer tokens kept")


def costs_and_scores(results: report.Results, flags: Flags, runs: list[dict]) -> list[str]:
    """The cells of COSTS and of the scores of runs with these flags at some rate.

    The share of the answer tokens is of full data's: a method that chooses its rows before training sees no others.
    """
    seen = (runs_of(results, FULL_DATA) or runs)[0]["answer_tokens_seen"]
    kept = statistics.mean(run["answer_tokens_kept"] for run in runs) / seen
    costs = [str(len(runs)), f"{seconds(results, flags):.0f}", f"{100 * kept:.1f} %"]
    return [*costs, *(report.with_margin(runs, task) for task in TASKS)]


def parts_table(results: report.Results) -> str:
    """Markdown: Q-Tuning at 25x50 with one part changed in each line; empty unless two of them have run."""
    lines = [["25x50", *COSTS, *map(called, TASKS)]]
    for name, flags in PARTS.items():
        runs = runs_of(results, flags, "parts")
        if runs:
            lines.append([name, *costs_and_scores(results, flags, runs)])
    return markdown(lines) if len(lines) > 2 else ""


def answers(results: report.Results) -> str:
    """Markdown: the gain of each method over random at its budget, over full data and over the untuned model.

    Each gain has its 95 % interval. Where two methods are equal, one interval in twenty excludes 0 by chance.
    """
    lines = [["budget", "method", "over", *map(called, TASKS), "beyond noise"]]
    for (budget, method), flags in variants().items():
        runs, others = runs_of(results, flags), {FULL: FULL_DATA, UNTUNED: None}
        others = {"random": METHODS["random"](budget)} | others if budget else others
        for name, over in ((name, runs_of(results, of)) for name, of in others.items() if name != method):
            if runs and over:
                gains = {task: report.gain(runs, over, task) for task in TASKS}
                words = [
                    f"{'better' if gain.mean > 0 else 'worse'}: {called(task)}"
                    for task, gain in gains.items()
                    if not gain.is_noise()
                ]
                shown = [report.interval(gain, task) for task, gain in gains.items()]
                lines.append([budget, method, name, *shown, ", ".join(words) or "nothing"])
    return markdown(lines) if len(lines) > 1 else ""


def noise_table(results: report.Results) -> str:
    """Markdown: held-out loss by the share and the kind of the noise among the rows, at each budget of whole answers.

    Empty without runs on rows other than the embedded ones. The lowest loss of a line is bold.
    """
    lines = [["noise among the rows", "budget", FULL, *COMPARED]]
    for name in ("WizardLM", *NOISY):
        experiment = "front" if name == "WizardLM" else name
        _, kinds, share = ("noise-all-0.3" if name == "WizardLM" else name).split("-")
        for budget in WHOLE[:2]:
            compared = [FULL_DATA, *(METHODS[method](budget) for method in COMPARED)]
            found = [runs_of(results, flags, experiment) for flags in compared]
            if all(found):
                losses = [statistics.mean(report.values(runs, "held")) for runs in found]
                shown = [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]
                lines.append(
                    [f"{float(share):.0%}, {kinds}".replace("%", " %"), budget.partition("x")[0] + " %", *shown]
                )
    return markdown(lines) if len({line[0] for line in lines}) > 2 else ""


# --------------------------------------------------------------------------------------------- pictures

LOOKS = {  # Okabe and Ito's colours
    FULL: ("black", "*"),
    "random": ("#0072b2", "s"),
    "entropy": ("#cc79a7", "^"),
    "as printed": ("#d55e00", "o"),
    "Q1 barred": ("#009e73", "D"),
    "Q1 barred, scored once": ("#56b4e9", "v"),
    "LESS": ("#e69f00", "P"),
    "Rho-1": ("#8c564b", "X"),
}


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats, as (seconds, score): none is as fast with a score as high. By seconds."""
    front, best = [], float("-inf")
    for at, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if score > best:
            front.append((at, score))
            best = score
    return front


PAID = {  # picture -> what its methods pay, and the name of the axis
    "front": (seconds, "seconds of training"),
    "front_tokens": (tokens, "thousands of answer tokens trained on"),
}


def draw_front(results: report.Results, path: Path) -> None:
    """Score against what the file's name says (PAID), each method at each budget, with each score's Pareto front."""
    paid, axis_name = PAID[path.stem]
    import matplotlib

    with matplotlib.rc_context(figures.STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(figures.WIDTH, 5.6), layout="constrained")
        for axis, task in zip(figure.subplots(2, 2).flatten(), TASKS, strict=True):
            points, sign = [], report.better(task)
            for (budget, method), flags in variants().items():
                runs = runs_of(results, flags)
                if not runs or (paid is seconds and method in SIDE_FILES):
                    continue
                found, at = report.values(runs, task), paid(results, flags)
                colour, marker = LOOKS[method]
                y, margin = statistics.mean(found), noise.mean_margin(found)  # None, for a single run, draws no bar
                hollow = {"markerfacecolor": "white"} if budget == "12.5x50" else {}
                axis.errorbar(at, y, margin, color=colour, marker=marker, markersize=5, alpha=0.9, **hollow)
                label = "" if method == FULL else budget.partition("x")[0]
                axis.annotate(label, (at, y), (4, 3), textcoords="offset points", fontsize=7, color=colour)
                points.append((at, sign * y))
            front = [(at, sign * y) for at, y in pareto(points)]
            if front:
                axis.step(*zip(*front, strict=True), where="post", color="#999999", linewidth=0.8, zorder=0)
            axis.set_title(called(task) + (", percent correct" if task != "held" else ", nats a token"))
            axis.set_xlabel(axis_name)
        handles = [
            matplotlib.lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
            for name, (colour, marker) in LOOKS.items()
            if paid is not seconds or name not in SIDE_FILES
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        figure.suptitle(
            f"Score against {axis_name}; labels: percent of the samples, hollow: tokens trimmed, bars: 95 % interval",
            x=0.01,
            ha="left",
            fontsize=10,
        )
        figure.savefig(path, metadata={"Date": None})


def draw_noise(results: report.Results, path: Path) -> bool:
    """Share of noise against budget, coloured by the gain in held-out loss over full data and over random.

    Returns:
        whether there were runs of two shares or more to draw.
    """
    import matplotlib

    methods, budgets = COMPARED[1:], WHOLE[:2]
    grids = {}
    for over in (FULL, "random"):
        for method in methods:
            grid = []
            for budget in budgets:
                line = []
                for name in SHARES:
                    experiment = "front" if name == "WizardLM" else name
                    base = FULL_DATA if over == FULL else METHODS["random"](budget)
                    pair = [runs_of(results, flags, experiment) for flags in (METHODS[method](budget), base)]
                    line.append(report.gain(*pair, "held").mean if all(pair) else float("nan"))
                grid.append(line)
            grids[over, method] = grid
    known = [abs(x) for grid in grids.values() for line in grid for x in line if x == x]
    shares = {x for grid in grids.values() for line in grid for x, value in enumerate(line) if value == value}
    if len(shares) < 2:  # a single share of noise compares nothing
        return False
    with matplotlib.rc_context(figures.STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(figures.WIDTH, 3.6), layout="constrained")
        for axis, ((over, method), grid) in zip(figure.subplots(2, 2).flatten(), grids.items(), strict=True):
            image = axis.imshow(grid, cmap="RdBu", vmin=-max(known), vmax=max(known), aspect="auto")
            axis.set_xticks(range(len(SHARES)), [f"{share} %" for share in SHARES.values()])
            axis.set_yticks(range(len(budgets)), [f"{budget.partition('x')[0]} %" for budget in budgets])
            axis.set_title(f"{method}, over {over}")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    if value == value:
                        axis.text(x, y, f"{value:+.3f}", ha="center", va="center", fontsize=8)
        figure.colorbar(image, ax=figure.axes, label="gain in held-out loss, nats")
        figure.suptitle("Share of noise (across) and of samples kept (down)", x=0.01, ha="left", fontsize=10)
        figure.savefig(path, metadata={"Date": None})
    return True
