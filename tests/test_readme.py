"""README.md and docs/ are true of the code: commands, links, flags, choices, keys, pruners, examples and numbers."""

import dataclasses
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.run import get_args_parser

import pruners
import qtuning
import train
from model import Transformer
from reproduce import choices, efficiency, front, gpu, memory, packing, quickstart, report, selection
from reproduce.experiments import BEST_RATES, EXPERIMENTS, FULL_DATA, METHODS, PARTS, at_rate
from reproduce.presets import SMALL_HELDOUT
from training.files import read_json, read_jsonl
from training.memory import peak_bytes

ROOT = Path(train.__file__).parent
RESULTS = ROOT / "reproduce" / "results"
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES[ROOT / "README.md"]


def page(name: str) -> str:
    return PAGES[ROOT / "docs" / name]


def section(text: str, heading: str) -> str:
    """The text between a heading of the second level and the next one."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def table(text: str) -> list[list[str]]:
    """The cells of the first Markdown table, without its head."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ------------------------------------------------------------------------------------------ form


def test_readme_holds_at_most_180_lines_of_at_most_120_characters():
    lines = README.splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > 120] == []


def test_prose_of_the_docs_holds_lines_of_at_most_120_characters():
    lines = [line for text in PAGES.values() for line in text.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


def test_readme_states_the_lines_of_each_file_to_within_a_tenth():
    rows = re.findall(r"^\| \[`(\S+)`\]\(\S+\) \| (\d+) \|", README, re.MULTILINE)
    assert [name for name, _ in rows[:3]] == ["qtuning.py", "model.py", "train.py"]
    counts = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name, _ in rows}
    assert {name: counts[name] for name, said in rows if abs(int(said) - counts[name]) > counts[name] / 10} == {}


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[path]) if not link.startswith("http")]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_of_docs_is_linked_from_readme():
    assert [p.name for p in PAGES if p.parent.name == "docs" and f"(docs/{p.name})" not in README] == []


# ------------------------------------------------------------------------------- commands and flags


def test_ci_runs_the_two_commands_word_for_word_and_checks_the_style():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("python3")] == commands
    assert lines[-2:] == [".venv/bin/ruff check", ".venv/bin/ruff format --check"]
    assert re.search(r"^ruff==\d", (ROOT / "requirements-test.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_workflow_starts_at_the_oldest_python_that_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in workflow
    oldest = re.search(r'python-version: \["([\d.]+)"', workflow)[1]
    assert project["requires-python"] == f">={oldest}"
    assert f"Python {oldest} or later" in README
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_flags_exist():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(train.Config)}
    for folder in ("pruners", "eval", "reproduce", "data"):
        for source in (ROOT / folder).glob("*.py"):
            flags |= set(re.findall(r'"(--[a-z-]+)"', source.read_text(encoding="utf-8")))
    elsewhere = {"--help", "--nproc_per_node", "--standalone", "--nnodes", "--node_rank", "--dist"}
    elsewhere |= {"--rdzv_endpoint", "--rdzv_backend"}
    named = {flag for text in PAGES.values() for flag in re.findall(r"--[a-z][a-z0-9_-]+", text)}
    assert named - flags - elsewhere == set()


def test_modules_that_commands_run_exist():
    modules = {name for text in PAGES.values() for name in re.findall(r"python -m ([\w.]+)", text)}
    modules |= {name for text in PAGES.values() for name in re.findall(r"(?:torchrun|\d) -m ([\w.]+)", text)}
    assert {"reproduce.quickstart", "pruners.score_rows", "eval.gsm8k"} <= modules
    assert [name for name in modules - {"venv"} if importlib.util.find_spec(name) is None] == []


def test_torchrun_takes_the_command_for_several_machines():
    text = section(page("COST.md"), "Several devices and machines")
    (command,) = re.findall(r"^torchrun (.*) \.\.\.$", text, re.MULTILINE)
    args = get_args_parser().parse_args(shlex.split(command))
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "8", "c10d")
    assert args.training_script == "train.py" and args.training_script_args == ["--out", "DIR"]
    fixed = get_args_parser().parse_args([*shlex.split("--rdzv_backend=static --node_rank=1"), "train.py"])
    assert "`--rdzv_backend=static --node_rank=N`" in text and (fixed.rdzv_backend, fixed.node_rank) == ("static", 1)


