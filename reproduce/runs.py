"""Runs of train.py and the scorers as commands: what each is called, where it lies, what it left.

A run is known by what it computes: its model, rows and seed, and the settings of train.py that differ from their
defaults. So a run that two tables share is made once, and one that was cut goes on where it stopped. Paths are not
part of it: delete a preset's folder after its checkpoints, rows or the method have changed.
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
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from data.sft import load_samples
from data.tokenizer import TextTokenizer
from model import Transformer, read_json, write_json
from reproduce.experiments import Experiment, Flags, rows
from reproduce.presets import Preset, rows_of, write_rows
from reproduce.quickstart import machine, read_jsonl

EVAL_EVERY = 25  # steps between two looks at the held rows
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
HELD = ("rows_nll", "rows_ppl", "rows_ent")
FROM_SIDE_FILES = {"alpagasus", "deita", "ds2", "less", "rho1", "tokencleaning-row"}  # pruners that go by them
SIDE_FILES = ("base_nll", "reference_nll", "rating", "complexity", "quality", "embedding", "less")

Command = tuple[str, list[str]]  # a module's name and its flags


@dataclass(frozen=True)
class Run:
    model: str  # of Preset.models
    data: str  # of Preset.data
    flags: Flags | None  # None: the untuned model
    seed: int


def run_of(preset: Preset, model: str, data: str, flags: Flags | None, seed: int) -> Run:
    """The run that these names come to: of names that stand for one checkpoint or file, the first."""

    def first(named: dict[str, Path], name: str) -> str:
        return next(other for other, path in named.items() if path == named[name])

    return Run(first(preset.models, model), first(preset.data, data), flags, seed if flags is not None else 0)


def runs_of(preset: Preset, experiment: Experiment, seeds: int) -> list[Run]:
    """All runs of an experiment, the first seed's first."""
    models = experiment.models or preset.sizes
    every = ((seed, model, flags) for seed in range(seeds) for model in models for _, _, flags in rows(experiment))
    return list(dict.fromkeys(run_of(preset, model, experiment.data, flags, seed) for seed, model, flags in every))


# --------------------------------------------------------------------------------------------- commands


def settings(preset: Preset, run: Run) -> list[str]:
    """Flags of train.py, but for paths and what is only looked at."""
    template = ["--template", preset.templates[run.model]] if run.model in preset.templates else []
    flags = [f"{float(flag[1:]) * preset.lr:g}" if flag in ("x2", "x4") else flag for flag in run.flags]
    return [*preset.settings, *template, *flags, "--seed", str(run.seed)]


def config_of(preset: Preset, run: Run) -> train.Config:
    return parsed(("--model", "-", "--data", "-", *settings(preset, run)))


@functools.cache
def parsed(flags: Flags) -> train.Config:
    return train.parse_config(list(flags))


def key(preset: Preset, run: Run) -> str:
    """Twelve hex digits of what the run computes."""
    told = [run.model, run.data]
    if run.flags is not None:
        config = config_of(preset, run)
        fields = [field for field in dataclasses.fields(config) if field.name not in ELSEWHERE]
        told.append({f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default})
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def side_folder(run: Run, root: Path) -> Path | None:
    """Where the side files that a run goes by lie; None if it goes by none."""
    return root / f"side-{run.model}-{run.data}" if FROM_SIDE_FILES & set(run.flags or ()) else None


def train_command(preset: Preset, run: Run, root: Path) -> Command:
    argv = ["--model", str(preset.models[run.model]), "--data", str(preset.data[run.data])]
    argv += ["--out", str(root / key(preset, run)), *settings(preset, run)]
    argv += ["--eval-every", str(EVAL_EVERY), "--eval-sets", f"rows={preset.held}"]
    side = side_folder(run, root)
    return "train", argv + (["--scores", str(side / "scores")] if side else [])


def eval_commands(preset: Preset, run: Run, root: Path) -> dict[str, Command]:
    """Task -> its scorer."""
    folder, model = root / key(preset, run), ["--model", str(preset.models[run.model])]
    if run.flags is not None:
        lora = config_of(preset, run).lora_rank > 0
        model = [*model, "--adapter", str(folder / "adapter")] if lora else ["--model", str(folder / "model")]
    return {
        task: (module, [*model, *flags, "--out", str(folder / f"{task}.json")])
        for task, (module, flags) in preset.tests[run.data].items()
    }


