"""Q-Tuning against full data and random pruning at the same ratios, on the embedded default.

    python -m reproduce.compare [--runs runs/compare] [--seeds 3] [--out reproduce/results/default.json]
    python -m reproduce.compare --table [--out FILE]      print the table of a result file, run nothing

Every method sees the same rows in the same order and takes the same number of optimizer steps. A finished run is
not run again, one that was cut goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import train
from reproduce.quickstart import machine, read_jsonl, scores

METHODS = {  # name -> flags of train.py
    "full data": ["--sample-pruner", "none", "--token-pruner", "none"],
    "random": ["--sample-pruner", "random", "--token-pruner", "random"],
    "random, whole answers": ["--sample-pruner", "random", "--token-pruner", "none"],
    "Q-Tuning": [],
    "Q-Tuning, whole answers": ["--token-pruner", "none"],
    "Q-Tuning, reversed": ["--reverse"],
}
MEASURES = {  # name -> where it stands in a run's scores, decimals to show
    "ARC form %": (lambda s: s["arc"]["score"], 1),
    "GSM8K form %": (lambda s: s["gsm8k"]["score"], 1),
    "held-out loss": (lambda s: s["heldout_loss"], 3),
}


def run_one(folder: Path, method: list[str], seed: int) -> dict:
    """Train and score one run, or read what an earlier call left in its folder."""
    done = folder / "scores.json"
    if not done.exists():
        resume = ["--resume"] if (folder / "config.json").exists() else []
        train.train(train.parse_config(["--out", str(folder), "--seed", str(seed), *method, *resume]))
        metrics = read_jsonl(folder / "metrics.jsonl")
        total = {key: sum(m[key] for m in metrics) for key in metrics[0] if key not in ("step", "lr", "peak_mem_gib")}
        result = {
            "steps": len(metrics),
            "samples_kept": total["samples_kept"] / total["samples_seen"],
            "answer_tokens_kept": total["answer_tokens_kept"] / total["answer_tokens_seen"],
            "score_s": total["score_s"],
            "train_s": total["train_s"],
            **scores(folder / "model", folder),
        }
        train.write_aside(done, json.dumps(result, indent=1) + "\n")
    return json.loads(done.read_text(encoding="utf-8"))


def table(results: dict) -> str:
    """One Markdown row a method: mean and standard deviation over seeds."""
    head = ["method", "samples kept", "answer tokens kept", *MEASURES]
    before = results["before"]
    rows = [head, ["---"] * len(head)]
    rows.append(["before tuning", "", "", *(f"{measure(before):.{digits}f}" for measure, digits in MEASURES.values())])
    for name, runs in results["methods"].items():
        shares = [statistics.mean(run[key] for run in runs) for key in ("samples_kept", "answer_tokens_kept")]
        kept = [f"{100 * share:.1f} %" for share in shares]
        cells = []
        for measure, digits in MEASURES.values():
            values = [measure(run) for run in runs]
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        rows.append([name, *kept, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, seeds 0, 1, ...; at least 2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "default.json")
    parser.add_argument("--table", action="store_true", help="print the table of --out and stop")
    args = parser.parse_args(argv)
    try:
        if args.seeds < 2:
            raise ValueError(f"--seeds must be at least 2, for a spread, got {args.seeds}")
        if not args.table:
            results = {"before": scores(Path(train.TINY["model"]), args.runs), "methods": {}}
            for name, method in METHODS.items():
                stem = name.replace(",", "").replace(" ", "-").lower()
                folders = [args.runs / f"{stem}-{seed}" for seed in range(args.seeds)]
                results["methods"][name] = [run_one(f, method, seed) for seed, f in enumerate(folders)]
            results["machine"] = machine(folders[-1])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            train.write_aside(args.out, json.dumps(results, indent=1) + "\n")
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
