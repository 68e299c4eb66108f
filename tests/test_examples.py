"""The examples train as train.py does, and run as their docstrings say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 9
# Adam divides by the gradient's size: where that is rounding alone, a step moves a weight by the rate in a direction
# that rounding chose. At a rate of 5e-4, losses agree to 1e-5 after one step. At this one they agree to 1e-6.
LR = 1e-5
# Not the default of 0.5, at which Eq. 7 gives a token of very high PPL and both its neighbours nearly the same score.
SMOOTHING = 0.0


def ours(out, *flags, steps=STEPS):
    """(loss, gradient norm) of each step of train.py on the embedded default."""
    epochs = str((steps * 32 + 0.5) / 5120)  # so many steps of 32 samples are the whole schedule
    given = ["--out", str(out), "--device", "cpu", "--epochs", epochs, "--lr", str(LR), "--smoothing", str(SMOOTHING)]
    given += ["--grad-accum", "4"]
    train.main([*given, *flags])
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == steps
    return [(step["loss"], step["grad_norm"]) for step in metrics]


@pytest.fixture(scope="module")
def qtuned(tmp_path_factory):
    return ours(tmp_path_factory.mktemp("run") / "run")


def assert_equal_steps(theirs, ours):
    assert len(theirs) == len(ours)
    for (loss, norm), (expected, expected_norm) in zip(theirs, ours, strict=True):
        assert loss == pytest.approx(expected, rel=5e-6, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=5e-6, abs=1e-5)


@pytest.fixture
def example(monkeypatch):
    """An example by name, with the settings of this test."""

    def prepared(name):
        module = importlib.import_module(f"examples.{name}")
        monkeypatch.setattr(module, "LR", LR)
        monkeypatch.setattr(module, "SMOOTHING", SMOOTHING)
        return module

    return prepared


def test_the_plain_loop_trains_as_train_does(example, qtuned):
    assert_equal_steps(example("plain_loop").train(STEPS), qtuned)


def test_the_plain_loop_without_pruning_trains_as_train_does(example, tmp_path):
    none = ("--sample-pruner", "none", "--token-pruner", "none")
    assert_equal_steps(example("plain_loop").train(2, prune=False), ours(tmp_path / "run", *none, steps=2))


def test_the_trainer_of_transformers_trains_as_train_does(example, qtuned):
    pytest.importorskip("transformers", reason="pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="pip install transformers accelerate")
    assert_equal_steps(example("hf_trainer").train(STEPS, use_cpu=True), qtuned)


def test_an_example_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "plain_loop.py"), "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 1/1 loss ")
