"""The embedded default, tuned with Q-Tuning and scored before and after.

    python -m reproduce.quickstart [--out runs/default] [--seed 0]

It prints what was selected and ends in a summary of eight lines; OUT/quickstart.json holds the same numbers. An
interrupted run is continued by the same command.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import train
from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer
from eval import arc, gsm8k
from eval.common import errors_in_one_line
from model import Transformer
from qtuning import IGNORE_INDEX, Quadrant
from training.files import read_json, read_jsonl, write_json, write_text
from training.scoring import score

TINY = Path(train.TINY["data"]).parent
GROUPS = ("learned", "corrected", "retained")  # of test items, by the beginning of their ids
KINDS = ("clean", "padded", "misconception", "known", "wrong")  # the kinds of rows that data/tiny/make.py plants


# --------------------------------------------------------------------------------------------- scoring


def scores(folder: Path, scratch: Path) -> dict:
    """Accuracy on the embedded tests (percent, with 95 % intervals), and the loss on their right answers."""
    model, tokenizer = Transformer.from_pretrained(folder).eval(), TextTokenizer.from_pretrained(folder)
    results = {
        "arc": arc.evaluate(model, tokenizer, arc.read_items(TINY / "arc_test.jsonl")),
        "gsm8k": gsm8k.evaluate(model, tokenizer, gsm8k.read_items(TINY / "gsm8k_test.jsonl"), max_new_tokens=96),
    }
    nll, _, loss_mask = score(model, heldout_samples(tokenizer, scratch), 4096, nullcontext())
    kept = {task: {key: r[key] for key in ("score", "n", "interval95")} for task, r in results.items()}
    return {**kept, "heldout_loss": (nll.sum() / loss_mask.sum()).item()}


def heldout_rows() -> list[dict]:
    """The tests' questions with their right answers, worded as the rows of the training data."""
    return [
        {"prompt": item.question, "response": item.choices[item.gold]}
        for item in arc.read_items(TINY / "arc_test.jsonl")
    ] + [
        {
            "prompt": f"{item.question}\nLet's think step by step",
            "response": f"{' '.join(item.rationale.split())} The answer is {item.gold}.",
        }
        for item in gsm8k.read_items(TINY / "gsm8k_test.jsonl")
    ]


def heldout_samples(tokenizer: TextTokenizer, scratch: Path) -> list[Sample]:
    """`heldout_rows` tokenised; they are written into `scratch`, since rows are read from files."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "heldout.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in heldout_rows()))
    return load_samples(path, tokenizer)[0]


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


def report(result: dict) -> str:
    """What was selected, and at the end the eight lines of `summary`."""
    total, lines = result["total"], ["", "source of the kept samples"]
    for name, key in (
        ("Q2, trimmed", "kept_q2"),
        ("Q4, whole", "kept_q4"),
        ("backfill, trimmed", "backfilled_q2"),
        ("backfill, whole", "backfilled_q4"),
    ):
        lines.append(f"  {name:17} {total[key]:5,}  {total[key] / total['samples_kept']:6.1%}")
    lines += ["", "planted kind      seen      Q1     Q2     Q3     Q4  between     kept"]
    for kind, row in result["plants"].items():
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
    """Eight lines: what was kept, and the scores before and after."""
    total, before, after = result["total"], result["before"], result["after"]
    lines = [
        f"Q-Tuning on the embedded default: {result['steps']} steps, seed {result['seed']}, "
        f"{result['seconds']:.0f} s of training ({result['scoring_share']:.0%} of it scoring)",
        "                             kept   share   asked",
    ]
    for name, what, asked in (
        ("samples", "samples", f"{result['sample_keep_ratio']:.1%}"),
        ("answer tokens", "answer_tokens", f"{result['token_keep_ratio']:.0%} in trimmed samples"),
    ):
        kept = total[f"{what}_kept"]
        lines.append(f"  {name:22} {kept:8,}  {kept / total[f'{what}_seen']:6.1%}   {asked}")
    lines.append("                            before             after")
    for name, key in (("ARC form, accuracy", "arc"), ("GSM8K form, accuracy", "gsm8k")):
        cells = [
            f"{s[key]['score']:5.1f}% [{s[key]['interval95'][0]:.0f}, {s[key]['interval95'][1]:.0f}]"
            for s in (before, after)
        ]
        lines.append(f"  {name:22} {cells[0]:>17} {cells[1]:>17}   n {before[key]['n']}, 95% interval")
    losses = " ".join(f"{s['heldout_loss']:17.3f}" for s in (before, after))
    return "\n".join([*lines, f"  {'held-out loss':22} {losses}   nats per token"])


def run(out: Path, seed: int) -> dict:
    """Tune the embedded default, or continue the run in `out`, and score it; the result as quickstart.json holds it."""
    flags = ["--out", str(out), "--seed", str(seed), "--log-selection"]
    config = train.parse_config(flags + (["--resume"] if (out / "config.json").exists() else []))
    base = Path(config.model)
    print("scoring the base model", flush=True)
    before = scores(base, out)
    train.train(config)
    print("scoring the tuned model", flush=True)
    after = scores(out / "model", out)

    metrics, selection = read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "selection.jsonl")
    counted = [key for key, value in metrics[0].items() if isinstance(value, int) and key != "step"]
    seconds = {key: sum(m[key] for m in metrics) for key in ("score_s", "train_s")}
    rows, tokenizer = read_json(TINY / "sft.json"), TextTokenizer.from_pretrained(base)
    samples = load_samples(TINY / "sft.json", tokenizer, max_length=config.max_length)[0]
    return {
        "seed": seed,
        "steps": len(metrics),
        "seconds": sum(seconds.values()),
        "scoring_share": seconds["score_s"] / sum(seconds.values()),
        "sample_keep_ratio": config.sample_keep_ratio,
        "token_keep_ratio": config.token_keep_ratio,
        "total": {key: sum(m[key] for m in metrics) for key in counted},
        "plants": plants_by_quadrant(selection, {row["id"]: row["kind"] for row in rows}),
        "trimmed_boilerplate": trimmed_boilerplate(selection, rows, samples, tokenizer),
        "before": before,
        "after": after,
        "machine": machine(out),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.quickstart", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/default"), help="run folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with errors_in_one_line(parser.prog):
        result = run(args.out, args.seed)
        write_json(args.out / "quickstart.json", result, indent=1)
    print(report(result))


if __name__ == "__main__":
    main()
