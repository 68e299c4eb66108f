"""Estimated cost of a run of the paper's preset: memory of one device, hours of all devices. For --dry-run.

Memory is the formula of training/memory.py at the run's --pass-tokens, by default as many as fit a GPU of GPU_BYTES.
Hours are the FLOPs of reproduce/efficiency.py over the devices' PEAK, of which the share UTILISATION is assumed;
scoring the run on its tests comes on top. The rows' file gives a token for every 4 bytes; TOKENS_OF_ROWS is used where
the file is missing.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from pruners import COMPUTED, SAMPLE_PRUNERS, TOKEN_PRUNERS, keep_all
from reproduce.efficiency import flops
from reproduce.experiments import HERMES, MATH, WIZARD
from reproduce.memory import MODELS
from reproduce.presets import Preset
from reproduce.runs import Run, config_of
from train import Config
from training.memory import fitting_tokens, mode_of, peak_bytes
from training.scoring import Need

PEAK, UTILISATION = 312e12, 0.35  # FLOP/s of an A100 in bf16, and the share that a run reaches
GPU_BYTES = 80 * 2**30
TOKENS_OF_ROWS = {WIZARD: 70_000 * 450, MATH: 262_000 * 220, HERMES: 1_001_000 * 380}
ANSWER_SHARE = 0.75  # of a row's tokens


def estimate(preset: Preset, run: Run) -> tuple[float, float]:
    """GiB of one device and hours of all devices, for training a run."""
    config, path = config_of(preset, run), Path(preset.data[run.data])
    tokens = (path.stat().st_size / 4 if path.exists() else TOKENS_OF_ROWS[run.data]) * config.epochs
    scored, trained, in_loss = (share * tokens for share in shares(config))
    tune, again = "lora" if config.lora_rank else "full", config.activation_checkpointing
    work = work_of(run.model, scored, trained, in_loss * ANSWER_SHARE, tune, again)
    memory = memory_of(run.model, dataclasses.replace(config, dtype="bf16"), preset.devices)
    return memory / 2**30, work / (PEAK * UTILISATION * preset.devices) / 3600


def shares(config: Config) -> tuple[float, float, float]:
    """Tokens scored, trained, and in the loss, over the tokens of all epochs; by the pruners' entries in the tables.

    A sample pruner that chooses in each step needs scores of every row, a token pruner those of the kept rows. One
    pass gives all of COMPUTED; a need that is a function of the model is a pass of its own. A sample pruner that
    draws needs the loss of every row once, before training.
    """
    sample, token = SAMPLE_PRUNERS[config.sample_pruner], TOKEN_PRUNERS[config.token_pruner]
    prunes = sample.choose or sample.rows or sample.draw
    kept = config.sample_keep_ratio if prunes else 1.0
    needs = sample.needs if sample.choose else ()
    together, further = passes(needs), passes(token.needs)
    known = together[0]  # every row's place on the plane comes with its token scores
    scored = sum(together) + kept * (further[0] * (not known) + further[1])
    scored += 1 / config.epochs if sample.draw else 0
    return scored, kept, kept * (1.0 if token.decide is keep_all else config.token_keep_ratio)


def passes(needs: tuple[Need, ...]) -> tuple[int, int]:
    """Passes over the rows: one for any needs in COMPUTED, and one for each function of the model."""
    return int(any(need in COMPUTED for need in needs)), sum(callable(need) for need in needs)


@functools.cache  # many runs share these numbers, and the models of memory.py take time to make
def work_of(model: str, scored: float, trained: float, in_loss: float, tune: str, again: bool) -> float:
    work = {"tokens_scored": scored, "tokens_trained": trained}
    answers = {"answer_tokens_scored": scored * ANSWER_SHARE, "answer_tokens_kept": in_loss}
    return flops(MODELS[model], work | answers, tune, again)


@functools.cache
def memory_of(model: str, config: Config, devices: int) -> int:
    tokens = config.pass_tokens or fitting_tokens(config, MODELS[model], devices, GPU_BYTES)
    return peak_bytes(MODELS[model], tokens, mode_of(config), config.lora_rank, ranks=devices, shard=config.shard)