def test_pages_say_that_no_gpu_has_run_this_as_long_as_no_result_is_from_one():
    devices = {
        device
        for path in RESULTS.glob("*.json")
        for device in re.findall(r'"device(?:_name)?": "([^"]*)"', path.read_text(encoding="utf-8"))
    }
    assert devices and all(re.fullmatch(r"\d+ cpu cores(, \w+)?", device) for device in devices)
    for text in (README, page("COST.md"), page("MODELS.md")):
        words = " ".join(text.split())
        assert "No line of the CUDA path has run on a real GPU" in words and "`python -m reproduce gpu" in words


def test_what_the_check_of_a_gpu_reports_is_what_docs_say():
    source = (ROOT / "reproduce" / "gpu.py").read_text(encoding="utf-8")
    words = " ".join(section(page("COST.md"), "On a GPU").split())
    for finding in ("two backward passes are bit-equal", "the resumed run is bit-equal"):
        assert f'{finding}"' in source and finding in words
    (parts,) = re.findall(r"`--parts ([a-z ]+)`", words)
    assert tuple(parts.split()) == gpu.IN_FP32_TOO


def test_the_models_that_eight_gpus_hold_are_those_of_the_formula():
    held = {
        name
        for name, cfg in memory.MODELS.items()
        if peak_bytes(cfg, memory.TOKENS, memory.SHARDED, ranks=memory.RANKS, shard=True) < 80 * 2**30
    }
    assert "GPUs of 80 GiB hold the full tuning of 7B to 14B, but not that of Qwen3-32B" in " ".join(
        section(page("COST.md"), "Memory").split()
    )
    assert memory.MODELS.keys() - held == {"Qwen3-32B"}


# ------------------------------------------------------------------------------------------ choices


def test_every_choice_has_its_row_and_a_test_that_exists():
    text = page("CHOICES.md")
    expected = [f"C{i}" for i in range(1, 19)]
    assert [row[0] for row in table(section(text, "What is done"))] == expected
    rows = table(section(text, "Why, and what the other reading changes"))
    assert [row[0] for row in rows] == expected
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert [row[3] for row in rows if f"def {row[3].strip('`')}(" not in tests] == []
    found = read_json(RESULTS / "choices.json")
    assert {row[0]: row[2] for row in rows} == {name: choices.cell(found, name) for name in expected}


def test_the_main_choices_of_readme_are_among_all_choices():
    rows = table(section(README, "Main choices"))
    assert len(rows) == 6
    assert {row[0] for row in rows} <= {f"C{i}" for i in range(1, 19)}


# ------------------------------------------------------------------------------ keys of a run's files


@pytest.fixture(scope="module")
def run_keys(tmp_path_factory, checkpoint, rows):
    """Every key of the files that two short runs write: Q-Tuning with evaluations, and InfoBatch with weights."""
    found = {"config.json": set(), "metrics.jsonl": set(), "selection.jsonl": set()}
    sets = f"rows={rows},arc={ROOT / 'data' / 'tiny' / 'arc_test.jsonl'}"
    for pruner, more in (("qtuning", {"eval_every": 1, "eval_sets": sets, "eval_limit": 2}), ("infobatch", {})):
        out = tmp_path_factory.mktemp("run")
        settings = {"model": str(checkpoint), "data": str(rows), "out": str(out), "max_steps": 1, "device": "cpu"}
        settings |= {"micro_batch": 8, "grad_accum": 1, "sample_keep_ratio": 0.5, "sample_pruner": pruner}
        train.train(train.Config(**settings, log_selection=True, **more))
        found["config.json"] |= set(read_json(out / "config.json"))
        found["metrics.jsonl"] |= {key for line in read_jsonl(out / "metrics.jsonl") for key in line}
        records = [record for line in read_jsonl(out / "selection.jsonl") for record in line["samples"]]
        found["selection.jsonl"] |= {key for record in records for key in record}
    return found


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "selection.jsonl"])
def test_every_key_of_a_run_is_explained_and_every_explained_key_is_written(file, run_keys):
    explained = {name for row in table(section(page("METRICS.md"), file)) for name in names(row[0])}
    assert explained - {"eval_gsm8k"} == run_keys[file]  # the second example of a benchmark's key


