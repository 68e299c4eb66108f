"""Every sample pruner with every token pruner, on the embedded default: realised budgets, seconds, scores.

    python -m reproduce.pairings [--runs runs/pairings] [--seeds 3] [--out reproduce/results/pairings.json]
    python -m reproduce.pairings --table [--out FILE]      print the tables of a result file, run nothing

What the pruners go by is made first, with the commands that a user would run: a reference model and a LoRA warm-up
run on a tenth of the rows, and a pass of score_rows.py for each side file. The ratings are those of the embedded
model itself, a million parameters; the report says how it did in its swap test. So `alpagasus-planted` and
`ds2-planted` go by what a perfect rater would say of what data/tiny/make.py planted. LESS's targets are 8 word
problems and 8 facts of the rows, planted as right. Then five seeds of random with random, seed 0 of all pairings,
and the other seeds of those that the paper compares. A finished run is not run again; the result file is written
anew after each, so that it can be read while others run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import score_rows
import train
from reproduce.quickstart import machine, read_jsonl, scores

# The paper's eight and six; then the other reading of a name, the official rule, controls, and Q-Tuning's own.
PAPER_SAMPLES = ("random", "longest", "entropy", "infobatch", "alpagasus", "deita", "ds2", "less")
PAPER_TOKENS = ("random", "ppl-keep-low", "fastv", "sparsevlm-text", "rho1", "tokencleaning-row")
PLANTED = {"clean": 5, "misconception": 5, "known": 4, "padded": 3, "wrong": 0}  # kind -> a perfect rater's rating
CONTROLS = ("drop-longest", "infobatch-official", "random-static", "cond-gain", "alpagasus-planted", "ds2-planted")
SAMPLES = (*PAPER_SAMPLES, *CONTROLS, "qtuning")
TOKENS = (*PAPER_TOKENS, "ppl-keep-high", "tokencleaning-global", "qtuning", "none")
RANDOM_SEEDS = 5
MEASURES = {"arc": (1, 1), "gsm8k": (1, 1), "heldout_loss": (-1, 3)}  # better: up or down; decimals to show
NAMES = {"arc": "ARC form %", "gsm8k": "GSM8K form %", "heldout_loss": "held-out loss"}
BEYOND_NOISE = 3.0  # standard errors over seeds


# ---------------------------------------------------------------------------------- what the pruners go by


def prepare(runs: Path) -> tuple[Path, dict]:
    """The folder of side files, and what is worth telling of how they were made."""
    model, data, folder = train.TINY["model"], train.TINY["data"], runs / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads(Path(data).read_text(encoding="utf-8"))
    files = {"slice": random.Random(0).sample(rows, len(rows) // 10)}
    right = [row for row in random.Random(1).sample(rows, len(rows)) if row["kind"] == "clean"]
    files["target-problems"] = [row for row in right if row["input"]][:8]
    files["target-facts"] = [row for row in right if not row["input"]][:8]
    for name, part in files.items():
        train.write_aside(runs / f"{name}.json", json.dumps(part) + "\n")

    about = runs / "preparation.json"
    told = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {"cpu_seconds": {}}

    def once(name: str, command, *argv: str) -> None:
        if name not in told["cpu_seconds"]:
            started = time.process_time()
            command([str(arg) for arg in argv])
            told["cpu_seconds"][name] = round(time.process_time() - started, 1)
            train.write_aside(about, json.dumps(told, indent=1) + "\n")

    whole = ["--model", model, "--data", runs / "slice.json", "--sample-pruner", "none", "--token-pruner", "none"]
    for name, flags in {"reference": ["--lora-rank", 0, "--lr", 5e-4], "warmup": ["--lr", 1e-3]}.items():
        cut = ["--resume"] if (runs / name / "config.json").exists() else []
        once(name, train.main, *whole, *flags, "--out", runs / name, *cut)
    extra = {
        "reference_nll": ["--model", runs / "reference" / "model"],
        "less": ["--warmup", runs / "warmup", "--targets", runs / "target-problems.json", runs / "target-facts.json"],
    }
    for what in ("base_nll", "reference_nll", "rating", "complexity", "quality", "cond_gain", "embedding", "less"):
        argv = [what, "--model", model, "--data", data, "--scores", folder, *extra.get(what, [])]
        once(what, score_rows.main, *argv)
    planted = planted_folder(folder)
    planted.mkdir(exist_ok=True)
    ratings = (json.dumps({"id": row["id"], "rating": PLANTED[row["kind"]]}) + "\n" for row in rows)
    train.write_aside(planted / "rating.jsonl", "".join(ratings))
    shutil.copyfile(folder / "embedding.jsonl", planted / "embedding.jsonl")
    for what in ("rating", "quality"):
        raw = json.loads((folder / f"{what}.json").read_text(encoding="utf-8"))
        told[what] = {key: round(value, 3) for key, value in raw.items() if key != "settings"}
    return folder, told


def planted_folder(side: Path) -> Path:
    return side.with_name(f"{side.name}-planted")


# ------------------------------------------------------------------------------------------------ runs


def run_one(folder: Path, sample: str, token: str, seed: int, side: Path) -> dict:
    """Train and score one pairing, or read what an earlier call left in its folder; the weights are not kept."""
    done = folder / "scores.json"
    if not done.exists():
        started = time.process_time()
        if folder.exists():
            shutil.rmtree(folder)  # one that was cut
        pruner, scored = sample.removesuffix("-planted"), planted_folder(side) if "-planted" in sample else side
        argv = ["--out", folder, "--seed", seed, "--sample-pruner", pruner, "--token-pruner", token, "--scores", scored]
        train.train(train.parse_config([str(arg) for arg in argv]))
        seconds = time.process_time() - started
        metrics = read_jsonl(folder / "metrics.jsonl")
        total = {key: sum(m[key] for m in metrics) for key in ("samples_kept", "answer_tokens_kept", "weight_sum")}
        found = scores(folder / "model", folder)
        result = {
            "sample": sample,
            "token": token,
            "seed": seed,
            "steps": len(metrics),
            **{key: round(value, 2) for key, value in total.items()},
            "cpu_seconds": round(seconds, 1),  # of the training run; wall time where others use the machine says less
            "arc": found["arc"]["score"],
            "gsm8k": found["gsm8k"]["score"],
            "heldout_loss": found["heldout_loss"],
            "machine": machine(folder),
        }
        train.write_aside(done, json.dumps(result, indent=1) + "\n")
        shutil.rmtree(folder / "checkpoint")
        shutil.rmtree(folder / "model")
    return json.loads(done.read_text(encoding="utf-8"))


def plan(seeds: int) -> list[tuple[str, str, int]]:
    """(sample pruner, token pruner, seed) in the order to run: random, seed 0 of all, more seeds of the paper's own."""
    every = [(sample, token) for sample in SAMPLES for token in TOKENS]
    paper = [(sample, token) for sample in PAPER_SAMPLES for token in PAPER_TOKENS]
    runs = [("random", "random", seed) for seed in range(RANDOM_SEEDS)]
    runs += [(*pair, 0) for pair in sorted(every, key=lambda pair: pair not in paper)]
    runs += [(*pair, seed) for seed in range(1, seeds) for pair in paper]
    return list(dict.fromkeys(runs))


