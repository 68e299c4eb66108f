"""Sources of the samples that a run kept, at its prune batch and at others, and the correlation of PPL and entropy.

    python -m reproduce.selection RUN [--prune-batch 8 32] [--out FILE.json]
    python -m reproduce.selection --table FILE.json ...             print the table of result files

RUN is the folder of a Q-Tuning run with --log-selection. For each size the samples are chosen again, from the run's
own scores in the run's order. (A run at another prune batch would have trained other weights and logged other scores.)
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import train
from eval.common import errors_in_one_line, positive_int
from pruners import qtuning_samples
from qtuning import SamplePruning
from reproduce.quickstart import machine
from reproduce.tables import markdown
from training.files import read_json, read_jsonl, write_json
from training.run_folder import selection_counts

SOURCES = ("kept_q2", "kept_q4", "backfilled_q2", "backfilled_q4")


# ---------------------------------------------------------------------------------------------- the log


@dataclass(frozen=True)
class Log:
    """Settings of a run, and the finished lines of its selection.jsonl: {"step", "samples"}."""

    config: train.Config
    steps: list[dict]


def read_log(folder: str | Path) -> Log:
    """The selection log of a Q-Tuning run, which may still be running.

    Raises:
        FileNotFoundError: there is no config.json or no selection.jsonl.
        ValueError: another pruner chose the samples, or no step is logged yet.
    """
    folder = Path(folder)
    found, path = read_json(folder / "config.json"), folder / "selection.jsonl"
    fields = [field.name for field in dataclasses.fields(train.Config) if field.name in found]
    config = train.Config(**{name: found[name] for name in fields})  # flags newer than the run have their defaults
    if config.sample_pruner != "qtuning":
        raise ValueError(f"{folder}: expected a run of --sample-pruner qtuning, got {config.sample_pruner}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; train.py --log-selection writes it")
    steps = read_jsonl(path, growing=True)
    if not steps:
        raise ValueError(f"{path}: expected at least one step, got none")
    return Log(config, steps)


def scores(step: dict) -> tuple[Tensor, Tensor]:
    """PPL and Ent of the samples of a logged step: (B,) each."""
    ppl, ent = (torch.tensor([sample[axis] for sample in step["samples"]]) for axis in ("ppl", "ent"))
    return ppl, ent


def chosen_again(log: Log, step: dict, size: int | None = None) -> Iterator[tuple[list[dict], SamplePruning]]:
    """The records of each prune batch of a logged step, with stage 1 decided again from its scores.

    Args:
        size: samples of a prune batch; default: the run's own, where each decision must be the logged one.
    Raises:
        ValueError: a decision differs from the logged one.
    """
    ppl, ent = scores(step)
    own, size = size is None, size or log.config.prune_batch
    for start in range(0, len(ppl), size):
        part = slice(start, start + size)
        records = step["samples"][part]
        chosen = qtuning_samples(log.config, None, len(records), ppl[part], ent[part])
        decided = {"quadrant": chosen.quadrant, "kept": chosen.keep, "backfilled": chosen.backfilled}
        for key, values in decided.items():
            if own and values.tolist() != [record[key] for record in records]:
                raise ValueError(
                    f"step {step['step']}, place {records[0]['place']} on: {key} differs from what its scores give"
                )
        yield records, chosen


# ---------------------------------------------------------------------------------------------- the result


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation: that of the ranks; ties share their mean rank."""

    def ranks(values: Tensor) -> Tensor:
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place].double()

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def sources(log: Log, size: int) -> dict[str, float]:
    """Shares of the kept samples by source, and of the prune batches that needed the backfill."""
    chosen = [decision for step in log.steps for _, decision in chosen_again(log, step, size)]
    counts = sum((Counter(selection_counts(decision)) for decision in chosen), Counter())
    shares = {key: counts[key] / counts["samples_kept"] for key in SOURCES}
    return {**shares, "batches_backfilled": sum(bool(c.backfilled.any()) for c in chosen) / len(chosen)}


def describe(run: Path, sizes: list[int]) -> dict:
    """The result for a run, with its sources at prune batches of these sizes."""
    log, metrics = read_log(run), read_jsonl(run / "metrics.jsonl")
    planes = [scores(step) for step in log.steps]
    ppl, ent = (torch.cat(axis) for axis in zip(*planes, strict=True))
    tokens_kept, tokens_seen = (sum(m[f"answer_tokens_{what}"] for m in metrics) for what in ("kept", "seen"))
    return {
        "model": Path(log.config.model).name,
        "data": Path(log.config.data).name,
        "seed": log.config.seed,
        "device": machine(run)["device_name"],
        "steps": len(metrics),
        "samples": len(ppl),
        "ppl_ent_rank_correlation": rank_correlation(ppl, ent),
        "answer_tokens_kept": tokens_kept / tokens_seen,
        "sources": {str(size): sources(log, size) for size in sizes},
        "loss": [round(m["loss"], 4) for m in metrics],
        "mean_nll_of_seen_samples": [round(ppl.log().mean().item(), 4) for ppl, _ in planes],
    }


def table(results: list[dict]) -> str:
    """Markdown: one row for each run and prune batch, with shares of the kept samples by source."""
    head = ["model, rows, steps", "rank correlation", "prune batch", "Q2", "Q4", "backfill, trimmed", "backfill, whole"]
    rows = [[*head, "batches backfilled"]]
    for result in results:
        run = f"{result['model']}, {result['data']}, {result['steps']}"
        for size, shares in result["sources"].items():
            cells = [f"{100 * shares[name]:.0f} %" for name in (*SOURCES, "batches_backfilled")]
            rows.append([run, f"{result['ppl_ent_rank_correlation']:.2f}", size, *cells])
    return markdown(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.selection", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="run folder")
    parser.add_argument("--prune-batch", type=positive_int, nargs="+", default=[8, 32], help="sizes to choose at")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--table", type=Path, nargs="+", default=[], help="result files to print instead")
    args = parser.parse_args(argv)
    if (args.run is None) == (not args.table):
        parser.error("expected a run folder or --table with result files")
    with errors_in_one_line(parser.prog):
        results = [read_json(path) for path in args.table] or [describe(args.run, args.prune_batch)]
        if args.out:
            write_json(args.out, results[0], indent=1)
    print(table(results))


if __name__ == "__main__":
    main()
