"""Memory of scoring, LoRA and full tuning by formula, for the paper's models.

    python -m reproduce.memory [--out FILE.json]      compute the formulas, and measure steps of SmolLM2-135M's sizes
    python -m reproduce.memory --table FILE.json      print the tables of a result file (reproduce/results/memory.json)

The formula counts, for P parameters of which A train, with 16-bit activations as train.py has them on a GPU:
  - weights: 2 P bytes for scoring or LoRA (bf16; LoRA's own 4 A in fp32), 4 P for full tuning (fp32, under autocast);
  - gradients and AdamW's two moments, fp32: 12 A bytes;
  - what autograd keeps of the layers for the backward pass (`activation_bytes`; a test counts the tensors), or with
    activation checkpointing the input of every layer, and the rest for one layer at a time;
  - the head's workspace: the logits of LOSS_ROWS tokens in training, a tile of them in scoring, never (N, V); in full
    tuning also the gradient of its weight, which the forward pass computes, and the weight's 16-bit copy.
It does not count the allocator's reserve and what CUDA and its libraries take.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch

from data.sft import Sample
from model import ModelConfig, Transformer
from reproduce import bench
from reproduce.tables import markdown
from training.head import LOSS_ROWS, TILE, TokenLoss
from training.lora import add_lora
from training.packing import pack
from training.scoring import score

RESULT = Path(__file__).parent / "results" / "memory.json"
TOKENS = 2048
MEASURED_MODEL, MEASURED_TOKENS = "SmolLM2-135M", 512
KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
MODELS = {  # the paper's models, and a small one to measure
    name: ModelConfig.from_dict(dict(zip(KEYS, values, strict=True)))
    for name, values in {
        "LLaMA2-7B": ("llama", 32000, 4096, 11008, 32, 32, 32, False),
        "Mistral-7B": ("mistral", 32000, 4096, 14336, 32, 32, 8, False),
        "LLaMA3-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
        "SmolLM2-1.7B": ("llama", 49152, 2048, 8192, 24, 32, 32, True),
        "Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, False),
        "Qwen3-14B": ("qwen3", 151936, 5120, 17408, 40, 40, 8, False),
        "Qwen3-32B": ("qwen3", 151936, 5120, 25600, 64, 64, 8, False),
        "SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, True),
    }.items()
}
MODES = ("score", "lora, checkpointing", "lora", "full, checkpointing", "full")


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
    weights = meta_model(cfg, lora_rank).model["layers"][0]
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
    cfg: ModelConfig, tokens: int, mode: str, lora_rank: int = 8, bf16: bool = True, device: str = "cuda"
) -> int:
    """Bytes of weights, gradients, moments, activations and the head's workspace, for one pass over `tokens` tokens.

    Args:
        mode: one of MODES.
    """
    kind = mode.partition(",")[0]
    model = meta_model(cfg, lora_rank if kind == "lora" else 0)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    s = 2 if bf16 else 4
    if kind == "score":
        alive = s * tokens * (3 * cfg.hidden_size + 3 * cfg.intermediate_size)  # at once, in the feed-forward layer
        rows, columns = TILE[device]
        return s * total + alive + 3 * 4 * min(rows, tokens) * min(columns, cfg.vocab_size)
    rank = lora_rank if kind == "lora" else 0
    weights = 4 * total if kind == "full" else s * (total - trained) + 4 * trained
    head = min(LOSS_ROWS[device], tokens) * cfg.vocab_size * (4 + 2 * bf16)
    if kind == "full":
        head += cfg.vocab_size * cfg.hidden_size * (4 + 2 * bf16)
    return weights + 12 * trained + activation_bytes(cfg, tokens, rank, bf16, "checkpointing" in mode) + head


def measured_peak(cfg: ModelConfig, tokens: int, mode: str, bf16: bool, lora_rank: int = 8) -> int:
    """`peak_bytes` measured: weights, and the peak of torch's allocator in a real step on the CPU, random weights."""
    kind = mode.partition(",")[0]
    model = Transformer(cfg).to(torch.bfloat16 if bf16 and kind != "full" else torch.float32)
    if kind == "lora":
        add_lora(model, lora_rank, alpha=2 * lora_rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    row = torch.randint(cfg.vocab_size, (tokens + 1,)).tolist()
    sample = Sample(id="", input_ids=row, labels=row)
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    token_loss = TokenLoss(model, "checkpointing" in mode)

    def steps() -> None:
        if kind == "score":
            score(model, [sample], tokens, autocast)
        else:
            optimizer = torch.optim.AdamW(trained, fused=True)
            for _ in range(2):  # the second step has moments, and its second pass has gradients
                for _ in range(2):
                    with autocast:
                        loss, _ = token_loss(*pack([sample], "cpu"))
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    return sum(p.nbytes for p in model.parameters()) + bench.allocated_peak(steps)


def measure(args: argparse.Namespace) -> dict:
    """The result: GiB of every model and mode by formula, and of one small model also measured."""
    results = {
        "tokens": TOKENS,
        "parameters": {name: sum(p.numel() for p in meta_model(cfg).parameters()) for name, cfg in MODELS.items()},
        "gib": {name: {mode: peak_bytes(cfg, TOKENS, mode) / 2**30 for mode in MODES} for name, cfg in MODELS.items()},
        "torch": torch.__version__,
        "measured_tokens": MEASURED_TOKENS,
        "measured": [],
    }
    cfg = MODELS[MEASURED_MODEL]
    with bench.progress(2 * len(MODES), "memory") as bar:
        for mode, bf16 in [(mode, bf16) for bf16 in (False, True) for mode in MODES]:
            row = {"mode": mode, "dtype": "bf16" if bf16 else "fp32"}
            row["formula_gib"] = peak_bytes(cfg, MEASURED_TOKENS, mode, bf16=bf16, device="cpu") / 2**30
            row["measured_gib"] = measured_peak(cfg, MEASURED_TOKENS, mode, bf16) / 2**30
            results["measured"].append(row)
            bar.update()
    return results


def table(results: dict) -> str:
    """Two Markdown tables: GiB of every model by formula, and the formula beside what was measured."""
    gib = [["model", "parameters", *MODES]]
    for name, row in results["gib"].items():
        gib.append([name, f"{results['parameters'][name] / 1e9:.2f} B", *(f"{row[mode]:.1f}" for mode in MODES)])
    check = [["measured", "dtype", "formula", "measured", "ratio"]]
    for row in results["measured"]:
        ratio = f"{row['formula_gib'] / row['measured_gib']:.2f}"
        check.append([row["mode"], row["dtype"], f"{row['formula_gib']:.2f}", f"{row['measured_gib']:.2f}", ratio])
    return "\n\n".join((markdown(gib), markdown(check)))


def main(argv: list[str] | None = None) -> None:
    bench.main(argv, "reproduce.memory", __doc__.partition("\n")[0], lambda parser: None, measure, (table,))


if __name__ == "__main__":
    main()
