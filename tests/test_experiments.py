"""reproduce: experiments are the paper's; runs are named by what they compute, made once, and reported as they are."""

import dataclasses
import json
import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from data import download
from pruners import SAMPLE_PRUNERS, TOKEN_PRUNERS, SamplePruner, TokenPruner, score_rows
from reproduce import __main__ as command_line
from reproduce import cost, noise, paper, planted, presets, report, runs, tables
from reproduce.experiments import EXPERIMENTS, SMALL, WIZARD, qtuning, row, rows
from training.files import read_json, write_json

ROOT = Path("runs")
PRESETS = {name: make(ROOT / name) for name, make in presets.PRESETS.items()}
EVERY = [(preset, name) for preset in PRESETS.values() for name in preset.experiments]


# ---------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if experiment.table])
def test_an_experiment_has_the_rows_that_the_paper_prints(name):
    experiment = EXPERIMENTS[name]
    printed = {(model, section, label) for model, section, label, _ in paper.rows(experiment.table)}
    missing = {(m["model"], m["section"], m["row"]) for m in paper.load()["missing"] if m["table"] == experiment.table}
    ours = {(model, section, label) for model in experiment.models for section, label, _ in rows(experiment)}
    assert printed <= ours
    further = {label for _, _, label in ours - printed - missing}
    quadrants = {"Q3 | Q2", "Q1 Q3 |", "Q1 Q3 | Q4", "Q1 Q3 | Q2", "Q1 Q3 | Q2 Q4"}
    assert further <= {"4": quadrants, "15": quadrants, "13": {"Random-Random"}, "14": {"Random-Random"}}.get(
        experiment.table, set()
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_section_has_a_reference_row(name):
    experiment = EXPERIMENTS[name]
    for section in experiment.sections:
        at, label = report.reference_of(experiment, section)
        assert label in experiment.sections[at]


@pytest.mark.parametrize(("preset", "name"), EVERY, ids=lambda value: getattr(value, "name", value))
def test_every_run_is_a_command_that_train_takes(preset, name):
    for run in runs.runs_of(preset, EXPERIMENTS[name], 1):
        if run.flags is not None:
            module, argv = runs.train_command(preset, run, ROOT)
            config = train.parse_config(argv)
            assert (module, config.seed, config.eval_sets) == ("train", 0, f"rows={preset.heldout}")
            by_side_file = {config.sample_pruner, config.token_pruner} & NEED_SIDE_FILES
            assert bool(config.scores) == bool(by_side_file)
            assert num_kept(config) >= 1


NEED_SIDE_FILES = {"alpagasus", "deita", "ds2", "less", "rho1", "tokencleaning-row"}


def num_kept(config):
    return (config.sample_keep_ratio * (config.prune_batch or config.micro_batch)) // 1


def test_the_papers_preset_is_its_table_7():
    config = runs.config_of(PRESETS["paper"], runs.Run("LLaMA2-7B", WIZARD, qtuning("12.5x50"), 0))
    found = (config.smoothing, config.epochs, config.lora_rank, config.grad_accum, config.micro_batch, config.lr)
    assert found == (0.5, 3, 8, 4, 8, 1e-4)
    assert (config.max_length, config.sample_keep_ratio, config.token_keep_ratio) == (2048, 0.125, 0.5)


def test_rows_and_tests_are_expected_in_the_folders_that_the_download_fills():
    for preset in (PRESETS["small"], PRESETS["paper"]):
        flags = [
            flag for tests in (*preset.tests.values(), preset.ends) for _, flags in tests.values() for flag in flags
        ]
        paths = [Path(flag) for flag in [*flags, *map(str, preset.data.values())] if flag.startswith("data/")]
        assert paths
        assert {path.parts[1] for path in paths} <= {*download.HUB, *download.WEB}


def test_the_real_rows_are_half_of_each_file_with_the_same_noise_and_none_of_them_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "an answer of six words or"
    write_json(
        Path("data/alpaca.json"), [{"instruction": f"{i}?", "input": "", "output": f"{words} {i}"} for i in range(1800)]
    )
    write_json(Path("data/lima.json"), [{"prompt": f"{i}?", "response": "yes"} for i in range(40)])
    problems = [json.dumps({"question": f"{i}!", "answer": f"{words} {i}"}) for i in range(1800)]
    Path("data/gsm8k").mkdir()
    Path("data/gsm8k/train.jsonl").write_text("\n".join(problems))
    preset = presets.small(tmp_path / "runs")
    preset.make_files(preset, set())
    clean, noisy = (presets.rows_of(preset.data[name]) for name in SMALL)
    assert [row["id"] for row in clean] == [row["id"] for row in noisy] and len(clean) == 3200
    changed = [row for row, other in zip(noisy, clean, strict=True) if row != other]
    assert len(changed) == 0.3 * 3200 and {row["kind"] for row in changed} == set(planted.NOISE)
    assert sum(row["id"].startswith("alpaca-") for row in clean) == 1600
    heldout = {name: presets.rows_of(path) for name, path in preset.losses.items()}
    assert {name: len(rows) for name, rows in heldout.items()} == {"alpaca_nll": 100, "gsm8k_nll": 100, "lima_nll": 30}
    ids = {row["id"] for name in ("alpaca_nll", "gsm8k_nll") for row in heldout[name]}
    assert ids.isdisjoint(row["id"] for row in clean)
    assert {row["id"] for row in presets.rows_of(preset.heldout)} < ids


def test_only_the_untuned_model_and_full_data_are_scored_on_the_tests_of_the_ends():
    preset = presets.small(Path("runs"))
    scored = {
        (section, label): set(runs.tests_of(preset, runs.run_of(preset, "SmolLM2-135M", SMALL[0], flags, 0)))
        for section, label, flags in rows(EXPERIMENTS[SMALL[0]])
    }
    ends = {("", "Zero-Shot"), ("", "Full Dataset")}
    assert ends < scored.keys()
    assert scored == {name: set(preset.ends) if name in ends else set() for name in scored}


def test_a_broken_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n{oops\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
        presets.rows_of(tmp_path / "rows.jsonl")


def test_a_larger_batch_takes_a_learning_rate_in_proportion():
    flags = EXPERIMENTS["figure5"].sections["25x50"]["batch 32"]
    for preset in (PRESETS["tiny"], PRESETS["paper"]):
        run = runs.run_of(preset, "LLaMA2-7B", WIZARD, flags, 0)
        assert run.flags[-4:] == ("--micro-batch", "32", "--lr", f"{4 * preset.lr:g}")
        config = runs.config_of(preset, run)
        assert (config.micro_batch, config.lr) == (32, pytest.approx(4 * preset.lr))


# ------------------------------------------------------------------------------------------------ keys


def test_a_run_is_named_by_what_it_computes_and_not_by_its_paths():
    here, there = (presets.tiny(Path(root)) for root in ("a", "b/c"))
    run = runs.run_of(here, "LLaMA2-7B", WIZARD, qtuning("12.5x50"), 0)
    assert runs.key(here, run) == runs.key(there, run)
    others = [
        dataclasses.replace(run, seed=1),
        dataclasses.replace(run, flags=qtuning("25x50")),
        dataclasses.replace(run, flags=None),
        dataclasses.replace(run, data="MathInstruct"),
        dataclasses.replace(run, model="1-layer"),
    ]
    assert len({runs.key(here, other) for other in (run, *others)}) == 1 + len(others)
    assert runs.key(dataclasses.replace(here, settings=("--lora-rank", "4")), run) != runs.key(here, run)
    spelled = (*run.flags, "--smoothing", "0.5")  # the default
    assert runs.key(here, dataclasses.replace(run, flags=spelled)) == runs.key(here, run)


def test_tables_share_their_runs():
    tiny, of_paper = PRESETS["tiny"], PRESETS["paper"]
    shared = {name: set(runs.runs_of(tiny, EXPERIMENTS[name], 3)) for name in ("table1", "table10", "table8")}
    assert shared["table1"] < shared["table10"]  # all models are the embedded one
    assert len(shared["table1"] & shared["table8"]) == 4  # the untuned model, full data at 3 seeds
    assert not set(runs.runs_of(of_paper, EXPERIMENTS["table1"], 1)) & set(
        runs.runs_of(of_paper, EXPERIMENTS["table10"], 1)
    )
    assert sum(run.flags is None for run in shared["table1"]) == 1  # it has no seed


# ------------------------------------------------------------------------------------------- pruners


def test_side_files_are_those_that_the_tables_name():
    """Every pruner's needs, by hand: a pruner that needs another file is one more line of `pruners/`, none here."""
    files = {"alpagasus": ["rating"], "cond-gain": ["cond_gain"], "deita": ["complexity", "quality", "embedding"]}
    files |= {"ds2": ["rating", "embedding"], "less": ["less"], "rho1": ["reference_nll"]}
    files |= {"tokencleaning-row": ["base_nll", "reference_nll"]}
    for flag, table in (("--sample-pruner", SAMPLE_PRUNERS), ("--token-pruner", TOKEN_PRUNERS)):
        other = "--token-pruner" if flag == "--sample-pruner" else "--sample-pruner"
        for name in table:
            run = runs.Run("embedded", WIZARD, (flag, name, other, "none"), 0)
            assert runs.side_files(PRESETS["tiny"], run) == files.get(name, [])
    assert runs.side_files(PRESETS["tiny"], runs.Run("embedded", WIZARD, None, 0)) == []


def test_a_new_pruner_runs_without_a_change_here(monkeypatch):
    """Its side files are written before it, by the commands that write any other's."""
    monkeypatch.setitem(SAMPLE_PRUNERS, "new", SamplePruner(("num_answer_tokens", "a_score"), rows=lambda *given: None))
    monkeypatch.setitem(TOKEN_PRUNERS, "newer", TokenPruner(("nll", "reference_nll"), lambda *given: None))
    tiny = PRESETS["tiny"]
    both = runs.Run("embedded", WIZARD, ("--sample-pruner", "new", "--token-pruner", "newer"), 0)
    side = runs.side_folder(tiny, both, ROOT)
    assert side.name.startswith("side-embedded-WizardLM-")
    other = dataclasses.replace(tiny, settings=(*tiny.settings, "--lr", "1e-3"))
    assert runs.side_folder(other, both, ROOT) != side  # its models are tuned at another rate
    assert runs.side_folder(tiny, dataclasses.replace(both, seed=1), ROOT) == side
    assert runs.train_command(tiny, both, ROOT)[1][-2:] == ["--scores", str(side / "scores")]
    commands = runs.side_commands(tiny, [run_of(0), both], side)
    assert [(module, argv[0]) for module, argv in commands if module != "train"] == [
        ("pruners.score_rows", "a_score"),
        ("pruners.score_rows", "reference_nll"),
    ]
    (reference,) = [argv for module, argv in commands if module == "train"]
    assert reference[reference.index("--out") + 1] == str(side / "reference")


def test_side_files_are_written_for_the_runs_that_share_them_and_no_others(monkeypatch, tmp_path):
    tiny = PRESETS["tiny"]
    needy = [run_of(0, "Rho-1"), run_of(1, "TokenCleaning"), run_of(0)]
    commands = runs.side_commands(tiny, needy, tmp_path)
    written = [argv[0] for module, argv in commands if module == "pruners.score_rows"]
    assert written == ["reference_nll", "base_nll"]  # each once
    stronger = runs.Run("embedded", WIZARD, row("LESS", "Random", "12.5x50"), 0)
    (_, warmup), (module, less) = runs.side_commands(tiny, [stronger], tmp_path)
    assert (module, less[0]) == ("pruners.score_rows", "less")
    assert less[less.index("--warmup") + 1] == str(tmp_path / "warmup")
    assert train.parse_config(warmup).lora_rank == 8  # also where the preset tunes the whole model


def test_side_files_are_commands_that_score_rows_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(score_rows, "score_file", lambda args: taken.append(args.what))
    for preset in (PRESETS["tiny"], PRESETS["paper"]):
        taken, expected = [], []
        for name in preset.experiments:
            every = runs.runs_of(preset, EXPERIMENTS[name], 1)
            for side, needy in command_line.by_side_folder(preset, every, tmp_path).items():
                for module, argv in runs.side_commands(preset, needy, side) if side else ():
                    assert module in ("train", "pruners.score_rows")
                    if module == "pruners.score_rows":
                        score_rows.main(argv)
                        expected.append(argv[0])
        assert taken == expected and {"rating", "reference_nll", "less"} <= set(taken)


@pytest.mark.parametrize("module", [runs, cost, command_line], ids=lambda module: module.__name__)
def test_what_runs_a_pruner_names_none(module):
    """Experiments and tables of results name methods; the code that runs them and estimates cost reads the tables."""
    source = Path(module.__file__).read_text()
    names = {*SAMPLE_PRUNERS, *TOKEN_PRUNERS} - {"none", "less"}  # `less` is also a side file
    assert [name for name in names if f'"{name}"' in source] == []


# ------------------------------------------------------------------------------------------- one run


@pytest.fixture
def small_scale(tmp_path):
    """Two steps of 32 rows of the embedded default, four items a test, 20 held-out rows."""
    preset = presets.tiny(tmp_path)
    held = {path: tmp_path / path.name for path in (preset.heldout, *preset.losses.values())}
    for path, few in held.items():
        write_json(few, presets.rows_of(path)[:20])
    losses = {name: held[path] for name, path in preset.losses.items()}
    tests = {task: (module, (*flags, "--limit", "4")) for task, (module, flags) in presets.TINY_TESTS.items()}
    settings = (*preset.settings, "--max-steps", "2", "--grad-accum", "4")
    tests = {WIZARD: tests, "OpenHermes": tests}
    return dataclasses.replace(preset, heldout=held[preset.heldout], losses=losses, settings=settings, tests=tests)


def test_a_run_is_made_once_and_its_summary_is_what_it_did(small_scale, tmp_path, monkeypatch):
    small_scale.make_files(small_scale, set())
    run = runs.run_of(small_scale, "LLaMA2-7B", WIZARD, qtuning("12.5x50"), 1)
    made = runs.make(small_scale, run, tmp_path)
    folder = tmp_path / runs.key(small_scale, run)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (made["steps"], made["seed"], made["flags"]) == (2, 1, list(run.flags))
    assert made["samples_kept"] == sum(m["samples_kept"] for m in metrics) == 8
    assert made["held"]["rows_nll"] == [round(metrics[-1]["eval_rows_nll"], 5)]
    for task in ("arc", "gsm8k"):
        scored = read_json(folder / f"{task}.json")
        assert (made["scores"][task], made["n"][task]) == (round(scored["score"], 4), 4)
    items = [item for task in ("arc", "gsm8k") for item in read_json(folder / f"{task}.json")["items"]]
    for group in {item["id"].partition("-")[0] for item in items}:
        correct = [item["correct"] for item in items if item["id"].startswith(group)]
        assert made["scores"][group] == pytest.approx(100 * sum(correct) / len(correct), abs=1e-3)
        assert made["n"][group] == len(correct)
    assert 0 < made["valid"] < 5
    assert not (folder / "model").exists()  # weights are not kept at this scale

    monkeypatch.setattr(runs, "execute", lambda *args: pytest.fail("made again"))
    assert runs.make(small_scale, run, tmp_path) == made


def test_an_interrupted_run_continues(small_scale, tmp_path, monkeypatch):
    small_scale.make_files(small_scale, set())
    run = runs.run_of(small_scale, "LLaMA2-7B", WIZARD, row("Random", "Random", "12.5x50"), 0)
    whole = runs.make(small_scale, run, tmp_path / "whole")

    execute = runs.execute

    def cut(preset, command, log, main=None):
        if command[0] == "eval.gsm8k":
            raise KeyboardInterrupt
        execute(preset, command, log, main)

    monkeypatch.setattr(runs, "execute", cut)
    with pytest.raises(KeyboardInterrupt):
        runs.make(small_scale, run, tmp_path / "cut")
    trained = (tmp_path / "cut" / runs.key(small_scale, run) / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(runs, "execute", execute)
    again = runs.make(small_scale, run, tmp_path / "cut")
    assert (tmp_path / "cut" / runs.key(small_scale, run) / "metrics.jsonl").read_bytes() == trained
    assert (again["scores"], again["held"]) == (whole["scores"], whole["held"])


def test_the_untuned_model_is_step_0_of_every_curve(small_scale, tmp_path):
    small_scale.make_files(small_scale, set())
    made = runs.make(small_scale, runs.run_of(small_scale, "Qwen3-8B", WIZARD, None, 0), tmp_path)
    assert made["held"]["step"] == [0]
    assert 0 < made["held"]["rows_nll"][0] < 2
    assert "steps" not in made


def test_a_failing_run_says_where_and_why(small_scale, tmp_path):
    missing = dataclasses.replace(small_scale, heldout=tmp_path / "nowhere.json")
    run = runs.run_of(missing, "LLaMA2-7B", WIZARD, qtuning("12.5x50"), 0)
    with pytest.raises(ChildProcessError, match=r"train failed, see .*log\.txt: train\.py: .*nowhere\.json"):
        runs.make(missing, run, tmp_path)


# ------------------------------------------------------------------------------------ many runs at once


@pytest.fixture
def made(monkeypatch):
    """Runs that only note in what order they were made, in threads; failing and dying ones by their seed."""
    order = []

    def make(preset, run, root):
        order.append(run)
        if run.seed == 7:
            raise ChildProcessError("train failed, see log.txt: why")
        if run.seed == 9:
            raise BrokenProcessPool("a process died")

    def make_side_files(preset, needy, root):
        order.append(runs.side_folder(preset, needy[0], root))
        if needy[0].model == "embedded" and needy[0].data == "MathInstruct":
            raise ChildProcessError("pruners.score_rows failed")

    monkeypatch.setattr(command_line, "ProcessPoolExecutor", lambda jobs, *how: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(runs, "make", make)
    monkeypatch.setattr(runs, "make_side_files", make_side_files)
    return order


def run_of(seed, token="Random", data=WIZARD):
    return runs.Run("embedded", data, row("Random", token, "12.5x50"), seed)


def test_side_files_come_before_the_runs_that_need_them_and_once(made):
    todo = [run_of(0, "Rho-1"), run_of(0), run_of(1, "TokenCleaning"), run_of(1)]
    assert command_line.run_all(PRESETS["tiny"], todo, ROOT, 2, lambda: None) == []
    side = runs.side_folder(PRESETS["tiny"], todo[0], ROOT)
    assert sorted(map(str, made)) == sorted(map(str, [*todo, side]))
    assert made.index(side) < min(made.index(todo[0]), made.index(todo[2]))


def test_a_failing_run_is_reported_and_the_others_continue(made):
    todo = [run_of(7), run_of(0, "Rho-1", "MathInstruct"), run_of(1), run_of(2)]
    failed = command_line.run_all(PRESETS["tiny"], todo, ROOT, 1, lambda: None)
    assert sorted(line.rpartition(": ")[0].partition(":")[0] for line in failed) == [
        "embedded, WizardLM, seed 7",
        f"side files {runs.side_folder(PRESETS['tiny'], todo[1], ROOT)}",
    ]
    assert run_of(1) in made
    assert run_of(2) in made
    assert run_of(0, "Rho-1", "MathInstruct") not in made  # its side files are missing


def test_results_are_saved_now_and_then(made):
    saved = []
    todo = [run_of(seed) for seed in range(100, 145)]
    command_line.run_all(PRESETS["tiny"], todo, ROOT, 1, lambda: saved.append(len(made)))
    assert len(saved) == 2


def test_a_killed_worker_ends_in_one_line(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "plan", lambda *args: [run_of(9)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["table1", "--runs", str(tmp_path), "--out", str(tmp_path / "out.json"), "--jobs", "1"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("reproduce: a worker was killed")


# ---------------------------------------------------------------------------------------- command line


def named(preset, run):
    flags = None if run.flags is None else shlex.join(run.flags)
    return {**dataclasses.asdict(run), "flags": flags, "key": runs.key(preset, run)}


def test_runs_of_other_settings_are_refused_before_any_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "run_all", lambda *args: pytest.fail("ran"))
    tiny, file = presets.tiny(tmp_path / "tiny"), tmp_path / "tiny.json"
    other = dataclasses.replace(tiny, settings=(*tiny.settings, "--epochs", "3"))
    run = runs.runs_of(tiny, EXPERIMENTS["spread"], 1)[0]
    file.write_text(json.dumps({"runs": [named(other, run)]}))
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["spread", "--runs", str(tmp_path), "--out", str(file)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert str(file) in said and runs.key(other, run) in said and runs.key(tiny, run) in said and "seed 0" in said


def test_a_run_that_the_result_file_holds_is_not_made_again_unless_its_log_is_needed(tmp_path, capsys):
    tiny = presets.tiny(tmp_path / "tiny")
    known = [run for name in ("spread", "cases") for run in runs.runs_of(tiny, EXPERIMENTS[name], 1)]
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({"runs": [named(tiny, run) for run in known]}))
    given = ["--runs", str(tmp_path), "--out", str(file), "--dry-run"]
    for name, seeds, count in (("spread", 1, 0), ("spread", 2, 1), ("cases", 1, 1)):
        command_line.main([name, "--seeds", str(seeds), *given])
        assert capsys.readouterr().out.strip().endswith(f"# {count} runs")


def test_a_dry_run_prints_commands_that_parse_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "run_all", lambda *args: pytest.fail("ran"))
    argv = ["table5", "table14", "table6", "--preset", "paper", "--seeds", "1", "--runs", str(tmp_path), "--dry-run"]
    command_line.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python -m reproduce.efficiency --model models/Llama-2-7b-hf ")
    trained = [shlex.split(line) for line in lines if " train.py " in line]
    for words in trained:
        train.parse_config(words[words.index("train.py") + 1 :])
    outs = [words[words.index("--out") + 1] for words in trained]
    assert len(set(outs)) == len(outs)
    assert sum("GiB a device" in line for line in lines) + 2 == len(trained)  # a reference for each model
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["table99"], "expected some of all, figure1, figure2, figure7, figure9, table6, table1,"),
        ([SMALL[0]], "preset tiny: expected some of"),
        (["table1", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["smollm2", "--preset", "small"], "data/alpaca.json: no such file"),
        (["table1", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_a_wrong_command_line_is_refused_with_what_was_expected(argv, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(argv)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_are_added_to_those_in_the_file(tmp_path):
    tiny, out = presets.tiny(tmp_path), tmp_path / "tiny.json"
    other = dataclasses.replace(tiny, settings=(*tiny.settings, "--epochs", "3"))
    flags = ("--token-pruner", "none")
    for made_by, folder, seed, score in (
        (tiny, "a", 0, 1.0),
        (tiny, "b", 1, 2.0),
        (tiny, "b", 0, 3.0),
        (other, "c", 0, 4.0),
    ):
        run = runs.Run("embedded", WIZARD, flags, seed)
        summary = {**dataclasses.asdict(run), "key": runs.key(made_by, run), "scores": {"arc": score}}
        summary["machine"] = {"device_name": folder}
        path = tmp_path / folder / summary["key"] / "summary.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(summary))
    for folder in "abc":
        command_line.gather(tiny, tmp_path / folder, out)
    found = read_json(out)
    assert [(run["seed"], run["scores"]["arc"]) for run in found["runs"]] == [(0, 3.0), (1, 2.0)]
    assert [found["machines"][run["machine"]]["device_name"] for run in found["runs"]] == ["b", "b"]
    assert shlex.split(found["runs"][0]["flags"]) == list(flags)
    assert {run["seed"] for made in report.Results.read("tiny", out).runs.values() for run in made} == {0, 1}


# ----------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 6, 9, 10, 11, 15, 30, 100])
def test_the_quantile_of_students_t_leaves_two_and_a_half_percent_above(freedom):
    angle = numpy.linspace(0, math.atan(noise.t975(freedom) / math.sqrt(freedom)), 20_001)
    inside = numpy.trapezoid(numpy.cos(angle) ** (freedom - 1), angle)  # t = sqrt(freedom) tan(angle)
    whole = math.sqrt(math.pi) * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2) / 2
    assert 0.5 + inside / whole / 2 == pytest.approx(0.975, abs=1e-4)


scores = st.lists(st.floats(0, 100), min_size=2, max_size=6)


@given(scores, st.floats(-50, 50))
def test_intervals_do_not_move_with_the_level(values, shift):
    moved = [value + shift for value in values]
    assert noise.mean_margin(moved) == pytest.approx(noise.mean_margin(values), abs=1e-9)
    assert noise.difference_margin(moved, values) == pytest.approx(noise.difference_margin(values, values), abs=1e-9)


@given(scores, scores)
def test_a_difference_is_as_uncertain_either_way_round(a, b):
    assert noise.difference_margin(a, b) == pytest.approx(noise.difference_margin(b, a))


def test_margins_of_hand_computed_values():
    assert noise.mean_margin([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert noise.mean_margin([1.0]) is None
    assert noise.difference_margin([1.0, 2.0, 3.0], [5.0]) == pytest.approx(4.303 * math.sqrt(1 + 1 / 3))
    assert noise.difference_margin([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == pytest.approx(2.776 * math.sqrt(2 / 3))
    assert noise.difference_margin([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]) == pytest.approx(4.303 * math.sqrt(1 / 3))
    assert noise.difference_margin([4.0, 4.0], [5.0, 5.0, 5.0]) == 0
    assert noise.difference_margin([1.0], [2.0]) is None
    assert noise.proportions_margin((50.0, 100), (50.0, 100)) == pytest.approx(1.96 * math.sqrt(50))


# ---------------------------------------------------------------------------------------------- report


def test_a_single_run_is_as_uncertain_as_the_others_and_the_untuned_model_exact():
    tuned = [result(("--x",), seed, gsm8k) for seed, gsm8k in enumerate((1.0, 2.0, 3.0))]
    assert report.gain(tuned, [result(("--y",), 0, 5.0)], "gsm8k").margin == pytest.approx(4.303 * math.sqrt(1 + 1 / 3))
    assert report.gain(tuned, [result(None, 0, 5.0)], "gsm8k").margin == pytest.approx(4.303 / math.sqrt(3))
    assert report.gain([result(None, 0, 5.0)], tuned, "gsm8k").margin == pytest.approx(4.303 / math.sqrt(3))


def result(flags, seed, gsm8k, held=0.2):
    return {
        "model": "embedded",
        "data": WIZARD,
        "flags": flags and shlex.join(flags),
        "seed": seed,
        "scores": {"arc": 50.0 + seed, "gsm8k": gsm8k},
        "n": {"arc": 300, "gsm8k": 300},
        "held": {"rows_nll": [1.0, held]},
        "samples_seen": 80,
        "samples_kept": 10,
        "answer_tokens_seen": 100,
        "answer_tokens_kept": 6,
        **dict.fromkeys(("kept_q2", "kept_q4", "backfilled_q2"), 2),
        "backfilled_q4": 4,
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    random, ours = row("Random", "Random", "12.5x50"), qtuning("12.5x50")
    found = [result(None, 0, 31.0)]
    found += [result(random, seed, score, 0.30) for seed, score in enumerate((40.0, 41.0, 42.0))]
    found += [result(ours, seed, score, 0.25) for seed, score in enumerate((45.0, 46.0, 47.0))]
    tiny = presets.tiny(tmp_path)
    for run in found:
        run["key"] = report.key_of(tiny, run)
    (tmp_path / "tiny.json").write_text(json.dumps({"runs": found}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return report.Results.read("tiny")


def test_a_table_shows_the_papers_score_ours_and_the_difference_of_the_gains(results):
    table = report.score_table(results, "table1", "Mistral-7B")
    lines = {line.split(" | ")[1]: line.strip("| ").split(" | ") for line in table.splitlines()[2:]}
    assert set(lines) == {"Zero-Shot (reference)", "Random-Random (reference)", "Q-Tuning"}
    head = table.splitlines()[0].strip("| ").split(" | ")
    ours = dict(zip(head[8:13], lines["Q-Tuning"][8:13], strict=True))
    assert ours == {
        "GSM8K: paper": "29.34",
        "gain": "+5.0",  # ours; the column of the same name before it has the paper's +6.60
        "GSM8K form: ours": "46.0 ± 2.5",
        "difference": "-1.6 ~",
    }
    assert lines["Q-Tuning"][9] == "+6.60"
    assert lines["Random-Random (reference)"][10] == "41.0 ± 2.5"


def test_a_falling_loss_is_a_gain_and_a_gain_within_its_interval_is_noise(results):
    ours, theirs = (
        results.runs["embedded", WIZARD, f] for f in (qtuning("12.5x50"), row("Random", "Random", "12.5x50"))
    )
    assert report.gain(ours, theirs, "held").mean == pytest.approx(0.05)
    assert not report.gain(ours, theirs, "gsm8k").is_noise()
    assert report.gain(ours, theirs, "gsm8k").is_noise(expected=6.0)
    assert report.gain(ours, theirs, "arc").is_noise()
    line = "| Q-Tuning over random x random, 12.5x50 | +0.0 ± 2.3 | +5.0 ± 2.3 | +0.050 ± 0.000 | better on GSM8K form"
    assert line in report.answers(results)


def test_sources_are_shares_of_what_was_kept(results):
    assert "| 12.5x50 | 8 | 20 % | 20 % | 20 % | 40 % | 6.0 % |" in report.sources(results)


def test_the_page_holds_what_there_is_and_nothing_else(results, tmp_path, monkeypatch):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "figure5.svg").touch()
    monkeypatch.setattr(report.efficiency, "table", lambda found: "EFFICIENCY")
    monkeypatch.setattr(report, "read_json", lambda path: {})
    monkeypatch.setattr(report, "front_parts", lambda *args: [])
    monkeypatch.setattr(report.Results, "complete", lambda self: ["table1", "figure5"])
    page = report.page(results, None, tmp_path)
    assert "### Table 1: " in page
    assert "Not made: table2, table3, " in page
    assert "### Figure 5: Batch size and lambda (and Figure 9)" in page
    assert "(results/figures/figure5.svg)" in page
    assert "### Table 5: " not in page
    assert "## What is selected" not in page
    assert "SmolLM2-135M on real rows" not in page
    assert "EFFICIENCY" in page


def test_a_table_escapes_bars_and_has_as_many_dashes_as_columns():
    found = tables.markdown([["", "a"], ["Q3 | Q2", "1"]])
    assert found == "|  | a |\n| --- | --- |\n| Q3 \\| Q2 | 1 |"


def test_a_result_file_has_a_line_for_each_run_and_reads_back(tmp_path):
    results = {"runs": [{"a": 1, "b": ["ä"]}, {"a": 2}], "machines": [{"name": "x"}]}
    runs.write_by_line(tmp_path / "new" / "results.json", results, "runs")
    text = (tmp_path / "new" / "results.json").read_text()
    assert json.loads(text) == results
    lines = [line.strip(" ,") for line in text.splitlines()]
    assert [json.loads(line) for line in lines if line.startswith('{"a"')] == results["runs"]
    runs.write_by_line(tmp_path / "none.json", {"machines": [], "runs": []}, "runs")
    assert read_json(tmp_path / "none.json") == {"machines": [], "runs": []}
