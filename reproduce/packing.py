"""What packing and the tiled head save: ours beside the plain forms, on the same rows, in the same run.

    python -m reproduce.packing [--model DIR --data FILE] [--out FILE.json]     measure here
    python -m reproduce.packing --table FILE.json                               print the table of a result file

Plain: micro-batches padded to their longest row, logits of every token, log-softmax and autograd on them. Ours:
passes.py. Both score a window of rows, and both train a step of full data on it (LoRA and full tuning, forward and
backward). The head alone is measured against the bare product that it cannot do without, and its NLL and entropy
against float64. Memory is what torch's CPU allocator had given out at most beyond what was there before; seconds are
the process's own CPU time (of all its threads), medians of repeats that take turns. CPU only, fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import passes
import qtuning
import train
from data.sft import Sample, collate, load_samples
from data.tokenizer import TextTokenizer
from model import Transformer, add_lora, read_json
from reproduce.memory import allocated_peak

HEADS = ((49_152, 576, 512), (128_256, 576, 512), (49_152, 2048, 512), (128_256, 2048, 256))  # V, H, tokens


@torch.no_grad()
def plain_score(model: Transformer, samples: list[Sample], micro_batch: int) -> None:
    for start in range(0, len(samples), micro_batch):
        input_ids, labels = collate(samples[start : start + micro_batch])
        qtuning.token_nll_and_entropy(model(input_ids), labels)


def plain_train(model: Transformer, samples: list[Sample], micro_batch: int) -> None:
    for start in range(0, len(samples), micro_batch):
        input_ids, labels = collate(samples[start : start + micro_batch])
        F.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten(), reduction="sum").backward()


def packed_train(model: Transformer, samples: list[Sample], pass_tokens: int) -> None:
    for group in passes.packs([len(s.input_ids) - 1 for s in samples], pass_tokens):
        passes.TokenLoss(model)(*passes.pack([samples[i] for i in group], "cpu"))[0].backward()


def head_tiled(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
    return passes.head_nll_and_entropy(hidden, weight, labels)


def head_bare(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    """The product alone, a block of rows at a time."""
    for block in hidden.split(128):
        block @ weight.T


@torch.no_grad()
def head_plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
    return qtuning.token_nll_and_entropy((hidden @ weight.T)[None], labels[None])


def compare(what: str, forms: dict[str, Callable[[], object]], repeats: int) -> dict:
    """Median seconds and peak bytes of each form; one turn each that is not counted, for the memory."""
    peak = {name: allocated_peak(work) for name, work in forms.items()}
    seconds = {name: [] for name in forms}
    for _ in range(repeats):
        for name, work in forms.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    plain, ours = median["plain"], median["ours"]
    row = {"what": what, "seconds": median, "mib": {name: peak[name] / 2**20 for name in forms}}
    return {**row, "times_faster": plain / ours, "times_less_memory": peak["plain"] / peak["ours"]}


def measure(args: argparse.Namespace) -> dict:
    tokenizer = TextTokenizer.from_pretrained(args.model)
    rows, _ = load_samples(args.data, tokenizer, "auto", args.max_length, args.skip_bad_rows)
    window = [rows[i] for i in train.stream_order(len(rows), 0, args.rows, 0)]
    results = {
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": args.rows,
        "tokens": sum(len(row.input_ids) - 1 for row in window),
        "padded_tokens": sum(collate(window[i : i + 8])[0].numel() for i in range(0, args.rows, 8)),
        "answer_tokens": sum(train.num_answer_tokens(row) for row in window),
        "compared": [],
    }
    bar = tqdm(total=3 + len(HEADS), desc="packing", mininterval=0.1 if sys.stderr.isatty() else 30)
    model = Transformer.from_pretrained(args.model)
    forms = {
        "plain": lambda: plain_score(model, window, 8),
        "ours": lambda: passes.score(model, window, args.pass_tokens, nullcontext()),
    }
    results["compared"].append(compare("scoring", forms, args.repeats))
    bar.update()
    for what in ("full tuning", "LoRA"):
        tuned = Transformer.from_pretrained(args.model)
        if what == "LoRA":
            add_lora(tuned, 8, 16)
        forms = {
            "plain": lambda tuned=tuned: plain_train(tuned, window, 8),
            "ours": lambda tuned=tuned: packed_train(tuned, window, args.pass_tokens),
        }
        results["compared"].append(compare(f"full data, {what}", forms, args.repeats))
        bar.update()
    for vocab, width, tokens in HEADS:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator)
        weight = torch.randn(vocab, width, generator=generator) * 2 / width**0.5
        labels = torch.randint(vocab, (tokens,), generator=generator)
        given = (hidden, weight, labels)
        heads = {"plain": head_plain, "ours": head_tiled, "bare product": head_bare}
        row = compare(
            f"head, V {vocab}, H {width}", {k: lambda f=f, g=given: f(*g) for k, f in heads.items()}, args.repeats
        )
        log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
        exact = torch.stack([-log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
        row["largest_error"] = (torch.stack(head_tiled(*given)).double() - exact).abs().amax(1).tolist()
        results["compared"].append(row)
        bar.update()
    bar.close()
    return results


def table(results: dict) -> str:
    """Markdown, one row a comparison."""
    head = ["", "plain s", "ours s", "times faster", "bare product s", "plain MiB", "ours MiB", "times less", "error"]
    lines = [head, ["---"] * len(head)]
    for row in results["compared"]:
        seconds, mib, error = row["seconds"], row["mib"], row.get("largest_error")
        bare = f"{seconds['bare product']:.3g}" if "bare product" in seconds else ""
        line = [row["what"], f"{seconds['plain']:.3g}", f"{seconds['ours']:.3g}", f"{row['times_faster']:.2f}", bare]
        line += [f"{mib['plain']:.0f}", f"{mib['ours']:.0f}", f"{row['times_less_memory']:.1f}"]
        lines.append([*line, f"{max(error):.0e}" if error else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.packing", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=train.TINY["model"], help="checkpoint folder; the embedded default")
    parser.add_argument("--data", default=train.TINY["data"], help="rows; the embedded default's")
    parser.add_argument("--rows", type=int, default=32, help="rows of the window; %(default)s")
    parser.add_argument("--max-length", type=int, default=2048, help="as in train.py; %(default)s")
    parser.add_argument("--pass-tokens", type=int, default=2048, help="as in train.py; %(default)s")
    parser.add_argument("--skip-bad-rows", action="store_true", help="as in train.py")
    parser.add_argument("--repeats", type=int, default=3, help="%(default)s")
    parser.add_argument("--out", type=Path, help="write the result here (JSON)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result file, run nothing")
    args = parser.parse_args(argv)
    try:
        results = read_json(args.table) if args.table else measure(args)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            train.write_aside(args.out, json.dumps(results, indent=1) + "\n")
        print(table(results))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
