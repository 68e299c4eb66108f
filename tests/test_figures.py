"""reproduce/figures.py: what is drawn is what the result file says."""

import json
import math
import shlex
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reproduce import figures, noise, report
from reproduce.experiments import EXPERIMENTS, qtuning, row
from reproduce.figures import OURS
from reproduce.presets import PRESETS
from reproduce.runs import HELDOUT, key, runs_of

pytest.importorskip("matplotlib", reason="pip install matplotlib (the plot extra)")

NAMES = ("figure3", "figure4", "figure5", "figure6", "figure8")
TINY = PRESETS["tiny"](Path("runs/tiny"))


def plan(*names, seeds=3):
    """The runs of these figures, in the result file's form; no two have the same scores."""
    every = dict.fromkeys(run for name in names for run in runs_of(TINY, EXPERIMENTS[name], seeds))
    found = []
    for number, run in enumerate(every):
        steps = [0] if run.flags is None else [25, 50, 60]
        held = {name: [1 + number / 1000 + step / 100 + place for step in steps] for place, name in enumerate(HELDOUT)}
        scores = {task: 40 + number / 10 + run.seed**2 + place for place, task in enumerate(("arc", "gsm8k"))}
        named = {"model": run.model, "data": run.data, "flags": run.flags, "seed": run.seed, "key": key(TINY, run)}
        found.append(json.loads(json.dumps({**named, "scores": scores, "held": {"step": steps, **held}})))
    return found


COMPLETE = plan(*NAMES)


