"""Q-Tuning in a plain PyTorch loop: one line more in the step, and `pruned`, the function that it calls.

    python examples/plain_loop.py [--steps 9]               with Q-Tuning
    python examples/plain_loop.py [--steps 9] --full-data   the same loop without it

It tunes the embedded default with the settings of train.py and prints each step's loss and gradient norm. For a loop
of your own, install `qtuning` alone and copy `pruned`. A micro-batch must be large enough for the ratio: 12.5 % of 5
samples is none. `prune_batch(..., keep_one=True)` then keeps one; by default it raises.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # the repository root, wherever this is run from
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.sft import collate, load_samples
from data.stream import stream_order
from data.tokenizer import TextTokenizer
from model import Transformer
from qtuning import IGNORE_INDEX, prune_batch, token_nll_and_entropy
from train import TINY

MICRO_BATCH, GRAD_ACCUM, LR = 8, 4, TINY["lr"]
SAMPLE_KEEP_RATIO, TOKEN_KEEP_RATIO, SMOOTHING = 0.125, 0.5, 0.5


def pruned(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The kept samples of a micro-batch; a pruned token has no label.

    Args:
        input_ids, labels: (B, T) int64; labels[b, t] is the token after input_ids[b, t], -100 where it is not trained.
    Returns:
        input_ids and labels, each (number kept, T).
    """
    model.eval()  # no dropout
    with torch.no_grad():
        nll, entropy = token_nll_and_entropy(model(input_ids), labels)
    model.train()
    left = prune_batch(nll, entropy, labels != IGNORE_INDEX, SAMPLE_KEEP_RATIO, TOKEN_KEEP_RATIO, SMOOTHING)
    keep = left.samples.keep
    return input_ids[keep], labels.masked_fill(~left.token_mask, IGNORE_INDEX)[keep]


def step(model: nn.Module, optimizer, micro_batches: list[tuple[Tensor, Tensor]], prune: bool) -> tuple[float, float]:
    """Take an optimizer step; returns the loss (nats per trained token) and the norm of its gradient."""
    if prune:
        micro_batches = [pruned(model, *batch) for batch in micro_batches]  # the line that Q-Tuning adds
    num_tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in micro_batches)
    total = 0.0
    for input_ids, labels in micro_batches:
        logits = model(input_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        (loss / num_tokens).backward()
        total += loss.item()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return total / num_tokens, grad_norm


def train(num_steps: int, prune: bool = True) -> list[tuple[float, float]]:
    """Tune the embedded default; returns the loss and gradient norm of each step."""
    model = Transformer.from_pretrained(TINY["model"], dtype=torch.float32)
    tokenizer = TextTokenizer.from_pretrained(TINY["model"])
    samples, _ = load_samples(TINY["data"], tokenizer, max_length=TINY["max_length"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / num_steps)))
    order = stream_order(len(samples), 0, num_steps * GRAD_ACCUM * MICRO_BATCH, seed=0)
    batches = [[samples[i] for i in order[k : k + MICRO_BATCH]] for k in range(0, len(order), MICRO_BATCH)]
    found = []
    for k in range(num_steps):
        micro_batches = [collate(batch) for batch in batches[k * GRAD_ACCUM : (k + 1) * GRAD_ACCUM]]
        found.append(step(model, optimizer, micro_batches, prune))
        schedule.step()
        print("step {}/{} loss {:.4f} grad_norm {:.4f}".format(k + 1, num_steps, *found[-1]), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps of 32 samples; default: %(default)s")
    parser.add_argument("--full-data", action="store_true", help="train on all samples and tokens")
    args = parser.parse_args()
    train(args.steps, prune=not args.full_data)
