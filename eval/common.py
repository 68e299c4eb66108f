"""What the scorers share: the command line, rows, batched generation and likelihoods, statistics, the result file.

A scorer is one file: its protocols at the head, `read_items`, the pure functions `prompt`, `extract` and
`is_correct`, `evaluate`, and a `main` that hands them to `run` below. Under torchrun every rank calls `evaluate`
with the same items; the work is dealt out to the ranks batch by batch, and each of them gets the whole result.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.sft import line_of_row, read_rows, share
from data.tokenizer import TextTokenizer
from model import KVCache, Transformer, generate, load_adapter, shared_length, write_aside

PROTOCOLS = ("paper", "standard")
LOGITS_AT_ONCE = 2**24  # fp32 logits alive at one time: 64 MiB

# --- the command line ------------------------------------------------------------------------------------------


def run(
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    data: str | None,
    read_items: Callable[[str], list],
    evaluate: Callable[..., dict],
    shots: dict[str, int] | None = None,
) -> None:
    """A scorer's `main`: flags, rows, model, evaluate, one line printed, the result file.

    data: the default of --data; None: the flag is required.
    shots: for each protocol, how many exemplars it puts before a question. None: the scorer generates nothing, it
        compares likelihoods; it then has --batch-tokens in place of the flags of generation."""
    args = argument_parser(prog, description, data, generates=shots is not None).parse_args(argv)
    with errors_in_one_line(prog), process_group(args):
        items = read_items(args.data)[: args.limit]
        if len({item.id for item in items}) < len(items):
            double, times = Counter(item.id for item in items).most_common(1)[0]
            raise ValueError(f"{args.data}: {times} items have the id {double!r}; expected each id once")
        if shots is None:
            settings = {"batch_tokens": args.batch_tokens}
        else:
            settings = {"exemplars": read_exemplars(args, read_items, shots[args.protocol], items)}
            settings |= {key: getattr(args, key) for key in ("max_new_tokens", "batch_size", "temperature", "seed")}
        model, tokenizer = load(args)
        started = time.perf_counter()
        scored = evaluate(model, tokenizer, items, protocol=args.protocol, **settings)
        report(args, scored, time.perf_counter() - started)


def argument_parser(prog: str, description: str, data: str | None, generates: bool) -> argparse.ArgumentParser:
    """The flags every scorer has, and those of the ones that generate."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add = parser.add_argument
    add("--model", default="runs/default/model", help="model folder in Hugging Face layout; %(default)s")
    add("--adapter", help="LoRA adapter folder in PEFT layout, put on the model")
    add("--data", default=data, required=data is None, help="rows to score; %(default)s")
    add("--limit", type=positive_int, help="score the first N rows of the file only")
    add("--out", help="result file (JSON): the score and every item's prediction")
    add("--protocol", choices=PROTOCOLS, default="paper", help="the paper's or the field's; %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    dtypes = ("auto", "bf16", "fp32")
    add("--dtype", choices=dtypes, default="auto", help="of weights and activations; auto: bf16 on cuda, fp32 on cpu")
    if not generates:
        add("--batch-tokens", type=positive_int, help="tokens of one pass, padded; default: 1024 on cpu, 16384 on cuda")
        return parser
    add("--exemplars", help="worked questions to put before each; rows of the form of --data, never those scored")
    add("--shots", type=positive_int, help="how many of them, from the first; default: the protocol's number")
    add("--temperature", type=not_negative, default=0.0, help="0: the most likely token; else sampled; %(default)s")
    add("--seed", type=int, default=0, help="of sampling; %(default)s")
    add("--batch-size", type=positive_int, default=32, help="prompts generated together; %(default)s")
    add("--max-new-tokens", type=positive_int, help="default: the protocol's number")
    return parser


def positive_int(text: str) -> int:
    """argparse type: an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def not_negative(text: str) -> float:
    """argparse type: a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


@contextlib.contextmanager
def errors_in_one_line(prog: str) -> Iterator[None]:
    """Turn what a user can put right into `<prog>: <message>` on stderr and exit status 2; other errors pass.

    Every rank meets the same errors (see over_ranks), and the first of them says so."""
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
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def process_group(args: argparse.Namespace) -> Iterator[None]:
    """Settle args.device; under torchrun, join the other ranks and take this rank's GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The first rank to finish waits for the last one's batches, which may be long.
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def load(args: argparse.Namespace) -> tuple[Transformer, TextTokenizer]:
    """Model (with its adapter, in eval mode) and tokenizer the flags ask for. Sets args.dtype to what was chosen.
    Raises FileNotFoundError or ValueError on a folder or --out that cannot be used."""
    if args.out and Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: expected a file name, got a folder")
    if not Path(args.model).is_dir():
        raise FileNotFoundError(f"--model {args.model}: no such folder (`python train.py` makes the default one)")
    if args.adapter and not Path(args.adapter).is_dir():
        raise FileNotFoundError(f"--adapter {args.adapter}: no such folder")
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device == "cuda" else "fp32"
    tokenizer = TextTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = Transformer.from_pretrained(args.model, dtype=dtype, device=args.device)
    if args.adapter:
        load_adapter(model, args.adapter)
    return model.eval(), tokenizer


def read_exemplars(
    args: argparse.Namespace, read_items: Callable[[str], list], protocol_shots: int, items: list
) -> list:
    """The first --shots (or else protocol_shots, and args.shots is set to that) rows of --exemplars, none of them
    among the items to score; no rows without that flag."""
    if not args.exemplars:
        if args.shots:
            raise ValueError(f"--shots {args.shots}: needs --exemplars, the rows to take them from")
        if protocol_shots and this_rank()[0] == 0:
            print(f"no --exemplars, so 0-shot; protocol {args.protocol} has {protocol_shots} shots")
        return []
    wanted = args.shots = args.shots or protocol_shots
    if not wanted:
        raise ValueError(f"--exemplars: protocol {args.protocol} has none; say how many to use with --shots")
    exemplars = read_items(args.exemplars)[:wanted]
    if len(exemplars) < wanted:
        raise ValueError(f"--exemplars {args.exemplars}: expected at least {wanted} rows, got {len(exemplars)}")
    for exemplar, item in itertools.product(exemplars, items):
        if dataclasses.replace(exemplar, id=item.id) == item:
            raise ValueError(f"--exemplars {args.exemplars}: row {exemplar.id} is also scored, as item {item.id}")
    return exemplars


def check_protocol(protocol: str) -> None:
    """ValueError on a name that is none of PROTOCOLS."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")


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