def side_commands(preset: Preset, run: Run, side: Path) -> list[Command]:
    """A reference model and LESS's warm-up run, both tuned on side/tenth.json, and a pass over all rows for each file.

    A million parameters are tuned whole; LESS needs LoRA all the same.
    """
    model, scored = ["--model", str(preset.models[run.model])], ["--data", str(preset.data[run.data])]
    whole = dataclasses.replace(run, flags=("--sample-pruner", "none", "--token-pruner", "none"), seed=0)
    tune = [*model, "--data", str(side / "tenth.json"), *settings(preset, whole), "--epochs", "3"]
    lora = config_of(preset, whole).lora_rank > 0
    reference = side / "reference"
    further = {
        "reference_nll": [*model, "--adapter", str(reference / "adapter")]
        if lora
        else ["--model", str(reference / "model")],
        "less": [*model, "--warmup", str(side / "warmup"), "--targets", *map(str, preset.targets)],
    }
    return [
        ("train", [*tune, "--out", str(reference)]),
        ("train", [*tune, *([] if lora else ["--lora-rank", "8", "--lr", "1e-3"]), "--out", str(side / "warmup")]),
        *(
            ("score_rows", [what, *further.get(what, model), *scored, "--scores", str(side / "scores")])
            for what in SIDE_FILES
        ),
    ]


def efficiency_command(preset: Preset, out: Path) -> Command:
    """Table 6: what pruning saves, of the preset's first model and rows; on one device."""
    model, data = next(iter(preset.models.values())), next(iter(preset.data.values()))
    given = [] if str(model) == train.TINY["model"] else ["--model", str(model), "--data", str(data)]
    return "reproduce.efficiency", [*given, "--out", str(out)]


def words(preset: Preset, command: Command) -> list[str]:
    """The command line."""
    module, argv = command
    many = preset.devices > 1 and module != "score_rows"  # which is for one device
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={preset.devices}"] if many else ["python"]
    return [*launcher, *(["-m", module] if "." in module else [f"{module}.py"]), *argv]


# ---------------------------------------------------------------------------------------------- running


def execute(preset: Preset, command: Command, log: Path) -> None:
    """Run a command, in this process if it takes one CPU. Raises RuntimeError with its last line where it fails."""
    module, argv = command
    if module == "train":
        out = Path(argv[argv.index("--out") + 1])
        if (out / "model").exists() or (out / "adapter").exists():
            return
        argv = [*argv, "--resume"] if (out / "config.json").exists() else argv
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        if preset.devices:
            failed = subprocess.run(words(preset, (module, argv)), stdout=file, stderr=file, check=False).returncode
        else:
            try:
                with redirect_stdout(file), redirect_stderr(file):
                    importlib.import_module(module).main(argv)
                failed = 0
            except SystemExit as stop:
                failed = stop.code
    if failed:
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{module} failed, see {log}: {said[-1]}")


def make_side_files(preset: Preset, run: Run, root: Path) -> None:
    side = side_folder(run, root)
    if not (side / "tenth.json").exists():
        every = rows_of(preset.data[run.data])
        write_rows(side / "tenth.json", random.Random(0).sample(every, len(every) // 10))
    for command in side_commands(preset, run, side):
        execute(preset, command, side / "log.txt")


def make(preset: Preset, run: Run, root: Path) -> dict:
    """Train and score a run, or what of it is missing; returns what it came to, which is also its summary.json."""
    folder = root / key(preset, run)
    done = folder / "summary.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if run.flags is not None:
            execute(preset, train_command(preset, run, root), folder / "log.txt")
        scored = eval_commands(preset, run, root)
        for task, command in scored.items():
            if not (folder / f"{task}.json").exists():
                execute(preset, command, folder / "log.txt")
        found = {**dataclasses.asdict(run), "scores": {}, "n": {}}
        for task in scored:
            result = read_json(folder / f"{task}.json")
            found["scores"][task], found["n"][task] = round(result["score"], 4), result["n"]
        found |= trained(folder) if run.flags is not None else untrained(preset, run)
        write_json(done, found)
        for name in ("checkpoint", *(() if preset.keep_weights else ("model",))):
            shutil.rmtree(folder / name, ignore_errors=True)
    return read_json(done)


def trained(folder: Path) -> dict:
    """What a run's metrics.jsonl comes to; `held` is one list of steps and one for each measure."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    looks = [m for m in metrics if "eval_rows_nll" in m]
    return {
        "steps": len(metrics),
        **{name: sum(m[name] for m in metrics) for name in TOTALS},
        "seconds": round(sum(m["score_s"] + m["train_s"] for m in metrics), 1),
        "held": {"step": [m["step"] for m in looks], **{k: [round(m[f"eval_{k}"], 5) for m in looks] for k in HELD}},
        "machine": machine(folder),
    }


def untrained(preset: Preset, run: Run) -> dict:
    """The untuned model on the held rows: step 0 of every run's curve."""
    folder = preset.models[run.model]
    config = train.resolve(config_of(preset, dataclasses.replace(run, flags=())))
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    model, tokenizer = (
        Transformer.from_pretrained(folder, dtype=dtype, device=config.device),
        TextTokenizer.from_pretrained(folder),
    )
    samples, _ = load_samples(preset.held, tokenizer, config.template, config.max_length)
    held = train.rows_scores(model, samples, config.pass_tokens, nullcontext())
    return {"held": {"step": [0], **{name: [round(held[name], 5)] for name in HELD}}}
