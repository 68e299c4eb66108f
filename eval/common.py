"""What the benchmarks share: the command line, rows, work on several ranks, the result file.

A benchmark is one file: its protocols in the docstring, `read_items`, the pure functions `prompt`, `extract` and
`is_correct`, `evaluate`, and a `main` that hands them to `run`. Under torchrun every rank calls `evaluate` with the
same items; the ranks share the work batch by batch, and each of them gets the whole result.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.sft import read_rows, row_name
from data.tokenizer import TextTokenizer
from eval.statistics import in_words, measure
from model import Transformer
from training.files import check_writable, write_json
from training.lora import load_adapter
from training.ranks import Ranks, chosen_device, chosen_dtype, errors_in_one_line
from training.run_folder import code_version, device_name

PROTOCOL_NAMES = ("paper", "standard")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark has a model answer."""

    shots: int  # exemplars before each question
    max_new_tokens: int
    stop: tuple[str, ...]  # a text ends before the first of these strings


# --- the command line ------------------------------------------------------------------------------------------


def run(
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    data: str | None,
    read_items: Callable[[str], list],
    evaluate: Callable[..., dict],
    protocols: dict[str, Protocol] | None = None,
) -> None:
    """The `main` of a benchmark: parse flags, read rows, load the model, evaluate, print, write the result file.

    Args:
        data:      the default of --data; the flag is required where this is None.
        protocols: those of a benchmark that generates, by name. One that compares likelihoods has none; its command
                   has --batch-tokens in place of the flags of generation.
    """
    args = argument_parser(prog, description, data, generates=protocols is not None).parse_args(argv)
    with errors_in_one_line(prog), Ranks.joined(chosen_device(args.device)) as ranks:
        args.device = ranks.device.type
        items = read_items(args.data)[: args.limit]
        if len({item.id for item in items}) < len(items):
            double, times = Counter(item.id for item in items).most_common(1)[0]
            raise ValueError(f"{args.data}: {times} items have the id {double!r}; expected each id once")
        if protocols is None:
            settings = {"batch_tokens": args.batch_tokens}
        else:
            settings = {"exemplars": read_exemplars(args, read_items, protocols[args.protocol].shots, items)}
            settings |= {key: getattr(args, key) for key in ("max_new_tokens", "batch_size", "temperature", "seed")}
        model, tokenizer = load(args)
        started = time.perf_counter()
        scored = evaluate(model, tokenizer, items, protocol=args.protocol, **settings)
        report(args, scored, time.perf_counter() - started)


def argument_parser(prog: str, description: str, data: str | None, generates: bool) -> argparse.ArgumentParser:
    """The flags that every benchmark has, and those of one that generates."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add = parser.add_argument
    add("--model", default="runs/default/model", help="model folder in Hugging Face layout; default: %(default)s")
    add("--adapter", help="LoRA adapter folder in PEFT layout, applied to the model")
    default_data = "default: %(default)s" if data else "required"
    add("--data", default=data, required=data is None, help=f"rows to score; {default_data}")
    add("--limit", type=positive_int, help="score only the first N rows of the file")
    add("--out", help="result file (JSON): the score and the prediction for every item")
    add("--protocol", choices=PROTOCOL_NAMES, default="paper", help="the paper's or the field's; default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is a GPU")
    dtypes = ("auto", "bf16", "fp32")
    add("--dtype", choices=dtypes, default="auto", help="of weights and activations; auto: bf16 on a GPU that has it")
    if not generates:
        add("--batch-tokens", type=positive_int, help="padded tokens of one pass; default: 1024 on cpu, 16384 on cuda")
        return parser
    add("--exemplars", help="file of worked questions to put before each question, in the form of --data")
    add("--shots", type=positive_int, help="how many exemplars to use, from the first; default: the protocol's number")
    add("--temperature", type=not_negative, default=0.0, help="0 takes the most likely token; default: %(default)s")
    add("--seed", type=int, default=0, help="seed of sampling; default: %(default)s")
    add("--batch-size", type=positive_int, default=32, help="prompts decoded together; default: %(default)s")
    add("--max-new-tokens", type=positive_int, help="limit of each answer; default: the protocol's number")
    return parser


def positive_int(text: str) -> int:
    """An integer of at least 1: an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0: an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def load(args: argparse.Namespace) -> tuple[Transformer, TextTokenizer]:
    """The model (with its adapter, in eval mode) and the tokenizer that the flags name; sets args.dtype if it is auto.

    Raises:
        FileNotFoundError: a folder or one of its files is missing.
        ValueError: a file of a folder, --out or --dtype cannot be used.
    """
    if args.out and Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: expected a file name, got a folder")
    if args.out and Ranks.current().rank == 0:
        check_writable(args.out)
    if not Path(args.model).is_dir():
        raise FileNotFoundError(f"--model {args.model}: no such folder (`python train.py` makes the default one)")
    if args.adapter and not Path(args.adapter).is_dir():
        raise FileNotFoundError(f"--adapter {args.adapter}: no such folder")
    args.dtype = chosen_dtype(args.dtype, args.device)
    tokenizer = TextTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = Transformer.from_pretrained(args.model, dtype=dtype, device=args.device)
    if args.adapter:
        load_adapter(model, args.adapter)
    return model.eval(), tokenizer


