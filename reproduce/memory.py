"""Memory of scoring, LoRA and full tuning by formula, for the paper's models.

    python -m reproduce.memory [--out FILE.json]      compute the formulas, and measure steps of SmolLM2-135M's sizes
    python -m reproduce.memory --table FILE.json      print the tables of a result file (reproduce/results/memory.json)

The formula is that of training/memory.py, by which train.py sets --pass-tokens on a GPU; what it counts is said there.
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
from training.head import TokenLoss
from training.lora import add_lora
from training.memory import MODES, meta_model, peak_bytes
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
SHARDED = "full, checkpointing"  # the mode that is also given with --shard on RANKS GPUs
RANKS = 8


def measured_peak(cfg: ModelConfig, tokens: int, mode: str, bf16: bool, lora_rank: int = 8) -> int:
    """`peak_bytes` measured: weights, and the peak of torch's allocator in a real step on the CPU, random weights."""
    kind = mode.partition(",")[0]
    model = Transformer(cfg).to(torch.bfloat16 if bf16 and kind != "full" else torch.float32)
    if kind == "lora":
        add_lora(model, lora_rank, alpha=2 * lora_rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    row = torch.randint(cfg.vocab_size, (tokens + 1,)).tolist()
    sample = Sample(id="", input_ids=row, labels=row)
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()
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


def sharded(cfg: ModelConfig) -> int:
    """Bytes on each of RANKS GPUs with --shard, in the mode SHARDED."""
    return peak_bytes(cfg, TOKENS, SHARDED, ranks=RANKS, shard=True)


def measure(args: argparse.Namespace) -> dict:
    """The result: GiB of every model and mode by formula, and of one small model also measured."""
    results = {
        "tokens": TOKENS,
        "parameters": {name: sum(p.numel() for p in meta_model(cfg).parameters()) for name, cfg in MODELS.items()},
        "gib": {name: {mode: peak_bytes(cfg, TOKENS, mode) / 2**30 for mode in MODES} for name, cfg in MODELS.items()},
        "sharded_gib": {name: sharded(cfg) / 2**30 for name, cfg in MODELS.items()},
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
    gib = [["model", "parameters", *MODES, f"{SHARDED}, `--shard` on {RANKS}"]]
    for name, row in results["gib"].items():
        values = [*(row[mode] for mode in MODES), results["sharded_gib"][name]]
        gib.append([name, f"{results['parameters'][name] / 1e9:.2f} B", *(f"{value:.1f}" for value in values)])
    check = [["measured", "dtype", "formula", "measured", "ratio"]]
    for row in results["measured"]:
        ratio = f"{row['formula_gib'] / row['measured_gib']:.2f}"
        check.append([row["mode"], row["dtype"], f"{row['formula_gib']:.2f}", f"{row['measured_gib']:.2f}", ratio])
    return "\n\n".join((markdown(gib), markdown(check)))


def main(argv: list[str] | None = None) -> None:
    bench.main(argv, "reproduce.memory", __doc__.partition("\n")[0], lambda parser: None, measure, (table,))


if __name__ == "__main__":
    main()