# ---------------------------------------------------------------------------------------------- report


def by_pairing(runs: list[dict]) -> dict[tuple[str, str], list[dict]]:
    pairs = {}
    for run in runs:
        pairs.setdefault((run["sample"], run["token"]), []).append(run)
    return pairs


def seed_deviation(runs: list[dict], measure: str) -> float:
    """The standard deviation between seeds of one pairing, pooled over all that have more than one."""
    groups = [[run[measure] for run in group] for group in by_pairing(runs).values() if len(group) > 1]
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


def beyond_noise(runs: list[dict]) -> dict[str, list[dict]]:
    """For each measure, the pairings that differ from random with random by more than the noise of seeds.

    That is, by more than BEYOND_NOISE standard errors of the difference of two means, with `seed_deviation` as
    the deviation of a run. The items of the tests are the same in all runs: whether others would say the same is
    another question.
    """
    pairs = by_pairing(runs)
    baseline = pairs["random", "random"]
    found = {}
    for measure, (sign, _) in MEASURES.items():
        deviation, mean = seed_deviation(runs, measure), statistics.mean(run[measure] for run in baseline)
        found[measure] = []
        for (sample, token), group in pairs.items():
            gain = sign * (statistics.mean(run[measure] for run in group) - mean)
            error = deviation * math.sqrt(1 / len(group) + 1 / len(baseline))
            if group is not baseline and abs(gain) > BEYOND_NOISE * error:
                found[measure].append({"sample": sample, "token": token, "seeds": len(group), "gain": round(gain, 4)})
        found[measure].sort(key=lambda entry: -entry["gain"])
    return found


