"""Q-Tuning in transformers' Trainer: prune in `get_batch_samples`.

    pip install transformers accelerate
    python examples/hf_trainer.py [--steps 9]

`get_batch_samples` sees every micro-batch of an optimizer step before the first of them is trained on. It returns them
with the number of their labels, which divides the loss: after pruning that is the number of kept tokens. Do not
override `compute_loss` to prune: there the number is still that before pruning. At 12.5 % of the samples and 50 % of
the tokens the loss would be about 16 times too small.

This file tunes the embedded default with the settings of train.py. Losses and gradient norms are the same, up to
rounding. In your own training, also mind these points.

- Columns. `remove_unused_columns=False` if your collator reads columns that the model's `forward` does not take.
- The last micro-batch of an epoch may be too small for the ratio: 12.5 % of 5 samples is none. `keep_one=True` keeps
  one of them; `dataloader_drop_last=True` drops such micro-batches.
- Shifting. Labels are aligned with input_ids here, and the model shifts them. So logits[:, t] are scored with the
  label at t + 1, and the mask is shifted back.
- Eval mode while scoring, so that dropout does not change what is kept.
- Several ranks. Each rank prunes its own micro-batches. With `average_tokens_across_devices` (the default) the Trainer
  sums the kept tokens over the ranks, and two ranks take the same steps as one with twice the accumulation. Use
  torchrun: without a launcher, nn.DataParallel splits the kept rows over the GPUs, and there may be fewer of them.
- Rows must be samples, with padding on the right. A packed row is several samples; it would be kept or dropped whole.
- Every row needs an answer token; `prune_batch` refuses a row without one, as truncation may leave it.
- Evaluation does not prune, since `get_batch_samples` is called in training alone.

TRL's SFTTrainer (1.16) divides its loss by the same number and does not override `get_batch_samples`, so the two
methods below work in a subclass of it, with `packing=False` and `padding_free=False` (the defaults). Perplexity
and entropy are those of the labelled tokens, so set `assistant_only_loss=True` for conversations: otherwise SFTTrainer
labels their whole text. On rows of prompt and completion it labels the completion alone, by default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

if __name__ == "__main__":  # the repository root, wherever this is run from
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.sft import Sample, load_samples
from data.stream import stream_order
from data.tokenizer import TextTokenizer
from qtuning import IGNORE_INDEX, prune_batch, token_nll_and_entropy
from train import TINY

MICRO_BATCH, GRAD_ACCUM, LR = 8, 4, TINY["lr"]
SAMPLE_KEEP_RATIO, TOKEN_KEEP_RATIO, SMOOTHING = 0.125, 0.5, 0.5


class QTuningTrainer(Trainer):
    """A Trainer that trains on what Q-Tuning leaves of each micro-batch."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(map(self.pruned, epoch_iterator), num_batches, device)

    @torch.no_grad()
    def pruned(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The kept samples of a micro-batch; a pruned token has no label."""
        self.model_wrapped.eval()
        logits = self.model_wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]  # logits[:, t] predict the label at t + 1
        nll, entropy = token_nll_and_entropy(logits[:, :-1], labels)
        self.model_wrapped.train()
        mask = labels != IGNORE_INDEX
        left = prune_batch(nll, entropy, mask, SAMPLE_KEEP_RATIO, TOKEN_KEEP_RATIO, SMOOTHING, keep_one=True)
        labels = F.pad(labels.masked_fill(~left.token_mask, IGNORE_INDEX), (1, 0), value=IGNORE_INDEX)
        longest = int(batch["attention_mask"][left.samples.keep].sum(dim=1).max())
        return {name: values[left.samples.keep, :longest] for name, values in {**batch, "labels": labels}.items()}


def padded(samples: list[Sample]) -> dict[str, Tensor]:
    """A micro-batch, padded on the right; labels are aligned with input_ids."""
    input_ids = [torch.tensor(sample.input_ids) for sample in samples]
    labels = [torch.tensor(sample.labels) for sample in samples]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
    }


def train(num_steps: int, use_cpu: bool = False) -> list[tuple[float, float]]:
    """Tune the embedded default; returns the loss and gradient norm of each step."""
    tokenizer = TextTokenizer.from_pretrained(TINY["model"])
    samples, _ = load_samples(TINY["data"], tokenizer, max_length=TINY["max_length"])
    order = stream_order(len(samples), 0, num_steps * GRAD_ACCUM * MICRO_BATCH, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=GRAD_ACCUM,
            num_train_epochs=1,
            train_sampling_strategy="sequential",  # the rows come in train.py's order
            learning_rate=LR,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
        )
        model = AutoModelForCausalLM.from_pretrained(TINY["model"], dtype=torch.float32)
        rows = [samples[i] for i in order]
        trainer = QTuningTrainer(model=model, args=settings, train_dataset=rows, data_collator=padded)
        trainer.train()
    return [(step["loss"], step["grad_norm"]) for step in trainer.state.log_history if "loss" in step]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps of 32 samples; default: %(default)s")
    train(parser.parse_args().steps)
