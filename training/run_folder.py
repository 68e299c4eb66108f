"""A run's folder: config.json, metrics.jsonl, selection.jsonl on request, checkpoint/.

Rank 0 writes it; every rank reads the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.sft import Sample
from qtuning import Quadrant, SamplePruning
from training.files import append_json, read_json, write_json, write_text
from training.ranks import Ranks
from training.scoring import Scorer, trained_lengths
from training.shard import own_parts, whole

# Settings that a resumed run may change; the samples of a step must stay the same all the same.
MAY_CHANGE = {
    *("out", "resume", "max_steps", "save_every", "grad_accum", "pass_tokens", "activation_checkpointing"),
    *("reuse_forward", "shard", "eval_every", "eval_sets", "eval_limit"),
}


def code_version() -> dict:
    """{commit, uncommitted_changes} of this checkout; None where there is no git to ask."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes)}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "uncommitted_changes": None}


def device_name(kind: str) -> str:
    """The name of the GPU, or the number of CPU cores."""
    return torch.cuda.get_device_name() if kind == "cuda" else f"{os.cpu_count()} cpu cores"


def describe_run(cfg, world: int, num_samples: int) -> dict:
    """config.json: everything that a reader needs to run it again."""
    return {
        **dataclasses.asdict(cfg),
        "world_size": world,
        "num_samples": num_samples,
        **code_version(),
        "device_name": device_name(cfg.device),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, numpy, safetensors, tokenizers)},
        },
    }


def open_run(cfg, description: dict) -> Path | None:
    """Start the run folder, or return the checkpoint to continue from.

    Raises:
        ValueError: the folder holds a run and --resume is not given, or the other way round, or the run there
            was made with other settings.
    """
    out = Path(cfg.out)
    config_file = out / "config.json"
    if not config_file.exists():
        if cfg.resume:
            raise ValueError(f"--resume: {out} holds no run (no config.json)")
        write_json(config_file, description)
        return None
    if not cfg.resume:
        raise ValueError(f"--out {out} holds a run already; give --resume to continue it, or another folder")
    before = read_json(config_file)
    for key in ("num_samples", *(field.name for field in dataclasses.fields(cfg))):
        if key not in MAY_CHANGE and before.get(key) != description[key]:
            raise ValueError(f"--resume: the run in {out} has {key} {before.get(key)!r}, got {description[key]!r}")
    ours, theirs = (d["micro_batch"] * d["grad_accum"] * d["world_size"] for d in (description, before))
    if ours != theirs:
        raise ValueError(f"--resume: the run in {out} takes {theirs} samples a step, these settings take {ours}")
    checkpoint_file = out / "checkpoint" / "state.pt"
    return checkpoint_file if checkpoint_file.exists() else None


