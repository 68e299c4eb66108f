"""Runs of train.py for the tests: started here or under torchrun, and what they leave behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train

ROOT = Path(train.__file__).parent


def run(checkpoint, rows, out, *flags, ranks=1):
    """The metrics of a run of train.py in this process, or under torchrun."""
    argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(out), "--lora-rank", "0", "--lr", "1e-2"]
    argv += ["--micro-batch", "4", "--sample-keep-ratio", "0.5", *flags]
    if ranks == 1:
        train.main(argv)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run([*launch, str(ROOT / "train.py"), *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *argv):
    """The one line on stderr with which train.py refuses `argv`, exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        train.main([str(arg) for arg in argv])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: ")
    return lines[0]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def selected(out):
    """The samples of each step, as selection.jsonl records them."""
    return [json.loads(line)["samples"] for line in (out / "selection.jsonl").read_text().splitlines()]


def kept_ids(out):
    """(id, kept tokens) of each step's kept samples."""
    return [[(s["id"], s.get("tokens")) for s in step if s["kept"]] for step in selected(out)]


def untimed(metrics):
    """Metrics without what differs from run to run: seconds and memory."""
    return [{k: v for k, v in step.items() if not k.endswith(("_s", "_gib"))} for step in metrics]
