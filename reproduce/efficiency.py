"""What pruning saves: Table 6 of the paper on this machine, for any model and rows.

    python -m reproduce.efficiency                                      the embedded default
    python -m reproduce.efficiency --model DIR --data FILE [--tuning lora full] [--checkpointing off on]
    python -m reproduce.efficiency --table FILE.json                    print the table of a result file, run nothing

Every cell is `python train.py` on the same rows in the same order: full data; Q-Tuning at 12.5, 25 and 50 % of samples
x 50 % of tokens, pruned tokens masked or dropped, and under activation checkpointing with the scoring pass's forward
reused; and random at the same ratios, which scores nothing: the rival at equal time. A round runs all cells once, for
a few steps; the first step of a run is not counted (it warms up), the others of all rounds are, and their median is
the cell's. So what shares the machine slows all cells alike. The share of a cell is its seconds over those of our own
full run, which is packed and without full logits as well.

FLOPs are those of the linear layers: 2 a weight and token forward, as much again for the gradient of the input,
and of the weight where it trains, once more forward under activation checkpointing, unless scoring's is reused; the
head's on answer tokens alone. (Attention's own products are under a twentieth of that up to 2048 tokens of a 7B model.)
The bound is their ratio to the full run's: what the seconds would be if every FLOP cost the same. `matmul` is the rate
of a large square product here, measured in each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import train
from model import ModelConfig, read_json
from reproduce.memory import meta_model
from reproduce.quickstart import read_jsonl

PAPER = {0.125: 65 / 90, 0.25: 70 / 90, 0.5: 80 / 90}  # Table 6: minutes over those of full data
RATIOS = (0.125, 0.25, 0.5)
SECONDS = ("score_s", "select_s", "train_s", "optimizer_s")


def cells(tuning: list[str], checkpointing: list[str]) -> dict[tuple, list[str]]:
    """(tuning, checkpointing, method, sample_keep_ratio) -> flags of train.py."""
    found = {}
    for tune in tuning:
        for again in checkpointing:
            flags = ["--lora-rank", "8" if tune == "lora" else "0"]
            flags += ["--activation-checkpointing"] if again == "on" else []
            found[tune, again, "full", 1.0] = [*flags, "--sample-pruner", "none", "--token-pruner", "none"]
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
    """One run of train.py in a process of its own: its metrics but the first step's, and its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(train.HERE / "train.py"), "--out", folder, "--max-steps", str(args.steps + 1)]
        given = {"--model": args.model, "--data": args.data, "--pass-tokens": args.pass_tokens, "--dtype": args.dtype}
        command += [str(part) for pair in given.items() if pair[1] for part in pair]
        command += ["--skip-bad-rows"] if args.skip_bad_rows else []
        # Freed pages stay with the process: otherwise Linux clears them anew for every large tensor.
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


def flops(cfg: ModelConfig, metrics: dict, scored_answers: int, tune: str, twice: bool) -> float:
    """FLOPs of the linear layers in one step, in which trained tokens pass forward twice or once."""
    layers = sum(p.numel() for p in meta_model(cfg).model["layers"].parameters() if p.dim() == 2)
    head = cfg.vocab_size * cfg.hidden_size
    products = 2 if tune == "lora" else 3
    trained = products * layers
    if twice:  # a layer is made again up to its last product, which nothing needs
        trained += layers - cfg.num_hidden_layers * cfg.hidden_size * cfg.intermediate_size
    stack = layers * metrics["tokens_scored"] + trained * metrics["tokens_trained"]
    return 2 * (stack + head * (scored_answers + products * metrics["answer_tokens_kept"]))


