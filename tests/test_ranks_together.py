"""Ranks: what travels between them, the same choices on any number of them, and how a failing one ends the job."""

import datetime
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from forked import Failed, on_ranks
from hypothesis import given
from hypothesis import strategies as st
from pretended_gpu import GPU

import pruners
import train
from data.sft import Sample
from data.stream import fingerprint
from model import Transformer
from training import ranks as ranks_file
from training.head import TokenLoss
from training.ranks import Ranks, share

ROOT = Path(train.__file__).parent


def run(checkpoint, rows, out, *flags, world=1, grad_accum=4):
    """train.py on some ranks, with 16 samples a step on any number of them."""
    argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(out), "--lora-rank", "0", "--lr", "1e-2"]
    argv += ["--micro-batch", "4", "--sample-keep-ratio", "0.5", "--max-steps", "2", "--log-selection"]
    argv += ["--grad-accum", str(grad_accum // world), *map(str, flags)]
    train.main(argv) if world == 1 else on_ranks(world, train.main, argv)
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def selection(out):
    """What each step decided about each sample, without the scores, which may round differently."""
    steps = [json.loads(line) for line in (Path(out) / "selection.jsonl").read_text().splitlines()]
    return [[{k: v for k, v in s.items() if k not in ("ppl", "ent")} for s in step["samples"]] for step in steps]


# ------------------------------------------------------------------------------------------ what travels


def exchanged():
    """On each rank: whether `exchange` and `sum` give every rank what each of them has."""
    ok = []
    with Ranks.joined("cpu") as ranks:
        for case in range(40):
            generator = torch.Generator().manual_seed(case)
            sizes = torch.randint(0, 5, (case % 7,), generator=generator).tolist()
            dtype = (torch.float32, torch.uint8, torch.int64)[case % 3]
            values = [torch.randint(0, 200, (size,), generator=generator).to(dtype) for size in sizes]
            if dtype == torch.float32:  # any bits
                values = [value / 7 * 10.0 ** (case - 20) for value in values]
            mine = {i: values[i] for i in share(sizes, ranks.world)[ranks.rank]}
            found = ranks.exchange(sizes, mine, dtype)
            ok.append(len(found) == len(values) and all(map(torch.equal, found, values)))
        ok.append(
            torch.equal(ranks.sum(torch.tensor([ranks.rank, 1])), torch.tensor([sum(range(ranks.world)), ranks.world]))
        )
        ok.append(
            torch.equal(ranks.sum(torch.tensor(0.1, dtype=torch.float64)).float(), torch.tensor(0.1 * ranks.world))
        )
    return all(ok)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_gets_each_ranks_values_bit_by_bit(world):
    assert on_ranks(world, exchanged) == [True] * world


def test_nan_and_infinity_travel():
    def work():
        with Ranks.joined("cpu") as ranks:
            return ranks.exchange([2, 1], {ranks.rank: torch.tensor([[math.nan, math.inf], [1.0]][ranks.rank])})[
                0
            ].tolist()

    for found in on_ranks(2, work):
        assert math.isnan(found[0]) and found[1] == math.inf


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 5))
def test_each_item_is_one_ranks_and_the_shares_are_even(costs, world):
    hands = share(costs, world)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    loads = [sum(costs[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(costs, default=0)


# ------------------------------------------------------------------------------------------- the choices

METHODS = {
    "qtuning": [],
    "prune batch 8": ["--prune-batch", "8"],
    "prune batch 12": ["--prune-batch", "12"],  # 12 and 4 samples compete
    "random": ["--sample-pruner", "random", "--token-pruner", "random"],
    "entropy, fastv": ["--sample-pruner", "entropy", "--token-pruner", "fastv"],
    "infobatch": [
        "--sample-pruner",
        "infobatch",
        "--token-pruner",
        "ppl-keep-high",
        "--epochs",
        "8",
        "--max-steps",
        "6",
    ],
    "reused scores": ["--reuse-scores", "2", "--epochs", "8", "--max-steps", "6"],
    "drop": ["--token-pruning", "drop"],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_is_the_same_on_1_2_and_4_ranks(checkpoint, rows, tmp_path, method):
    alone = run(checkpoint, rows, tmp_path / "1", *METHODS[method])
    for world in (2, 4):
        metrics = run(checkpoint, rows, tmp_path / str(world), *METHODS[method], world=world)
        assert selection(tmp_path / str(world)) == selection(tmp_path / "1")
        assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in alone], rel=1e-5)
        for key in ("answer_tokens_kept", "tokens_scored", "tokens_trained", "weight_sum"):
            assert [m[key] for m in metrics] == [m[key] for m in alone]


def counted(argv):
    """Train, and count the prune batches and the samples that this rank has decided about."""
    pruner, tokens = pruners.SAMPLE_PRUNERS["qtuning"], pruners.TOKEN_PRUNERS["qtuning"]
    calls = []

    def choose(*args):
        calls.append(1)
        return pruner.choose(*args)

    def decide(cfg, generators, *args):
        calls.append(100 * len(generators))
        return tokens.decide(cfg, generators, *args)

    pruners.SAMPLE_PRUNERS["qtuning"] = pruners.SamplePruner(pruner.needs, choose=choose)
    pruners.TOKEN_PRUNERS["qtuning"] = pruners.TokenPruner(tokens.needs, decide)
    train.main(argv)
    return sum(calls)


def test_each_rank_decides_about_its_share_only(checkpoint, rows, tmp_path):
    argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(tmp_path / "run"), "--micro-batch", "4"]
    argv += ["--sample-keep-ratio", "0.5", "--grad-accum", "4", "--max-steps", "1", "--log-selection"]
    calls = on_ranks(2, counted, argv)
    assert [count % 100 for count in calls] == [4, 4]  # of 8 prune batches of 4
    trimmed = [count // 100 for count in calls]
    assert abs(trimmed[0] - trimmed[1]) <= 1
    assert sum(trimmed) == sum(s["trimmed"] for s in selection(tmp_path / "run")[0])


# ------------------------------------------------------------------------------------------------ errors


def failing(argv, rank, error):
    """Train; the scoring of the second step fails on one rank."""
    real = train.choose_tokens

    def choose_tokens(cfg, step, *args):
        if step == 2 and int(os.environ["RANK"]) == rank:
            raise error
        return real(cfg, step, *args)

    train.choose_tokens = choose_tokens
    train.main(argv)


def argv_of(checkpoint, rows, out, *flags):
    argv = ["--model", checkpoint, "--data", rows, "--out", out, "--lora-rank", "0", "--micro-batch", "4"]
    return [str(arg) for arg in [*argv, "--grad-accum", "2", "--sample-keep-ratio", "0.5", "--epochs", "9", *flags]]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_fails_says_so_once_and_ends_the_job(checkpoint, rows, tmp_path, rank):
    started = time.monotonic()
    with pytest.raises(Failed) as failed:
        on_ranks(2, failing, argv_of(checkpoint, rows, tmp_path / "run"), rank, ValueError("row 7 is odd"))
    assert failed.value.codes == [2, 2]
    assert failed.value.errors[rank].splitlines()[-1] == f"train.py: rank {rank}: row 7 is odd"
    assert "Traceback" not in "".join(failed.value.errors) and "odd" not in failed.value.errors[1 - rank]
    assert time.monotonic() - started < 15


def stopped_later(argv):
    """Train; rank 1 fails while it reads rows, and rank 0 is then stopped, as torchrun does."""

    def load_samples(*args):
        if os.environ["RANK"] == "1":
            raise ValueError("row 7 is odd")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    train.load_samples = load_samples
    train.main(argv)


def test_a_rank_that_is_stopped_because_another_failed_says_nothing(checkpoint, rows, tmp_path):
    with pytest.raises(Failed) as failed:
        on_ranks(2, stopped_later, argv_of(checkpoint, rows, tmp_path / "run"))
    assert failed.value.codes == [143, 2]
    assert failed.value.errors == ["", "train.py: rank 1: row 7 is odd\n"]


def hanging(argv, error):
    """Train; rank 1 fails in the second step, and leaving the group never ends there."""
    ranks_file.LEAVING = 2
    if os.environ["RANK"] == "1":
        ranks_file.dist.destroy_process_group = lambda: time.sleep(60)
    failing(argv, 1, error)


def broken_on_rank_1(argv, first):
    """Train; the first row of rank 1 has a NaN, and of the ranks, `first` is the first to fail."""
    real = TokenLoss.forward

    def forward(self, *inputs):
        loss, nll = real(self, *inputs)
        if os.environ["RANK"] == "1":
            nll[0] = math.nan
        return loss + nll.sum(), nll

    TokenLoss.forward = forward
    ranks_file.fails_first = lambda: os.environ["RANK"] == str(first)
    train.main(argv)


def test_a_row_whose_loss_is_not_finite_is_named_by_a_rank_that_does_not_have_it(checkpoint, rows, tmp_path):
    flags, said = ["--sample-pruner", "none", "--token-pruner", "none"], []
    for first in range(2):
        with pytest.raises(Failed) as failed:
            on_ranks(2, broken_on_rank_1, argv_of(checkpoint, rows, tmp_path / str(first), *flags), first)
        (line,) = [line for line in "".join(failed.value.errors).splitlines() if line.startswith("train.py: ")]
        said.append(line.removeprefix(f"train.py: rank {first}: "))
    assert said[0] == said[1] and "step 1: the loss (nan)" in said[0]
    assert said[0].count(" in row 'r") == 1 and " more" not in said[0]


@pytest.mark.parametrize("error", [ValueError("row 7 is odd"), RuntimeError("a bug")])
def test_a_rank_that_cannot_leave_the_group_still_says_why(checkpoint, rows, tmp_path, error):
    started = time.monotonic()
    with pytest.raises(Failed) as failed:
        on_ranks(2, hanging, argv_of(checkpoint, rows, tmp_path / "run"), error)
    assert failed.value.codes == [2, 2]
    said = failed.value.errors[1].splitlines()
    assert said[-1] == ("rank 1: row 7 is odd" if isinstance(error, ValueError) else "RuntimeError: a bug")
    assert sum("odd" in line or "a bug" in line for line in said) == 1 and "Traceback" not in failed.value.errors[0]
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(("kind", "backend", "device"), [("cpu", "gloo", None), ("cuda", "nccl", GPU)])
def test_the_group_has_a_timeout_and_a_device_and_is_left_after_an_error(monkeypatch, kind, backend, device, gpu):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_file, "fails_first", lambda: True)
    monkeypatch.setattr(ranks_file.threading, "Timer", mock.Mock())
    calls = []
    monkeypatch.setattr(ranks_file.dist, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(ranks_file.dist, "destroy_process_group", lambda: calls.append("left"))
    hour = datetime.timedelta(hours=1)
    with pytest.raises(ValueError, match="odd"), Ranks.joined(kind, patience=hour):
        raise ValueError("odd")
    assert calls == [((backend,), {"timeout": hour, "device_id": device}), "left"]


def test_a_bug_leaves_its_traceback_once(checkpoint, rows, tmp_path):
    with pytest.raises(Failed) as failed:
        on_ranks(2, failing, argv_of(checkpoint, rows, tmp_path / "run"), 1, RuntimeError("a bug"))
    assert "RuntimeError: a bug" in failed.value.errors[1] and "Traceback" in failed.value.errors[1]
    assert "Traceback" not in failed.value.errors[0]


def test_what_all_ranks_meet_is_said_once(checkpoint, rows, tmp_path):
    with pytest.raises(Failed) as failed:
        on_ranks(2, train.main, argv_of(checkpoint, tmp_path / "none.jsonl", tmp_path / "run"))
    lines = "".join(failed.value.errors).splitlines()
    assert len(lines) == 1 and "none.jsonl: no such file" in lines[0] and lines[0].startswith("train.py: rank ")


def test_without_torchrun_the_line_names_no_rank(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(argv_of(checkpoint, tmp_path / "none.jsonl", tmp_path / "run"))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"train.py: {tmp_path / 'none.jsonl'}: no such file\n"


def elsewhere(argv, folders):
    """Train in the folder of this rank: what relative paths name differs."""
    os.chdir(folders[int(os.environ["RANK"])])
    train.main(argv)


@pytest.fixture
def machines(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


def test_ranks_that_read_different_rows_say_so_before_the_first_step(checkpoint, rows, machines):
    lines = rows.read_text().splitlines()
    for folder, text in zip(machines, ([*lines], [*lines[:9], lines[10], lines[9], *lines[11:]]), strict=True):
        (folder / "rows.jsonl").write_text("\n".join(text))
    with pytest.raises(Failed) as failed:
        on_ranks(2, elsewhere, argv_of(checkpoint, "rows.jsonl", "run"), machines)
    (line,) = "".join(failed.value.errors).splitlines()
    assert "the rows of --data rows.jsonl, as tokens: not the same on rank 0 and on rank 1" in line
    assert not (machines[0] / "run").exists()


def with_flags_of_its_own(argv, flags):
    train.main([*argv, *flags[int(os.environ["RANK"])]])


def test_ranks_that_are_started_with_different_settings_name_the_flag(checkpoint, rows, tmp_path):
    flags = ([], ["--token-keep-ratio", "0.75"])
    with pytest.raises(Failed) as failed:
        on_ranks(2, with_flags_of_its_own, argv_of(checkpoint, rows, tmp_path / "run"), flags)
    (line,) = "".join(failed.value.errors).splitlines()
    assert "--token-keep-ratio: not the same on rank 0 and on rank 1" in line
    assert not (tmp_path / "run").exists()


def test_ranks_that_choose_different_rows_say_so_before_the_first_step(checkpoint, rows, machines):
    ids = [json.loads(line)["id"] for line in rows.read_text().splitlines()]
    for folder, sign in zip(machines, (1, -1), strict=True):
        (folder / "scores").mkdir()
        lines = [json.dumps({"id": row_id, "rating": sign * place}) for place, row_id in enumerate(ids)]
        (folder / "scores" / "rating.jsonl").write_text("\n".join(lines))
    argv = argv_of(checkpoint, rows, "run", "--sample-pruner", "alpagasus", "--scores", "scores")
    with pytest.raises(Failed) as failed:
        on_ranks(2, elsewhere, argv, machines)
    assert "the rows that --sample-pruner chooses: not the same on rank 0 and on rank 1" in "".join(failed.value.errors)


def test_resume_without_a_shared_folder_says_what_it_needs(checkpoint, rows, machines):
    argv = argv_of(checkpoint, rows, "run", "--max-steps", "1")
    on_ranks(2, elsewhere, argv, machines)
    with pytest.raises(Failed) as failed:
        on_ranks(2, elsewhere, [*argv, "--resume"], machines)
    (line,) = [line for line in "".join(failed.value.errors).splitlines() if "--resume" in line]
    assert line.startswith("train.py: rank 1: --resume: run/checkpoint/state.pt is not on ") and "share" in line


def test_ranks_that_read_different_weights_say_so_before_the_first_step(checkpoint, rows, machines):
    for folder, scale in zip(machines, (1, 2), strict=True):
        model = Transformer.from_pretrained(checkpoint)
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(folder / "model")
    with pytest.raises(Failed) as failed:
        on_ranks(2, elsewhere, argv_of("model", rows, "run"), machines)
    (line,) = "".join(failed.value.errors).splitlines()
    assert "the weights in --model model: not the same on rank 0 and on rank 1" in line
    assert not (machines[0] / "run").exists()


def test_a_copy_of_the_checkpoint_on_each_machine_resumes_and_one_of_another_step_is_refused(
    checkpoint, rows, machines
):
    argv = argv_of(checkpoint, rows, "run")
    on_ranks(2, elsewhere, [*argv, "--max-steps", "1"], machines)
    shutil.copytree(machines[0] / "run" / "checkpoint", machines[1] / "run" / "checkpoint")
    on_ranks(2, elsewhere, [*argv, "--max-steps", "2", "--resume"], machines)
    with pytest.raises(Failed) as failed:
        on_ranks(2, elsewhere, [*argv, "--max-steps", "3", "--resume"], machines)
    (line,) = [line for line in "".join(failed.value.errors).splitlines() if "--resume" in line]
    assert "--resume: the run and step of run/checkpoint/state.pt: not the same on rank 0 and on rank 1" in line


SAMPLE = {"id": "a", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


@pytest.mark.parametrize(
    "change",
    [{"id": "b"}, {"input_ids": [1, 2, 4]}, {"labels": [-100, -100, 3]}, {"input_ids": [1, 2], "labels": [-100, 2]}],
)
def test_the_fingerprint_sees_every_part_of_a_row_and_the_order(change):
    one, other = Sample(**SAMPLE), Sample(**SAMPLE | change)
    prints = {fingerprint(rows) for rows in ([one], [other], [one, other], [other, one], [one, one])}
    assert len(prints) == 5 and all(0 <= number < 2**63 for number in prints)


def two_machines(argv):
    """train.py on two ranks, each of a torchrun of its own: what each torchrun wrote to stderr, and its status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=7"]
    launch += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    command, env = [str(ROOT / "train.py"), *argv], {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen([*launch, f"--node_rank={node}", *command], stderr=subprocess.PIPE, text=True, env=env)
        for node in range(2)
    ]
    return [(node.communicate(timeout=180)[1], node.returncode) for node in nodes]


def test_two_machines_under_torchrun_train_as_two_ranks_of_one(checkpoint, rows, tmp_path):
    flags = ["--max-steps", "2", "--log-selection"]
    for error, code in two_machines(argv_of(checkpoint, rows, tmp_path / "two", *flags)):
        assert code == 0, error
    on_ranks(2, train.main, argv_of(checkpoint, rows, tmp_path / "one", *flags))
    assert selection(tmp_path / "two") == selection(tmp_path / "one")


@pytest.mark.slow
def test_under_torchrun_an_error_is_printed_once_and_ends_both_machines(checkpoint, rows, tmp_path):
    started = time.monotonic()
    errors, codes = zip(*two_machines(argv_of(checkpoint, rows, tmp_path / "run", "--lr", "1e30")), strict=True)
    assert all(codes)
    assert "".join(errors).count("train.py: rank ") == 1 and "try a lower --lr" in "".join(errors), errors
    assert time.monotonic() - started < 90
