"""What packing and the tiled head save, beside padded micro-batches and full logits on the same rows.

    python -m reproduce.packing [--model DIR --data FILE] [--out FILE.json]     measure here
    python -m reproduce.packing --table FILE.json                               print the table of a result file

"Plain" is micro-batches padded to their longest row, logits of every token, log-softmax and autograd on them. "Ours"
is training/packing.py and training/head.py. Both score the same rows, and both train a step of full data on them
(LoRA and full tuning, forward and backward). The head alone is compared with the bare product of hidden states and
weight, and its NLL and entropy with float64.

Memory is the peak of torch's CPU allocator beyond what was allocated before. Seconds are the process's own CPU time,
of all its threads: medians of repeats in which the forms take turns. CPU only, fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import qtuning
import train
from data.sft import Sample, collate, load_samples
from data.stream import stream_order
from data.tokenizer import TextTokenizer
from eval.common import positive_int
from model import Transformer
from reproduce import bench
from reproduce.tables import markdown
from training.head import TokenLoss, head_nll_and_entropy
from training.lora import add_lora
from training.packing import pack, packs
from training.scoring import answer_mask, score

MICRO_BATCH = 8
HEADS = ((49_152, 576, 512), (128_256, 576, 512), (49_152, 2048, 512), (128_256, 2048, 256))  # V, H, tokens


def padded(samples: list[Sample]) -> list[tuple[Tensor, Tensor]]:
    """Input ids and labels of micro-batches, padded to their longest row."""
    return [collate(samples[start : start + MICRO_BATCH]) for start in range(0, len(samples), MICRO_BATCH)]


@torch.no_grad()
def plain_score(model: Transformer, samples: list[Sample]) -> None:
    for input_ids, labels in padded(samples):
        qtuning.token_nll_and_entropy(model(input_ids), labels)


def plain_train(model: Transformer, samples: list[Sample]) -> None:
    for input_ids, labels in padded(samples):
        F.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten(), reduction="sum").backward()


def packed_train(model: Transformer, samples: list[Sample], pass_tokens: int) -> None:
    for group in packs([len(s.input_ids) - 1 for s in samples], pass_tokens):
        TokenLoss(model)(*pack([samples[i] for i in group], "cpu"))[0].backward()


def head_bare(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The product alone, a block of rows at a time."""
    for block in hidden.split(128):
        block @ weight.T


@torch.no_grad()
def head_plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return qtuning.token_nll_and_entropy((hidden @ weight.T)[None], labels[None])


def compare(what: str, forms: dict[str, Callable[[], object]], repeats: int) -> dict:
    """Median seconds and peak memory of each form; the run that measures memory is not timed."""
    peak = {name: bench.allocated_peak(work) for name, work in forms.items()}
    seconds = {name: [] for name in forms}
    for _ in range(repeats):
        for name, work in forms.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    row = {"what": what, "seconds": median, "mib": {name: peak[name] / 2**20 for name in forms}}
    ratios = {"times_faster": median["plain"] / median["ours"], "times_less_memory": peak["plain"] / peak["ours"]}
    return row | ratios


def compare_heads(vocab: int, width: int, tokens: int, repeats: int) -> dict:
    """The head on random hidden states: `compare`, and the largest error of our NLL and of our entropy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 2 / width**0.5
    labels = torch.randint(vocab, (tokens,), generator=generator)
    heads = {"plain": head_plain, "ours": head_nll_and_entropy, "bare product": head_bare}
    forms = {name: lambda head=head: head(hidden, weight, labels) for name, head in heads.items()}
    row = compare(f"head, V {vocab}, H {width}", forms, repeats)
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    exact = torch.stack([-log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
    error = torch.stack(head_nll_and_entropy(hidden, weight, labels)).double() - exact
    return row | {"largest_error": error.abs().amax(1).tolist()}


def measure(args: argparse.Namespace) -> dict:
    """The result: scoring, training and the head, each plain and ours."""
    tokenizer = TextTokenizer.from_pretrained(args.model)
    rows, _ = load_samples(args.data, tokenizer, "auto", args.max_length, args.skip_bad_rows)
    some = [rows[i] for i in stream_order(len(rows), 0, args.rows, 0)]
    compared = []
    with bench.progress(3 + len(HEADS), "packing") as bar:
        for what in ("scoring", "full data, full tuning", "full data, LoRA"):
            model = Transformer.from_pretrained(args.model)
            if what == "scoring":
                plain, ours = plain_score, lambda *given: score(*given, nullcontext())
            else:
                plain, ours = plain_train, packed_train
            if what == "full data, LoRA":
                add_lora(model, 8, 16)
            forms = {
                "plain": lambda plain=plain, model=model: plain(model, some),
                "ours": lambda ours=ours, model=model: ours(model, some, args.pass_tokens),
            }
            compared.append(compare(what, forms, args.repeats))
            bar.update()
        for sizes in HEADS:
            compared.append(compare_heads(*sizes, args.repeats))
            bar.update()
    return {
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": args.rows,
        "tokens": sum(len(row.input_ids) - 1 for row in some),
        "padded_tokens": sum(input_ids.numel() for input_ids, _ in padded(some)),
        "answer_tokens": sum(int(answer_mask(row).sum()) for row in some),
        "compared": compared,
    }


def table(results: dict) -> str:
    """Markdown: one row for each comparison."""
    head = ["", "plain s", "ours s", "times faster", "bare product s", "plain MiB", "ours MiB", "times less", "error"]
    rows = [head]
    for row in results["compared"]:
        seconds, mib, error = row["seconds"], row["mib"], row.get("largest_error")
        bare = f"{seconds['bare product']:.3g}" if "bare product" in seconds else ""
        line = [row["what"], f"{seconds['plain']:.3g}", f"{seconds['ours']:.3g}", f"{row['times_faster']:.2f}", bare]
        line += [f"{mib['plain']:.0f}", f"{mib['ours']:.0f}", f"{row['times_less_memory']:.1f}"]
        rows.append([*line, f"{max(error):.0e}" if error else ""])
    return markdown(rows)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=train.TINY["model"], help="checkpoint folder; default: the embedded model")
    parser.add_argument("--data", default=train.TINY["data"], help="rows; default: the embedded default's")
    parser.add_argument("--rows", type=positive_int, default=32, help="number of rows; default: %(default)s")
    parser.add_argument("--max-length", type=int, default=2048, help="as in train.py; default: %(default)s")
    parser.add_argument("--pass-tokens", type=int, default=2048, help="as in train.py; default: %(default)s")
    parser.add_argument("--skip-bad-rows", action="store_true", help="as in train.py")
    parser.add_argument("--repeats", type=positive_int, default=3, help="default: %(default)s")


def main(argv: list[str] | None = None) -> None:
    bench.main(argv, "reproduce.packing", __doc__.partition("\n")[0], add_flags, measure, (table,))


if __name__ == "__main__":
    main()
