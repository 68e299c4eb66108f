"""Scores while training: --eval-every and --eval-sets."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import torch

from data.sft import Sample, check_token_ids, load_samples
from data.tokenizer import TextTokenizer
from eval.common import over_ranks
from model import Transformer, read_config
from qtuning import sample_entropy, sample_perplexity
from training.packing import packs
from training.scoring import score

BENCHMARKS = ("arc", "gsm8k", "math", "squad", "triviaqa")


def read_eval_sets(cfg, tokenizer: TextTokenizer) -> dict[str, tuple]:
    """Task -> (the `evaluate` of its benchmark, items) of --eval-sets; empty without --eval-every.

    The task `rows` has None and Samples, for `rows_scores`: held-out rows in any form of --data, in the template and
    length of the run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no set, no such task, or a row is unusable or has a token that the model does not embed.
    """
    sets = {}
    if cfg.eval_every:
        if not cfg.eval_sets:
            raise ValueError("--eval-every needs --eval-sets TASK=FILE,...")
        for part in cfg.eval_sets.split(","):
            task, _, path = part.partition("=")
            tasks = (*BENCHMARKS, "rows")
            if task not in tasks or not path:
                raise ValueError(f"--eval-sets: expected TASK=FILE with TASK one of {', '.join(tasks)}, got {part!r}")
            if task in sets:
                raise ValueError(f"--eval-sets: expected each task once, got {task!r} twice; put both sets in one file")
            if task == "rows":
                evaluate, items = None, load_samples(path, tokenizer, cfg.template, cfg.max_length)[0]
                check_token_ids(path, (s.input_ids for s in items), tokenizer, read_config(cfg.model).vocab_size)
            else:
                benchmark = importlib.import_module(f"eval.{task}")
                evaluate, items = benchmark.evaluate, benchmark.read_items(path)
            sets[task] = evaluate, items[: cfg.eval_limit]
    return sets


def rows_scores(model: Transformer, samples: Sequence[Sample], pass_tokens: int, autocast) -> dict[str, float]:
    """Loss, perplexity and entropy of held-out rows, without gradients; all ranks share the work.

    Returns:
        rows_nll: the mean NLL of the answer tokens of all rows, nats; rows_ppl, rows_ent: the means over rows of Eq. 4
        and Eq. 5.
    Source: Figure 8.
    """

    def work(group: list[int]) -> list[list[float]]:
        nll, entropy, loss_mask = score(model, [samples[i] for i in group], pass_tokens, autocast)
        ppl, ent = sample_perplexity(nll, loss_mask), sample_entropy(entropy, loss_mask)
        return torch.stack([nll.double().sum(dim=-1), loss_mask.sum(dim=-1), ppl, ent], dim=1).tolist()

    lengths = [len(sample.input_ids) - 1 for sample in samples]
    of_rows = over_ranks(packs(lengths, pass_tokens), lengths, work, "scoring rows")
    nll, tokens, ppl, ent = (math.fsum(column) for column in zip(*of_rows, strict=True))
    return {"rows_nll": nll / tokens, "rows_ppl": ppl / len(samples), "rows_ent": ent / len(samples)}


def eval_scores(
    model: Transformer, tokenizer: TextTokenizer, sets: dict[str, tuple], pass_tokens: int, autocast
) -> dict[str, float]:
    """eval_TASK -> percent for every set, and eval_rows_... of `rows_scores`; all ranks share the work."""
    scores = {}
    for task, (evaluate, items) in sets.items():
        model.eval()  # for each set: `rows_scores` leaves the model in train mode
        if task == "rows":
            found = rows_scores(model, items, pass_tokens, autocast)
        else:
            with autocast:  # the fp32 weights of full tuning, too, generate in 16 bits
                found = {task: evaluate(model, tokenizer, items)["score"]}
        scores |= {f"eval_{name}": value for name, value in found.items()}
    model.train()
    return scores