def read_exemplars(
    args: argparse.Namespace, read_items: Callable[[str], list], protocol_shots: int, items: list
) -> list:
    """The first --shots rows of --exemplars; no rows without that flag. Sets args.shots, default: protocol_shots.

    Raises:
        ValueError: too few rows, or one of them is also among the items to score.
    """
    if not args.exemplars:
        if args.shots:
            raise ValueError(f"--shots {args.shots}: needs --exemplars, the rows to take them from")
        if protocol_shots and Ranks.current().rank == 0:
            print(f"no --exemplars, so 0-shot; protocol {args.protocol} has {protocol_shots} shots")
        return []
    wanted = args.shots = args.shots or protocol_shots
    if not wanted:
        raise ValueError(f"--exemplars: protocol {args.protocol} has 0 shots; give a number with --shots")
    exemplars = read_items(args.exemplars)[:wanted]
    if len(exemplars) < wanted:
        raise ValueError(f"--exemplars {args.exemplars}: expected at least {wanted} rows, got {len(exemplars)}")
    for exemplar, item in itertools.product(exemplars, items):
        if dataclasses.replace(exemplar, id=item.id) == item:
            raise ValueError(f"--exemplars {args.exemplars}: row {exemplar.id} is also scored, as item {item.id}")
    return exemplars


def check_protocol(protocol: str) -> None:
    """Raise ValueError on a name that is not one of PROTOCOL_NAMES."""
    if protocol not in PROTOCOL_NAMES:
        raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOL_NAMES)}")


# --- rows ------------------------------------------------------------------------------------------------------


def read_items(path: str | Path, parse: Callable[[dict, str], object]) -> list:
    """parse(row, id) for every row of a .jsonl file or .json list; the id is the row's own or its 0-based number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no row; a row is not a JSON object or `parse` refuses it (named as in data.sft.row_name).
    """
    items, rows = [], read_rows(path)
    for number, (_, row) in enumerate(rows):
        try:
            if isinstance(row, ValueError):  # the line is not JSON
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {row!r}")
            items.append(parse(row, str(number if row.get("id") is None else row["id"])))
        except ValueError as error:
            raise ValueError(f"{row_name(path, number, rows)}: {error}") from None
    if not items:
        raise ValueError(f"{path}: expected at least one row, got none")
    return items


def text_field(row: dict, key: str) -> str:
    """row[key], a text that is not blank.

    Raises:
        ValueError: the key is missing, or its value is anything else.
    """
    if key not in row:
        raise ValueError(f"key {key!r} is missing; expected it beside {', '.join(row) or 'nothing'}")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"key {key!r}: expected a text, got {value!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(
            f"key {key!r}: expected a text that UTF-8 can encode, got half of a surrogate pair in {value!r}"
        )
    return value


