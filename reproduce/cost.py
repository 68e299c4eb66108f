"""What a run of the paper's preset should take: memory of a device, hours of all of them. For --dry-run.

Memory is reproduce/memory.py's formula at the run's --pass-tokens. Hours are the FLOPs of reproduce/efficiency.py
over what the devices give: PEAK FLOP/s each, of which a share UTILISATION is assumed; the tests of a run come on
top. A token for every 4 bytes of the rows where they are there; else the rough figures below.
"""

from __future__ import annotations

import functools
from pathlib import Path

from reproduce.efficiency import flops
from reproduce.experiments import HERMES, MATH, WIZARD
from reproduce.memory import MODELS, peak_bytes
from reproduce.presets import Preset
from reproduce.runs import Run, config_of

PEAK, UTILISATION = 312e12, 0.35  # an A100 in bf16
TOKENS_OF_ROWS = {WIZARD: 70_000 * 450, MATH: 262_000 * 220, HERMES: 1_001_000 * 380}
ANSWER_SHARE = 0.75  # of a row's tokens
SCORES_ALL = {"qtuning", "entropy"}  # sample pruners that score every row they see
SCORES_KEPT = {"qtuning", "ppl-keep-low", "ppl-keep-high", "rho1", "fastv", "sparsevlm-text"}  # token pruners


def estimate(preset: Preset, run: Run) -> tuple[float, float]:
    """GiB of one device, hours of all: of a run's training."""
    config = config_of(preset, run)
    path = Path(preset.data[run.data])
    tokens = (path.stat().st_size / 4 if path.exists() else TOKENS_OF_ROWS[run.data]) * config.epochs
    kept = 1.0 if config.sample_pruner == "none" else config.sample_keep_ratio
    in_loss = 1.0 if config.token_pruner == "none" else config.token_keep_ratio
    scored = 0.0
    if config.sample_pruner in SCORES_ALL:
        scored = tokens
    elif config.token_pruner in SCORES_KEPT:
        scored = tokens * kept
    scored += tokens / config.epochs if config.sample_pruner == "infobatch" else 0
    tune, again = "lora" if config.lora_rank else "full", config.activation_checkpointing
    work = work_of(run.model, scored, tokens * kept, tokens * kept * in_loss * ANSWER_SHARE, tune, again)
    mode = tune + (", checkpointing" if again else "")
    memory = memory_of(run.model, config.pass_tokens or 16_384, mode, config.lora_rank)
    return memory / 2**30, work / (PEAK * UTILISATION * preset.devices) / 3600


@functools.cache  # many runs differ in nothing of this, and the models of memory.py take time to make
def work_of(model: str, scored: float, trained: float, in_loss: float, tune: str, again: bool) -> float:
    work = {"tokens_scored": scored, "tokens_trained": trained, "answer_tokens_kept": in_loss}
    return flops(MODELS[model], work, scored * ANSWER_SHARE, tune, again)


@functools.cache
def memory_of(model: str, tokens: int, mode: str, lora_rank: int) -> int:
    return max(peak_bytes(MODELS[model], tokens, which, lora_rank) for which in (mode, "score"))
