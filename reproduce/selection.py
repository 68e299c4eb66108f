"""What a run selected: where kept samples came from, at its own prune batch and at others, and how PPL and Ent relate.

    python -m reproduce.selection RUN [--prune-batch 8 32] [--out FILE.json]
    python -m reproduce.selection --table FILE.json ...             print result files as a table

RUN is the folder of a Q-Tuning run with --log-selection. The samples, scores and order are those of the run; the
choice of samples is made again for each size. (The weights are the run's own: another size would have trained others.)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import train
from qtuning import prune_samples
from reproduce.quickstart import read_jsonl

SOURCES = ("kept_q2", "kept_q4", "backfilled_q2", "backfilled_q4")


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean rank."""

    def ranks(values: Tensor) -> Tensor:
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place].double()

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def sources(scores: list[tuple[Tensor, Tensor]], size: int, sample_keep_ratio: float) -> dict[str, float]:
    """Shares of the kept samples by source, and of the prune batches that needed the backfill."""
    chosen = [
        prune_samples(ppl[start : start + size], ent[start : start + size], sample_keep_ratio)
        for ppl, ent in scores
        for start in range(0, len(ppl), size)
    ]
    counts = train.selection_counts(chosen)
    shares = {key: counts[key] / counts["samples_kept"] for key in SOURCES}
    return {**shares, "batches_backfilled": sum(bool(c.backfilled.any()) for c in chosen) / len(chosen)}


def describe(run: Path, sizes: list[int]) -> dict:
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    metrics, steps = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "selection.jsonl")
    scores = [tuple(torch.tensor([s[axis] for s in step["samples"]]) for axis in ("ppl", "ent")) for step in steps]
    ppl, ent = (torch.cat(axis) for axis in zip(*scores, strict=True))
    tokens_kept, tokens_seen = (sum(m[f"answer_tokens_{what}"] for m in metrics) for what in ("kept", "seen"))
    return {
        "model": Path(config["model"]).name,
        "data": Path(config["data"]).name,
        "seed": config["seed"],
        "device": config["device_name"],
        "steps": len(metrics),
        "samples": len(ppl),
        "ppl_ent_rank_correlation": rank_correlation(ppl, ent),
        "answer_tokens_kept": tokens_kept / tokens_seen,
        "sources": {str(size): sources(scores, size, config["sample_keep_ratio"]) for size in sizes},
        "loss": [round(m["loss"], 4) for m in metrics],
        "mean_nll_of_seen_samples": [round(p.log().mean().item(), 4) for p, _ in scores],
    }


def table(results: list[dict]) -> str:
    """One Markdown row for each run and prune batch: shares of the kept samples by source."""
    head = ["model, rows, steps", "rank correlation", "prune batch", "Q2", "Q4", "backfill, trimmed", "backfill, whole"]
    rows = [[*head, "batches backfilled"], ["---"] * (len(head) + 1)]
    for result in results:
        run = f"{result['model']}, {result['data']}, {result['steps']}"
        for size, shares in result["sources"].items():
            cells = [f"{100 * shares[name]:.0f} %" for name in (*SOURCES, "batches_backfilled")]
            rows.append([run, f"{result['ppl_ent_rank_correlation']:.2f}", size, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.selection", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="run folder")
    parser.add_argument("--prune-batch", type=int, nargs="+", default=[8, 32], help="sizes to choose samples at")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--table", type=Path, nargs="+", default=[], help="result files to print instead")
    args = parser.parse_args(argv)
    if (args.run is None) == (not args.table):
        parser.error("expected a run folder or --table with result files")
    try:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in args.table]
        if args.run is not None:
            results = [describe(args.run, args.prune_batch)]
            if args.out:
                train.write_aside(args.out, json.dumps(results[0], indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(results))


if __name__ == "__main__":
    main()
