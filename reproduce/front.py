"""What pruning pays on the embedded default: noise between seeds, learning rates, score against seconds, noisy rows.

Tables and pictures of the experiments `spread`, `rates`, `best`, `front`, `trimmed`, `parts` and `noise-...`.
A method's seconds are the fewest that any of its runs took to train, at any rate: runs share a machine, and a
neighbour only adds. Runs on another kind of processor than full data's do not count.
"""

from __future__ import annotations

import itertools
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
    NOISE_KINDS,
    NOISE_SHARES,
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
FULL, UNTUNED = "full data", "before tuning"


def percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"


SOME = "noise-all-0.3"  # the noise of the embedded rows themselves, whose runs are those of `front`
NOISES = {  # panel -> label -> rows; every kind in growing shares, then each kind alone
    "every kind": {percent(share): f"noise-all-{share}" for share in NOISE_SHARES},
    "30 % of one kind": {kind: f"noise-{kind}-0.3" for kind in NOISE_KINDS},
}
NOISY_ROWS = [name for named in NOISES.values() for name in named.values()]


def variants() -> dict[tuple[str, str], Flags]:
    """(budget, method) -> flags at the preset's rate, in the order of the experiments."""
    found = {("", FULL): FULL_DATA}
    for section, named in (*EXPERIMENTS["front"].sections.items(), *EXPERIMENTS["trimmed"].sections.items()):
        if section:
            found |= {(section, name.rpartition(", rate")[0]): flags for name, flags in named.items()}
    return found


def runs_of(results: report.Results, flags: Flags | None, experiment: str = "front") -> list[dict]:
    return results.of(EXPERIMENTS[experiment], EMBEDDED, flags)


def seconds(results: report.Results, flags: Flags) -> float | None:
    """The fewest seconds of a method's runs at any rate, which does not change the work.

    Runs on another device than full data's first run do not count; None if there are no others.
    """
    runs = [run for factor in HIGHER for run in runs_of(results, at_rate(flags, factor))]
    device = (runs_of(results, FULL_DATA) or runs)[0]["device"]
    return min((run["seconds"] for run in runs if run["device"] == device), default=None)


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
    took = seconds(results, flags)
    costs = [str(len(runs)), "" if took is None else f"{took:.0f}", f"{100 * kept:.1f} %"]
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


def noisy_runs(results: report.Results, name: str, flags: Flags) -> list[dict]:
    return runs_of(results, flags, "front" if name == SOME else name)


def rows_called(name: str) -> str:
    _, kinds, share = name.split("-")
    return f"{percent(share)}, {'every kind' if kinds == 'all' else kinds}"


def percent_of(budget: str) -> str:
    return f"{budget.partition('x')[0]} %"


def noise_table(results: report.Results) -> str:
    """Markdown: held-out loss by the share and the kind of the noise among the rows, at each budget of whole answers.

    Empty without runs on rows other than the embedded ones. The lowest loss of a line is bold.
    """
    lines = [["noise among the rows", "budget", "seeds", FULL, *COMPARED]]
    for name in NOISY_ROWS:
        for budget in WHOLE:
            compared = [FULL_DATA, *(METHODS[method](budget) for method in COMPARED)]
            found = [noisy_runs(results, name, flags) for flags in compared]
            if all(found):
                means = [statistics.mean(report.values(runs, "held")) for runs in found]
                shown = [report.with_margin(runs, "held") for runs in found]
                best = means.index(min(means))
                shown[best] = f"**{shown[best]}**"
                lines.append([rows_called(name), percent_of(budget), str(min(map(len, found))), *shown])
    return markdown(lines) if len({line[0] for line in lines}) > 2 else ""


GAINS = [(method, over) for method in COMPARED[1:] for over in (FULL, "random")]


def noise_gains(results: report.Results, method: str, over: str) -> dict[tuple[str, str], report.Gain]:
    """(rows, budget) -> a method's gain in held-out loss over full data or random, where both have run.

    It has an interval where both have several seeds: a single run would get the other's spread.
    """
    gains = {}
    for name in NOISY_ROWS:
        for budget in WHOLE:
            flags = METHODS[method](budget), FULL_DATA if over == FULL else METHODS[over](budget)
            pair = [noisy_runs(results, name, flag) for flag in flags]
            if all(pair):
                found = report.gain(*pair, "held")
                gains[name, budget] = found if min(map(len, pair)) > 1 else report.Gain(found.mean, None)
    return gains


def noise_gains_table(results: report.Results) -> str:
    """Markdown: the gains of `noise_gains` with their 95 % intervals; bold where the interval excludes 0."""
    every = [noise_gains(results, *pair) for pair in GAINS]
    lines = [["noise among the rows", "budget", *(f"{method}, over {over}" for method, over in GAINS)]]
    for name, budget in itertools.product(NOISY_ROWS, WHOLE):
        found = [gains.get((name, budget)) for gains in every]
        if all(found):
            shown = [(gain, report.interval(gain, "held")) for gain in found]
            cells = [text if gain.is_noise() else f"**{text}**" for gain, text in shown]
            lines.append([rows_called(name), percent_of(budget), *cells])
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
                at = paid(results, flags) if runs else None
                if at is None or (paid is seconds and method in SIDE_FILES):
                    continue
                found = report.values(runs, task)
                colour, marker = LOOKS[method]
                y, margin = statistics.mean(found), noise.mean_margin(found)  # None, for a single run, draws no bar
                hollow = {"markerfacecolor": "white"} if budget and budget not in WHOLE else {}
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
    """Noise among the rows against budget, coloured by the gain in held-out loss over full data and over random.

    Returns:
        whether there were runs of two sets of rows or more to draw.
    """
    import matplotlib

    every = {pair: noise_gains(results, *pair) for pair in GAINS}
    if len({name for gains in every.values() for name, _ in gains}) < 2:
        return False
    widest = max(abs(gain.mean) for gains in every.values() for gain in gains.values())
    with matplotlib.rc_context(figures.STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(figures.WIDTH, 6.4), layout="constrained")
        panels = figure.subplots(len(every), len(NOISES), sharey=True)
        for axes, ((method, over), gains) in zip(panels, every.items(), strict=True):
            for axis, (kind, named) in zip(axes, NOISES.items(), strict=True):
                means = {pair: gain.mean for pair, gain in gains.items()}
                grid = [[means.get((name, budget), float("nan")) for name in named.values()] for budget in WHOLE]
                image = axis.imshow(grid, cmap="RdBu", vmin=-widest, vmax=widest, aspect="auto")
                axis.set_xticks(range(len(named)), list(named))
                axis.set_yticks(range(len(WHOLE)), [percent_of(budget) for budget in WHOLE])
                axis.set_title(f"{method}, over {over}: {kind}")
                for x, name in enumerate(named.values()):
                    for y, budget in enumerate(WHOLE):
                        if (name, budget) in gains:
                            gain = gains[name, budget]
                            colour = "white" if abs(gain.mean) > widest / 2 else "black"
                            weight = "normal" if gain.is_noise() else "bold"
                            place = {"ha": "center", "va": "center", "fontsize": 8}
                            axis.text(x, y, f"{gain.mean:+.3f}", color=colour, fontweight=weight, **place)
        figure.colorbar(image, ax=panels, label="gain in held-out loss, nats", shrink=0.5)
        figure.suptitle(
            "Noise among the rows (across), share of the samples kept (down); bold: the 95 % interval excludes 0",
            x=0.01,
            ha="left",
            fontsize=10,
        )
        figure.savefig(path, metadata={"Date": None})
    return True