def measure(args: argparse.Namespace) -> dict:
    """Run every cell in every round, and put the medians together."""
    todo, steps, configs, rates = cells(args.tuning, args.checkpointing), {}, {}, []
    every = 0.1 if sys.stderr.isatty() else 30
    bar = tqdm(total=len(todo) * args.repeats, desc="efficiency", unit="run", mininterval=every)
    for _ in range(args.repeats):
        for cell, flags in todo.items():
            metrics, configs[cell] = run(flags, args)
            steps.setdefault(cell, []).extend(metrics)
            bar.update()
        made = next(iter(configs.values()))
        rates.append(matmul_rate(torch.bfloat16 if made["dtype"] == "bf16" else torch.float32, made["device"]))
    bar.close()
    rate = statistics.median(rates)
    cfg = ModelConfig.from_dict(read_json(Path(made["model"]) / "config.json"))
    rows = []
    for cell, metrics in steps.items():
        tune, again, method, ratio = cell
        full = steps[tune, again, "full", 1.0]
        scores, twice = method.startswith("Q-Tuning"), again == "on" and not method.endswith("reused")
        work, of_full = (
            sum(flops(cfg, m, m["answer_tokens_seen"] * scored, tune, passes_twice) for m in some)
            for some, scored, passes_twice in ((metrics, scores, twice), (full, False, again == "on"))
        )
        seconds = [m["score_s"] + m["train_s"] for m in metrics]
        median, full_median = statistics.median(seconds), statistics.median([m["train_s"] + m["score_s"] for m in full])
        tokens = sum(m["tokens_scored"] + m["tokens_trained"] for m in metrics)
        rows.append(
            {
                "tuning": tune,
                "checkpointing": again,
                "method": method,
                "sample_keep_ratio": ratio,
                "steps": len(metrics),
                "seconds_a_step": median,
                "spread": [min(seconds), max(seconds)],
                **{key: statistics.median([m[key] for m in metrics]) for key in SECONDS},
                "tokens_per_s": tokens / sum(seconds),
                "samples_kept": sum(m["samples_kept"] for m in metrics) / sum(m["samples_seen"] for m in metrics),
                "tokens_trained": sum(m["tokens_trained"] for m in metrics) / sum(m["tokens_trained"] for m in full),
                "answer_tokens_kept": sum(m["answer_tokens_kept"] for m in metrics)
                / sum(m["answer_tokens_kept"] for m in full),
                "peak_mem_gib": max(m["peak_mem_gib"] for m in metrics),
                "flops_a_step": work / len(metrics),
                "matmul_share": work / sum(seconds) / rate,
                "of_full": median / full_median,
                "bound": work / of_full,
            }
        )
    keys = ("device_name", "world_size", "commit", "versions", "model", "data", "dtype", "pass_tokens", "max_length")
    return {
        **{key: made[key] for key in keys},
        "model": Path(made["model"]).name,
        "data": Path(made["data"]).name,
        "threads": torch.get_num_threads(),
        "matmul_flops": rate,
        "repeats": args.repeats,
        "rows": rows,
    }


def table(results: dict) -> str:
    """Markdown, one row a cell; seconds are medians of a step."""
    head = ["tuning", "method", "score s", "select s", "train s", "optimizer s", "seconds", "of full", "bound", "paper"]
    head += ["tokens/s", "matmul share", "peak GiB"]
    lines = [head, ["---"] * len(head)]
    for row in results["rows"]:
        ratio = row["sample_keep_ratio"]
        tuning = row["tuning"] + (", checkpointing" if row["checkpointing"] == "on" else "")
        method = row["method"] + ("" if row["method"] == "full" else f", {100 * ratio:g} %")
        paper = f"{PAPER[ratio]:.2f}" if row["method"].startswith("Q-Tuning") else ""
        line = [tuning, method, row["score_s"] - row["select_s"], row["select_s"]]
        line += [row["train_s"] - row["optimizer_s"], row["optimizer_s"], row["seconds_a_step"], row["of_full"]]
        line = [f"{part:.3g}" if isinstance(part, float) else part for part in line]
        line += [f"{row['bound']:.2f}", paper, f"{row['tokens_per_s']:.0f}", f"{100 * row['matmul_share']:.0f} %"]
        lines.append([*line, f"{row['peak_mem_gib']:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shares(results: dict) -> str:
    """Markdown, Table 6 at a glance: seconds over those of the column's full run, and in brackets the bound."""
    cells = {
        (row["tuning"], row["checkpointing"], row["method"], row["sample_keep_ratio"]): row for row in results["rows"]
    }
    columns = list(dict.fromkeys(cell[:2] for cell in cells))
    names = [f"{tune}{', checkpointing' if again == 'on' else ''}" for tune, again in columns]
    full = [f"{cells[*column, 'full', 1.0]['seconds_a_step']:.3g} s" for column in columns]
    lines = [["", *names, "paper"], ["---"] * (len(columns) + 2), ["full data, a step", *full, ""]]
    methods = [method for method in dict.fromkeys(cell[2] for cell in cells) if method != "full"]
    for ratio in sorted({cell[3] for cell in cells if cell[2] != "full"}):
        for method in methods:
            found = [cells.get((*column, method, ratio)) for column in columns]
            line = [f"{row['of_full']:.2f} ({row['bound']:.2f})" if row else "" for row in found]
            paper = f"{PAPER[ratio]:.2f}" if method in ("Q-Tuning, mask", "Q-Tuning, drop") else ""
            lines.append([f"{method}, {100 * ratio:g} %", *line, paper])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.efficiency", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; none: the embedded default and its rows")
    parser.add_argument("--data", help="rows")
    parser.add_argument("--tuning", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--steps", type=int, default=4, help="counted steps of each run; %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; %(default)s")
    parser.add_argument("--pass-tokens", type=int, help="as in train.py")
    parser.add_argument("--dtype", help="as in train.py")
    parser.add_argument("--skip-bad-rows", action="store_true", help="as in train.py")
    parser.add_argument("--out", type=Path, help="write the result here (JSON)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result file, run nothing")
    args = parser.parse_args(argv)
    try:
        if args.table:
            results = read_json(args.table)
        else:
            if args.steps < 1 or args.repeats < 1:
                raise ValueError("--steps and --repeats must be at least 1")
            results = measure(args)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                train.write_aside(args.out, json.dumps(results, indent=1) + "\n")
        print(table(results), shares(results), sep="\n\n")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
