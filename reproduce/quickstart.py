"""The embedded default, tuned with Q-Tuning and with random pruning at the same budget, and scored before and after.

    python -m reproduce.quickstart [--out runs/default] [--seed 0]

It prints what was selected and ends in a summary of eight lines; OUT/quickstart.json holds the same numbers. An
interrupted run is continued by the same command.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import train
from data.sft import Sample, load_samples
from data.tiny.wording import NOISE_KINDS
from data.tokenizer import TextTokenizer
from eval import arc, gsm8k
from eval.common import errors_in_one_line
from eval.during import rows_scores
from model import Transformer
from qtuning import IGNORE_INDEX, Quadrant
from training.files import read_json, read_jsonl, write_json

TINY = Path(train.TINY["data"]).parent
KINDS = ("clean", "redundant", "corrected", "padded", *NOISE_KINDS)  # that data/tiny/make.py plants
GROUPS = ("learned", "corrected", "retained")  # of test items, by the beginning of their ids
METHODS = {  # name -> flags of train.py
    "Q-Tuning": (),
    "random": ("--sample-pruner", "random", "--token-pruner", "random"),
}


# --------------------------------------------------------------------------------------------- scoring


def group_scores(results: dict[str, dict], groups: tuple[str, ...]) -> dict[str, tuple[float, int]]:
    """(percent correct, number of items) of each group over all tasks.

    Args:
        results: task -> result of a benchmark. An item belongs to the group that its id begins with.
    """
    found = {}
    for group in groups:
        items = [item for result in results.values() for item in result["items"]]
        correct = [item["correct"] for item in items if item["id"].startswith(f"{group}-")]
        if correct:
            found[group] = (round(100 * sum(correct) / len(correct), 4), len(correct))
    return found


def scores(folder: Path) -> dict:
    """Percent correct and number of items of each group of test items, and the loss on held-out rows."""
    model, tokenizer = Transformer.from_pretrained(folder).eval(), TextTokenizer.from_pretrained(folder)
    results = {
        "arc": arc.evaluate(model, tokenizer, arc.read_items(TINY / "arc_test.jsonl")),
        "gsm8k": gsm8k.evaluate(model, tokenizer, gsm8k.read_items(TINY / "gsm8k_test.jsonl"), max_new_tokens=128),
    }
    samples, _ = load_samples(TINY / "heldout_test.json", tokenizer)
    loss = rows_scores(model, samples, 4096, nullcontext())["rows_nll"]
    return {**group_scores(results, GROUPS), "heldout_loss": loss}


# ---------------------------------------------------------------------------------- what was selected


def machine(run: Path) -> dict:
    """Device, ranks, commit and versions of a run."""
    config = read_json(run / "config.json")
    return {key: config[key] for key in ("device_name", "world_size", "commit", "versions")}


def plants_by_quadrant(selection: list[dict], kind_of: dict[str, str]) -> dict[str, Counter]:
    """For each planted kind: how often its samples were seen, in each quadrant, and kept."""
    table = {kind: Counter() for kind in KINDS}
    for step in selection:
        for sample in step["samples"]:
            row = table[kind_of[sample["id"]]]
            row["seen"] += 1
            row[Quadrant(sample["quadrant"]).name] += 1
            row["kept"] += sample["kept"]
    return table


def trimmed_boilerplate(selection: list[dict], rows: list[dict], samples: list[Sample], tokenizer) -> dict[str, float]:
    """Share of the tokens of trimmed `padded` answers that was removed, in their boilerplate and in the rest."""
    row_of = {row["id"]: row for row in rows}
    sample_of = {sample.id: sample for sample in samples}
    removed, total = Counter(), Counter()
    for step in selection:
        for sample in step["samples"]:
            row = row_of[sample["id"]]
            if sample["kept"] and sample["trimmed"] and row["kind"] == "padded":
                answer = [label for label in sample_of[sample["id"]].labels if label != IGNORE_INDEX]
                parts = in_boilerplate([tokenizer.decode([token]) for token in answer], row["boilerplate"])
                for part, kept in zip(parts, sample["tokens"], strict=True):
                    total[part] += 1
                    removed[part] += kept == "0"
    return {name: removed[part] / total[part] for name, part in (("boilerplate", True), ("rest", False)) if total[part]}


def in_boilerplate(pieces: list[str], boilerplate: list[str]) -> list[bool]:
    """Whether each token of an answer, given as its text, lies in one of the boilerplate sentences."""
    text = "".join(pieces)
    spans = [(text.index(sentence), text.index(sentence) + len(sentence)) for sentence in boilerplate]
    flags, at = [], 0
    for piece in pieces:
        middle = at + len(piece) - 0.5  # in the token's last character: its leading space belongs to neither side
        flags.append(bool(piece) and any(start <= middle < end for start, end in spans))
        at += len(piece)
    return flags


# ---------------------------------------------------------------------------------------------- report


def noise_share(plants: dict[str, dict], of: str) -> float:
    """The share of noise among the samples that were `seen` or `kept`."""
    return sum(plants[kind].get(of, 0) for kind in NOISE_KINDS) / sum(row.get(of, 0) for row in plants.values())


def report(result: dict) -> str:
    """What Q-Tuning selected, and at the end the eight lines of `summary`."""
    ours = result["runs"]["Q-Tuning"]
    total, lines = ours["total"], ["", "source of the samples that Q-Tuning kept"]
    for name, key in (
        ("Q2, trimmed", "kept_q2"),
        ("Q4, whole", "kept_q4"),
        ("backfill, trimmed", "backfilled_q2"),
        ("backfill, whole", "backfilled_q4"),
    ):
        lines.append(f"  {name:17} {total[key]:5,}  {total[key] / total['samples_kept']:6.1%}")
    lines += ["", "planted kind      seen      Q1     Q2     Q3     Q4  between     kept"]
    for kind, row in ours["plants"].items():
        names = ("HARMFUL_NOISE", "VALUABLE_MISCONCEPTION", "REDUNDANT_KNOWLEDGE", "CALIBRATION_DATA", "BETWEEN")
        shares = [row.get(name, 0) / row["seen"] for name in names]
        cells = " ".join(f"{share:6.1%}" for share in shares[:4])
        kept = row.get("kept", 0) / row["seen"]
        lines.append(f"  {kind:13} {row['seen']:6,}  {cells}   {shares[4]:6.1%}  {kept:6.1%}")
    trimmed = result["trimmed_boilerplate"]
    if len(trimmed) == 2:
        lines += [
            "",
            f"trimmed `padded` answers lost {trimmed['boilerplate']:.0%} of their boilerplate tokens "
            f"and {trimmed['rest']:.0%} of the others",
        ]
    return "\n".join([*lines, "", summary(result)])


def summary(result: dict) -> str:
    """Eight lines: what each method kept, and the scores before and after."""
    before, runs = result["before"], result["runs"]
    budget = f"{result['sample_keep_ratio']:.1%} of the samples, {result['token_keep_ratio']:.0%} of their tokens"
    seen = noise_share(next(iter(runs.values()))["plants"], "seen")
    totals = {name: run["total"] for name, run in runs.items()}
    rows = [
        ("samples kept", f"{next(iter(totals.values()))['samples_seen']:,} rows"),
        ("noise among them", f"{seen:.0%}"),
        *((f"{group}, {before[group][1]} items", f"{before[group][0]:.1f} %") for group in GROUPS),
        ("held-out loss", f"{before['heldout_loss']:.3f}"),
    ]
    cells = {
        name: [
            f"{run['total']['samples_kept']:,}",
            f"{noise_share(run['plants'], 'kept'):.0%}",
            *(f"{run['after'][group][0]:.1f} %" for group in GROUPS),
            f"{run['after']['heldout_loss']:.3f}",
        ]
        for name, run in runs.items()
    }
    lines = [f"{budget}, {result['steps']} steps, seed {result['seed']}"]
    seconds = {name: f"{name}, {run['seconds']:.0f} s" for name, run in runs.items()}
    lines.append(f"  {'':24}{'before':>14}" + "".join(f"{seconds[name]:>18}" for name in runs))
    for i, (what, first) in enumerate(rows):
        lines.append(f"  {what:24}{first:>14}" + "".join(f"{cells[name][i]:>18}" for name in runs))
    return "\n".join(lines)


def run(out: Path, seed: int) -> dict:
    """Tune the embedded default by both methods, or continue the runs in `out`, and score them."""
    rows = read_json(TINY / "sft.json")
    kind_of = {row["id"]: row["kind"] for row in rows}
    print("scoring the base model", flush=True)
    before, runs = scores(Path(train.TINY["model"])), {}
    for name, more in METHODS.items():
        folder = out / name.lower()
        flags = ["--out", str(folder), "--seed", str(seed), "--log-selection", *more]
        print(f"{name}: training, then scoring", flush=True)
        config = train.parse_config(flags + (["--resume"] if (folder / "config.json").exists() else []))
        train.train(config)
        metrics, selection = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "selection.jsonl")
        counted = [key for key, value in metrics[0].items() if isinstance(value, int) and key != "step"]
        scoring = sum(m["score_s"] for m in metrics)
        seconds = scoring + sum(m["train_s"] for m in metrics)
        runs[name] = {
            "seconds": seconds,
            "scoring_share": scoring / seconds,
            "total": {key: sum(m[key] for m in metrics) for key in counted},
            "plants": plants_by_quadrant(selection, kind_of),
            "after": scores(folder / "model"),
        }
        if name == "Q-Tuning":
            tokenizer = TextTokenizer.from_pretrained(config.model)
            samples = load_samples(TINY / "sft.json", tokenizer, max_length=config.max_length)[0]
            trimmed = trimmed_boilerplate(selection, rows, samples, tokenizer)
    return {
        "seed": seed,
        "steps": len(metrics),
        "sample_keep_ratio": config.sample_keep_ratio,
        "token_keep_ratio": config.token_keep_ratio,
        "before": before,
        "runs": runs,
        "trimmed_boilerplate": trimmed,
        "machine": machine(folder),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.quickstart", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/default"), help="folder of both run folders")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with errors_in_one_line(parser.prog):
        result = run(args.out, args.seed)
        write_json(args.out / "quickstart.json", result, indent=1)
    print(report(result))


if __name__ == "__main__":
    main()