# ------------------------------------------------------------------------------------------ pruners


def need_name(need) -> str:
    return need if isinstance(need, str) else need.__name__


def test_the_tables_of_pruners_are_those_of_the_code():
    moments = {"choose": "in each prune batch", "rows": "once", "draw": "before each epoch"}
    rows = table(section(page("BASELINES.md"), "Sample pruners"))
    shown = {names(name)[0]: (chooses, names(needs)) for name, chooses, needs, _ in rows}
    assert shown == {
        name: (
            next((words for field, words in moments.items() if getattr(pruner, field)), "never"),
            [need_name(need) for need in pruner.needs],
        )
        for name, pruner in pruners.SAMPLE_PRUNERS.items()
    }
    token_rows = table(section(page("BASELINES.md"), "Token pruners"))
    assert {names(name)[0]: [n.split(".")[-1] for n in names(needs)] for name, needs, _ in token_rows} == {
        name: [need_name(need) for need in pruner.needs] for name, pruner in pruners.TOKEN_PRUNERS.items()
    }
    functions = [names(row[-1]) for row in rows + token_rows]
    known = {**vars(qtuning), **vars(pruners)}
    assert [name for found in functions for name in found if name.removeprefix("qtuning.") not in known] == []


def test_every_need_that_is_not_computed_is_a_documented_side_file():
    needs = {
        need for table in (pruners.SAMPLE_PRUNERS, pruners.TOKEN_PRUNERS) for p in table.values() for need in p.needs
    }
    read = {need for need in needs if isinstance(need, str)} - set(pruners.COMPUTED) - {"num_answer_tokens"}
    rows = table(section(page("BASELINES.md"), "Side files"))
    assert {name for row in rows for name in names(row[0])} == read


# ------------------------------------------------------------------------------------------ examples


