"""Memory of a pass: how much by formula, how many tokens fit a GPU, and what to say where they do not fit.

For P parameters, A of them trained, with 16-bit activations as train.py has them on a GPU, the formula counts
  - weights: 2 P bytes for scoring or LoRA (bf16; LoRA's own 4 A in fp32), 4 P for full tuning (fp32, under autocast);
  - gradients and AdamW's two moments, fp32: 12 A bytes; with DDP another 4 A, since it lays its buckets out again
    after the first step, and until they are used the gradients exist twice;
  - what autograd keeps of the layers for the backward pass (`activation_bytes`; a test counts the tensors), or with
    activation checkpointing the input of every layer, and the rest for one layer at a time;
  - autocast's 16-bit copies of trained fp32 weights, which autograd keeps; and on the way back a weight's gradient in
    16 bits, before it is added to the fp32 one;
  - the head's workspace: the logits of LOSS_ROWS tokens in training, a tile of them in scoring, never (N, V); in full
    tuning also the gradient of its weight, which the forward pass computes, and the weight's 16-bit copy.
With --shard, weights, gradients and moments are divided by the ranks; whole are the embedding and the head, two layers
at a time, and the gradients of the first two and of a layer.
It does not count the allocator's reserve and what CUDA and its libraries take.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence

import torch

from model import ModelConfig, Transformer
from training.head import LOSS_ROWS, TILE
from training.lora import add_lora

MODES = ("score", "lora, checkpointing", "lora", "full, checkpointing", "full")
MOST_TOKENS, STEP = 16_384, 512  # of a pass on a GPU; more make it no faster
MARGIN = 0.9  # the share of free memory to plan for: passes of unlike sizes leave gaps in the allocator


def meta_model(cfg: ModelConfig, lora_rank: int = 0) -> Transformer:
    """A model without memory, to count its parameters; lora_rank 0: without LoRA."""
    with torch.device("meta"):
        model = Transformer(cfg)
        return add_lora(model, lora_rank, alpha=2 * lora_rank) if lora_rank else model


def layer_bytes(cfg: ModelConfig, tokens: int, lora_rank: int, bf16: bool) -> int:
    """Bytes that autograd keeps of one decoder layer for the backward pass; lora_rank 0: full tuning."""
    hidden, s, full = cfg.hidden_size, 2 if bf16 else 4, lora_rank == 0
    heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
    q, kv = heads * cfg.head_dim, kv_heads * cfg.head_dim
    norms = 2 * (4 * hidden + 4)  # of both: the input and the reciprocal rms, fp32
    if not full:
        norms += 2 * s * hidden  # inputs of the projections and of LoRA
    else:  # normalised values, for the weight's gradient, and inputs of the projections: with bf16 a copy for each
        norms += 2 * 4 * hidden + (5 * 2 * hidden if bf16 else 2 * 4 * hidden)
    attention = s * (2 * q + 2 * kv) + 4 * heads  # queries, keys, values, output; log-sum-exp
    if cfg.model_type == "qwen3":  # the norms of queries and keys
        attention += (q + kv) * (4 + s * full) + 4 * (heads + kv_heads)
    feed_forward = 4 * s * cfg.intermediate_size  # gate, its silu, up, their product
    per_token = norms + attention + feed_forward + 7 * s * lora_rank  # A x of seven linear layers
    weights = meta_model(dataclasses.replace(cfg, num_hidden_layers=1), lora_rank).model["layers"][0]
    cast = sum(p.numel() for p in weights.parameters() if p.requires_grad and p.dim() == 2) if bf16 else 0
    return tokens * per_token + 2 * cast  # autocast's bf16 copies of the fp32 weights that train


def activation_bytes(cfg: ModelConfig, tokens: int, lora_rank: int, bf16: bool, checkpointing: bool) -> int:
    """Bytes that autograd keeps of `Transformer.hidden_states` for the backward pass."""
    layers, full = cfg.num_hidden_layers, lora_rank == 0
    once = tokens * (2 * 4 * cfg.head_dim + 4 * cfg.hidden_size + 4)  # cos, sin; the last norm
    once += tokens * (8 + 4 * cfg.hidden_size) if full else 0  # token ids; the last norm's normalised values
    if checkpointing:
        stream = 2 if bf16 and not full else 4  # bytes of a value between the layers
        return once + layers * tokens * stream * cfg.hidden_size + layer_bytes(cfg, tokens, lora_rank, bf16)
    total = once + layers * layer_bytes(cfg, tokens, lora_rank, bf16)
    if not full:  # the frozen embedding needs no gradient: the first layer keeps neither its norm nor A of q, k, v
        total -= tokens * (4 * cfg.hidden_size + 4) + (3 * 2 * lora_rank * cfg.hidden_size if bf16 else 0)
    return total


def peak_bytes(
    cfg: ModelConfig,
    tokens: int,
    mode: str,
    lora_rank: int = 8,
    bf16: bool = True,
    device: str = "cuda",
    ranks: int = 1,
    shard: bool = False,
) -> int:
    """Bytes of weights, gradients, moments, activations and the head's workspace, for one pass over `tokens` tokens.

    Args:
        mode: one of MODES.
        ranks, shard: of a run on several GPUs: what each of them holds.
    """
    kind = mode.partition(",")[0]
    rank = lora_rank if kind == "lora" else 0
    s, more_layers = 2 if bf16 else 4, cfg.num_hidden_layers - 1
    model = meta_model(dataclasses.replace(cfg, num_hidden_layers=1), rank)
    layer = list(model.model["layers"][0].parameters())
    of_layer, trained_of_layer = (sum(p.numel() for p in layer if p.requires_grad >= least) for least in (0, 1))
    total = sum(p.numel() for p in model.parameters()) + more_layers * of_layer
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + more_layers * trained_of_layer
    trained = 0 if kind == "score" else trained
    weights = 4 * total if kind == "full" else s * (total - trained) + 4 * trained
    if shard and ranks > 1:
        size = 4 if kind == "full" else s
        outside = total - cfg.num_hidden_layers * of_layer
        states = (weights + 12 * trained) / ranks + size * (outside + 2 * of_layer)
        states += 4 * (outside + of_layer) if kind == "full" else 0  # their gradients, before they are divided
    else:
        states = weights + 12 * trained + 4 * trained * (ranks > 1)
    if kind == "score":
        alive = s * tokens * (3 * cfg.hidden_size + 3 * cfg.intermediate_size)  # at once, in the feed-forward layer
        rows, columns = TILE[device]
        tile = 3 * 4 * min(rows, tokens) * min(columns, cfg.vocab_size) + s * tokens * cfg.hidden_size
        return int(states) + max(alive, tile)
    head = min(LOSS_ROWS[device], tokens) * cfg.vocab_size * (4 + 4)  # logits, and their exponentials to sum
    if kind == "full":
        head += cfg.vocab_size * cfg.hidden_size * (4 + 2 * bf16)
        head += 2 * bf16 * cfg.hidden_size * cfg.intermediate_size  # the largest weight's gradient, in 16 bits
    return int(states) + activation_bytes(cfg, tokens, rank, bf16, "checkpointing" in mode) + head


# ------------------------------------------------------------------------------- how many tokens fit


def mode_of(cfg) -> str:
    """The mode of MODES in which a run with these settings trains."""
    return ("lora" if cfg.lora_rank else "full") + (", checkpointing" if cfg.activation_checkpointing else "")


def fitting_tokens(cfg, config: ModelConfig, ranks: int, free: int, kept: int = 0) -> int:
    """The tokens of a pass that fit: a multiple of STEP up to MOST_TOKENS, at least STEP.

    Args:
        cfg:    the run's settings.
        config: the model's.
        free:   bytes that weights, gradients, moments and a pass may take together.
        kept:   tokens of which --reuse-forward keeps every layer's output on one rank.
    """
    stream = 2 if cfg.dtype == "bf16" and cfg.lora_rank else 4
    room = MARGIN * free - stream * kept * config.num_hidden_layers * config.hidden_size

    def needed(steps: int) -> int:
        sizes = {"lora_rank": cfg.lora_rank, "bf16": cfg.dtype == "bf16", "ranks": ranks, "shard": cfg.shard}
        return peak_bytes(config, steps * STEP, mode_of(cfg), **sizes)

    return STEP * max(1, bisect.bisect_right(range(1, MOST_TOKENS // STEP + 1), room, key=needed))


def free_bytes(device: torch.device) -> int:
    """What this process has on the GPU and what nobody has."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


