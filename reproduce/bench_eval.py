"""How much faster the scorers are than the plain loop, one text at a time, and whether both say the same.

    python -m reproduce.bench_eval --model DIR --arc ARC-Easy-Dev.jsonl --gsm8k test.jsonl --exemplars train.jsonl

ARC: the scorer (batches, what choices share run once, logits only where they are read) against one forward pass a
choice with all its logits. GSM8K: the scorer (batches that finished rows leave, the exemplars run once a batch)
against one prompt after the other, with a KV cache. Both in one run, on the same items; seconds without loading
(on a CPU the process's own).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch

from data.tokenizer import TextTokenizer
from eval import arc, common, gsm8k
from model import Transformer


@torch.no_grad()
def arc_one_by_one(model: Transformer, tokenizer: TextTokenizer, items: list[arc.Item], protocol: str) -> list[dict]:
    """The definition of arc.evaluate, literally: {id, nll, prediction} of each item."""
    context, device, answers = model.config.max_position_embeddings, model.lm_head.weight.device, []
    for item in items:
        nll = []
        for ids, start in arc.scored_ids(item, tokenizer, context, protocol):
            log_p = model(torch.tensor([ids], device=device))[0].float().log_softmax(-1)  # (T, V)
            total = -sum(log_p[t - 1, ids[t]] for t in range(start, len(ids))).item()
            nll.append(total / (len(ids) - start) if protocol == "paper" else total)
        answers.append({"id": item.id, "nll": nll, "prediction": item.labels[nll.index(min(nll))]})
    return answers


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """What the work returns, and its seconds: on a GPU the clock's, on a CPU the process's own, of all its threads,
    so that what else runs on the machine does not count."""
    on_cuda = torch.cuda.is_available()
    clock = time.perf_counter if on_cuda else time.process_time
    started = clock()
    done = work()
    if on_cuda:
        torch.cuda.synchronize()
    return done, clock() - started


def bench_arc(model, tokenizer, items: list[arc.Item], protocol: str) -> dict:
    """Seconds of both ways, how many answers are the same, and the largest difference of an NLL (nats)."""
    items = [item for item in items if protocol == "standard" or len(item.choices) == 4]
    batched, batched_s = timed(lambda: arc.evaluate(model, tokenizer, items, protocol=protocol)["items"])
    plain, plain_s = timed(lambda: arc_one_by_one(model, tokenizer, items, protocol))
    pairs = list(zip(batched, plain, strict=True))
    off = max(abs(x - y) for one, other in pairs for x, y in zip(one["nll"], other["nll"], strict=True))
    same = sum(one["prediction"] == other["prediction"] for one, other in pairs)
    return {**ratio(plain_s, batched_s), "n": len(pairs), "same_answers": same, "largest_nll_difference": off}


def bench_gsm8k(model, tokenizer, items, exemplars, protocol: str, max_new_tokens: int | None, batch_size: int) -> dict:
    """Seconds of both ways, how many answers and completions are the same, and the tokens made."""

    def generate(batch_size: int) -> list[dict]:
        settings = {"exemplars": exemplars, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        return gsm8k.evaluate(model, tokenizer, items, protocol=protocol, **settings)["items"]

    batched, batched_s = timed(lambda: generate(batch_size))
    plain, plain_s = timed(lambda: generate(1))
    pairs = list(zip(batched, plain, strict=True))
    same = {
        f"same_{what}s": sum(one[key] == other[key] for one, other in pairs)
        for what, key in (("answer", "prediction"), ("completion", "completion"))
    }
    tokens = sum(row["new_tokens"] for row in batched)
    return {**ratio(plain_s, batched_s), "n": len(pairs), **same, "new_tokens": tokens, "shots": len(exemplars)}


def ratio(plain_s: float, batched_s: float) -> dict:
    return {"plain_s": round(plain_s, 3), "batched_s": round(batched_s, 3), "ratio": round(plain_s / batched_s, 2)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.bench_eval", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder in Hugging Face layout")
    parser.add_argument("--arc", required=True, help="ARC rows")
    parser.add_argument("--gsm8k", required=True, help="GSM8K rows")
    parser.add_argument("--exemplars", required=True, help="GSM8K train rows")
    parser.add_argument("--limit", type=common.positive_int, default=32, help="items of each; %(default)s")
    parser.add_argument("--batch-size", type=common.positive_int, default=32, help="of generation; %(default)s")
    parser.add_argument("--max-new-tokens", type=common.positive_int, help="of generation; default: the protocol's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--out", help="write the numbers here too (JSON)")
    args = parser.parse_args(argv)
    args.adapter = None
    with common.errors_in_one_line(parser.prog), common.process_group(args):
        questions = arc.read_items(args.arc)[: args.limit]
        problems, exemplars = gsm8k.read_items(args.gsm8k)[: args.limit], gsm8k.read_items(args.exemplars)
        model, tokenizer = common.load(args)
        measured = {}
        for protocol in common.PROTOCOLS:
            measured[f"arc, {protocol}"] = bench_arc(model, tokenizer, questions, protocol)
            print(f"arc, {protocol}:", json.dumps(measured[f"arc, {protocol}"]), flush=True)
        for protocol, shots in gsm8k.SHOTS.items():
            settings = (exemplars[:shots], protocol, args.max_new_tokens, args.batch_size)
            measured[f"gsm8k, {protocol}"] = bench_gsm8k(model, tokenizer, problems, *settings)
            print(f"gsm8k, {protocol}:", json.dumps(measured[f"gsm8k, {protocol}"]), flush=True)
        if args.out:
            on_cuda = args.device == "cuda"
            where = {
                "model": args.model,
                "device_name": torch.cuda.get_device_name() if on_cuda else f"{os.cpu_count()} cpu cores",
                "threads": torch.get_num_threads(),
                "dtype": args.dtype,
                "batch_size": args.batch_size,
                **common.code_version(),
            }
            common.write_json(args.out, {**where, **measured})


if __name__ == "__main__":
    main()
