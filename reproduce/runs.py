"""Runs of train.py and the benchmarks of eval/: their commands, names, folders and summaries.

A run is named by what it computes: its model, rows and seed, and the settings of train.py that differ from their
defaults. So two tables share a run that both contain, and an interrupted run continues. Paths are not part of the
name: delete a preset's folder and its result file after its checkpoints, its rows or the method have changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from data.sft import load_samples
from data.tokenizer import TextTokenizer
from eval.during import rows_scores
from model import Transformer
from pruners import COMPUTED, SAMPLE_PRUNERS, TOKEN_PRUNERS
from pruners.side_files import OF_SAMPLE
from reproduce.experiments import Experiment, Flags, rows
from reproduce.presets import Preset, Test, rows_of
from reproduce.quickstart import group_scores, machine
from training.files import read_json, read_jsonl, write_json, write_text
from training.lora import load_adapter
from training.memory import MOST_TOKENS

ELSEWHERE = ("model", "data", "out", "scores", "resume", "eval_every", "eval_sets", "eval_limit")
TOTALS = (
    "samples_seen",
    "samples_kept",
    "kept_q2",
    "kept_q4",
    "backfilled_q2",
    "backfilled_q4",
    "answer_tokens_seen",
    "answer_tokens_kept",
    "tokens_scored",
    "tokens_trained",
)
HELDOUT = ("rows_nll", "rows_ppl", "rows_ent")  # measures of the held-out rows

Command = tuple[str, list[str]]  # a module's name and its flags


@dataclass(frozen=True)
class Run:
    """Names of a preset's model and data, flags of train.py (None: the untuned model), and the seed."""

    model: str
    data: str
    flags: tuple[str, ...] | None
    seed: int


def run_of(preset: Preset, model: str, data: str, flags: Flags | None, seed: int) -> Run:
    """The run of these names and flags.

    Of several names for one checkpoint or file it takes the first, and a factor becomes a learning rate.
    """

    def first(named: dict[str, Path], name: str) -> str:
        return next(other for other, path in named.items() if path == named[name])

    model, data = first(preset.models, model), first(preset.data, data)
    if flags is None:
        return Run(model, data, None, 0)
    return Run(model, data, tuple(f if isinstance(f, str) else f"{f * preset.lr:g}" for f in flags), seed)


def runs_of(preset: Preset, experiment: Experiment, seeds: int) -> list[Run]:
    """All runs of an experiment, the first seed's first."""
    models = experiment.models or preset.sizes
    every = ((seed, model, flags) for seed in range(seeds) for model in models for _, _, flags in rows(experiment))
    return list(dict.fromkeys(run_of(preset, model, experiment.data, flags, seed) for seed, model, flags in every))


# --------------------------------------------------------------------------------------------- commands


def settings(preset: Preset, run: Run) -> list[str]:
    """A run's flags of train.py, without paths and without evaluation."""
    template = ["--template", preset.templates[run.model]] if run.model in preset.templates else []
    return [*preset.settings, *template, *run.flags, "--seed", str(run.seed)]


def config_of(preset: Preset, run: Run) -> train.Config:
    """A run's settings, without paths."""
    return parsed(("--model", "-", "--data", "-", *settings(preset, run)))


@functools.cache
def parsed(flags: tuple[str, ...]) -> train.Config:
    return train.parse_config(list(flags))


def key(preset: Preset, run: Run) -> str:
    """A run's name: twelve hex digits of a hash of what it computes."""
    computed = [run.model, run.data]
    if run.flags is not None:
        config = config_of(preset, run)
        fields = [field for field in dataclasses.fields(config) if field.name not in ELSEWHERE]
        computed.append({f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default})
    return hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest()[:12]


def side_files(preset: Preset, run: Run) -> list[str]:
    """The side files that the run's pruners need."""
    if run.flags is None:
        return []
    config = config_of(preset, run)
    needs = (*SAMPLE_PRUNERS[config.sample_pruner].needs, *TOKEN_PRUNERS[config.token_pruner].needs)
    return [need for need in needs if isinstance(need, str) and need not in (*COMPUTED, *OF_SAMPLE)]


def side_folder(preset: Preset, run: Run, root: Path) -> Path | None:
    """The folder of the side files that a run needs; None if it needs none.

    Its name holds the settings with which the models that write them are tuned.
    """
    return root / f"side-{run.model}-{run.data}-{key(preset, untouched(run))}" if side_files(preset, run) else None


def untouched(run: Run) -> Run:
    """The run of the same model and rows with full data, seed 0."""
    return dataclasses.replace(run, flags=("--sample-pruner", "none", "--token-pruner", "none"), seed=0)


