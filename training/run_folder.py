"""A run's folder: config.json, metrics.jsonl, selection.jsonl on request, checkpoint/, finished.json.

Rank 0 writes it, and holds its lock; every rank reads the checkpoint. finished.json is the last file of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.sft import Sample
from data.stream import fingerprint
from qtuning import Quadrant, SamplePruning
from training.checkpoint import read_checkpoint, usable_checkpoint, write_checkpoint
from training.files import append_json, locked, read_object, remove_leftovers, write_json, write_text
from training.ranks import Ranks
from training.scoring import Scorer, trained_lengths
from training.shard import own_parts, whole
from training.signals import Stopped, StopRequest

SAVE_SECONDS = 600  # between checkpoints, without --save-every

# Settings that a resumed run may change. The number of samples in a step must stay the same.
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
    """The name of the GPU, or the number of CPU cores and their vector instructions, on which results depend."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cpu cores, {torch.backends.cpu.get_cpu_capability()}"


def describe_run(cfg, world: int, num_samples: int, hashes: dict[str, str]) -> dict:
    """config.json: everything that a reader needs to run it again."""
    return {
        **dataclasses.asdict(cfg),
        "run_id": uuid.uuid4().hex,
        "world_size": world,
        "num_samples": num_samples,
        "hashes": hashes,
        **code_version(),
        "device_name": device_name(cfg.device),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, numpy, safetensors, tokenizers)},
        },
    }


# ------------------------------------------------------------------------------------- what a run reads


