"""What the scorers share: flags, loading, JSON rows, batched generation, the confidence interval, the result file."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data.sft import line_of_row, read_rows
from data.tokenizer import TextTokenizer
from model import Transformer, generate, load_adapter


def argument_parser(prog: str, description: str, data: str) -> argparse.ArgumentParser:
    """The flags every scorer has; `data` is the default test file."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--model", default="runs/default/model", help="model folder in Hugging Face layout; %(default)s"
    )
    parser.add_argument("--adapter", help="LoRA adapter folder in PEFT layout, put on the model")
    parser.add_argument("--data", default=data, help="rows to score, .jsonl or .json; %(default)s")
    parser.add_argument("--limit", type=positive_int, help="score the first N rows of the file only")
    parser.add_argument("--out", help="result file (JSON): the score and every item's prediction")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of weights and activations; auto: bf16 on cuda, fp32 on cpu",
    )
    return parser


def positive_int(text: str) -> int:
    """argparse type: an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


@contextlib.contextmanager
def errors_in_one_line(prog: str) -> Iterator[None]:
    """Turn what a user can put right into `<prog>: <message>` on stderr and exit status 2; other errors pass."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:  # a RuntimeError, but the flags can cure it
        message = f"out of GPU memory, try smaller batches: {error}"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except ValueError as error:
        message = str(error)
    else:
        return
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def load(args: argparse.Namespace) -> tuple[Transformer, TextTokenizer]:
    """Model (with its adapter, in eval mode) and tokenizer the flags ask for. Sets args.device and args.dtype to
    what was chosen. Raises FileNotFoundError or ValueError on a folder, device or --out that cannot be used."""
    if args.out and Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: expected a file name, got a folder")
    if not Path(args.model).is_dir():
        raise FileNotFoundError(f"--model {args.model}: no such folder (`python train.py` makes the default one)")
    if args.adapter and not Path(args.adapter).is_dir():
        raise FileNotFoundError(f"--adapter {args.adapter}: no such folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device == "cuda" else "fp32"
    tokenizer = TextTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = Transformer.from_pretrained(args.model, dtype=dtype, device=args.device)
    if args.adapter:
        load_adapter(model, args.adapter)
    return model.eval(), tokenizer


# --- rows ------------------------------------------------------------------------------------------------------


def read_items(path: str | Path, parse: Callable[[dict, str], object]) -> list:
    """parse(row, id) of every row of a .jsonl file or .json list; id is the row's own, or else its 0-based number.

    Raises FileNotFoundError; ValueError `path:line: ...` on a row that is no JSON object, or that `parse` refuses
    with a ValueError; ValueError when there is no row at all."""
    items = []
    for number, (line, row) in enumerate(read_rows(path)):
        try:
            if isinstance(row, ValueError):  # the line is no JSON
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {row!r}")
            items.append(parse(row, str(number if row.get("id") is None else row["id"])))
        except ValueError as error:
            raise ValueError(f"{path}:{line or line_of_row(path, number)}: {error}") from None
    if not items:
        raise ValueError(f"{path}: expected at least one row, got none")
    return items


def text_field(row: dict, key: str) -> str:
    """row[key], which must be a text with something in it."""
    if key not in row:
        raise ValueError(f"key {key!r} is missing; expected it beside {', '.join(row) or 'nothing'}")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"key {key!r}: expected a text, got {value!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"key {key!r}: half of a surrogate pair in {value!r}, no tokenizer takes it")
    return value


# --- generation ------------------------------------------------------------------------------------------------


def generate_texts(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: list[tuple[str, str]],
    max_new_tokens: int,
    batch_size: int,
    stop: str,
) -> list[dict]:
    """Greedy continuation of each prompt; `prompts` are pairs of item id (for messages) and prompt text.

    Returns, in the order of `prompts`, {text, new_tokens, finished}. A text ends with EOS or where `stop` has
    appeared in it (then it is finished), or at its limit: max_new_tokens, or less where prompt + new tokens would
    pass the model's context. `stop` only saves time: it stays in the text, for the caller to cut.
    Prompts of like length run together. Raises ValueError where a prompt leaves no room for one new token."""
    context = model.config.max_position_embeddings
    ids = [tokenizer.encode(prompt) for _, prompt in prompts]
    limits = [min(max_new_tokens, context - len(row)) for row in ids]
    for (name, _), row, limit in zip(prompts, ids, limits, strict=True):
        if limit < 1:
            raise ValueError(
                f"item {name}: its prompt of {len(row)} tokens leaves no room in the model's context of {context}"
            )
    # Only rows with the same limit share a batch, so that no row's result depends on its neighbours' lengths.
    order = sorted(range(len(ids)), key=lambda i: (-limits[i], len(ids[i])))
    groups = []
    for _, same_limit in itertools.groupby(order, key=lambda i: limits[i]):
        rows = list(same_limit)
        groups += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    tail = len(stop.encode()) + 1  # no token is shorter than a byte, so `stop` shows up in these many last tokens

    def stopped(new_ids: list[int]) -> bool:
        return stop in tokenizer.decode(new_ids[-tail:])

    results: list[dict] = [{}] * len(ids)
    for group in progress(groups, len(ids), "generating"):
        rows = generate(model, [ids[i] for i in group], limits[group[0]], stop=stopped, batch_size=batch_size)
        for i, row in zip(group, rows, strict=True):
            finished = row[-1] in model.config.eos_token_ids or stopped(row)
            results[i] = {"text": tokenizer.decode(row), "new_tokens": len(row), "finished": finished}
    return results


def progress(groups: list[list[int]], total: int, what: str) -> Iterator[list[int]]:
    """The groups one by one, counting their members: a bar on a terminal, elsewhere a line each half minute."""
    bar = tqdm(total=total, desc=what, leave=False, disable=not sys.stderr.isatty())
    done, last = 0, time.monotonic()
    for group in groups:
        yield group
        done += len(group)
        bar.update(len(group))
        if bar.disable and time.monotonic() - last > 30:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
            last = time.monotonic()
    bar.close()


# --- results ---------------------------------------------------------------------------------------------------


def wilson_interval(num_correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, in percent; z = 1.959964 gives 95%. Unlike the normal interval it
    has a width at 0 and at n correct, and stays within [0, 100]."""
    if not 0 <= num_correct <= n or n < 1:
        raise ValueError(f"expected 0 <= num_correct <= n and n >= 1, got {num_correct} of {n}")
    p = num_correct / n
    centre = p + z * z / (2 * n)
    margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    return max(0.0, scale * (centre - margin)), min(100.0, scale * (centre + margin))


def result(task: str, protocol: str, items: list[dict], **more: object) -> dict:
    """The scorers' return value; the score (percent) counts the `correct` of the items."""
    num_correct, n = sum(item["correct"] for item in items), len(items)
    return {
        "task": task,
        "metric": "accuracy",
        "score": 100 * num_correct / n,
        "n": n,
        "interval95": wilson_interval(num_correct, n),
        "protocol": protocol,
        **more,
        "items": items,
    }


def report(args: argparse.Namespace, scored: dict, seconds: float) -> None:
    """Print one line and, with --out, write the result file: aside first, then renamed, so never half a file."""
    low, high = scored["interval95"]
    print(
        f"{scored['task']}: {scored['score']:.2f}%  n {scored['n']}  95% [{low:.2f}, {high:.2f}]  {seconds:.1f} s  "
        f"({scored['protocol']})"
    )
    if args.out:
        items = scored.pop("items")  # written last: a reader of the file meets the settings first
        where = {key: getattr(args, key) for key in ("model", "adapter", "data", "limit", "device", "dtype")}
        whole = {**scored, **where, "seconds": round(seconds, 2), "items": items}
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(out.name + ".tmp")
        aside.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, out)
