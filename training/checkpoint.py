"""A run's checkpoint: written whole, checked before it is used, and the one before it kept.

A checkpoint is the zip archive that torch.save writes. The archive holds a CRC-32 of every tensor, which torch.load
does not check; `usable_checkpoint` does.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch

from training.files import replaced

NEWEST, BEFORE, BROKEN = "state.pt", "state.previous.pt", "state.broken.pt"
KEYS = {"run_id", "step", "trainable", "optimizer", "stream", "scores"}


def write_checkpoint(folder: Path, state: dict) -> None:
    """Write `state` as the newest checkpoint; the one that was the newest is kept beside it.

    Raises:
        OSError: it could not be written, on a full disk for example. The earlier checkpoints are still there.
    """
    folder.mkdir(exist_ok=True)
    with replaced(folder / NEWEST, earlier=folder / BEFORE) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch closes its archive after a failed write, which fails as well
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def usable_checkpoint(folder: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of this run (None if there is none yet), and a warning for each broken one.

    A broken newest checkpoint is renamed, so that the next one does not take the place of the good one before it.

    Raises:
        ValueError: there are checkpoints, but none of them is usable.
    """
    warnings = []
    for path in (folder / NEWEST, folder / BEFORE):
        if path.exists():
            try:
                state = read_checkpoint(path)
                if state["run_id"] != run_id:
                    raise ValueError("it belongs to another run")
            except ValueError as error:
                warnings.append(f"{path}: {error}")
                continue
            if warnings:
                os.replace(folder / NEWEST, folder / BROKEN)
            return path, warnings
    if warnings:
        raise ValueError(f"--resume: no usable checkpoint: {'; '.join(warnings)}")
    return None, warnings


def read_checkpoint(path: Path, *, mapped: bool = True) -> dict:
    """The state in a checkpoint, on the CPU: mapped from the file, or read.

    Raises:
        ValueError: the file is torn, empty or changed, or is no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        state = None if changed else torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # zipfile and torch raise many kinds of errors on damaged bytes
        raise ValueError(
            f"not a whole checkpoint ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        ) from None
    if changed:
        raise ValueError(f"the checksum of {changed} differs")
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise ValueError("not a checkpoint of train.py")
    return state