# ----------------------------------------------------------------------------------- out of memory


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU had too little memory for torch."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # of the CPU's allocator, of CUDA and NCCL beside torch's allocator, of cuBLAS
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(words in str(error) for words in said)


@contextlib.contextmanager
def noted(what: str, lengths: Sequence[int] = ()) -> Iterator[None]:
    """Note on an out-of-memory error what was being done, and over rows of which lengths."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            rows = f" of {sum(lengths)} tokens in {len(lengths)} rows, the longest {max(lengths)}" if lengths else ""
            error.add_note(what + rows)
        raise


@contextlib.contextmanager
def explained(cfg, ranks: int) -> Iterator[None]:
    """Turn an out-of-memory error into a MemoryError: what was being done, and the flags that lower what it takes."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        doing = " in ".join(getattr(error, "__notes__", [])) or "outside of a pass"
        flags = [f"--pass-tokens below {cfg.pass_tokens}" if cfg.pass_tokens else "--pass-tokens", "--max-length"]
        flags += [] if cfg.activation_checkpointing else ["--activation-checkpointing"]
        flags += ["no --reuse-forward"] if cfg.reuse_forward else []
        flags += [] if cfg.lora_rank else ["--lora-rank 8"]
        flags += ["--shard"] if ranks > 1 and not cfg.shard else []
        reason = re.split(r" GPU \d+ has", str(error).strip().splitlines()[0])[0]
        raise MemoryError(f"out of memory in {doing} ({reason}); what helps: {', '.join(flags)}") from error
