"""What pruning pays: the Pareto front, the rate that validation chooses, and tables of runs that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reproduce import front, report
from reproduce.experiments import BEST_RATES, EXPERIMENTS, FULL_DATA, HIGHER, METHODS, PARTS, WIZARD, at_rate
from reproduce.presets import PRESETS
from reproduce.runs import key, run_of, runs_of

TINY = PRESETS["tiny"](Path("runs/tiny"))
points = st.lists(st.tuples(st.integers(0, 20), st.integers(-20, 20)), max_size=12)


@given(points)
def test_the_front_is_every_point_that_none_beats_once(found):
    def beaten(point):
        return any(
            (at < point[0] and score >= point[1]) or (at <= point[0] and score > point[1]) for at, score in found
        )

    assert front.pareto(found) == sorted({point for point in found if not beaten(point)})


def made(flags, seed, valid=1.0, learned=50.0, held=1.0, seconds=10.0, data=WIZARD):
    run = run_of(TINY, "embedded", data, flags, seed)
    scores = dict.fromkeys(front.GROUPS, learned)
    return {
        "model": run.model,
        "data": run.data,
        "flags": None if flags is None else shlex.join(run.flags),
        "seed": run.seed,
        "key": key(TINY, run),
        "scores": scores,
        "n": dict.fromkeys(scores, 500),
        "held": {"rows_nll": [held]},
        "valid": valid,
        "seconds": seconds,
        "answer_tokens_seen": 100,
        "answer_tokens_kept": 25,
    }


def results(folder, runs, devices=()):
    machines = [{"device_name": name} for name in devices]
    (folder / "tiny.json").write_text(json.dumps({"machines": machines, "runs": runs}))
    return report.Results.read("tiny", folder / "tiny.json")


def test_the_rate_with_the_lowest_validation_loss_of_seed_0_is_chosen(tmp_path):
    losses = dict(zip(HIGHER, (1.2, 1.3, 1.1, 1.4, 1.5), strict=True))
    runs = [made(at_rate(FULL_DATA, factor), 0, valid=loss) for factor, loss in losses.items()]
    assert front.best_rates(results(tmp_path, runs)) == {("", "full data"): HIGHER[2]}
    assert "| 1.200 | 1.300 | **1.100** | 1.400 | 1.500 |" in front.rates_table(results(tmp_path, runs))
    assert front.best_rates(results(tmp_path, runs[:-1])) == {}
    assert front.rates_table(results(tmp_path, runs[:-1])) == ""


def test_the_best_rates_are_those_of_the_committed_runs():
    assert front.best_rates(report.Results.read("tiny")) == BEST_RATES


def test_each_method_is_shown_at_its_own_best_rate(tmp_path):
    chosen = [(FULL_DATA, ("", "full data")), (METHODS["entropy"]("25x100"), ("25x100", "entropy"))]
    runs = [made(at_rate(flags, BEST_RATES[name]), seed, held=1.5) for flags, name in chosen for seed in (0, 1)]
    runs += [made(FULL_DATA, seed, held=9.0) for seed in (0, 1)]
    lines = front.best_table(results(tmp_path, runs)).splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [["full data", "0.002"], ["entropy", "6e-05"]]
    assert all(line.endswith("| 1.500 ± 0.000 |") for line in lines[2:])
    assert front.best_table(results(tmp_path, runs[:3])) == ""


def test_a_row_has_the_fewest_seconds_and_gains_over_random_and_full_data(tmp_path):
    ours, random = (METHODS[name]("25x100") for name in ("as printed", "random"))
    runs = [made(None, 0)]
    runs += [made(ours, seed, learned=60.0 + seed, held=0.9, seconds=40.0 - seed) for seed in range(3)]
    runs += [made(random, seed, learned=50.0 + seed, seconds=20.0 + seed) for seed in range(3)]
    runs += [made(FULL_DATA, seed, learned=60.0 + seed, held=0.9) for seed in range(3)]
    found = results(tmp_path, runs)
    assert "| 25x100 | as printed | 3 | 38 | 25.0 % | 61.0 ± 2.5 |" in front.front_table(found)
    assert "| 25x100 | random | 3 | 20 | 25.0 % | 51.0 ± 2.5 |" in front.front_table(found)
    assert "|  | before tuning |  |  |  | 50.0 [45.6, 54.4] |" in front.front_table(found)
    lines = front.answers(found).splitlines()
    compared = [tuple(line.split(" | ")[1:3]) for line in lines[2:]]
    assert compared == [
        ("full data", "before tuning"),
        ("random", "full data"),
        ("random", "before tuning"),
        ("as printed", "random"),
        ("as printed", "full data"),
        ("as printed", "before tuning"),
    ]
    assert lines[5].startswith("| 25x100 | as printed | random | +10.0 ± 2.3 |") and "better: learned" in lines[5]
    assert lines[6].startswith("| 25x100 | as printed | full data | +0.0 ± 2.3 |") and lines[6].endswith("| nothing |")
    assert lines[7].startswith("| 25x100 | as printed | before tuning | +11.0 ± 2.5 |")


def test_seconds_on_another_device_than_full_data_do_not_count(tmp_path):
    flags = METHODS["random"]("25x100")
    runs = [made(FULL_DATA, 0) | {"machine": 0}]
    runs += [made(flags, seed, seconds=20.0 - seed) | {"machine": seed} for seed in range(2)]
    found = results(tmp_path, runs, ("slow", "fast"))
    assert (front.seconds(found, flags), front.seconds(found, FULL_DATA)) == (20.0, 10.0)
    found = results(tmp_path, [runs[0], runs[2]], ("slow", "fast"))
    assert front.seconds(found, flags) is None
    assert "| 25x100 | random | 1 |  | 25.0 % |" in front.front_table(found)
    pytest.importorskip("matplotlib", reason="pip install matplotlib (the plot extra)")
    for name in front.PAID:
        front.draw_front(found, tmp_path / f"{name}.svg")
        assert (">25<" in (tmp_path / f"{name}.svg").read_text()) == (name == "front_tokens")


def test_the_spread_is_the_standard_deviation_over_seeds(tmp_path):
    runs = [made(METHODS["random"]("12.5x50"), seed, learned=score) for seed, score in enumerate((30.0, 32.0, 34.0))]
    assert "| learned | 3 | 32.00 | 2.00 |" in front.spread_table(results(tmp_path, runs))
    assert front.spread_table(results(tmp_path, runs[:1])) == ""


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib (the plot extra)")
    ours, random = (METHODS[name]("25x100") for name in ("as printed", "random"))
    runs = [made(flags, 0, held=held) for flags, held in ((ours, 0.9), (random, 1.0), (FULL_DATA, 0.95))]
    found = results(tmp_path, runs)
    for name in front.PAID:
        front.draw_front(found, tmp_path / f"{name}.svg")
    drawn = {name: (tmp_path / f"{name}.svg").read_text() for name in front.PAID}
    assert all(">25<" in drawn[name] and front.PAID[name][1] in drawn[name] for name in drawn)  # a point's budget
    assert "LESS" in drawn["front_tokens"] and "LESS" not in drawn["front"]  # whose seconds are not all counted
    assert not front.draw_noise(found, tmp_path / "none.svg")  # one share of noise compares nothing
    pairs = ((ours, 1.3), (random, 1.5), (FULL_DATA, 1.1))
    noisy = [made(flags, 0, held=held, data="noise-all-0.6") for flags, held in pairs]
    noisy += [made(flags, 1, held=held + 0.002, data="noise-all-0.6") for flags, held in pairs]
    assert front.draw_noise(results(tmp_path, runs + noisy), tmp_path / "noise.svg")
    picture = (tmp_path / "noise.svg").read_text()
    for gain, certain in (("+0.100", False), ("+0.050", False), ("+0.200", True), ("-0.200", True)):
        (style,) = re.findall(rf'<text style="([^"]*)"[^>]*>{re.escape(gain)}<', picture)
        assert ("700" in style or "bold" in style) == certain
    assert not (tmp_path / "none.svg").exists()


def test_each_part_is_a_line_of_its_own_runs(tmp_path):
    runs = [made(flags, 0, held=1 + place / 10) for place, flags in enumerate(PARTS.values())]
    table = front.parts_table(results(tmp_path, runs))
    for place, name in enumerate(PARTS):
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith(f"| {1 + place / 10:.3f} |")
    assert front.parts_table(results(tmp_path, runs[:1])) == ""


def test_a_table_is_complete_once_all_of_its_runs_are_there(tmp_path):
    runs = [made(run.flags, run.seed) for run in runs_of(TINY, EXPERIMENTS["table3"], 1)]
    assert results(tmp_path, runs).complete() == ["table3"]
    assert all(results(tmp_path, runs[:n] + runs[n + 1 :]).complete() == [] for n in range(len(runs)))


def test_losses_by_noise_are_compared_within_the_same_rows(tmp_path):
    compared = {"random": 1.0, "as printed": 0.9, "Q1 barred": 0.8}
    plain = [made(METHODS[name]("25x100"), 0, held=held) for name, held in compared.items()]
    plain.append(made(FULL_DATA, 0, held=0.95))
    worse = {"random": 2.0, "as printed": 2.1, "Q1 barred": 1.9}
    noisy = [made(METHODS[name]("25x100"), 0, held=held, data="noise-wrong-0.3") for name, held in worse.items()]
    noisy.append(made(FULL_DATA, 0, held=1.5, data="noise-wrong-0.3"))
    assert front.noise_table(results(tmp_path, plain)) == ""  # one kind of rows compares nothing
    table = front.noise_table(results(tmp_path, plain + noisy))
    assert "| 30 %, every kind | 25 % | 1 | 0.950 | 1.000 | 0.900 | **0.800** |" in table
    assert "| 30 %, wrong | 25 % | 1 | **1.500** | 2.000 | 2.100 | 1.900 |" in table
    assert table.count("\n|") == 3
    table = front.noise_gains_table(results(tmp_path, plain + noisy))
    assert "| 30 %, every kind | 25 % | +0.050 | +0.100 | +0.150 | +0.200 |" in table
    assert "| 30 %, wrong | 25 % | -0.600 | -0.100 | -0.400 | +0.100 |" in table
    assert table.count("\n|") == 3 and front.noise_gains_table(results(tmp_path, plain)) == ""
    more = {name: held + 0.002 for name, held in worse.items()}
    again = [made(METHODS[name]("25x100"), 1, held=held, data="noise-wrong-0.3") for name, held in more.items()]
    again.append(made(FULL_DATA, 1, held=1.502, data="noise-wrong-0.3"))
    table = front.noise_gains_table(results(tmp_path, plain + noisy + again))
    line = "| 30 %, wrong | 25 % | **-0.600 ± 0.006** | **-0.100 ± 0.006** | **-0.400 ± 0.006** | **+0.100 ± 0.006** |"
    assert line in table
    more = [made(METHODS["random"]("25x100"), 1, held=2.2, data="noise-wrong-0.3")]
    table = front.noise_table(results(tmp_path, plain + noisy + more))
    assert "| 30 %, wrong | 25 % | 1 | **1.500** | 2.100 ± 1.271 | 2.100 | 1.900 |" in table