def cut_log(path: Path, last_step: int) -> None:
    """Drop the lines after the checkpoint's step; the resumed run writes them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a last line without its end was cut off
        write_text(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= last_step))


class Run:
    """The folder of one run, and what it reports on the terminal."""

    def __init__(self, cfg, ranks: Ranks, num_samples: int):
        self.cfg, self.ranks, self.out = cfg, ranks, Path(cfg.out)
        description = describe_run(cfg, ranks.world, num_samples)
        # Rank 0 decides, so that no rank reads a file that another has just written.
        self.checkpoint = ranks.first(lambda: open_run(cfg, description))
        self.on_terminal = sys.stderr.isatty()
        self.bar: tqdm | None = None

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.rank == 0:
            print(line, flush=True)

    def resume(self, trainable: dict[str, nn.Parameter], optimizer, stream, scorer: Scorer) -> int:
        """Load the checkpoint, if there is one; returns the number of steps done."""
        done = 0
        if self.checkpoint:
            if not self.checkpoint.exists():
                raise ValueError(
                    f"--resume: {self.checkpoint} is not on {platform.node()}; every rank reads the checkpoint, so "
                    f"--out must be a folder that all machines share, or hold a copy of checkpoint/ on each"
                )
            # A GPU copies from the mapped file, so that nothing of it stays in memory.
            mapped = self.ranks.device.type == "cuda"
            state = torch.load(self.checkpoint, map_location="cpu", mmap=mapped, weights_only=True)
            if self.cfg.shard:
                state = own_parts(state, trainable)
            for name, parameter in trainable.items():
                parameter.data.copy_(state["trainable"][name])
            optimizer.load_state_dict(state["optimizer"])
            stream.load(state["stream"])
            scorer.load(state["scores"])
            done = state["step"]
        if self.ranks.rank == 0:
            for log in ("metrics.jsonl", "selection.jsonl"):
                cut_log(self.out / log, done)
        return done

    def save(self, step: int, trainable: dict[str, nn.Parameter], optimizer, stream, scorer: Scorer) -> None:
        """Write the checkpoint: trained weights, optimizer, steps done, the stream's rows, scores to use again."""
        weights = {name: parameter.detach() for name, parameter in trainable.items()}
        state = {"step": step, "trainable": weights, "optimizer": optimizer.state_dict()}
        if self.cfg.shard:
            state = whole(state, self.ranks)
        if self.ranks.rank:
            return
        folder = self.out / "checkpoint"
        folder.mkdir(exist_ok=True)
        state |= {"stream": stream.state(), "scores": scorer.state()}
        torch.save(state, folder / "state.pt.tmp")
        os.replace(folder / "state.pt.tmp", folder / "state.pt")

    def steps(self, done: int, last_step: int) -> tqdm:
        """The steps to take: a progress bar on a terminal."""
        hidden = self.ranks.rank > 0 or not self.on_terminal
        self.bar = tqdm(range(done + 1, last_step + 1), desc="train", initial=done, total=last_step, disable=hidden)
        return self.bar

    def log(
        self,
        step: int,
        measured: dict[str, float],
        samples: Sequence[Sample],
        rows: Sequence[int],
        weights: Tensor,
        chosen: SamplePruning,
        kept: Tensor,
        scorer: Scorer,
    ) -> None:
        """Write a line of metrics.jsonl and, with --log-selection, of selection.jsonl; show the step."""
        if self.ranks.rank:
            return
        trained = trained_lengths(self.cfg, samples, rows, kept)
        metrics = {
            "step": step,
            **measured,
            **selection_counts(chosen),
            "answer_tokens_seen": int(scorer.loss_mask(rows).sum()),
            "answer_tokens_kept": int(kept.sum()),
            "weight_sum": sum(weights[chosen.keep].tolist()),
            "tokens_scored": scorer.tokens,
            "tokens_trained": sum(length - 1 for length in trained if length),
            "peak_mem_gib": peak_mem_gib(self.ranks.device),
        }
        append_json(self.out / "metrics.jsonl", metrics)
        if self.cfg.log_selection:
            records = selection_records(samples, rows, weights, chosen, kept, scorer)
            append_json(self.out / "selection.jsonl", {"step": step, "samples": records})
        shown = {"loss": f"{measured['loss']:.3f}", "kept": f"{metrics['samples_kept']}/{metrics['samples_seen']}"}
        shown |= {"tokens": metrics["answer_tokens_kept"]}
        shown |= {name: f"{value:.4g}" for name, value in measured.items() if name.startswith("eval_")}
        self.bar.set_postfix(shown)
        if not self.on_terminal:
            self.say(f"step {step}/{self.bar.total} " + " ".join(f"{name} {value}" for name, value in shown.items()))


def peak_mem_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on a GPU; resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def selection_counts(chosen: SamplePruning) -> dict[str, int]:
    """How many samples of a step each quadrant and the backfill gave, by the keys of metrics.jsonl."""
    keep, quadrant, backfilled, as_q2 = chosen.keep, chosen.quadrant, chosen.backfilled, chosen.prune_tokens
    counts = {
        "samples_seen": torch.ones_like(keep),
        "samples_kept": keep,
        "kept_q2": keep & ~backfilled & (quadrant == Quadrant.VALUABLE_MISCONCEPTION),
        "kept_q4": keep & ~backfilled & (quadrant == Quadrant.CALIBRATION_DATA),
        "backfilled_q2": backfilled & as_q2,
        "backfilled_q4": backfilled & ~as_q2,
        "in_q1": quadrant == Quadrant.HARMFUL_NOISE,
        "in_q3": quadrant == Quadrant.REDUNDANT_KNOWLEDGE,
    }
    return {name: int(mask.sum()) for name, mask in counts.items()}


def selection_records(
    samples: Sequence[Sample],
    rows: Sequence[int],
    weights: Tensor,
    chosen: SamplePruning,
    kept: Tensor,
    scorer: Scorer,
) -> list[dict]:
    """selection.jsonl: the decision about each sample of a step, and the scores behind it."""
    mask = scorer.loss_mask(rows)
    plane = {name: scorer.per_sample(name, rows).tolist() for name in ("ppl", "ent")} if scorer.on_plane else {}
    columns = {"quadrant": chosen.quadrant, "kept": chosen.keep, "backfilled": chosen.backfilled}
    columns = {name: values.tolist() for name, values in (columns | {"trimmed": chosen.prune_tokens}).items()} | plane
    records = []
    for place, row in enumerate(rows):
        record = {"place": place, "id": samples[row].id} | {name: values[place] for name, values in columns.items()}
        if record["kept"]:  # one digit for each answer token in order, 1 = in the loss
            record |= {"weight": weights[place].item()} if weights[place] != 1 else {}
            record["tokens"] = "".join(str(int(token)) for token in kept[place][mask[place]])
        records.append(record)
    return records