@contextlib.contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Put the place before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def prompt_id(text: str) -> str:
    """The first 16 hexadecimal digits of the text's SHA-256: equal ids mean equal prompts."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- work on several ranks -------------------------------------------------------------------------------------


def over_ranks(
    groups: list[list[int]], costs: Sequence[int], work: Callable[[list[int]], list], what: str
) -> list[object]:
    """The result for each member, in order, on every rank.

    The groups are the batches. They are the same on any number of ranks, and so are the results, bit for bit.

    Args:
        groups: the members 0, 1, ..., N-1, each in one group.
        costs:  the cost of each member, in any unit; it decides which rank works on a group.
        work:   returns one result for each member of a group.
        what:   the name of the work, for the progress bar.
    Raises:
        ValueError, torch.cuda.OutOfMemoryError: `work` raised it on any rank; all ranks raise it, so that none waits.
    """
    ranks = Ranks.current()
    mine = [groups[g] for g in ranks.share([sum(costs[i] for i in group) for group in groups])]
    done: dict[int, object] | Exception = {}
    try:
        for group in progress(mine, what, quiet=ranks.rank > 0):
            done.update(zip(group, work(group), strict=True))
    except (ValueError, torch.cuda.OutOfMemoryError) as error:
        done = error
    whole = {}
    for part in ranks.gather([done]):
        if isinstance(part, Exception):
            raise part
        whole.update(part)
    return [whole[i] for i in range(len(whole))]


def progress(groups: list[list[int]], what: str, quiet: bool = False) -> Iterator[list[int]]:
    """The groups one by one; shows how many members are done: a bar on a terminal, else a line every 30 seconds."""
    total, on_terminal = sum(map(len, groups)), sys.stderr.isatty()
    bar = tqdm(total=total, desc=what, leave=False, disable=quiet or not on_terminal)
    done, last = 0, time.monotonic()
    for group in groups:
        yield group
        done += len(group)
        bar.update(len(group))
        if not (quiet or on_terminal) and time.monotonic() - last > 30:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
            last = time.monotonic()
    bar.close()


# --- results ---------------------------------------------------------------------------------------------------


def result(
    task: str, protocol: str, items: list[dict], *, metric: str = "accuracy", also: Sequence[str] = (), **more: object
) -> dict:
    """The result of a benchmark: {task, metric, score (percent), n, interval95, protocol, metrics, ..., items}.

    Args:
        items: {id, prompt_id, prediction, gold, correct, ...} each; the score is the share that is `correct`.
        also:  further keys to measure where the items have them, bools or numbers in [0, 1]; metrics[key] is
               {score, n, interval95}.
        more:  other keys of the result. `tokens`, the number of tokens scored or generated, gives tokens_per_s;
               the counts `dropped` and `unfinished` are printed where they are not 0.
    """
    metrics = {key: measure([item[key] for item in items]) for key in also if items and key in items[0]}
    scored = measure([item["correct"] for item in items])
    return {"task": task, "metric": metric, **scored, "protocol": protocol, "metrics": metrics, **more, "items": items}


def how(protocol: str, num_shots: int, temperature: float) -> str:
    """The key `protocol` of a result: `paper, 4-shot, greedy`."""
    return f"{protocol}, {num_shots}-shot, " + (f"temperature {temperature:g}" if temperature else "greedy")


def report(args: argparse.Namespace, scored: dict, seconds: float) -> None:
    """Print a line for each metric and, with --out, write the result file; on rank 0 only."""
    ranks = Ranks.current()
    if ranks.rank:
        return
    print(f"{scored['task']}: {in_words(scored)}  {seconds:.1f} s  ({scored['protocol']})")
    for name, part in scored["metrics"].items():
        print(f"  {name}: {in_words(part)}")
    for key, what in (("dropped", "items dropped"), ("unfinished", "completions ended by a limit of tokens")):
        if scored.get(key):
            print(f"  {what}: {scored[key]}")
    if args.out:
        items = scored.pop("items")  # written last: a reader of the file meets the settings first
        flags = {key: value for key, value in vars(args).items() if key not in ("out", *scored)}
        made_by = {
            **flags,
            **code_version(),
            "device_name": device_name(args.device),
            "world_size": ranks.world,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(scored["tokens"] / seconds, 1),
        }
        write_json(args.out, {**scored, **made_by, "items": items}, indent=1)