def digest(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits of a SHA-256 over these bytes."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:16]


def weights_hash(model: str | Path) -> str:
    """A hash of a model folder's config.json, and of each weight file's size and 64 KiB at 16 places of it."""

    def parts() -> Iterator[bytes]:
        for path in (Path(model) / "config.json", *sorted(Path(model).glob("*.safetensors"))):
            size = path.stat().st_size
            yield f"{path.name} {size}".encode()
            with path.open("rb") as file:
                for place in range(16):
                    file.seek(max(0, size - 2**16) * place // 15)
                    yield file.read(2**16)

    return digest(parts())


def input_hashes(cfg, samples: Sequence[Sample], rows: Sequence[int], side: dict[str, dict[int, Tensor]]) -> dict:
    """Hashes of what a run reads: its rows as tokenised, those that its pruner chose, base weights, side values."""
    found = {
        "rows": f"{fingerprint(samples):016x}",
        "chosen_rows": digest([array("q", rows).tobytes()]),
        "base_weights": weights_hash(cfg.model),
    }
    for need, values in side.items():
        found[need] = digest(values[row].double().numpy().tobytes() for row in rows)
    return found


HASHED = {
    "rows": "the rows of --data as tokenised",
    "chosen_rows": "the rows that --sample-pruner chooses",
    "base_weights": "the weights in --model",
}


def hashed(name: str) -> str:
    """What a hash of `input_hashes` is of."""
    return HASHED.get(name, f"the values of {name!r} in the data or in --scores")


OF_RANK = ("model", "data", "out", "scores", "eval_sets", "pass_tokens")  # paths of a machine, and its own memory


def check_settings(cfg, ranks: Ranks) -> None:
    """Make sure that all ranks have the same settings, but for OF_RANK: each machine starts its own command.

    Raises:
        ValueError: the flag, and the ranks that have another value of it than rank 0.
    """
    for field in dataclasses.fields(cfg):
        if field.name not in OF_RANK:
            value = repr(getattr(cfg, field.name)).encode()
            ranks.check_same(lambda value=value: int(digest([value]), 16) >> 1, f"--{field.name.replace('_', '-')}")


def check_hashes(hashes: dict[str, str], ranks: Ranks) -> None:
    """Make sure that all ranks have the same hashes of `input_hashes`.

    Raises:
        ValueError: what differs, and on which ranks.
    """
    for name, value in hashes.items():
        ranks.check_same(lambda value=value: int(value, 16) >> 1, hashed(name))


# -------------------------------------------------------------------------------------- start and resume


@contextlib.contextmanager
def owned(cfg, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder for this process (rank 0); a folder that stays empty is removed.

    Raises:
        ValueError: another process writes the run.
    """
    if ranks.rank:
        yield
        return
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / ".lock", f"--out {out}"):
            yield
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()


def open_run(cfg, description: dict) -> tuple[Path | None, str, list[str]]:
    """Start the run folder or find the checkpoint to continue from: its path, the run's id, and warnings.

    Raises:
        ValueError: the folder holds a run and --resume is not given, or the other way round, or the run there
            was made with other settings or from other inputs, or its checkpoints are broken.
    """
    out = Path(cfg.out)
    config_file = out / "config.json"
    if not config_file.exists():
        if cfg.resume:
            raise ValueError(f"--resume: {out} holds no run (no config.json)")
        write_json(config_file, description)
        return None, description["run_id"], []
    if not cfg.resume:
        raise ValueError(f"--out {out} holds a run already; give --resume to continue it, or another folder")
    before = read_object(config_file)
    if not isinstance(before.get("hashes"), dict) or "run_id" not in before:
        raise ValueError(f"{config_file}: expected the settings of a run (with its run_id and hashes)")
    for key in ("num_samples", *(field.name for field in dataclasses.fields(cfg))):
        if key not in MAY_CHANGE and before.get(key) != description[key]:
            raise ValueError(f"--resume: the run in {out} has {key} {before.get(key)!r}, got {description[key]!r}")
    ours, theirs = (d["micro_batch"] * d["grad_accum"] * d["world_size"] for d in (description, before))
    if ours != theirs:
        raise ValueError(f"--resume: the run in {out} takes {theirs} samples a step, these settings take {ours}")
    for name, value in description["hashes"].items():
        if before["hashes"].get(name) != value:
            raise ValueError(f"--resume: {hashed(name)} have changed since the run in {out} began")
    for folder in ("model", "adapter"):
        remove_leftovers(out / folder)
    (out / "finished.json").unlink(missing_ok=True)
    checkpoint, warnings = usable_checkpoint(out / "checkpoint", before["run_id"])
    return checkpoint, before["run_id"], warnings


def cut_log(path: Path, done: int) -> None:
    """Keep the lines of the first `done` steps of a log; the resumed run writes the later ones again.

    Raises:
        FileNotFoundError: the log of a run with steps is missing.
        ValueError: one of these lines is missing or broken, by file and line.
    """
    if not path.exists() and done:
        raise FileNotFoundError(f"{path}: not found, but the checkpoint is at step {done}")
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for step in range(1, done + 1):
        line = lines[step - 1] if step <= len(lines) else b""
        try:
            right = json.loads(line)["step"] == step
        except (ValueError, TypeError, KeyError):
            right = False
        if not right:
            got = line[:60].decode("utf-8", "replace") or "nothing"
            raise ValueError(f"{path}:{step}: expected the line of step {step}, got {got}")
    if path.exists():
        write_text(path, b"".join(line + b"\n" for line in lines[:done]).decode("utf-8"))


# ------------------------------------------------------------------------------------------------- the run


class Run:
    """The folder of one run, and what it reports on the terminal."""

    def __init__(self, cfg, ranks: Ranks, num_samples: int, hashes: dict[str, str], stop: StopRequest):
        self.cfg, self.ranks, self.stop, self.out = cfg, ranks, stop, Path(cfg.out)
        description = describe_run(cfg, ranks.world, num_samples, hashes)
        # Rank 0 decides, so that no rank reads a file that another has just written.
        self.checkpoint, self.run_id, warnings = ranks.first(lambda: open_run(cfg, description))
        for warning in warnings:
            self.say(f"warning: {warning}; continuing from the checkpoint before it")
        self.on_terminal = sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.saved_at = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.rank == 0:
            print(line, flush=True)

    def resume(self, last_step: int, trainable: dict[str, nn.Parameter], optimizer, stream, scorer: Scorer) -> int:
        """Load the checkpoint, if there is one; returns the number of steps done."""
        done = 0
        if self.checkpoint:
            if not self.checkpoint.exists():
                raise ValueError(
                    f"--resume: {self.checkpoint} is not on {platform.node()}; every rank reads the checkpoint, so "
                    f"--out must be a folder that all machines share, or hold a copy of checkpoint/ on each"
                )
            # A GPU copies from the mapped file, so that nothing of it stays in memory.
            state = read_checkpoint(self.checkpoint, mapped=self.ranks.device.type == "cuda")
            read = int(digest([f"{state['run_id']} {state['step']}".encode()]), 16) >> 1
            self.ranks.check_same(lambda: read, f"--resume: the run and step of {self.checkpoint}")
            if self.cfg.shard:
                state = own_parts(state, trainable)
            for name, parameter in trainable.items():
                parameter.data.copy_(state["trainable"][name])
            optimizer.load_state_dict(state["optimizer"])
            stream.load(state["stream"])
            scorer.load(state["scores"])
            done = state["step"]
            if done > last_step:
                raise ValueError(
                    f"--resume: the run in {self.out} is at step {done}, these settings end at {last_step}"
                )
        if self.ranks.rank == 0:
            cut_log(self.out / "metrics.jsonl", done)
            if self.cfg.log_selection:
                cut_log(self.out / "selection.jsonl", done)
        return done

    def steps(self, done: int, last_step: int) -> Iterator[int]:
        """The steps to take, with a progress bar on a terminal. A request to stop is noted and waits for the step."""
        hidden = self.ranks.rank > 0 or not self.on_terminal
        self.bar = tqdm(range(done + 1, last_step + 1), desc="train", initial=done, total=last_step, disable=hidden)
        self.stop.deferred = True
        yield from self.bar
        self.stop.deferred, self.stop.note = False, "stopped while saving the model; --resume continues"

    def due(self, step: int) -> bool:
        """Whether to save after this step: by --save-every or the clock, at the end, or to stop. All ranks agree."""
        every = self.cfg.save_every
        now = time.monotonic() - self.saved_at >= SAVE_SECONDS if every is None else step % every == 0
        now = now or step == self.bar.total
        asked = self.ranks.most(2 * self.stop.number + (now and self.ranks.rank == 0))  # both in one exchange
        self.signal = asked // 2
        return asked > 0

    def save(self, step: int, trainable: dict[str, nn.Parameter], optimizer, stream, scorer: Scorer) -> None:
        """Write the checkpoint; then leave, if a signal has asked for it.

        Raises:
            ValueError: a weight is not finite; the earlier checkpoint stays.
            Stopped: a signal came during the step.
        """
        weights = {name: parameter.detach() for name, parameter in trainable.items()}
        state = {"run_id": self.run_id, "step": step, "trainable": weights, "optimizer": optimizer.state_dict()}
        if self.cfg.shard:
            state = whole(state, self.ranks)
        if self.ranks.rank == 0:
            for name, parameter in state["trainable"].items():
                if not bool(parameter.isfinite().all()):
                    raise ValueError(f"step {step}: the weight {name} is not finite; try a lower --lr")
            for log in ("metrics.jsonl", "selection.jsonl"):  # on disk before the checkpoint that counts their lines
                if (self.out / log).exists():
                    with (self.out / log).open("rb") as file:
                        os.fsync(file.fileno())
            write_checkpoint(self.out / "checkpoint", state | {"stream": stream.state(), "scores": scorer.state()})
        self.saved_at = time.monotonic()
        if self.signal:
            raise Stopped(self.signal, f"stopped after step {step} of {self.bar.total}; --resume continues")

    @contextlib.contextmanager
    def scoring(self, step: int) -> Iterator[None]:
        """While scores are computed, which may take long, a request to stop is met at once."""
        if self.stop.number:
            raise Stopped(self.stop.number, f"stopped in step {step}; --resume continues from the last checkpoint")
        self.stop.deferred = False
        yield
        self.stop.deferred = True

    def finish(self, step: int) -> None:
        """Say that the run is whole: its last file."""
        if self.ranks.rank == 0:
            write_json(self.out / "finished.json", {"steps": step})

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