def prompt_id(text: str) -> str:
    """16 hexadecimal digits of the text's SHA-256: equal ids, equal prompts."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- work, spread over the ranks -------------------------------------------------------------------------------


def this_rank() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def over_ranks(
    groups: list[list[int]], costs: Sequence[int], work: Callable[[list[int]], list], what: str
) -> list[object]:
    """work(group) returns one result for each member of a group; the results of all groups, by member.

    The groups are the batches: they are the same on any number of ranks, and so are the results, to the last
    bit. Members are 0, 1, ..., each in one group; costs: of each member, in any unit. A rank's ValueError or lack
    of GPU memory is raised on all, so that none waits for ever."""
    rank, world = this_rank()
    hands = share([sum(costs[i] for i in group) for group in groups], world)
    mine = [groups[g] for g in hands[rank]]
    done: dict[int, object] | Exception = {}
    try:
        for group in progress(mine, what, quiet=rank > 0):
            done.update(zip(group, work(group), strict=True))
    except (ValueError, torch.cuda.OutOfMemoryError) as error:
        done = error
    parts = [done]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, done)
    whole = {}
    for part in parts:
        if isinstance(part, Exception):
            raise part
        whole.update(part)
    return [whole[i] for i in range(len(whole))]


def progress(groups: list[list[int]], what: str, quiet: bool = False) -> Iterator[list[int]]:
    """The groups one by one, counting their members: a bar on a terminal, elsewhere a line each half minute."""
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


# --- generation ------------------------------------------------------------------------------------------------


def generate_texts(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: Sequence[tuple[str, str]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict]:
    """A continuation of each prompt; `prompts` are pairs of item id and prompt text.

    Returns, in the order of `prompts`, {prompt_id, completion, new_tokens, finished}. A completion ends before the
    first of the `stop` strings or at EOS (then it is finished), or at its limit: max_new_tokens, or less where
    prompt + new tokens would pass the model's context. A stop string that is a token of the vocabulary, such as
    <|im_end|>, ends it like EOS. Prompts of like length run together.

    temperature 0 takes the most likely token; above 0, an item's draws depend on (seed, item id) alone. So neither
    the order of the prompts nor batch_size changes a completion, but for rounding between near-equal tokens.
    Raises ValueError where a prompt leaves no room for one new token."""
    context, device = model.config.max_position_embeddings, model.lm_head.weight.device
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
    stop_ids = [tokenizer.token_id(text) for text in stop]
    eos_ids = (*model.config.eos_token_ids, *(stop_id for stop_id in stop_ids if stop_id is not None))
    # No token is shorter than a byte, so a stop string shows up in these many last tokens; the one more is there
    # because some decoders drop a space that the first token begins with.
    tail = max((len(text.encode()) for text in stop), default=0) + 1

    def stopped(new_ids: list[int]) -> bool:
        text = tokenizer.decode(new_ids[-tail:])
        return any(end in text for end in stop)

    def generator(name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def work(group: list[int]) -> list[dict]:
        rows = generate(
            model,
            [ids[i] for i in group],
            limits[group[0]],
            eos_ids=eos_ids,
            stop=stopped if stop else None,
            temperature=temperature,
            generators=[generator(prompts[i][0]) for i in group] if temperature else None,
            batch_size=batch_size,
        )
        made = []
        for i, row in zip(group, rows, strict=True):
            text = tokenizer.decode(row)
            completion = cut(text, stop)
            finished = row[-1] in eos_ids or completion != text
            made.append({"prompt_id": prompt_id(prompts[i][1]), "completion": completion})
            made[-1] |= {"new_tokens": len(row), "finished": finished}
        return made

    costs = [len(row) + limit for row, limit in zip(ids, limits, strict=True)]
    return over_ranks(groups, costs, work, "generating")


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the `stop` strings in it, or all of it."""
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


