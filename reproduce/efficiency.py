"""What pruning saves: Table 6 of the paper on this machine, for any model and rows.

    python -m reproduce.efficiency                                      the embedded default
    python -m reproduce.efficiency --model DIR --data FILE [--tuning lora full] [--checkpointing off on]
    python -m reproduce.efficiency --table FILE.json                    print the tables of a result file, run nothing

A cell is `python train.py` on the same rows in the same order: full data; Q-Tuning at 12.5, 25 and 50 % of samples
x 50 % of tokens, with pruned tokens masked or dropped, and under activation checkpointing with --reuse-forward; and
random at the same ratios, which needs no scores and is the alternative at equal time. A round runs every cell once, for
a few steps. A cell's time is the median of its steps in all rounds, without each run's first step, which warms up. So
other load on the machine slows all cells, not one. A cell's share is its time over that of our full-data run, which
packs its rows and makes no full logits either.

FLOPs are those of the linear layers: 2 per weight and token forward, as many again for the gradient of the input and
for the gradient of each weight that trains, and once more forward under activation checkpointing, unless the scoring
pass's outputs are reused. The head counts for answer tokens alone. (Attention's own products are below a twentieth of
that up to 2048 tokens of a 7B model.) `bound` is a cell's FLOPs over the full-data run's: its share if all FLOPs
took the same time. `matmul_flops` is the rate of a large square product on this machine, measured in each round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from eval.common import positive_int
from model import ModelConfig
from reproduce import bench
from reproduce.memory import meta_model
from reproduce.tables import markdown
from training.files import read_json, read_jsonl

PAPER = {0.125: 65 / 90, 0.25: 70 / 90, 0.5: 80 / 90}  # Table 6: minutes over those of full data
RATIOS = (0.125, 0.25, 0.5)
SECONDS = ("score_s", "select_s", "train_s", "optimizer_s")
FULL = ("full", 1.0)


def cells(tuning: list[str], checkpointing: list[str]) -> dict[tuple, list[str]]:
    """(tuning, checkpointing, method, sample_keep_ratio) -> flags of train.py."""
    found = {}
    for tune in tuning:
        for again in checkpointing:
            flags = ["--lora-rank", "8" if tune == "lora" else "0"]
            flags += ["--activation-checkpointing"] if again == "on" else []
            found[tune, again, *FULL] = [*flags, "--sample-pruner", "none", "--token-pruner", "none"]
            for ratio in RATIOS:
                at = [*flags, "--sample-keep-ratio", str(ratio), "--token-keep-ratio", "0.5"]
                found[tune, again, "Q-Tuning, mask", ratio] = at
                found[tune, again, "Q-Tuning, drop", ratio] = [*at, "--token-pruning", "drop"]
                if again == "on":
                    found[tune, again, "Q-Tuning, mask, reused", ratio] = [*at, "--reuse-forward"]
                rival = ["--sample-pruner", "random", "--token-pruner", "random"]
                found[tune, again, "random, mask", ratio] = [*at, *rival]
    return found


def run(flags: list[str], args: argparse.Namespace) -> tuple[list[dict], dict]:
    """The metrics of one run of train.py in a process of its own, without the first step's, and its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(train.HERE / "train.py"), "--out", folder, "--max-steps", str(args.steps + 1)]
        given = {"--model": args.model, "--data": args.data, "--pass-tokens": args.pass_tokens, "--dtype": args.dtype}
        command += [str(part) for pair in given.items() if pair[1] for part in pair]
        command += ["--skip-bad-rows"] if args.skip_bad_rows else []
        # Freed pages stay with the process; otherwise Linux clears them again for every large tensor.
        environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000", **os.environ}
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise ValueError(f"{' '.join([*command[1:], *flags])} ended with {done.returncode}: {done.stderr[-500:]}")
        return read_jsonl(Path(folder) / "metrics.jsonl")[1:], read_json(Path(folder) / "config.json")


def matmul_rate(dtype: torch.dtype, device: str, size: int = 2048, times: int = 5) -> float:
    """FLOP/s of a large square product, the best of a few."""
    size = 8192 if device == "cuda" else size
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(times):
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def flops(cfg: ModelConfig, metrics: dict, tune: str, twice: bool) -> float:
    """FLOPs of the linear layers in one step.

    Args:
        metrics: tokens_scored, tokens_trained, and of the head answer_tokens_scored, answer_tokens_kept.
        tune:    "lora" or "full".
        twice:   whether trained tokens pass forward twice.
    """
    layers = sum(p.numel() for p in meta_model(cfg).model["layers"].parameters() if p.dim() == 2)
    head = cfg.vocab_size * cfg.hidden_size
    products = 2 if tune == "lora" else 3
    trained = products * layers
    if twice:  # a layer runs again up to its last product, which no gradient needs
        trained += layers - cfg.num_hidden_layers * cfg.hidden_size * cfg.intermediate_size
    stack = layers * metrics["tokens_scored"] + trained * metrics["tokens_trained"]
    return 2 * (stack + head * (metrics["answer_tokens_scored"] + products * metrics["answer_tokens_kept"]))


