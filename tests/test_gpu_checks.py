"""reproduce.gpu: its reduced form on a CPU, and that its checks fail where something is wrong."""

import gc
import json
from unittest import mock

import pytest
import torch
from pretended_gpu import Cuda, mutated
from torch.nn.attention import varlen

from reproduce import __main__ as reproduce
from reproduce import gpu as checks
from training import packing
from training.memory import MODES


def run(out, *parts):
    checks.main(["--device", "cpu", "--out", str(out), "--parts", *parts])
    return json.loads(out.read_text())


def test_all_but_training_runs_on_a_cpu(tmp_path, capsys):
    found = run(tmp_path / "gpu.json", *(part for part in checks.PARTS if part != "trains"))
    assert found["reduced"] and found["torch"] == torch.__version__ and "commit" in found
    assert len(found["checks"]) == 8 * 5 and all(check["passed"] for check in found["checks"].values())
    keys = found["findings"].keys()
    for mode in MODES:
        assert f"speed: SmolLM2-1.7B, {mode}, 128 tokens" in keys
    assert {"step: LLaMA2-7B, reuse", "step: LLaMA2-7B: time over that of full data"} <= keys
    assert {"tiles: score, V 2000, H 64: ms, GiB", "tiles: train, V 2000, H 64: ms, GiB"} <= keys
    assert {"compile: eager", "compile: compiled"} <= keys
    assert capsys.readouterr().out.rstrip().endswith("0 of 40 checks failed")
    reproduce.main(["gpu", "--out", str(tmp_path / "gpu.json"), "--table"])
    assert "| correct: qwen2, LoRA: gradient, cosine |" in capsys.readouterr().out


@pytest.mark.slow
def test_training_runs_on_a_cpu(tmp_path):
    found = run(tmp_path / "gpu.json", "trains")
    assert all(check["passed"] for check in found["checks"].values())
    assert found["findings"]["trains: the resumed run is bit-equal"] is True


def test_what_fails_is_a_finding_and_the_rest_goes_on(tmp_path, capsys):
    with mock.patch.dict(checks.PARTS, {"speed": lambda report: 1 / 0}), pytest.raises(SystemExit) as end:
        run(tmp_path / "gpu.json", "speed", "tiles")
    assert end.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["checks"] == {
        "speed": {"found": "ZeroDivisionError: division by zero", "expected": "no error", "passed": False}
    }
    assert len(found["findings"]) == 2
    assert "| speed | ZeroDivisionError: division by zero | no error | FAIL |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "fails"),
    [
        (None, []),
        ((packing.varlen_attention, "window - 1", "window"), ["NLL, mean difference"]),
        ((packing.varlen_attention, "q, k, v, ends, ends", "q, k, v.roll(1, 0), ends, ends"), ["NLL, mean difference"]),
        ((packing.attend_packed, "if q.is_cuda and", "if not q.is_cuda and"), ["varlen kernels"]),
    ],
)
def test_on_a_gpu_a_mistake_in_attention_fails_a_check(tmp_path, monkeypatch, mistake, fails, gpu):
    if mistake:
        monkeypatch.setattr(mistake[0], "__code__", mutated(*mistake))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    report = checks.Report(torch.device("cuda", 0), tmp_path / "gpu.json")
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "mistral", "sliding_window": 16}
    monkeypatch.setattr(checks, "made_rows", lambda cfg, tokens, real=checks.made_rows: real(cfg, 500))
    checks.one_form(report, "form", report.shape("SmolLM2-135M", **sizes, **heads), 0)
    failed = [key.removeprefix("form: ") for key, check in report.found["checks"].items() if not check["passed"]]
    assert set(fails) <= set(failed) and bool(failed) == bool(fails)
    assert bool(Cuda.calls.get("torch_attn._varlen_attn.default")) == ("varlen kernels" not in fails)


def test_parts_about_bf16_are_refused_on_a_gpu_without_it(tmp_path, monkeypatch, capsys, gpu):
    ran = []
    parts = {part: lambda report, part=part: ran.append(part) for part in checks.PARTS}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    flags = ["--out", str(tmp_path / "gpu.json"), "--parts"]
    with mock.patch.dict(checks.PARTS, parts):
        with pytest.raises(SystemExit) as end:
            checks.main([*flags, "trains", "speed", "tiles"])
        assert end.value.code == 2 and ran == []
        said = capsys.readouterr().err
        assert said.startswith("reproduce.gpu: --parts speed tiles: expected a GPU that computes in bf16")
        assert said.endswith("got a pretended GPU; --parts trains step runs on it, in fp32\n") and said.count("\n") == 1
        checks.main([*flags, "trains", "step"])
        assert ran == ["trains", "step"]
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        checks.main([*flags, "trains", "speed"])
        assert ran[2:] == ["trains", "speed"]


def test_a_torch_without_the_kernel_is_refused_before_any_part(tmp_path, monkeypatch, capsys, gpu):
    monkeypatch.delattr(varlen, "varlen_attn")
    with mock.patch.dict(checks.PARTS, {"trains": lambda report: 1 / 0}), pytest.raises(SystemExit) as end:
        checks.main(["--out", str(tmp_path / "gpu.json"), "--parts", "trains"])
    assert end.value.code == 2 and "reproduce.gpu: bf16 on a GPU needs torch 2.11" in capsys.readouterr().err


def test_memory_is_measured_with_nothing_of_another_measurement_alive(tmp_path, monkeypatch):
    def alive(report, name, mode, sizes, peak):
        gc.collect()
        found.append([tuple(x.shape) for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= 2**16])

    found = []
    monkeypatch.setattr(checks, "passes", alive)
    gc.freeze()  # what other tests have left
    checks.speed(checks.Report(torch.device("cpu"), tmp_path / "gpu.json"))
    gc.unfreeze()
    assert len(found) == 3 * len(MODES) - 2 and not any(found), found[0]


def test_operations_are_those_of_the_products_counted_one_by_one():
    """Against torch's own counter; in bf16, since it does not see the product that is summed in place."""
    from torch.utils.flop_counter import FlopCounterMode

    report = checks.Report(torch.device("cpu"), None)
    cfg = report.shape("SmolLM2-135M")
    rows, net = checks.made_rows(cfg, 400), checks.network(cfg, 0, torch.float32, torch.device("cpu"))
    for mode in ("score", "full", "full, checkpointing"):
        with FlopCounterMode(display=False) as counter:
            if mode == "score":
                checks.score(net, rows, 10**6, report.autocast())
            else:
                checks.loss_of(net, rows, report.autocast(), checkpointing="checkpointing" in mode).backward()
        counted = sum(
            count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
        )
        lengths = [len(row.input_ids) - 1 for row in rows]
        square = 2 * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim * sum(n * n for n in lengths)
        attention = square * {"score": 1, "full": 3.5, "full, checkpointing": 4.5}[mode]
        assert checks.flops(cfg, rows, mode) - attention == pytest.approx(
            counted, rel=0.04
        )  # the last product of a layer is not run again
