"""How the cost of scoring grows: seconds and memory against row length, rows, vocabulary and model size.

    python -m reproduce.growth [--out FILE.json]      measure here; with matplotlib (the plot extra) also FILE.svg
    python -m reproduce.growth --table FILE.json      print the table of a result file, run nothing

Random weights; half of each row's tokens are answers. One setting grows, the others stay as in BASE. Seconds are the
process's own CPU time. Memory is what torch's allocator had given out at most beyond the weights. An exponent is the
slope of the straight line through the logarithms: 1 means that twice as much costs twice as much. CPU only.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import passes
import train
from data.sft import Sample
from model import ModelConfig, Transformer, read_json
from reproduce.memory import allocated_peak

BASE = {"length": 512, "rows": 2, "vocabulary": 49_152, "layers": 4, "width": 576}
SWEEPS = {  # what grows -> its values
    "length": (128, 256, 512, 1024, 2048, 4096, 8192),
    "rows": (1, 2, 4, 8, 16, 32),
    "vocabulary": (32_000, 49_152, 65_536, 100_000, 128_256, 151_936),
    "layers": (2, 4, 8, 16, 32),
    "width": (192, 384, 576, 768, 1152, 1536),
}


def measure(setting: dict, repeats: int) -> dict:
    """Seconds (median of `repeats`, after one not counted) and bytes of scoring at one setting."""
    width = setting["width"]
    config = ModelConfig(
        vocab_size=setting["vocabulary"],
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=setting["layers"],
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        head_dim=64,
    )
    torch.manual_seed(0)
    model, length = Transformer(config), setting["length"]
    ids = torch.randint(config.vocab_size, (setting["rows"], length + 1)).tolist()
    samples = [Sample(str(i), row, [-100] * (length // 2 + 1) + row[length // 2 + 1 :]) for i, row in enumerate(ids)]

    def work() -> None:
        passes.score(model, samples, 2048, nullcontext())

    peak = allocated_peak(work)
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    parameters = sum(p.numel() for p in model.parameters())
    return {**setting, "parameters": parameters, "seconds": statistics.median(seconds), "bytes": peak}


def exponent(xs: list[float], ys: list[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def table(results: dict) -> str:
    """Markdown: one row a point, the exponents of each sweep behind its last."""
    lines = [["grows", "from, to", "seconds", "exponent", "MiB beyond weights", "exponent"], ["---"] * 6]
    for what, points in results["sweeps"].items():
        xs = [point[what] for point in points]
        line = [what, ", ".join(map(str, xs))]
        for key, scale in (("seconds", 1), ("bytes", 2**20)):
            ys = [point[key] / scale for point in points]
            line += [", ".join(f"{y:.3g}" for y in ys), f"{exponent(xs, ys):.2f}"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(results: dict, path: Path) -> None:
    """One panel a sweep, logarithmic: seconds and MiB."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(3 * len(SWEEPS), 2.8), layout="constrained")
    for axis, (what, points) in zip(axes, results["sweeps"].items(), strict=True):
        xs = [point[what] for point in points]
        for key, scale, label, style in (
            ("seconds", 1, "seconds", "o-"),
            ("bytes", 2**20, "MiB beyond weights", "s--"),
        ):
            ys = [point[key] / scale for point in points]
            axis.loglog(xs, ys, style, label=f"{label} ~ x^{exponent(xs, ys):.2f}", markersize=4)
        axis.set_xlabel(what)
        axis.set_xticks(xs[:: max(1, len(xs) // 3)], [str(x) for x in xs[:: max(1, len(xs) // 3)]])
        axis.minorticks_off()
        axis.legend(fontsize=7, frameon=False)
        axis.grid(alpha=0.3)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="timed passes at each point; %(default)s")
    parser.add_argument("--out", type=Path, help="write the result here (JSON)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result file, run nothing")
    args = parser.parse_args(argv)
    if args.table:
        results = read_json(args.table)
    else:
        points = [(what, value) for what, values in SWEEPS.items() for value in values]
        results = {"base": BASE, "torch": torch.__version__, "threads": torch.get_num_threads(), "sweeps": {}}
        for what, value in tqdm(points, desc="growth", mininterval=0.1 if sys.stderr.isatty() else 30):
            point = measure({**BASE, what: value}, args.repeats)
            results["sweeps"].setdefault(what, []).append(point)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            train.write_aside(args.out, json.dumps(results, indent=1) + "\n")
            try:
                plot(results, args.out.with_suffix(".svg"))
            except ImportError:
                print("no plot: matplotlib is not installed (the plot extra)", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