def measure(args: argparse.Namespace) -> dict:
    """The result: a row for each cell, from all rounds."""
    todo, steps, configs, rates = cells(args.tuning, args.checkpointing), {}, {}, []
    with bench.progress(len(todo) * args.repeats, "efficiency") as bar:
        for _ in range(args.repeats):
            for cell, flags in todo.items():
                metrics, configs[cell] = run(flags, args)
                steps.setdefault(cell, []).extend(metrics)
                bar.update()
            made = next(iter(configs.values()))
            rates.append(matmul_rate(torch.bfloat16 if made["dtype"] == "bf16" else torch.float32, made["device"]))
    cfg = ModelConfig.from_dict(read_json(Path(made["model"]) / "config.json"))
    rate, work = statistics.median(rates), {}
    for (tune, again, method, ratio), metrics in steps.items():
        for m in metrics:  # the benchmark's methods score every answer of a step, or none
            m["answer_tokens_scored"] = m["answer_tokens_seen"] if m["tokens_scored"] else 0
        twice = again == "on" and "--reuse-forward" not in todo[tune, again, method, ratio]
        work[tune, again, method, ratio] = sum(flops(cfg, m, tune, twice) for m in metrics)
    keys = ("device_name", "world_size", "commit", "versions", "model", "data", "dtype", "pass_tokens", "max_length")
    return {
        **{key: made[key] for key in keys},
        "model": Path(made["model"]).name,
        "data": Path(made["data"]).name,
        "threads": torch.get_num_threads(),
        "matmul_flops": rate,
        "repeats": args.repeats,
        "rows": [describe(cell, steps, work, rate) for cell in steps],
    }


def describe(cell: tuple, steps: dict[tuple, list[dict]], work: dict[tuple, float], rate: float) -> dict:
    """A cell's row of the result; its shares are over the full-data run of the same tuning and checkpointing."""
    metrics, full_cell = steps[cell], (*cell[:2], *FULL)
    full = steps[full_cell]

    def total(key: str, some: list[dict] = metrics) -> float:
        return sum(m[key] for m in some)

    seconds, full_seconds = ([m["score_s"] + m["train_s"] for m in some] for some in (metrics, full))
    median = statistics.median(seconds)
    return {
        **dict(zip(("tuning", "checkpointing", "method", "sample_keep_ratio"), cell, strict=True)),
        "steps": len(metrics),
        "seconds_a_step": median,
        "spread": [min(seconds), max(seconds)],
        **{key: statistics.median([m[key] for m in metrics]) for key in SECONDS},
        "tokens_per_s": (total("tokens_scored") + total("tokens_trained")) / sum(seconds),
        "samples_kept": total("samples_kept") / total("samples_seen"),
        **{key: total(key) / total(key, full) for key in ("tokens_trained", "answer_tokens_kept")},
        "peak_mem_gib": max(m["peak_mem_gib"] for m in metrics),
        "flops_a_step": work[cell] / len(metrics),
        "matmul_share": work[cell] / sum(seconds) / rate,
        "of_full": median / statistics.median(full_seconds),
        "bound": work[cell] / work[full_cell],
    }


def table(results: dict) -> str:
    """Markdown: one row for each cell; seconds are medians of a step."""
    head = ["tuning", "method", "score s", "select s", "train s", "optimizer s", "seconds"]
    head += ["of full", "of full in FLOPs", "paper"]
    rows = [[*head, "tokens/s", "matmul share", "peak GiB"]]
    for row in results["rows"]:
        ratio = row["sample_keep_ratio"]
        tuning = row["tuning"] + (", checkpointing" if row["checkpointing"] == "on" else "")
        method = row["method"] + ("" if row["method"] == "full" else f", {100 * ratio:g} %")
        numbers = [row["score_s"] - row["select_s"], row["select_s"], row["train_s"] - row["optimizer_s"]]
        numbers += [row["optimizer_s"], row["seconds_a_step"], row["of_full"]]
        line = [tuning, method, *(f"{number:.3g}" for number in numbers), f"{row['bound']:.2f}"]
        line.append(f"{PAPER[ratio]:.2f}" if row["method"].startswith("Q-Tuning") else "")
        line += [f"{row['tokens_per_s']:.0f}", f"{100 * row['matmul_share']:.0f} %", f"{row['peak_mem_gib']:.2f}"]
        rows.append(line)
    return markdown(rows)


def shares(results: dict) -> str:
    """Markdown, Table 6: time over that of the column's full-data run, and in brackets the same in FLOPs."""
    cells = {
        (row["tuning"], row["checkpointing"], row["method"], row["sample_keep_ratio"]): row for row in results["rows"]
    }
    columns = list(dict.fromkeys(cell[:2] for cell in cells))
    names = [f"{tune}{', checkpointing' if again == 'on' else ''}" for tune, again in columns]
    full = [f"{cells[*column, *FULL]['seconds_a_step']:.3g} s" for column in columns]
    rows = [["", *names, "paper"], ["full data, a step", *full, ""]]
    methods = [method for method in dict.fromkeys(cell[2] for cell in cells) if method != "full"]
    for ratio in sorted({cell[3] for cell in cells if cell[2] != "full"}):
        for method in methods:
            found = [cells.get((*column, method, ratio)) for column in columns]
            line = [f"{row['of_full']:.2f} ({row['bound']:.2f})" if row else "" for row in found]
            paper = f"{PAPER[ratio]:.2f}" if method in ("Q-Tuning, mask", "Q-Tuning, drop") else ""
            rows.append([f"{method}, {100 * ratio:g} %", *line, paper])
    return markdown(rows)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint folder; default: the embedded default and its rows")
    parser.add_argument("--data", help="rows")
    parser.add_argument("--tuning", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--steps", type=positive_int, default=4, help="counted steps of each run; default: %(default)s")
    parser.add_argument("--repeats", type=positive_int, default=3, help="rounds; default: %(default)s")
    parser.add_argument("--pass-tokens", type=int, help="as in train.py")
    parser.add_argument("--dtype", help="as in train.py")
    parser.add_argument("--skip-bad-rows", action="store_true", help="as in train.py")


def main(argv: list[str] | None = None) -> None:
    bench.main(argv, "reproduce.efficiency", __doc__.partition("\n")[0], add_flags, measure, (table, shares))


if __name__ == "__main__":
    main()