def python_block(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


def test_the_trainer_example_runs_and_its_loss_is_the_mean_over_the_kept_tokens(checkpoint):
    model = Transformer.from_pretrained(checkpoint)
    input_ids = torch.randint(100, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.roll(-1, dims=1)
    labels[:, :4] = -100
    scope = {"torch": torch, "F": F, "qtuning": qtuning, "model": model, "input_ids": input_ids, "labels": labels}
    exec(python_block(README), scope)
    nll, _ = qtuning.token_nll_and_entropy(model(input_ids), labels)
    assert scope["loss"].item() == pytest.approx(nll[scope["pruned"].token_mask].mean().item(), rel=1e-5)
    assert int(scope["keep"].sum()) == 1


def test_the_example_of_a_new_pruner_trains(tmp_path, checkpoint, rows):
    settings = {"model": str(checkpoint), "data": str(rows), "out": str(tmp_path), "max_steps": 1, "device": "cpu"}
    settings |= {"sample_pruner": "hardest", "token_pruner": "first", "sample_keep_ratio": 0.25, "grad_accum": 1}
    try:
        exec(python_block(section(page("BASELINES.md"), "Add a pruner")), {})
        train.train(train.Config(**settings, log_selection=True))
    finally:
        pruners.SAMPLE_PRUNERS.pop("hardest", None)
        pruners.TOKEN_PRUNERS.pop("first", None)
    (line,) = read_jsonl(tmp_path / "selection.jsonl")
    ppl = [sample["ppl"] for sample in line["samples"]]
    kept = [sample for sample in line["samples"] if sample["kept"]]
    assert sorted(sample["ppl"] for sample in kept) == sorted(ppl)[-2:]
    assert all(re.fullmatch("1+0+", sample["tokens"]) for sample in kept)


# ------------------------------------------------------------------------------------------ numbers


def generated(text: str) -> dict[str, str]:
    """name -> content of each `<!-- name -->` block."""
    found = re.findall(r"<!-- (\w+) -->\n(?:```text\n)?(.*?)(?:\n```)?\n<!-- end -->", text, re.DOTALL)
    return {name: content.strip() for name, content in found}


def result(name: str) -> dict:
    return read_json(RESULTS / f"{name}.json")


def tables_of_results() -> dict[str, str]:
    tiny = report.Results.read("tiny")
    return {
        "quickstart": quickstart.report(result("quickstart")),
        "grid_ends": report.grid_ends(tiny),
        "grid_loss": report.grid(tiny, "held"),
        "grid": report.grid(tiny, "gsm8k"),
        "scores": report.scores_table(result("smollm2_scores")),
        "smollm2": selection.table([result("smollm2_gsm8k"), result("smollm2_alpaca")]),
        "efficiency_smollm2": efficiency.shares(result("efficiency_smollm2")),
        "efficiency_tiny": efficiency.shares(result("efficiency_tiny")),
        "packing": packing.table(result("packing_smollm2")),
        "memory": memory.table(result("memory")),
    }


def test_the_tables_of_docs_are_those_of_the_committed_results():
    shown = {
        name: content
        for path, text in PAGES.items()
        if path.parent.name == "docs"
        for name, content in generated(text).items()
    }
    assert shown == {name: content.strip() for name, content in tables_of_results().items()}


def test_the_tables_of_readme_are_rows_of_the_committed_results():
    shown = generated(README)
    whole = {
        "front": front.front_table(report.Results.read("tiny")),
        "efficiency": efficiency.shares(result("efficiency_smollm2")),
    }
    assert shown.keys() == whole.keys()
    for name, content in shown.items():
        head, rule, *rows = content.splitlines()
        known = whole[name].strip().splitlines()
        assert [head, rule] == known[:2]
        assert [row for row in rows if row not in known[2:]] == []
        assert sorted(rows, key=known.index) == rows
    assert len(shown["front"].splitlines()) == 2 + 8


FOUND = " ".join(section(README, "What was found").split())
ONCE, BARRED, PRINTED, RANDOM = (
    METHODS[name] for name in ("Q1 barred, scored once", "Q1 barred", "as printed", "random")
)
HALF, LESS = ONCE("50x100"), METHODS["LESS"]("50x100")
FULL_AT_BEST = at_rate(FULL_DATA, BEST_RATES["", "full data"])
TRIMMED_AT_BEST = at_rate(ONCE("50x50"), BEST_RATES["50x50", "Q1 barred, scored once"])
WHOLE_ANSWERS = PARTS["Q1 barred, whole answers"]
TOKENS = EXPERIMENTS["figure6"].sections["100x50"]
GARBLED, WRONG = "noise-garbled-0.3", "noise-wrong-0.3"
GAINS = [  # what README says, with {} for how much better the first row is than the second; experiment, measure
    ("at 2e-4: by {} trimmed (50x50, 3 seeds),", ONCE("50x50"), FULL_DATA, "trimmed", "held"),
    ("by {} whole, in", HALF, FULL_DATA, "front", "held"),
    ("the corrected score is {} points lower.", FULL_DATA, HALF, "front", "corrected"),
    ("full data leads** 50x50 by {},", FULL_AT_BEST, TRIMMED_AT_BEST, "best", "held"),
    ("but retains {} points less. LESS", TRIMMED_AT_BEST, FULL_AT_BEST, "best", "retained"),
    ("but learns {} points less than full data.", FULL_DATA, LESS, "front", "learned"),
    ("one budget of six**, 50x50, by {} in loss", PRINTED("50x50"), RANDOM("50x50"), "trimmed", "held"),
    ("It is worse at 12.5x100", RANDOM("12.5x100"), PRINTED("12.5x100"), "front", "held"),
    ("and 25x100,", RANDOM("25x100"), PRINTED("25x100"), "front", "held"),
    ("At 25 % random tokens do too ({}).", PARTS["Q1 barred, tokens at random"], WHOLE_ANSWERS, "parts", "held"),
    ("ends {} above random tokens (one seed).", TOKENS["Random"], TOKENS["Q-Tuning"], "figure6", "held"),
    ("garbled rows half, Q1 barred, beat full data** by {};", BARRED("50x100"), FULL_DATA, GARBLED, "held"),
    ("as printed they trail it by {}.", FULL_DATA, PRINTED("50x100"), GARBLED, "held"),
    ("trails random pruning by {} with wrong rows,", RANDOM("50x100"), BARRED("50x100"), WRONG, "held"),
    ("by {} without noise.", RANDOM("50x100"), BARRED("50x100"), "noise-all-0", "held"),
]
LEVEL = [("50x100", "front"), ("12.5x50", "front"), ("25x50", "parts")]


def gain(ours, over, name, task):
    results, experiment = report.Results.read("tiny"), EXPERIMENTS[name]
    model = experiment.models[0]
    return report.gain(results.of(experiment, model, ours), results.of(experiment, model, over), task)


@pytest.mark.parametrize(("words", "ours", "over", "name", "task"), GAINS, ids=[words for words, *_ in GAINS])
def test_readme_states_a_gain_that_its_runs_give(words, ours, over, name, task):
    found = gain(ours, over, name, task)
    assert found.mean > 0 and (found.margin is None or not found.is_noise())
    assert words.format(report.interval(found, task)[1:]) in FOUND


@pytest.mark.parametrize(("budget", "name"), LEVEL)
def test_readme_calls_level_what_no_run_tells_apart(budget, name):
    assert "level at 50x100, 12.5x50 and 25x50." in FOUND
    found = gain(PRINTED(budget), RANDOM(budget), name, "held")
    assert found.margin is not None and found.is_noise()


def test_readme_states_what_trimming_gains_at_each_share_of_samples():
    gains = [gain(BARRED(f"{share}x50"), BARRED(f"{share}x100"), "front", "held") for share in ("12.5", "25", "50")]
    assert not any(found.is_noise() for found in gains)
    low, high = (f"{which(found.mean for found in gains):.3f}" for which in (min, max))
    assert f"by {low} to {high} at each of the three shares of samples." in FOUND


def test_readme_states_the_seconds_of_half_and_of_full_data():
    half, full = (front.seconds(report.Results.read("tiny"), flags) for flags in (HALF, FULL_DATA))
    assert f"in {half:.0f} seconds of {full:.0f}." in FOUND


def test_readme_states_the_losses_of_the_real_model_over_full_data():
    results, experiment = report.Results.read("small"), EXPERIMENTS["smollm2-noise"]
    named = experiment.sections["50x50"]
    said = {"with Q1 barred": "Q-Tuning, Q1 barred", "as printed": "Q-Tuning", "for random pruning": "Random-Random"}
    (full,) = results.of(experiment, experiment.models[0], FULL_DATA)
    for words, name in said.items():
        (run,) = results.of(experiment, experiment.models[0], named[name])
        losses = ", ".join(f"{run[loss] - full[loss]:.3f}" for loss in SMALL_HELDOUT.values())
        assert f"{losses} nats {words}" in FOUND or f"{losses} {words}" in FOUND


def test_readme_shows_the_eight_lines_that_the_first_command_ends_in():
    (block,) = re.findall(r"```text\n(.*?)\n```", README, re.DOTALL)
    assert block == quickstart.summary(result("quickstart"))
    assert len(block.splitlines()) == 8
