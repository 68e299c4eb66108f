"""Three scales of the experiments: the checkpoints, rows, settings and tests behind the names of experiments.py.

tiny   the embedded default on a CPU. Every model is the embedded one, its word problems replace MathInstruct, and the
       sizes of Figure 4 are base models of 1, 2 and 4 layers. Rows named noise-KINDS-SHARE are the embedded rows with
       that share of noise.
small  SmolLM2-135M on 3,200 real rows: the experiments `smollm2` and `smollm2-noise`, where 30 % of the rows are
       planted noise (planted.py). It takes some hours on a CPU that computes in bf16 (AVX-512 BF16 or AMX); others take
       many times as long. It reads data/alpaca.json and LIMA's rows, data/lima.json.
paper  the paper's models, data and settings on 8 GPUs of 80 GiB. train.py's defaults are the paper's settings.

Checkpoints are expected in models/, rows and tests where `python -m data.download NAME --out data` puts them. TriviaQA
and MATH come as parquet; they are expected as data/triviaqa/dev.jsonl, data/math/train.jsonl and data/math/test.jsonl.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import train
from data.sft import read_rows
from reproduce.experiments import BEYOND, EXPERIMENTS, HERMES, MATH, NOISY, SMALL, WIZARD
from reproduce.planted import ALPACA, GSM8K, heldout_rows, mixed_rows, read_alpaca, read_gsm8k
from reproduce.quickstart import GROUPS, TINY
from training.files import write_json

Test = tuple[str, tuple[str, ...]]  # a module of eval/, and its flags


@dataclass(frozen=True)
class Preset:
    """One scale of the experiments.

    Attributes:
        models, data: the paper's name -> checkpoint folder, file of rows.
        tests:        name of the data that a run is tuned on -> task -> test.
        settings:     flags of train.py for every run.
        lr:           the learning rate of `settings`, for the factors in experiments.py.
        heldout:      rows whose loss, perplexity and entropy are logged during training.
        losses:       name in a summary -> rows whose loss is measured after training; `valid` chooses learning rates.
        ends:         further tests, of the untuned model and of full data alone.
        eval_every:   steps between scores of the held-out rows.
        groups:       beginnings of item ids whose scores are reported over all tests together.
        targets:      LESS: files of rows of the target tasks.
        make_files:   (preset, names of models and data) -> None: writes the files above that runs of these need.
        sizes:        the models of an experiment that compares sizes (Figure 4).
        templates:    name of a model -> --template.
        devices:      GPUs that torchrun uses for a run; 0: each run is a process on this machine's CPU.
    """

    name: str
    models: dict[str, Path]
    data: dict[str, Path]
    tests: dict[str, dict[str, Test]]
    settings: tuple[str, ...]
    lr: float
    heldout: Path
    targets: tuple[Path, ...]
    experiments: tuple[str, ...]
    make_files: Callable[[Preset, set[str]], None]
    losses: dict[str, Path] = field(default_factory=dict)
    ends: dict[str, Test] = field(default_factory=dict)
    eval_every: int = 25
    groups: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    templates: dict[str, str] = field(default_factory=dict)
    devices: int = 0
    keep_weights: bool = True


def rows_of(path: Path) -> list[dict]:
    """The rows of a data file.

    Raises:
        ValueError: a line is not valid JSON, by file and line.
    """
    rows = read_rows(path)
    for line, row in rows:
        if isinstance(row, ValueError):
            raise ValueError(f"{path}:{line}: {row}")
    return [row for _, row in rows]


# ------------------------------------------------------------------------------------------------- tiny

PAPER_MODELS = ("LLaMA2-7B", "Mistral-7B", "LLaMA3-8B", "SmolLM2-1.7B", "Qwen3-8B")
TINY_TESTS = {
    "arc": ("eval.arc", ("--data", str(TINY / "arc_test.jsonl"))),
    "gsm8k": ("eval.gsm8k", ("--data", str(TINY / "gsm8k_test.jsonl"), "--max-new-tokens", "128")),
}


def tiny(runs: Path) -> Preset:
    rows = Path(train.TINY["data"])
    noisy = {name: runs / name / "sft.json" for name in NOISY}
    return Preset(
        name="tiny",
        models={
            **dict.fromkeys(("embedded", *PAPER_MODELS, "4-layer"), Path(train.TINY["model"])),
            **{f"{layers}-layer": runs / f"{layers}-layer" / "base" for layers in (1, 2)},
        },
        sizes=("1-layer", "2-layer", "4-layer"),
        data={WIZARD: rows, HERMES: rows, MATH: runs / "word-problems.json", **noisy},
        tests={**dict.fromkeys((WIZARD, HERMES, *noisy), TINY_TESTS), MATH: {"gsm8k": TINY_TESTS["gsm8k"]}},
        settings=tuple(
            word
            for key in ("lora_rank", "lr", "max_length", "epochs", "grad_accum")
            for word in ("--" + key.replace("_", "-"), str(train.TINY[key]))
        ),
        lr=train.TINY["lr"],
        heldout=TINY / "heldout_test.json",
        losses={"valid": TINY / "heldout_valid.json"},
        groups=GROUPS,
        targets=(runs / "target-problems.json", runs / "target-facts.json"),
        experiments=tuple(name for name in EXPERIMENTS if name not in SMALL),
        make_files=make_tiny_files,
        keep_weights=False,
    )


def make_tiny_files(preset: Preset, needed: set[str]) -> None:
    """The word problems; 8 correct rows of each sort as LESS's targets; rows with other shares of noise; the smaller
    base models, which train on the same world (ten minutes each)."""
    rows = rows_of(preset.data[WIZARD])
    write_json(preset.data[MATH], [row for row in rows if row["input"]])
    correct = [row for row in random.Random(1).sample(rows, len(rows)) if row["kind"] == "clean"]
    write_json(preset.targets[0], [row for row in correct if row["input"]][:8])
    write_json(preset.targets[1], [row for row in correct if not row["input"]][:8])
    for name in [name for name in NOISY if name in needed]:
        _, kinds, share = name.split("-")
        given = [] if kinds == "all" else ["--noise-kinds", kinds]
        make_tiny("--rows-only", "--noise", share, *given, "--out", str(preset.data[name].parent))
    for name in needed & set(preset.sizes):
        base = preset.models[name]
        if not base.exists():
            make_tiny("--layers", name[0], "--out", str(base.parent))


def make_tiny(*flags: str) -> None:
    subprocess.run([sys.executable, str(TINY / "make.py"), *flags], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------- small and paper

ARC = Path("data/arc/ARC-V1-Feb2018-2")  # the archive's own folder
ARC_TESTS = {
    "arc_easy": ("eval.arc", ("--data", str(ARC / "ARC-Easy" / "ARC-Easy-Dev.jsonl"))),
    "arc_challenge": ("eval.arc", ("--data", str(ARC / "ARC-Challenge" / "ARC-Challenge-Dev.jsonl"))),
}
GSM8K_TEST = ("--data", "data/gsm8k/test.jsonl", "--exemplars", "data/gsm8k/train.jsonl")


SMALL_HELDOUT = {name: f"{name}_nll" for name in (ALPACA, GSM8K, "lima")}  # source -> name of its loss


def small(runs: Path) -> Preset:
    squad = ("eval.squad", ("--data", "data/squad/dev-v2.0.json", "--limit", "200", "--dtype", "bf16"))
    arc = ("eval.arc", (*ARC_TESTS["arc_easy"][1], "--dtype", "bf16"))
    return Preset(
        name="small",
        models={"SmolLM2-135M": Path("models/SmolLM2-135M-Instruct")},
        data={name: runs / f"{name}.json" for name in SMALL},
        tests={name: {} for name in SMALL},
        ends={"arc_easy": arc, "squad": squad},
        settings=("--epochs", "1", "--lr", "2e-4", "--dtype", "bf16"),
        lr=2e-4,
        heldout=runs / "heldout.json",
        eval_every=50,
        losses={loss: runs / f"heldout_{name}.json" for name, loss in SMALL_HELDOUT.items()},
        targets=(),
        experiments=SMALL,
        make_files=make_small_files,
    )


def make_small_files(preset: Preset, needed: set[str]) -> None:
    """3,200 rows, half each of Alpaca and GSM8K, without noise and with 30 %.

    Held out are 100 others of each, and 30 of LIMA. A run's curve uses 40 of each of the first two.
    """
    alpaca, gsm8k = read_alpaca(Path("data/alpaca.json")), read_gsm8k(Path("data/gsm8k/train.jsonl"))
    for name, noise in zip(SMALL, (0.0, 0.3), strict=True):
        write_json(preset.data[name], mixed_rows(alpaca, gsm8k, 3200, noise, seed=0))
    heldout = dict(zip((ALPACA, GSM8K), heldout_rows(alpaca, gsm8k, 100, seed=0), strict=True))
    write_json(preset.heldout, [row for rows in heldout.values() for row in rows[:40]])
    heldout["lima"] = random.Random(0).sample(rows_of(Path("data/lima.json")), 30)
    for name, rows in heldout.items():
        write_json(preset.losses[SMALL_HELDOUT[name]], rows)


def paper(runs: Path) -> Preset:
    models, data = Path("models"), Path("data")
    tasks = {
        **ARC_TESTS,
        "gsm8k": ("eval.gsm8k", GSM8K_TEST),
        "squad": ("eval.squad", ("--data", "data/squad/dev-v2.0.json")),
        "triviaqa": ("eval.triviaqa", ("--data", "data/triviaqa/dev.jsonl")),
    }
    maths = {
        "gsm8k": tasks["gsm8k"],
        "math": ("eval.math", ("--data", "data/math/test.jsonl", "--exemplars", "data/math/train.jsonl")),
    }
    return Preset(
        name="paper",
        models={
            "LLaMA2-7B": models / "Llama-2-7b-hf",
            "Mistral-7B": models / "Mistral-7B-v0.1",
            "LLaMA3-8B": models / "Meta-Llama-3-8B",
            "SmolLM2-1.7B": models / "SmolLM2-1.7B",
            **{f"Qwen3-{size}": models / f"Qwen3-{size}" for size in ("8B", "14B", "32B")},
        },
        templates={
            **dict.fromkeys(("LLaMA3-8B", "SmolLM2-1.7B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"), "default"),
            "LLaMA2-7B": "llama2",
            "Mistral-7B": "mistral",
        },
        sizes=("Qwen3-8B", "Qwen3-14B", "Qwen3-32B"),
        data={
            WIZARD: data / "wizard" / "alpaca_evol_instruct_70k.json",
            MATH: data / "mathinstruct" / "MathInstruct.json",
            HERMES: data / "openhermes" / "openhermes2_5.json",
        },
        tests={WIZARD: tasks, HERMES: tasks, MATH: maths},
        settings=("--activation-checkpointing", "--pass-tokens", "4096"),
        lr=1e-4,
        heldout=runs / "heldout.json",
        targets=(runs / "targets.json",),
        experiments=tuple(name for name in EXPERIMENTS if name not in (*SMALL, "choices", "pairings", *BEYOND)),
        make_files=make_paper_files,
        devices=8,
    )


def make_paper_files(preset: Preset, needed: set[str]) -> None:
    """100 rows of WizardLM, which also train, in place of held-out ones; 8 GSM8K training rows as LESS's targets."""
    write_json(preset.heldout, random.Random(0).sample(rows_of(preset.data[WIZARD]), 100))
    rows = rows_of(Path("data/gsm8k/train.jsonl"))[:8]
    write_json(preset.targets[0], [{"prompt": row["question"], "response": row["answer"]} for row in rows])


PRESETS = {"tiny": tiny, "small": small, "paper": paper}
