"""Supervised fine-tuning with Q-Tuning: score, prune, train on what is left.

    python train.py                                             the embedded default, on one device
    python train.py --model DIR --data FILE --out runs/mine     your own checkpoint and data
    torchrun --standalone --nproc_per_node=8 train.py ...       the same on 8 devices
    python train.py --score-only ...                            what would be kept of the data, without training

A step takes micro_batch x grad_accum samples per rank. The ranks share the scoring and the training by length, and
the choices by prune batch. The loss of a step is the sum over its kept tokens on all ranks, divided by their number.

The run folder holds config.json, metrics.jsonl (docs/METRICS.md explains each key), selection.jsonl with
--log-selection, checkpoint/, and at the end model/ (full fine-tuning) or adapter/ (LoRA).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.sft import Sample, check_token_ids, load_samples
from data.stream import fingerprint
from data.templates import resolve_template
from data.tokenizer import TextTokenizer
from eval import during
from model import Transformer, read_config
from pruners import SAMPLE_PRUNERS, TOKEN_PRUNERS, choose_samples, choose_tokens, read_side_values, row_stream
from pruners.look import write_look
from qtuning import num_samples_to_keep, token_mask
from training import memory
from training.head import TokenLoss
from training.lora import add_lora, save_adapter
from training.model_folder import tokenizer_files
from training.packing import check_varlen
from training.ranks import Ranks, chosen_device, chosen_dtype, errors_in_one_line, fails_first
from training.run_folder import Run, check_hashes, check_settings, input_hashes, owned, weights_hash
from training.scoring import Scorer, kept_batches, mean_nll, not_finite
from training.shard import shard, whole_model
from training.signals import Stopped, StopRequest

HERE = Path(__file__).resolve().parent


def flag(default, help: str, choices: Collection[str] | None = None):
    """A field of Config and the command-line flag that sets it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each field is a flag; the defaults are the paper's (Table 7)."""

    model: str | None = flag(None, "checkpoint folder in Hugging Face layout; default: the embedded model and data")
    data: str | None = flag(None, "rows to train on, .json or .jsonl")
    out: str = flag("runs/default", "run folder")
    seed: int = flag(0, "seed of the order of rows, the LoRA weights and random pruners")
    resume: bool = flag(False, "continue an interrupted run from its last checkpoint")
    score_only: bool = flag(False, "train nothing: write scores.jsonl and look.html, what would be kept and trimmed")

    sample_pruner: str = flag("qtuning", "how samples are chosen", SAMPLE_PRUNERS)
    token_pruner: str = flag("qtuning", "how their tokens are chosen", TOKEN_PRUNERS)
    sample_keep_ratio: float = flag(0.125, "r_sample: share of a prune batch's samples to keep, (0, 1]")
    token_keep_ratio: float = flag(0.5, "r_token: share of a trimmed sample's answer tokens to keep, [0, 1]")
    smoothing: float = flag(0.5, "lambda of Eq. 7: weight of a token's neighbours, [0, 1]")
    reverse: bool = flag(False, "keep the tokens of the highest score (Table 5)")
    keep_quadrants: str = flag("2,4", "quadrants that qtuning keeps, of 1 to 4 (Tables 4, 15)")
    trim_quadrants: str = flag("2", "quadrants whose kept samples qtuning trims; '' trims none")
    backfill_quadrants: str = flag("0,1,2,3,4", "where qtuning fills up from first; 0: in no corner (beyond the paper)")
    token_pruning: str = flag("mask", "pruned tokens leave the loss, or the input too", ("mask", "drop"))
    scores: str | None = flag(None, "folder of side files (pruners.score_rows), for the pruners that need them")
    prune_batch: int | None = flag(None, "samples that compete; a multiple of --micro-batch, default: --micro-batch")

    micro_batch: int = flag(8, "samples per device in each micro-batch")
    grad_accum: int = flag(4, "micro-batches per device in each optimizer step")
    reuse_scores: int = flag(1, "inexact: use a row's scores in K visits of the row before it is scored again")
    pass_tokens: int | None = flag(None, "tokens of one forward pass; default: 2048 on cpu, on cuda as many as fit")
    epochs: float = flag(3.0, "passes over the rows; they set the length of the learning-rate schedule")
    max_steps: int | None = flag(None, "stop after this many steps of that schedule")
    lr: float = flag(1e-4, "peak learning rate, cosine to 0")
    lora_rank: int = flag(8, "rank of the LoRA updates (alpha is twice that); 0: full fine-tuning")
    activation_checkpointing: bool = flag(
        False, "keep only the layers' inputs for the backward pass: slower, less memory"
    )
    reuse_forward: bool = flag(False, "with --activation-checkpointing: train on the layer outputs of the scoring pass")
    shard: bool = flag(False, "divide weights, gradients and moments among the ranks (FSDP): slower, less memory")
    max_length: int = flag(2048, "longest row in tokens; longer rows are cut")
    template: str = flag("auto", "chat template; auto: the tokenizer's own, else 'default'")
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "computing dtype; auto: bf16 on a GPU that has it, else fp32", ("auto", "bf16", "fp32"))
    save_every: int | None = flag(None, "steps between checkpoints; default: every 10 minutes, and at the end")
    eval_every: int | None = flag(None, "steps between scores of --eval-sets; metrics.jsonl holds them as eval_TASK")
    eval_sets: str | None = flag(
        None, "TASK=FILE,... for the scorers in eval/, paper's protocol, 0-shot; rows=FILE: held-out loss"
    )
    eval_limit: int | None = flag(None, "score the first N rows of each set; default: all")
    log_selection: bool = flag(False, "write selection.jsonl: each step's scores, quadrants and kept tokens")
    skip_bad_rows: bool = flag(False, "count unusable rows and continue; by default they end the run")

    def __post_init__(self):
        def check(name: str, ok: bool, expected: str):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

        for name in ("token_keep_ratio", "smoothing", "sample_keep_ratio"):
            check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("micro_batch", "grad_accum", "reuse_scores"):
            check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("prune_batch", "pass_tokens", "max_steps", "save_every", "eval_every", "eval_limit"):
            check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name, least, known in (
            ("keep_quadrants", 1, "1234"),
            ("trim_quadrants", 0, "1234"),
            ("backfill_quadrants", 1, "01234"),
        ):
            named = getattr(self, name).split(",") if getattr(self, name) else []
            ok = len(named) == len(set(named)) >= least and set(named) <= set(known)
            check(name, ok, f"{'one or more' if least else 'any'} of {','.join(known)}, none of them twice")
        if self.reuse_forward:
            needs = {*SAMPLE_PRUNERS[self.sample_pruner].needs, *TOKEN_PRUNERS[self.token_pruner].needs}
            exact, scored = self.reuse_scores == 1, bool(needs & {"ppl", "ent", "nll"})
            fits = self.activation_checkpointing and self.token_pruning == "mask" and exact and scored
            check("reuse_forward", fits, "with --activation-checkpointing, --token-pruning mask and exact scores")
        if self.shard:
            samples, tokens = SAMPLE_PRUNERS[self.sample_pruner], TOKEN_PRUNERS[self.token_pruner]
            clashes = {
                "--reuse-forward": self.reuse_forward,
                "--eval-every": self.eval_every is not None,
                f"--sample-pruner {self.sample_pruner}": samples.draw is not None,
                f"--token-pruner {self.token_pruner}": any(map(callable, tokens.needs)),
            }
            if odd := [name for name, given in clashes.items() if given]:
                raise ValueError(f"--shard does not go with {', '.join(odd)}: the ranks would not run as many passes")
        check("max_length", self.max_length >= 2, "at least 2")
        check("lora_rank", 0 <= self.lora_rank <= 65_536, "in [0, 65536]")
        check("epochs", 0 < self.epochs <= 1e6, "above 0 and at most 1e6")
        check("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
        check("lr", 0 < self.lr < math.inf, "above 0")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices:
                check(field.name, getattr(self, field.name) in choices, f"one of {', '.join(choices)}")
        if self.score_only:
            on_plane = {"ppl", "ent"} <= {*SAMPLE_PRUNERS[self.sample_pruner].needs}
            check("sample_pruner", on_plane, "one that places samples on the plane, with --score-only")
            check("resume", not self.resume, "absent with --score-only")


# The embedded default: without --model these replace the defaults of Config. A model this small is tuned whole, on
# short rows, with steps of 160: random pruning of samples and tokens at 12.5 % x 50 % leaves 550 answer tokens a step.
# The rate is one at which each score of that pruning spreads by at most 2 points over seeds (standard deviation).
TINY = {
    "model": str(HERE / "data" / "tiny" / "base"),
    "data": str(HERE / "data" / "tiny" / "sft.json"),
    "lora_rank": 0,
    "lr": 2e-4,
    "max_length": 512,
    "grad_accum": 20,
    "epochs": 2.0,
    "eval_sets": ",".join(f"{task}={HERE / 'data' / 'tiny' / task}_test.jsonl" for task in ("arc", "gsm8k")),
}


def resolve(cfg: Config) -> Config:
    """The settings with `auto` and the unset flags replaced by their values on this machine.

    On a GPU an unset --pass-tokens stays unset, until the model is there (`with_pass_tokens`).
    """
    device = chosen_device(cfg.device)
    dtype = chosen_dtype(cfg.dtype, device)
    if device == "cuda" and dtype == "bf16":
        check_varlen()
    pass_tokens = cfg.pass_tokens or (None if device == "cuda" else 2048)
    prune_batch = cfg.prune_batch or cfg.micro_batch
    return dataclasses.replace(cfg, device=device, dtype=dtype, prune_batch=prune_batch, pass_tokens=pass_tokens)


def parse_config(argv: list[str] | None = None) -> Config:
    """The command line as a Config."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    types = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(Config):
        name, help = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        if field.type == "bool":
            parser.add_argument(name, action="store_true", help=help)
        else:
            kind = types[field.type.removesuffix(" | None")]
            choices, help = field.metadata["choices"], f"{help} [{field.default}]"
            parser.add_argument(name, type=kind, default=field.default, choices=choices, help=help)
    if parser.parse_args(argv).model is None:
        parser.set_defaults(**TINY)
    config = Config(**vars(parser.parse_args(argv)))
    if config.data is None:
        raise ValueError("--data is required with --model")
    return config


# ------------------------------------------------------------------------------------------------ loop


def train(cfg: Config) -> None:
    """Train with these settings, under torchrun or alone.

    Raises:
        ValueError, OSError: wrong input, or a file that could not be read or written.
        Stopped: SIGTERM or Ctrl-C; the run is saved if a step was done.
    """
    cfg = resolve(cfg)
    with (
        StopRequest() as stop,
        Ranks.joined(cfg.device, patience=datetime.timedelta(hours=1)) as ranks,
        owned(cfg, ranks),
        memory.explained(cfg, ranks.world),
    ):
        train_on(cfg, ranks, stop)


def train_on(
    cfg: Config,
    ranks: Ranks,
    stop: StopRequest | None = None,
    *,
    make_loss: Callable[[Transformer, bool], nn.Module] = TokenLoss,
    change_rows: Callable[[list[Sample]], list[Sample]] | None = None,
) -> None:
    """Train with these settings on the ranks that have joined.

    Args:
        make_loss:   (model, activation_checkpointing) -> a module with `TokenLoss`'s inputs and outputs.
        change_rows: applied to the tokenised rows before training. Both are for ablations (reproduce/choices.py).
    """
    cfg = dataclasses.replace(cfg, shard=cfg.shard and ranks.world > 1)
    device, bf16 = ranks.device, cfg.dtype == "bf16"
    # Uncached: each weight is read once a pass, and autocast would keep all 16-bit copies until its end.
    autocast = torch.autocast(cfg.device, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)

    # Rows.
    tokenizer = TextTokenizer.from_pretrained(cfg.model)
    tokenizer_files(Path(cfg.model))  # a link that the end of the run could not copy is refused now
    template = resolve_template(cfg.template, tokenizer)
    samples, skipped = load_samples(cfg.data, tokenizer, template, cfg.max_length, cfg.skip_bad_rows)
    check_token_ids(cfg.data, (s.input_ids for s in samples), tokenizer, read_config(cfg.model).vocab_size)
    end_id, written = template.end_id, tokenizer.files(template.chat_template)
    del template  # ends the process that renders chat templates
    samples = change_rows(samples) if change_rows else samples
    check_settings(cfg, ranks)
    ranks.check_same(lambda: fingerprint(samples), f"the rows of --data {cfg.data}, as tokens")
    ranks.check_same(lambda: int(weights_hash(cfg.model), 16) >> 1, f"the weights in --model {cfg.model}")
    global_batch, per_step, schedule_steps, last_step = plan(cfg, len(samples), ranks.world)
    stream, note = row_stream(cfg, samples, lambda: first_losses(model, samples, cfg, ranks, autocast))
    side = read_side_values(cfg, samples, stream.rows)
    eval_sets = during.read_eval_sets(cfg, tokenizer)

    # Model and optimizer. Full fine-tuning keeps fp32 weights under autocast; LoRA puts fp32 adapters on a bf16 base.
    base_dtype = torch.bfloat16 if bf16 and cfg.lora_rank else torch.float32
    with memory.noted("loading the model"):
        place = {"dtype": None, "device": "cpu"} if cfg.shard else {"dtype": base_dtype, "device": device}
        model = Transformer.from_pretrained(cfg.model, **place)
        model.config = model.config.ending_with(end_id)
        torch.manual_seed(cfg.seed)
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank, alpha=2 * cfg.lora_rank)
        if cfg.shard:
            shard(model, ranks, base_dtype)
    cfg = with_pass_tokens(cfg, model, samples, ranks)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=cfg.lr, weight_decay=0.0, fused=True)
    token_loss = make_loss(model, cfg.activation_checkpointing)
    scorer = Scorer(model, samples, ranks, cfg, autocast, side)

    hashes = input_hashes(cfg, samples, stream.rows, side)
    check_hashes(hashes, ranks)
    run = Run(cfg, ranks, len(samples), hashes, stop or StopRequest())
    done = run.resume(last_step, trainable, optimizer, stream, scorer)
    run.say(
        f"{len(samples)} rows ({skipped} skipped), {last_step} steps of {global_batch}, {ranks.world} x {cfg.device}"
    )
    if note:
        run.say(note)
    context = model.config.max_position_embeddings
    if too_long := sum(len(sample.input_ids) > context for sample in samples):
        run.say(f"warning: {too_long} rows exceed the model's context; --max-length {context} would cut them")
    if cfg.score_only:
        return write_look(cfg, samples, tokenizer, stream, scorer, run, per_step, last_step)
    if ranks.world > 1 and not cfg.shard:
        devices = [device] if cfg.device == "cuda" else None
        token_loss = DistributedDataParallel(
            token_loss, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    for step in run.steps(done, last_step):
        started = time.perf_counter()
        rows, weights = stream.take((step - 1) * per_step, step * per_step)
        scorer.new_step(step)

        # Algorithm 1: stage 1 keeps samples, stage 2 trims their tokens.
        chosen = choose_samples(cfg, step, rows, scorer)
        trimmed = choose_tokens(cfg, step, rows, chosen, scorer)
        kept = token_mask(chosen, trimmed, scorer.loss_mask(rows))  # (B, T), the tokens in the loss
        num_kept = max(int(kept.sum()), 1)  # a step without a kept token has loss 0
        selected = time.perf_counter()

        # Train on what is left: the loss is the mean over the tokens kept on all ranks (choice C16).
        lr = cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / schedule_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum, row_loss, nlls = torch.zeros((), device=device), torch.zeros(len(rows), dtype=torch.float64), []
        for batch in kept_batches(cfg, samples, rows, kept, weights, scorer):
            # Gradients are exchanged once a step, on the last pass; DDP takes their mean over the ranks.
            exchange = nullcontext() if batch.last or ranks.world == 1 or cfg.shard else token_loss.no_sync()
            with exchange, memory.noted("a training pass", batch.lengths):
                with autocast:
                    loss, nll = token_loss(*batch.inputs)
                (loss * (ranks.world / num_kept)).backward()
            loss_sum += loss.detach()
            nlls += zip(batch.places, nll.split(batch.counts), strict=True)
            if stream.draw and batch.places:
                row_loss[batch.places] = torch.stack([part.mean() for part in nll.split(batch.counts)]).double().cpu()
        grad_norm = nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        grad_norm = (grad_norm.full_tensor() if cfg.shard else grad_norm).item()
        loss = ranks.sum(loss_sum.double()).item() / num_kept
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            broken = ranks.gather([rows[place] for place, nll in nlls if not nll.isfinite().all()])
            what = f"the loss ({loss}) or the gradient's norm ({grad_norm})"
            raise not_finite(cfg, step, what, [samples[row] for row in broken])
        differentiated = time.perf_counter()
        with memory.noted("the optimizer's step"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=ranks.world == 1 or cfg.shard)  # DDP's gradients are views of its buckets
        if cfg.device == "cuda":
            torch.cuda.synchronize()  # so that the seconds below are those of the work
        finished = time.perf_counter()
        if stream.draw:  # the next epoch is drawn by the rows' losses
            trained, row_loss = kept.any(dim=1).nonzero()[:, 0].tolist(), ranks.sum(row_loss).tolist()
            stream.learn([(rows[place], row_loss[place]) for place in trained])

        measured = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "score_s": selected - started}
        measured |= {"select_s": selected - started - scorer.seconds, "train_s": finished - selected}
        measured["optimizer_s"] = finished - differentiated
        if eval_sets and (step % cfg.eval_every == 0 or step == last_step):
            with run.scoring(step):
                measured |= during.eval_scores(model, tokenizer, eval_sets, cfg.pass_tokens, autocast)
        run.log(step, measured, samples, rows, weights, chosen, kept, scorer)
        if run.due(step):
            run.save(step, trainable, optimizer, stream, scorer)
    if cfg.shard:
        model = whole_model(model, ranks, cfg.lora_rank)
    if ranks.rank == 0:
        if cfg.lora_rank:
            save_adapter(model, run.out / "adapter", written)
        else:
            model.save_pretrained(run.out / "model", extra_files=written)
        run.finish(last_step)


def with_pass_tokens(cfg: Config, model: Transformer, samples: list[Sample], ranks: Ranks) -> Config:
    """The settings with --pass-tokens: where it is unset, as many tokens as fit the GPU with the least free memory."""
    if cfg.pass_tokens:
        return cfg
    kept = cfg.micro_batch * cfg.grad_accum * sum(len(s.input_ids) for s in samples) // len(samples)
    free = memory.free_bytes(ranks.device)
    tokens = memory.fitting_tokens(cfg, model.config, ranks.world, free, kept if cfg.reuse_forward else 0)
    return dataclasses.replace(cfg, pass_tokens=min(ranks.gather([tokens])))


def plan(cfg: Config, num_samples: int, world: int) -> tuple[int, int, int, int]:
    """Samples per step, rows that a step takes of the stream, steps of the schedule, steps to take.

    A pruner that chooses rows ahead, once or for an epoch, fills a step with as many as Q-Tuning would keep of it.
    So every method takes as many optimizer steps, on as many kept samples.

    Raises:
        ValueError: the rows do not fill a step, or a prune batch is too small to keep a sample.
    """
    global_batch = cfg.micro_batch * cfg.grad_accum * world
    schedule_steps = int(cfg.epochs * num_samples) // global_batch
    if schedule_steps < 1:
        raise ValueError(
            f"{cfg.epochs} epochs of {num_samples} rows do not fill one step of {global_batch} samples "
            f"(--micro-batch {cfg.micro_batch} x --grad-accum {cfg.grad_accum} x {world} ranks)"
        )
    if cfg.prune_batch % cfg.micro_batch or cfg.prune_batch > global_batch:
        raise ValueError(
            f"--prune-batch must be a multiple of --micro-batch {cfg.micro_batch}, at most the {global_batch} "
            f"samples of a step, got {cfg.prune_batch}"
        )
    pruner, per_step = SAMPLE_PRUNERS[cfg.sample_pruner], global_batch
    if pruner.choose or pruner.rows or pruner.draw:
        sizes = [min(cfg.prune_batch, global_batch - start) for start in range(0, global_batch, cfg.prune_batch)]
        budget = sum(num_samples_to_keep(cfg.sample_keep_ratio, size) for size in sizes)
        per_step = global_batch if pruner.choose else budget
    return global_batch, per_step, schedule_steps, min(schedule_steps, cfg.max_steps or schedule_steps)


def first_losses(model: Transformer, samples: list[Sample], cfg: Config, ranks: Ranks, autocast) -> Tensor:
    """Every row's mean NLL before training: (N,) float64."""
    mine, found = list(range(ranks.rank, len(samples), ranks.world)), torch.zeros(len(samples), dtype=torch.float64)
    chunks = [mine[start : start + 256] for start in range(0, len(mine), 256)]
    every = 0.1 if sys.stderr.isatty() else 30
    for rows in tqdm(chunks, desc="losses of all rows", delay=2, disable=ranks.rank > 0, mininterval=every):
        found[rows] = mean_nll(model, [samples[i] for i in rows], cfg.pass_tokens, autocast).double()
    return ranks.sum(found)


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line("train.py"):
        try:
            train(parse_config(argv))
        except Stopped as asked:
            if fails_first():  # torchrun also stops the ranks that are left after an error
                print(f"train.py: {asked}", file=sys.stderr)
            sys.exit(asked.status)


if __name__ == "__main__":
    main()
