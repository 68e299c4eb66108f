"""--shard: the run, the checkpoint and the saved model are those of DDP, on any number of ranks."""

import json

import pytest
import torch
from forked import on_ranks
from safetensors.torch import load_file
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import train
from model import Transformer
from training.lora import load_adapter
from training.ranks import Ranks
from training.shard import part_of, shard

FULL, LORA = ["--lora-rank", "0"], ["--lora-rank", "4"]
# 9 of 16 samples are kept, scored and trained, each in a pass of its own.
ODD = ["--sample-pruner", "random", "--prune-batch", "16", "--sample-keep-ratio", "0.57", "--pass-tokens", "1"]
KINDS = {  # flags, and the numbers of ranks that are tried by default
    "full": (FULL, (1, 2, 4)),
    "lora": (LORA, (2,)),
    "full, checkpointing, an odd number of passes": ([*FULL, "--activation-checkpointing", *ODD], (2,)),
    "lora, drop, reused scores": (
        [*LORA, "--token-pruning", "drop", "--reuse-scores", "2", "--pass-tokens", "60"],
        (4,),
    ),
    "lora, bf16": ([*LORA, "--dtype", "bf16"], (2,)),
    "full, bf16": ([*FULL, "--dtype", "bf16"], ()),
}
CASES = [
    pytest.param(flags, world, id=f"{kind}, {world} ranks", marks=() if world in quick else pytest.mark.slow)
    for kind, (flags, quick) in KINDS.items()
    for world in (1, 2, 4)
]


def run(checkpoint, rows, out, world, *flags, steps=3):
    argv = ["--model", checkpoint, "--data", rows, "--out", out, "--lr", "1e-2", "--micro-batch", "4"]
    argv += ["--grad-accum", 4 // world, "--sample-keep-ratio", "0.5", "--epochs", "9", "--log-selection"]
    argv = [str(arg) for arg in [*argv, "--max-steps", steps, *flags]]
    train.main(argv) if world == 1 else on_ranks(world, train.main, argv)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def selection(out):
    steps = [json.loads(line) for line in (out / "selection.jsonl").read_text().splitlines()]
    return [[{k: v for k, v in s.items() if k not in ("ppl", "ent")} for s in step["samples"]] for step in steps]


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def saved(out):
    (file,) = [*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")]
    return load_file(file)


@pytest.mark.parametrize(("flags", "world"), CASES)
def test_a_sharded_run_is_that_of_ddp(checkpoint, rows, tmp_path, flags, world):
    whole = run(checkpoint, rows, tmp_path / "whole", world, *flags)
    parts = run(checkpoint, rows, tmp_path / "parts", world, *flags, "--shard")
    assert selection(tmp_path / "parts") == selection(tmp_path / "whole")
    fp32 = "bf16" not in flags
    for key, close in (("loss", 1e-6 if fp32 else 1e-3), ("grad_norm", 1e-4 if fp32 else 1e-2)):
        assert [m[key] for m in parts] == pytest.approx([m[key] for m in whole], rel=close)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if fp32 else {"rtol": 1e-2, "atol": 1e-2}
    assert_close(saved(tmp_path / "parts"), saved(tmp_path / "whole"), **tolerance)


@pytest.mark.parametrize("flags", [FULL, LORA])
def test_resuming_is_exact_and_goes_on_from_a_checkpoint_of_either_kind(checkpoint, rows, tmp_path, flags):
    run(checkpoint, rows, tmp_path / "whole", 2, *flags, "--shard", steps=4)
    run(checkpoint, rows, tmp_path / "cut", 2, *flags, "--shard", steps=2)
    run(checkpoint, rows, tmp_path / "cut", 2, *flags, "--shard", "--resume", steps=4)
    assert_close(saved(tmp_path / "cut"), saved(tmp_path / "whole"), rtol=0, atol=0)
    assert selection(tmp_path / "cut") == selection(tmp_path / "whole")
    # From two sharded ranks to one, and back to four.
    run(checkpoint, rows, tmp_path / "mixed", 2, *flags, "--shard", steps=2)
    run(checkpoint, rows, tmp_path / "mixed", 1, *flags, "--resume", steps=3)
    run(checkpoint, rows, tmp_path / "mixed", 4, *flags, "--shard", "--resume", steps=4)
    assert_close(saved(tmp_path / "mixed"), saved(tmp_path / "whole"), rtol=1e-4, atol=1e-5)
    for out in ("cut", "mixed"):  # the saved folder loads
        model = Transformer.from_pretrained(checkpoint if flags == LORA else tmp_path / out / "model")
        if flags == LORA:
            load_adapter(model, tmp_path / out / "adapter")


def parameters_held(folder):
    with Ranks.joined("cpu") as ranks:
        model = Transformer.from_pretrained(folder, dtype=None)
        shard(model, ranks, torch.float32)
        return sum(parameter.to_local().numel() for parameter in model.parameters())


def test_each_rank_holds_its_share_of_the_parameters(checkpoint):
    total = sum(parameter.numel() for parameter in Transformer.from_pretrained(checkpoint).parameters())
    held = on_ranks(4, parameters_held, checkpoint)
    assert sum(held) == total and max(held) < 1.1 * total / 4


def part_and_its_memory():
    with Ranks.joined("cpu") as ranks:
        like = distribute_tensor(torch.zeros(10, 4), init_device_mesh("cpu", (ranks.world,)), [Shard(0)])
        part = part_of(torch.arange(40.0).view(10, 4), like).to_local()
        return part[:, 0].tolist(), part.untyped_storage().nbytes()


def test_a_part_of_a_checkpoint_does_not_keep_the_whole_tensor_in_memory():
    assert on_ranks(4, part_and_its_memory) == [([0, 4, 8], 48), ([12, 16, 20], 48), ([24, 28, 32], 48), ([36], 16)]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--reuse-forward", "--activation-checkpointing"], "--reuse-forward"),
        (["--eval-every", "2"], "--eval-every"),
        (["--sample-pruner", "infobatch"], "--sample-pruner infobatch"),
        (["--token-pruner", "fastv"], "--token-pruner fastv"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(flags, named):
    with pytest.raises(ValueError, match=f"--shard does not go with {named}"):
        train.parse_config(["--shard", *flags])