# --- likelihoods -----------------------------------------------------------------------------------------------


@torch.no_grad()
def choice_nll(
    model: Transformer, items: Sequence[Sequence[tuple[list[int], int]]], batch_tokens: int | None = None
) -> list[list[float]]:
    """For each item, the summed NLL (nats) of each of its choices: of tokens `start` and after, given all before.

    An item is a list of choices, a choice is (ids, start) with 1 <= start < len(ids). What the choices of an item
    have in common at their beginning, one token at least, goes through the model once; the rest of each choice
    follows on a copy of its keys and values. Items of like lengths share a pass of at most batch_tokens tokens,
    padding included (None: 1024 on a CPU, where more only adds padding, and 16384 on a GPU); which do changes a
    result by rounding only. The head runs where its logits are read and nowhere else, on LOGITS_AT_ONCE / V
    positions at a time, in fp32 from the logits on.
    Raises ValueError when the choices of an item begin with different tokens, or an NLL is not finite."""
    batch_tokens = batch_tokens or (16_384 if model.lm_head.weight.is_cuda else 1024)
    shared = [shared_length([ids for ids, _ in item]) for item in items]
    own = [max(len(ids) for ids, _ in item) - length for length, item in zip(shared, items, strict=True)]
    if min(shared) < 1:
        raise ValueError(f"item {shared.index(min(shared))}: expected its choices to begin with the same token")

    def tokens(group: list[int]) -> int:  # of both passes, each padded to its longest row
        rows = sum(len(items[i]) for i in group)
        return len(group) * max(shared[i] for i in group) + rows * max(own[i] for i in group)

    groups: list[list[int]] = []
    for i in sorted(range(len(items)), key=lambda i: (-(own[i] // 4), -shared[i])):  # alike in both lengths
        if groups and tokens([*groups[-1], i]) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])

    def work(group: list[int]) -> list[list[float]]:
        return _batch_nll(model, [items[i] for i in group], [shared[i] for i in group])

    return over_ranks(groups, [tokens([i]) for i in range(len(items))], work, "scoring choices")


def _batch_nll(
    model: Transformer, items: list[Sequence[tuple[list[int], int]]], shared: list[int]
) -> list[list[float]]:
    device = model.lm_head.weight.device
    rows = [(k, ids, start) for k, item in enumerate(items) for ids, start in item]
    width, rest = max(shared), max(len(ids) - 1 - shared[k] for k, ids, _ in rows)
    cache = KVCache(model, len(items), width + rest)

    def hidden_states(parts: list[list[int]], first: list[int]) -> Tensor:
        """(B, T, H): parts stand at positions first, first + 1, ...; padded on the right."""
        longest = max(map(len, parts))
        input_ids = torch.tensor([part + [0] * (longest - len(part)) for part in parts], device=device)
        position_ids = torch.tensor(first, device=device)[:, None] + torch.arange(longest, device=device)
        return model.hidden_states(input_ids, position_ids, cache).flatten(0, 1)

    hidden = hidden_states([item[0][0][:length] for item, length in zip(items, shared, strict=True)], [0] * len(items))
    if rest:  # else every choice has one token of its own, and no other comes after it
        cache.keep_rows(torch.tensor([k for k, _, _ in rows], device=device))
        parts = [ids[shared[k] : -1] for k, ids, _ in rows]
        hidden = torch.cat([hidden, hidden_states(parts, [shared[k] for k, _, _ in rows])])

    # Where in `hidden` the state that predicts each wanted token stands: those of the shared beginnings, item after
    # item, then those of the choices, row after row. A choice's first own token is predicted by the shared part.
    places, targets = [], []
    for k, item in enumerate(items):
        wanted = range(min(start for _, start in item), shared[k])
        places += [k * width + t - 1 for t in wanted]
        targets += [item[0][0][t] for t in wanted]
    for row, (k, ids, start) in enumerate(rows):
        after = len(items) * width + row * rest - shared[k]
        wanted = range(max(start, shared[k]), len(ids))
        places += [k * width + t - 1 if t == shared[k] else after + t - 1 for t in wanted]
        targets += [ids[t] for t in wanted]
    nll = iter(_token_nll(model, hidden[torch.tensor(places, device=device)], torch.tensor(targets, device=device)))

    beginnings = []
    for k, item in enumerate(items):
        first = min(start for _, start in item)
        beginnings.append({t: next(nll) for t in range(first, shared[k])})
    sums: list[list[float]] = [[] for _ in items]
    for k, ids, start in rows:
        beginning = sum(beginnings[k][t] for t in range(start, shared[k]))
        total = beginning + sum(next(nll) for _ in range(max(start, shared[k]), len(ids)))
        if not total < math.inf:
            raise ValueError(f"the model gives a text of {len(ids)} tokens an NLL of {total}")
        sums[k].append(total)
    return sums


def _token_nll(model: Transformer, hidden: Tensor, targets: Tensor) -> list[float]:
    """NLL of target n after state n: (N, H), (N,) -> N numbers."""
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = []
    for states, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.lm_head(states).float()  # (chunk, V)
        parts.append(logits.logsumexp(-1) - logits.gather(-1, target[:, None]).squeeze(-1))
    return torch.cat(parts).tolist()


# --- statistics ------------------------------------------------------------------------------------------------


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


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values`: 10,000 resamples of them, always the same ones.

    How often each distinct value comes up is drawn at once (a multinomial draw), so that the order of the values
    does not matter."""
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    rng, n = np.random.default_rng(seed), counts.sum()
    chunks = [rng.multinomial(n, counts / n, size=draws // 10) @ distinct / n for _ in range(10)]
    low, high = np.quantile(np.concatenate(chunks), [0.025, 0.975])
    return float(low), float(high)


def measure(values: Sequence[bool | float]) -> dict:
    """{score, n, interval95}, in percent: of bools the share that is True, with Wilson's interval; of other numbers
    (0 to 1 each) the mean, with a bootstrap's."""
    if not values:
        raise ValueError("expected at least one item to score, got none")
    n, score = len(values), 100 * math.fsum(values) / len(values)
    if all(isinstance(value, bool) for value in values):
        interval = wilson_interval(sum(values), n)
    else:
        low, high = bootstrap_interval(values)
        interval = (100 * low, 100 * high)
    return {"score": score, "n": n, "interval95": interval}


# --- results ---------------------------------------------------------------------------------------------------


def result(
    task: str, protocol: str, items: list[dict], *, metric: str = "accuracy", also: Sequence[str] = (), **more: object
) -> dict:
    """What `evaluate` returns: {task, metric, score (percent), n, interval95, protocol, metrics, ..., items}.

    items: {id, prompt_id, prediction, gold, correct, ...} each; the score is the share that is `correct`.
    also: further keys of the items to measure, bools or numbers from 0 to 1: metrics[key] is {score, n, interval95}.
    more: other keys of the result; `tokens`, the number of tokens scored or generated, gives tokens_per_s.
        `dropped` and `unfinished` are counts that are printed where they are not 0."""
    metrics = {key: measure([item[key] for item in items]) for key in also}
    scored = measure([item["correct"] for item in items])
    return {"task": task, "metric": metric, **scored, "protocol": protocol, "metrics": metrics, **more, "items": items}


def how(protocol: str, num_shots: int, temperature: float) -> str:
    """The `protocol` of a result: `paper, 4-shot, greedy`."""
    return f"{protocol}, {num_shots}-shot, " + (f"temperature {temperature:g}" if temperature else "greedy")


def report(args: argparse.Namespace, scored: dict, seconds: float) -> None:
    """On the first rank: print a line for each metric and, with --out, write the result file."""
    rank, world = this_rank()
    if rank:
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
        on_cuda = args.device == "cuda"
        made_by = {
            **flags,
            **code_version(),
            "device_name": torch.cuda.get_device_name() if on_cuda else f"{os.cpu_count()} cpu cores",
            "world_size": world,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(scored["tokens"] / seconds, 1),
        }
        write_json(args.out, {**scored, **made_by, "items": items})


def in_words(measured: dict) -> str:
    """`43.21%  n 200  95% [36.50, 50.14]`, of what `measure` returns."""
    low, high = measured["interval95"]
    return f"{measured['score']:.2f}%  n {measured['n']}  95% [{low:.2f}, {high:.2f}]"


def code_version() -> dict:
    """{commit, uncommitted_changes} of this checkout; None where there is no git to ask."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes)}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "uncommitted_changes": None}


def write_json(path: str | Path, value: dict) -> None:
    """Written aside first, then renamed, so never half a file; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