def train_command(preset: Preset, run: Run, root: Path) -> Command:
    argv = ["--model", str(preset.models[run.model]), "--data", str(preset.data[run.data])]
    argv += ["--out", str(root / key(preset, run)), *settings(preset, run)]
    argv += ["--eval-every", str(preset.eval_every), "--eval-sets", f"rows={preset.heldout}"]
    side = side_folder(preset, run, root)
    return "train", argv + (["--scores", str(side / "scores")] if side else [])


def weights(preset: Preset, run: Run, root: Path) -> tuple[Path, Path | None]:
    """The folders of a run's model and of its adapter, if it has one."""
    folder, base = root / key(preset, run), preset.models[run.model]
    if run.flags is None:
        return base, None
    return (base, folder / "adapter") if config_of(preset, run).lora_rank else (folder / "model", None)


def tests_of(preset: Preset, run: Run) -> dict[str, Test]:
    """Task -> the test that scores a run."""
    pruners = set()
    if run.flags is not None:
        config = config_of(preset, run)
        pruners = {config.sample_pruner, config.token_pruner} - {"none"}
    return preset.tests[run.data] | ({} if pruners else preset.ends)


def eval_commands(preset: Preset, run: Run, root: Path) -> dict[str, Command]:
    """Task -> the command that scores the run on it."""
    folder = root / key(preset, run)
    base, adapter = weights(preset, run, root)
    model = ["--model", str(base), *(["--adapter", str(adapter)] if adapter else [])]
    return {
        task: (module, [*model, *flags, "--out", str(folder / f"{task}.json")])
        for task, (module, flags) in tests_of(preset, run).items()
    }


def side_commands(preset: Preset, runs: Sequence[Run], side: Path) -> list[Command]:
    """The commands that write the side files of runs that share a folder: model and rows are the same.

    The reference model of `reference_nll` and the warm-up run of `less` are tuned on side/tenth.json. The warm-up
    run is LoRA, also where the preset's runs are full fine-tuning.
    """
    model, scored = ["--model", str(preset.models[runs[0].model])], ["--data", str(preset.data[runs[0].data])]
    whole = untouched(runs[0])
    tune = [*model, "--data", str(side / "tenth.json"), *settings(preset, whole), "--epochs", "3"]
    lora, reference, warmup = config_of(preset, whole).lora_rank > 0, side / "reference", side / "warmup"
    tuned = {  # field -> how the run that it needs is tuned
        "reference_nll": [*tune, "--out", str(reference)],
        "less": [*tune, *([] if lora else ["--lora-rank", "8", "--lr", "1e-3"]), "--out", str(warmup)],
    }
    scorer = {  # field -> the model that writes it; default: the one that is tuned
        "reference_nll": [*model, "--adapter", str(reference / "adapter")]
        if lora
        else ["--model", str(reference / "model")],
        "less": [*model, "--warmup", str(warmup), "--targets", *map(str, preset.targets)],
    }
    fields = dict.fromkeys(field for run in runs for field in side_files(preset, run))
    commands = [("train", tuned[field]) for field in fields if field in tuned]
    for field in fields:
        argv = [field, *scorer.get(field, model), *scored, "--scores", str(side / "scores")]
        commands.append(("pruners.score_rows", argv))
    return commands


def efficiency_command(preset: Preset, out: Path) -> Command:
    """Table 6, what pruning saves, on the preset's first model and rows and on one device."""
    model, data = next(iter(preset.models.values())), next(iter(preset.data.values()))
    given = [] if str(model) == train.TINY["model"] else ["--model", str(model), "--data", str(data)]
    return "reproduce.efficiency", [*given, "--out", str(out)]


def words(preset: Preset, command: Command) -> list[str]:
    """The command line of a command."""
    module, argv = command
    many = preset.devices > 1 and module != "pruners.score_rows"  # which runs on one device
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={preset.devices}"] if many else ["python"]
    return [*launcher, *(["-m", module] if "." in module else [f"{module}.py"]), *argv]


# ---------------------------------------------------------------------------------------------- running


def execute(preset: Preset, command: Command, log: Path, main: Callable[[list[str]], None] | None = None) -> None:
    """Run a command, in this process where it takes one CPU; its output is appended to `log`.

    Args:
        main: what runs in this process; default: the module's own `main`.
    Raises:
        ChildProcessError: the command failed, with its last line.
    """
    module, argv = command
    if module == "train":
        out = Path(argv[argv.index("--out") + 1])
        if (out / "finished.json").exists():  # a run's last file
            return
        argv = [*argv, "--resume"] if (out / "config.json").exists() else argv
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        if preset.devices:
            failed = subprocess.run(words(preset, (module, argv)), stdout=file, stderr=file, check=False).returncode
        else:
            try:
                with redirect_stdout(file), redirect_stderr(file):
                    (main or importlib.import_module(module).main)(argv)
                failed = 0
            except SystemExit as stop:
                failed = stop.code
    if failed:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        raise ChildProcessError(f"{module} failed, see {log}: {lines[-1]}")


