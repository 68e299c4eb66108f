"""A run that is killed, stopped, or out of disk space loses nothing: it resumes exactly, or says what is wrong."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_runs import ROOT, assert_same_weights, refused, run, selected, untimed, weights

import train
from model import Transformer
from pruners import score_rows
from training import checkpoint as checkpoints
from training import files, run_folder
from training.files import append_json, check_writable, locked, replaced, write_json, written_aside

STEPS = ["--max-steps", "4", "--save-every", "1", "--log-selection"]


def arguments(checkpoint, rows, out, *flags):
    argv = ["--model", checkpoint, "--data", rows, "--out", out, "--lora-rank", 0, "--lr", 1e-2]
    return [str(arg) for arg in [*argv, "--micro-batch", 4, "--sample-keep-ratio", 0.5, *flags]]


def in_child(work, limit=None):
    """The exit status of `work` in a process of its own, where a crash ends nothing else; limit: bytes of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            work()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(point):
    """Patch every call that changes the disk so that the process dies just before the `point`-th of them."""
    left = [point]

    def dying(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(77)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink", "mkdir", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    run_folder.append_json = dying(run_folder.append_json)


@pytest.fixture(scope="module")
def whole(checkpoint, rows, tmp_path_factory):
    """A run of four steps that was never cut."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(checkpoint, rows, out, *STEPS)
    return out


def assert_same_run(whole, out):
    """The same weights, metrics and selections, bit for bit; and marked as finished."""
    read = [[json.loads(line) for line in (o / "metrics.jsonl").read_text().splitlines()] for o in (whole, out)]
    assert untimed(read[0]) == untimed(read[1])
    assert selected(whole) == selected(out)
    assert_same_weights(whole, out, rtol=0, atol=0)
    assert json.loads((out / "finished.json").read_text()) == {"steps": 4}
    assert not list(out.rglob(".writing-*")) and not list(out.rglob("*.tmp"))


def resumed(argv, out):
    """Continue a run; start it again where it died before it had a config.json."""
    train.main([*argv, *(["--resume"] if (out / "config.json").exists() else [])])


# ----------------------------------------------------------------------------------------- killed


def test_a_run_killed_at_any_point_resumes_to_the_run_that_was_never_cut(checkpoint, rows, whole, tmp_path):
    points = 0
    while True:
        out = tmp_path / str(points)
        argv = arguments(checkpoint, rows, out, *STEPS)

        def killed(argv=argv, point=points):
            killed_at(point)
            train.main(argv)

        status = in_child(killed)
        assert status in (0, 77)
        if status == 0:
            break
        if not (out / "finished.json").exists():
            resumed(argv, out)
        assert_same_run(whole, out)
        shutil.rmtree(out)
        points += 1
    assert points > 50


def test_a_run_killed_twice_resumes_exactly(checkpoint, rows, whole, tmp_path):
    for seed in range(4):
        out, draw = tmp_path / str(seed), random.Random(seed)
        argv = arguments(checkpoint, rows, out, *STEPS)
        for first in (True, False):
            point = draw.randrange(10, 30)

            def killed(again=[] if first else ["--resume"], argv=argv, point=point):
                killed_at(point)
                train.main([*argv, *again])

            assert in_child(killed) == 77
        resumed(argv, out)
        assert_same_run(whole, out)


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def cut(checkpoint, rows, tmp_path_factory):
    """The same run, stopped after three steps."""
    out = tmp_path_factory.mktemp("cut") / "run"
    run(checkpoint, rows, out, "--max-steps", "3", *STEPS[2:])
    return out


def copied(cut, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(cut, out)
    return out


def damage(kind, path, other):
    data = bytearray(path.read_bytes())
    if kind == "empty":
        data = b""
    elif kind == "torn":
        data = data[: len(data) // 2]
    elif kind == "text":
        data = b"not a checkpoint"
    elif kind == "sign bits":
        for place in random.Random(0).sample(range(len(data) // 4, len(data) // 2), 100):
            data[place] ^= 0x80
    elif kind == "one bit":
        data[len(data) // 3] ^= 1
    elif kind == "another run's":
        data = other.read_bytes()
    else:
        torch.save({"a": torch.zeros(3)}, path)
        return
    path.write_bytes(data)


KINDS = ["empty", "torn", "text", "sign bits", "one bit", "another run's", "a file of torch.save"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_before_a_broken_one_is_used_with_a_warning(
    checkpoint, rows, whole, cut, tmp_path, capsys, kind
):
    out = copied(cut, tmp_path)
    damage(kind, out / "checkpoint" / "state.pt", whole / "checkpoint" / "state.pt")
    argv = arguments(checkpoint, rows, out, *STEPS)
    assert in_child(lambda: (killed_at(9), train.main([*argv, "--resume"]))) == 77  # and again after a kill
    train.main([*argv, "--resume"])
    assert_same_run(whole, out)
    assert (out / "checkpoint" / "state.broken.pt").exists()


def test_a_broken_checkpoint_is_named_in_the_warning_and_two_broken_ones_are_refused(
    checkpoint, rows, cut, tmp_path, capsys
):
    out = copied(cut, tmp_path)
    argv = arguments(checkpoint, rows, out, *STEPS)
    damage("torn", out / "checkpoint" / "state.previous.pt", None)
    damage("empty", out / "checkpoint" / "state.pt", None)
    message = refused(capsys, *argv, "--resume")
    assert "no usable checkpoint" in message and "state.pt: not a whole checkpoint" in message
    assert "state.previous.pt" in message
    shutil.rmtree(out)
    copied(cut, tmp_path)
    damage("sign bits", out / "checkpoint" / "state.pt", None)
    train.main([*argv, "--resume"])
    warned = capsys.readouterr().out
    assert "state.pt: the checksum of" in warned and "continuing from the checkpoint before it" in warned


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=5))
@settings(max_examples=60)
def test_a_changed_bit_is_noticed_or_changes_nothing(tmp_path_factory, flips):
    folder = tmp_path_factory.mktemp("flips")
    state = {"run_id": "r", "step": 3, "trainable": {"w": torch.arange(500.0)}, "optimizer": {"lr": 0.1}}
    state |= {"stream": None, "scores": {}}
    checkpoints.write_checkpoint(folder, state)
    path = folder / "state.pt"
    data = bytearray(path.read_bytes())
    for place, bit in flips:
        data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = checkpoints.read_checkpoint(path)
    except ValueError:
        return
    assert found["trainable"]["w"].equal(state["trainable"]["w"])
    assert {k: found[k] for k in ("run_id", "step", "optimizer")} == {
        k: state[k] for k in ("run_id", "step", "optimizer")
    }


def test_checkpoints_are_written_by_the_clock_and_at_the_end(checkpoint, rows, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run_folder, "write_checkpoint", lambda folder, state: written.append(state["step"]))
    run(checkpoint, rows, tmp_path / "end", "--max-steps", "3")
    monkeypatch.setattr(run_folder, "SAVE_SECONDS", 0)
    run(checkpoint, rows, tmp_path / "clock", "--max-steps", "3")
    run(checkpoint, rows, tmp_path / "steps", "--max-steps", "3", "--save-every", "2")
    assert written == [3, 1, 2, 3, 2, 3]


# ----------------------------------------------------------------------------------------- signals


def asked_in_step(monkeypatch, number, step):
    """Send this process a signal while it trains on the kept rows of a step."""
    steps, made = [], train.kept_batches

    def batches(*args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return made(*args)

    monkeypatch.setattr(train, "kept_batches", batches)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_continue(
    checkpoint, rows, whole, tmp_path, capsys, monkeypatch, number, status
):
    out = tmp_path / "run"
    argv = arguments(checkpoint, rows, out, "--max-steps", 4, "--log-selection")
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        asked_in_step(patched, number, 2)
        with pytest.raises(SystemExit) as stopped:
            train.main(argv)
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    name = signal.Signals(number).name
    assert capsys.readouterr().err.strip() == f"train.py: {name}: stopped after step 2 of 4; --resume continues"
    train.main([*argv, "--resume"])
    assert_same_run(whole, out)


def test_a_signal_before_the_first_step_leaves_a_run_that_can_be_resumed(
    checkpoint, rows, whole, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    argv = arguments(checkpoint, rows, out, *STEPS)
    load = train.Transformer.from_pretrained

    def loading(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(train.Transformer, "from_pretrained", loading)
        with pytest.raises(SystemExit) as stopped:
            train.main(argv)
    assert stopped.value.code == 143
    assert capsys.readouterr().err.strip() == "train.py: SIGTERM: stopped before the first step"
    assert not out.exists()
    train.main(argv)
    assert_same_run(whole, out)


def test_two_ranks_stop_after_the_same_step_and_resume(checkpoint, rows, tmp_path):
    """One of them alone is asked to stop; torchrun itself then reports the exit status 143."""
    flags = ["--grad-accum", "2", "--max-steps", "6", "--log-selection"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(checkpoint, rows, whole, *flags, ranks=2)
    program = tmp_path / "asked.py"
    program.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "made, seen = train.kept_batches, []\ndef batches(*args):\n    seen.append(1)\n"
        "    if len(seen) == 3 and os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return made(*args)\ntrain.kept_batches = batches\ntrain.main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    argv = arguments(checkpoint, rows, out, *flags)
    done = subprocess.run([*launch, *argv], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "train.py: SIGTERM: stopped after step 3 of 6; --resume continues" in done.stderr
    assert "exitcode  : 143" in done.stderr
    run(checkpoint, rows, out, *flags, "--resume", ranks=2)
    assert selected(whole) == selected(out)
    assert_same_weights(whole, out, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- locks


def test_a_run_folder_has_one_writer(checkpoint, rows, cut, tmp_path, capsys):
    out = copied(cut, tmp_path)
    before = (out / "metrics.jsonl").read_text()
    argv = arguments(checkpoint, rows, out, *STEPS, "--resume")
    with locked(out / ".lock", "x"):
        assert in_child(lambda: train.main(argv)) == 2
    ready, wait = os.pipe(), os.pipe()

    def hold():
        with locked(out / ".lock", "x"):
            os.write(ready[1], b"1")
            os.read(wait[0], 1)
            os._exit(9)  # as if killed, with the lock file still there

    child = os.fork()
    if child == 0:
        hold()
    os.read(ready[0], 1)
    message = refused(capsys, *argv)
    assert f"--out {out}: process {child} is writing it" in message
    assert (out / "metrics.jsonl").read_text() == before
    os.write(wait[1], b"1")
    os.waitpid(child, 0)
    train.main(argv)
    assert not (out / ".lock").exists()


# ---------------------------------------------------------------------------- what a run has read


def test_resuming_with_other_inputs_is_refused_by_name(checkpoint, rows, cut, tmp_path, capsys):
    out = copied(cut, tmp_path)
    lines = rows.read_text().splitlines()
    other = tmp_path / "rows.jsonl"
    other.write_text("\n".join([*lines[:-1], lines[-1].replace("It is", "It was")]) + "\n")
    config = json.loads((out / "config.json").read_text())
    write_json(out / "config.json", config | {"data": str(other)})
    argv = arguments(checkpoint, other, out, *STEPS, "--resume")
    assert "the rows of --data as tokenised have changed since the run" in refused(capsys, *argv)

    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    model = Transformer.from_pretrained(folder)
    with torch.no_grad():
        model.model["embed_tokens"].weight[0, 0] += 1
    model.save_pretrained(folder)
    write_json(out / "config.json", config | {"model": str(folder)})
    argv = arguments(folder, rows, out, *STEPS, "--resume")
    assert "the weights in --model have changed since the run" in refused(capsys, *argv)


def test_resuming_with_other_side_files_is_refused_by_name(checkpoint, rows, tmp_path, capsys):
    out, scores = tmp_path / "run", tmp_path / "scores"
    scores.mkdir()
    for field, start in (("rating", 0), ("rating", 1)):
        lines = [json.dumps({"id": f"r{i}", field: (i + start) % 7}) for i in range(40)]
        (scores / f"{field}.jsonl").write_text("\n".join(lines) + "\n")
        argv = arguments(checkpoint, rows, out, "--sample-pruner", "alpagasus", "--scores", scores)
        if start == 0:
            train.main([*argv, "--max-steps", "2"])
    message = refused(capsys, *argv, "--resume")
    assert "the rows that --sample-pruner chooses have changed" in message


@pytest.mark.parametrize("log", ["metrics.jsonl", "selection.jsonl"])
def test_a_log_with_a_hole_or_a_broken_line_is_named_by_file_and_line(checkpoint, rows, cut, tmp_path, capsys, log):
    out = copied(cut, tmp_path)
    argv = arguments(checkpoint, rows, out, *STEPS, "--resume")
    lines = (out / log).read_text().splitlines()
    (out / log).write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert f"{out / log}:2: expected the line of step 2" in refused(capsys, *argv)
    (out / log).write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    assert f"{out / log}:2: expected the line of step 2, got {lines[1][:20].strip()}" in refused(capsys, *argv)
    (out / log).unlink()
    assert f"{out / log}: not found, but the checkpoint is at step 3" in refused(capsys, *argv)


def test_a_run_past_the_last_step_is_refused(checkpoint, rows, cut, tmp_path, capsys):
    out = copied(cut, tmp_path)
    argv = arguments(checkpoint, rows, out, "--max-steps", 2, *STEPS[2:], "--resume")
    assert f"the run in {out} is at step 3, these settings end at 2" in refused(capsys, *argv)


# ------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("limit", [700, 3000, 20_000, 60_000])
def test_a_full_disk_ends_in_one_line_and_the_run_resumes_exactly(checkpoint, rows, whole, tmp_path, capfd, limit):
    out = tmp_path / "run"
    argv = arguments(checkpoint, rows, out, *STEPS)
    assert in_child(lambda: train.main(argv), limit=limit) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and str(out) in lines[0], lines
    assert "File too large" in lines[0]
    resumed(argv, out)
    assert_same_run(whole, out)


def test_a_log_that_cannot_be_written_is_named():
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_json("/dev/full", {"step": 1})


def test_a_file_in_the_way_is_named(checkpoint, rows, tmp_path, capsys):
    out = tmp_path / "run"
    out.write_text("a file")
    assert str(out) in refused(capsys, *arguments(checkpoint, rows, out, *STEPS))
    out.unlink()
    out.mkdir()
    (out / "checkpoint").write_text("a file")
    assert str(out / "checkpoint") in refused(capsys, *arguments(checkpoint, rows, out, *STEPS))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replaced(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_output_is_tried_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "x.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        check_writable(tmp_path / "file" / "x.json")


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / ".writing-abc" / "model.safetensors").write_bytes(b"x" * 100)
    with written_aside(tmp_path) as new:
        (new / "a").write_text("a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------- numbers


def test_a_number_that_is_not_finite_is_named_with_step_row_and_line(checkpoint, rows, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    model = Transformer.from_pretrained(folder)
    with torch.no_grad():
        model.model["norm"].weight[0] = float("nan")
    model.save_pretrained(folder)
    message = refused(capsys, *arguments(folder, rows, tmp_path / "a", *STEPS))
    assert "step 1: the NLL or entropy is NaN or infinite in row 'r" in message
    assert f"({rows}:" in message and "check the weights in --model, and --dtype" in message
    none = ["--sample-pruner", "none", "--token-pruner", "none"]
    message = refused(capsys, *arguments(folder, rows, tmp_path / "b", *STEPS, *none))
    assert "step 1: the loss (nan) or the gradient's norm" in message and f"({rows}:" in message
    message = refused(capsys, *arguments(checkpoint, rows, tmp_path / "c", *STEPS, "--lr", 1e30))
    assert "step 2: " in message and "try a lower --lr" in message


def test_a_weight_that_is_not_finite_never_replaces_a_checkpoint(checkpoint, rows, cut, tmp_path, capsys, monkeypatch):
    out = copied(cut, tmp_path)
    before = (out / "checkpoint" / "state.pt").read_bytes()
    step = torch.optim.AdamW.step

    def broken(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    message = refused(capsys, *arguments(checkpoint, rows, out, *STEPS, "--resume"))
    assert "step 4: the weight model.embed_tokens.weight is not finite" in message
    assert (out / "checkpoint" / "state.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "1e308"], "--epochs must be above 0 and at most 1e6"),
        (["--epochs", "nan"], "--epochs must be above 0"),
        (["--lora-rank", "1000000"], "--lora-rank must be in [0, 65536]"),
        (["--lora-rank", "5000"], "LoRA rank (--lora-rank) must be in [1, hidden_size 32], got 5000"),
        (["--seed", str(2**64)], "--seed must be in [0, 2**63)"),
        (["--seed", "-1"], "--seed must be in [0, 2**63)"),
    ],
)
def test_numbers_out_of_range_are_refused_by_flag(checkpoint, rows, tmp_path, capsys, flags, message):
    assert message in refused(capsys, *arguments(checkpoint, rows, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_a_run_is_finished_when_its_last_file_is_there(checkpoint, rows, whole, cut, tmp_path):
    out = copied(cut, tmp_path)
    assert (out / "finished.json").exists()
    argv = arguments(checkpoint, rows, out, *STEPS)
    assert in_child(lambda: (killed_at(7), train.main([*argv, "--resume"]))) == 77
    assert not (out / "finished.json").exists()  # it is at work again
    train.main([*argv, "--resume"])
    assert_same_run(whole, out)
    assert weights(out).keys() == weights(whole).keys()
    assert files.read_json(out / "finished.json") == {"steps": 4}


# -------------------------------------------------------------------------------------- side files


def side_command(checkpoint, rows, scores, field="base_nll"):
    return [str(arg) for arg in (field, "--model", checkpoint, "--data", rows, "--scores", scores)]


def test_a_side_file_has_one_writer(checkpoint, rows, tmp_path, capsys):
    with locked(tmp_path / ".base_nll.lock", "x"), pytest.raises(SystemExit) as stopped:
        score_rows.main(side_command(checkpoint, rows, tmp_path))
    assert stopped.value.code == 2
    assert f"process {os.getpid()} is writing it" in capsys.readouterr().err
    score_rows.main(side_command(checkpoint, rows, tmp_path))
    assert len((tmp_path / "base_nll.jsonl").read_text().splitlines()) == 40


@pytest.mark.parametrize("field", ["base_nll", "embedding"])
def test_nan_never_enters_a_side_file(checkpoint, rows, tmp_path, capsys, field):
    folder = tmp_path / "model"
    model = Transformer.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model["norm"].weight[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(SystemExit) as stopped:
        score_rows.main(side_command(folder, rows, tmp_path / "scores", field))
    assert stopped.value.code == 2
    assert f"{field} of row 'r0' ({rows}:1) is NaN or infinite: check --model" in capsys.readouterr().err
    assert (tmp_path / "scores" / f"{field}.jsonl").read_text() == ""


def test_a_side_file_of_other_weights_is_not_continued(checkpoint, rows, tmp_path, capsys):
    folder = tmp_path / "model"
    model = Transformer.from_pretrained(checkpoint)
    for change in (0, 1):
        with torch.no_grad():
            model.model["embed_tokens"].weight[0, 0] += change
        model.save_pretrained(folder)
        argv = side_command(folder, rows, tmp_path / "scores")
        if not change:
            score_rows.main(argv)
    with pytest.raises(SystemExit):
        score_rows.main(argv)
    assert "base_nll.jsonl was made with base_weights" in capsys.readouterr().err