def tables(results: dict, samples: Sequence[str] = SAMPLES, tokens: Sequence[str] = TOKENS) -> str:
    """Markdown: for each measure one row a sample pruner and one column a token pruner; then budgets; then who wins."""
    runs, parts = results["runs"], []
    pairs = by_pairing(runs)
    samples = [sample for sample in samples if any(pair[0] == sample for pair in pairs)]
    tokens = [token for token in tokens if any(pair[1] == token for pair in pairs)]
    columns = {name: (name, digits) for name, (_, digits) in MEASURES.items()}
    columns |= {"answer tokens kept": ("answer_tokens_kept", 0), "CPU seconds of training": ("cpu_seconds", 0)}
    for title, (key, digits) in columns.items():
        head = [NAMES.get(title, title), *tokens]
        lines = [head, ["---"] * len(head)]
        for sample in samples:
            cells = [pairs.get((sample, token)) for token in tokens]
            values = ["" if c is None else f"{statistics.mean(run[key] for run in c):.{digits}f}" for c in cells]
            lines.append([sample, *values])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    for measure, entries in results["beyond_noise"].items():
        better = [f"{e['sample']} x {e['token']} ({e['gain']:+.3g}, n {e['seeds']})" for e in entries if e["gain"] > 0]
        worse = sum(entry["gain"] < 0 for entry in entries)
        parts.append(
            f"{NAMES[measure]}: one run deviates by {results['seed_deviation'][measure]:.3g}; better than random x "
            f"random beyond noise: {', '.join(better) or 'none'}; worse: {worse} of {len(pairs) - 1}"
        )
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.pairings", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pairings"), help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each of the paper's pairings, seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pairings.json")
    parser.add_argument("--gather", action="store_true", help="write what is finished, train nothing more")
    parser.add_argument("--table", action="store_true", help="print the tables of --out and stop")
    args = parser.parse_args(argv)
    try:
        if args.seeds < 2:
            raise ValueError(f"--seeds must be at least 2, for a spread, got {args.seeds}")
        if not args.table:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            side, told = prepare(args.runs)
            results = {"before": scores(Path(train.TINY["model"]), args.runs), "preparation": told, "runs": []}
            runs = [(pairing, args.runs / "--".join(map(str, pairing))) for pairing in plan(args.seeds)]
            if args.gather:
                runs = [(pairing, folder) for pairing, folder in runs if (folder / "scores.json").exists()]
            for number, ((sample, token, seed), folder) in enumerate(runs, start=1):
                print(f"{number} of {len(runs)}: {sample} x {token}, seed {seed}", flush=True)
                run = run_one(folder, sample, token, seed, side)
                results["machine"] = run.pop("machine")
                results["runs"].append(run)
                if number > 1:  # two seeds of random with random: a spread
                    results["seed_deviation"] = {m: seed_deviation(results["runs"], m) for m in MEASURES}
                    results["beyond_noise"] = beyond_noise(results["runs"])
                    train.write_aside(args.out, compact(results))
        print(tables(json.loads(args.out.read_text(encoding="utf-8"))))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


def compact(results: dict) -> str:
    """JSON with one line a run."""
    rest = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=1)
    runs = ",\n".join("  " + json.dumps(run) for run in results["runs"])
    return f'{rest.removesuffix("}").rstrip()},\n "runs": [\n{runs}\n ]\n}}\n'


if __name__ == "__main__":
    main()