def make_side_files(preset: Preset, runs: Sequence[Run], root: Path) -> None:
    """Write the side files of runs that share a folder."""
    side = side_folder(preset, runs[0], root)
    if not (side / "tenth.json").exists():
        every = rows_of(preset.data[runs[0].data])
        write_json(side / "tenth.json", random.Random(0).sample(every, len(every) // 10))
    for command in side_commands(preset, runs, side):
        execute(preset, command, side / "log.txt")


def make(preset: Preset, run: Run, root: Path, main: Callable[[list[str]], None] | None = None) -> dict:
    """Train and score a run as far as it is not done yet; returns its summary, which is also its summary.json.

    Args:
        main: trains in place of `train.main`, for ablations.
    """
    folder = root / key(preset, run)
    done = folder / "summary.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if run.flags is not None:
            execute(preset, train_command(preset, run, root), folder / "log.txt", main)
        scored = eval_commands(preset, run, root)
        for task, command in scored.items():
            if not (folder / f"{task}.json").exists():
                execute(preset, command, folder / "log.txt")
        found = {"key": key(preset, run), **dataclasses.asdict(run), "scores": {}, "n": {}}
        results = {task: read_json(folder / f"{task}.json") for task in scored}
        for name, (score, n) in scores(results, preset.groups).items():
            found["scores"][name], found["n"][name] = score, n
        found |= trained(folder) if run.flags is not None else {}
        if run.flags is None:  # step 0 of every run's curve
            before = rows_measures(preset, run, root, preset.heldout)
            found["held"] = {"step": [0], **{name: [before[name]] for name in HELDOUT}}
        for name, rows in preset.losses.items():
            found[name] = rows_measures(preset, run, root, rows)["rows_nll"]
        write_json(done, found)
        for name in ("checkpoint", *(() if preset.keep_weights else ("model",))):
            shutil.rmtree(folder / name, ignore_errors=True)
    return read_json(done)


def trained(folder: Path) -> dict:
    """Totals of a run's metrics.jsonl; `held` has a list of steps, and a list for each measure of held-out rows."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    scored = [m for m in metrics if "eval_rows_nll" in m]
    return {
        "steps": len(metrics),
        **{name: sum(m[name] for m in metrics) for name in TOTALS},
        "seconds": round(sum(m["score_s"] + m["train_s"] for m in metrics), 1),
        "held": {
            "step": [m["step"] for m in scored],
            **{name: [round(m[f"eval_{name}"], 5) for m in scored] for name in HELDOUT},
        },
        "machine": machine(folder),
    }


def scores(results: dict[str, dict], groups: tuple[str, ...]) -> dict[str, tuple[float, int]]:
    """(score in percent, number of items) of each task, and of each group of items over all tasks."""
    found = {task: (round(result["score"], 4), result["n"]) for task, result in results.items()}
    return found | group_scores(results, groups)


def rows_measures(preset: Preset, run: Run, root: Path, rows: Path) -> dict[str, float]:
    """The loss, perplexity and entropy of a run's model on held-out rows, in the run's template and dtype."""
    flags = run.flags if run.flags is not None else ()
    config = train.resolve(config_of(preset, dataclasses.replace(run, flags=flags)))
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    folder, adapter = weights(preset, run, root)
    model = Transformer.from_pretrained(folder, dtype=dtype, device=config.device)
    if adapter:
        load_adapter(model, adapter)
    tokenizer = TextTokenizer.from_pretrained(folder)
    samples, _ = load_samples(rows, tokenizer, config.template, config.max_length)
    found = rows_scores(model, samples, config.pass_tokens or MOST_TOKENS, nullcontext())
    return {name: round(found[name], 5) for name in HELDOUT}


def write_by_line(path: Path, results: dict, *names: str) -> None:
    """Write a result file (JSON) in which each item of the lists `names` is one line; these lists come last."""
    text = json.dumps({key: value for key, value in results.items() if key not in names}, indent=1, ensure_ascii=False)
    text = text.removesuffix("\n}")
    for name in names:
        items = ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in results[name])
        text += f',\n "{name}": [\n{items}\n ]'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{text}\n}}\n")