def read(runs, folder, preset="tiny"):
    written = [{**run, "flags": run["flags"] and shlex.join(run["flags"])} for run in runs]
    (folder / f"{preset}.json").write_text(json.dumps({"runs": written}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "RESULTS", folder)
        return report.Results.read(preset)


def without(*words):
    return [run for run in COMPLETE if not set(words) <= set(run["flags"] or ["untuned"])]


def found(results, name, flags):
    experiment = EXPERIMENTS[name]
    return results.of(experiment, (experiment.models or results.preset.sizes)[0], flags)


def line(axis, name):
    """The points of a named line, and of its bars their ends."""
    (drawn,) = [part for part in axis.containers if part.get_label() == name]
    xs, ys = drawn.lines[0].get_data()
    bars = [tuple(y for _, y in segment) for group in drawn.lines[2] for segment in group.get_segments()]
    return list(xs), list(ys), bars


def level(axis, name):
    (drawn,) = [part for part in axis.lines if part.get_label() == name]
    return drawn


def test_every_figure_is_drawn_of_complete_results(tmp_path):
    results = read(COMPLETE, tmp_path)
    assert figures.draw(results, tmp_path) == [f"{name}.svg" for name in NAMES]
    for name in NAMES:
        drawn = (tmp_path / f"{name}.svg").read_bytes()
        text = "".join(ElementTree.fromstring(drawn).itertext())
        assert OURS in text and "full data" in text
        assert len(drawn) < 100_000
    before = (tmp_path / "figure6.svg").read_bytes()
    figures.draw(results, tmp_path)
    assert (tmp_path / "figure6.svg").read_bytes() == before


def test_a_figure_without_a_method_is_not_drawn(tmp_path):
    untuned_and_full = [run for run in COMPLETE if run["flags"] in (None, list(qtuning("100x100")))]
    assert len(untuned_and_full) == 3 * (1 + 3)
    for runs in ([], untuned_and_full):
        assert figures.draw(read(runs, tmp_path), tmp_path) == []
    assert figures.draw(read([], tmp_path, "small"), tmp_path) == []  # which has none of them
    assert not list(tmp_path.glob("*.svg"))


def test_figure_3_shows_means_intervals_seeds_and_both_ends(tmp_path):
    results = read(COMPLETE, tmp_path)
    axes = figures.figure3(results).axes
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert sorted(names) == sorted(EXPERIMENTS["figure3"].sections["12.5x50"]) and names[-1] == OURS
    for axis, task in zip(axes, ("arc", "gsm8k", "held"), strict=True):
        strokes = [part for part in axis.lines if part.get_marker() == "|"]
        for place, name in enumerate(names):
            expected = report.values(found(results, "figure3", EXPERIMENTS["figure3"].sections["12.5x50"][name]), task)
            drawn, (bars,) = axis.containers[place].lines[0], axis.containers[place].lines[2]
            assert drawn.get_xydata().tolist() == [[statistics.mean(expected), place]]
            ((left, _), (right, _)) = bars.get_segments()[0]
            assert (right - left) / 2 == pytest.approx(noise.mean_margin(expected))
            assert strokes[place].get_xdata().tolist() == expected
        for name, words in figures.WORDS.items():
            expected = report.values(found(results, "figure3", EXPERIMENTS["figure3"].sections[""][name]), task)
            assert level(axis, words).get_xdata() == [statistics.mean(expected)] * 2


def test_rows_that_are_missing_are_left_out(tmp_path):
    axis = figures.figure3(read(without("less"), tmp_path)).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert "LESS-Random" not in names and len(names) == len(axis.containers) == 7


def test_a_setting_that_is_missing_cuts_its_line(tmp_path):
    gone = row("Entropy", "Random", "25x100")
    results = read([run for run in COMPLETE if run["flags"] != list(gone)], tmp_path)
    axes = figures.figure6(results).axes
    ticks = [[label.get_text() for label in axis.get_xticklabels()] for axis in axes]
    assert ticks == [["12.5", "25", "50"]] * 3 + [["50", "70"]] * 3
    xs, ys, _ = line(axes[1], "Entropy")
    assert [round(x) for x in xs] == [0, 1, 2]
    first, last = (
        statistics.mean(report.values(found(results, "figure6", row("Entropy", "Random", budget)), "gsm8k"))
        for budget in ("12.5x100", "50x100")
    )
    assert ys[0] == first and math.isnan(ys[1]) and ys[2] == last


def test_an_axis_without_runs_has_no_panels(tmp_path):
    runs = [run for run in COMPLETE if "--sample-keep-ratio" in (run["flags"] or ["--sample-keep-ratio"])]
    assert [axis.get_xlabel() for axis in figures.figure6(read(runs, tmp_path)).axes] == ["samples kept, %"] * 3


def test_sizes_are_in_order_and_are_those_of_their_own_models(tmp_path):
    results = read(COMPLETE, tmp_path)
    axes = figures.figure4(results).axes
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["1-layer", "2-layer", "4-layer"]
    experiment = EXPERIMENTS["figure4"]
    expected = [
        statistics.mean(report.values(results.of(experiment, size, qtuning("12.5x70")), "held"))
        for size in results.preset.sizes
    ]
    assert line(axes[2], "Q-Tuning 12.5x70")[1] == expected and len(set(expected)) == 3


def test_batches_and_lambdas_meet_in_the_default(tmp_path):
    axes = figures.figure5(read(COMPLETE, tmp_path)).axes
    for budget in ("25x50", "25x70", "50x70"):
        batches, lambdas = line(axes[0], budget), line(axes[3], budget)
        assert len(batches[1]) == 3 and len(lambdas[1]) == 5
        assert batches[1][0] == lambdas[1][2] and batches[2][0] == lambdas[2][2]


def test_one_seed_has_no_bars(tmp_path):
    axis = figures.figure5(read(plan("figure5", seeds=1), tmp_path)).axes[0]
    assert line(axis, "25x50")[2] == [] and level(axis, "full data").get_linestyle() == "--"


def test_curves_start_from_the_untuned_model_and_span_their_seeds(tmp_path):
    results = read(COMPLETE, tmp_path)
    axes = figures.figure8(results).axes
    untuned = found(results, "figure8", None)[0]["held"]
    for axis, measure in zip(axes, ("rows_ppl", "rows_ent", "rows_nll"), strict=True):
        assert [part.get_label() for part in axis.lines] == [
            "full data", "Random", "Longest", "InfoBatch", "Entropy", OURS,
        ]  # fmt: skip
        curves = [run["held"][measure] for run in found(results, "figure8", qtuning("12.5x50"))]
        means = [statistics.mean(at) for at in zip(*curves, strict=True)]
        assert axis.lines[-1].get_xydata().tolist() == [
            [step, pytest.approx(y)] for step, y in zip([0, 25, 50, 60], [*untuned[measure], *means], strict=True)
        ]
        band = axis.collections[-1].get_paths()[0].vertices
        assert {y for x, y in band if x == 60} == {
            min(curve[-1] for curve in curves),
            max(curve[-1] for curve in curves),
        }
    bare = figures.figure8(read(without("untuned"), tmp_path)).axes[0]
    assert bare.lines[-1].get_xdata().tolist() == [25, 50, 60]


@settings(max_examples=8)
@given(st.sets(st.integers(0, len(COMPLETE) - 1), max_size=12))
def test_whatever_is_missing_a_figure_is_there_exactly_if_a_method_is(tmp_path_factory, indices):
    results = read([COMPLETE[i] for i in sorted(indices)], tmp_path_factory.mktemp("some"))
    for name in NAMES:
        experiment = EXPERIMENTS[name]
        methods = [flags for section, rows in experiment.sections.items() if section for flags in rows.values()]
        there = any(
            results.of(experiment, model, flags)
            for model in experiment.models or results.preset.sizes
            for flags in methods
        )
        assert (getattr(figures, name)(results) is not None) == there


def test_a_method_looks_the_same_in_every_figure(tmp_path):
    results = read(COMPLETE, tmp_path)
    seen = {}
    for name in NAMES:
        axis = getattr(figures, name)(results).axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            part = getattr(handle, "lines", [handle])[0]  # of bars, the line through them
            seen.setdefault(label, set()).add((part.get_color(), part.get_linestyle()))
    assert seen["full data"] == {("black", "--")} and seen["untuned"] == {("#777777", ":")}
    assert seen[OURS] == seen["Q-Tuning 12.5x50"] == {(figures.OUR_COLOUR, "-")}
    assert all(len(looks) == 1 for looks in seen.values())
