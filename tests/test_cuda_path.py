"""train.py and pruners.score_rows on a pretended GPU, against the same run on the CPU; and mistakes that are caught."""

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from pretended_gpu import GPU, Cuda, mutated

import eval.during
import model as model_file
import train
from data.sft import load_samples
from data.tokenizer import TextTokenizer
from eval import arc, gsm8k
from model import ModelConfig, Transformer
from pruners import score_rows
from training import checkpoint as checkpoint_file
from training import head, lora, packing, run_folder, scoring
from training.head import TokenLoss
from training.packing import pack

TINY = Path(train.__file__).parent / "data" / "tiny"
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}
DEEP = {"deep": {"model_type": "llama", "num_hidden_layers": 4}}
PATHS = {
    "plain": [],
    "checkpointing": ["--activation-checkpointing"],
    "reuse": ["--activation-checkpointing", "--reuse-forward"],
    "drop": ["--token-pruning", "drop", "--pass-tokens", "100"],
}
FULL, LORA = ["--lora-rank", "0"], ["--lora-rank", "4"]
QUICK = {  # each family, each path, full and LoRA, once or twice; the rest is slow
    *(("llama", "plain", "full"), ("llama", "reuse", "lora"), ("mistral", "drop", "lora")),
    *(("mistral", "plain", "full"), ("qwen2", "checkpointing", "lora"), ("qwen3", "reuse", "full")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model of every family with the embedded tokenizer; head_dim as flash attention takes it."""
    made, vocab = {}, json.loads((TINY / "base" / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    for name, more in {**FAMILIES, **DEEP}.items():
        torch.manual_seed(0)
        net = Transformer(ModelConfig(vocab_size=vocab, **{"model_type": name, **sizes, **heads, **more}))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(5 if parameter.dim() == 2 else 1)
        net.source = TINY / "base"
        net.save_pretrained(made.setdefault(name, tmp_path_factory.mktemp(name)))
    return made


def run(folder, rows, out, *flags):
    argv = ["--model", str(folder), "--data", str(rows), "--out", str(out), "--lr", "1e-2", "--max-steps", "2"]
    argv += ["--micro-batch", "4", "--grad-accum", "2", "--sample-keep-ratio", "0.5", "--log-selection", *flags]
    train.train(train.parse_config(argv))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def chosen(out):
    """The rows and tokens that each step of a run trained on."""
    steps = map(json.loads, (out / "selection.jsonl").read_text().splitlines())
    return [[(sample["id"], sample["kept"], sample.get("tokens")) for sample in step["samples"]] for step in steps]


def compared(folder, rows, out, *flags):
    """Train on the GPU and on the CPU, both in bf16; the kernels of a GPU are used, and the results are alike."""
    flags = [*flags, "--dtype", "bf16"]
    found = run(folder, rows, out / "gpu", *flags, "--device", "cuda")
    seen = dict(Cuda.calls)
    expected = run(folder, rows, out / "cpu", *flags, "--device", "cpu", "--pass-tokens", "40")
    assert Cuda.calls == seen, "the second run is on the CPU"
    assert seen.get("aten.mm.dtype") and seen["aten._fused_adamw_.default"] == 2
    assert seen.get("torch_attn._varlen_attn.default") and not Cuda.attended, "attention went row by row"
    assert all(settings["cache_enabled"] is False for settings in Cuda.autocasts), "autocast keeps its casts"
    for a, b, ours, theirs in zip(found, expected, chosen(out / "gpu"), chosen(out / "cpu"), strict=True):
        assert a["samples_kept"] == b["samples_kept"]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
        # In bf16 near ties may choose other tokens, whose gradient is another one: with AVX2 1.09 against 0.83.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.3 if ours == theirs else 0.5)


CASES = [
    pytest.param(family, path, kind, marks=() if (family, path, kind) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for path in PATHS
    for kind in ("full", "lora")
]


@pytest.mark.parametrize(("family", "path", "kind"), CASES)
def test_a_run_on_a_gpu_is_that_of_the_cpu_in_bf16(folders, rows, tmp_path, family, path, kind, gpu):
    compared(folders[family], rows, tmp_path, *PATHS[path], *(FULL if kind == "full" else LORA))


def scores_agree(folder, rows):
    """Scores on the GPU are those of the CPU in bf16, token by token."""
    samples = load_samples(rows, TextTokenizer.from_pretrained(folder))[0][:6]
    found = []
    for device, tokens in (("cuda", 10_000), ("cpu", 1)):
        net = Transformer.from_pretrained(folder, device=device)
        with torch.no_grad():
            nll, entropy, mask = scoring.score(net, samples, tokens, torch.autocast(device, dtype=torch.bfloat16))
        found.append(torch.stack([nll[mask], entropy[mask]]))
    error = (found[0] - found[1]).abs()
    assert error.mean() < 0.04 and error.max() < 0.6, (error.mean(), error.max())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_on_a_gpu_are_those_of_the_cpu(folders, rows, family, gpu):
    scores_agree(folders[family], rows)


def fp32(folder, rows, out):
    """fp32 takes the per-row path on kernels that take fp32."""
    run(folder, rows, out, *LORA, "--dtype", "fp32", "--max-steps", "1")
    assert Cuda.attended == {(torch.float32, False)}


def test_fp32_does_not_fall_to_the_math_kernel(folders, rows, tmp_path, gpu):
    fp32(folders["llama"], rows, tmp_path / "run")


@pytest.mark.parametrize("head_dim", [12, 264])
def test_heads_of_a_size_that_varlen_does_not_take_go_row_by_row(head_dim, gpu):
    q, k = (torch.randn(1, heads, 13, head_dim).bfloat16().to("cuda") for heads in (4, 2))
    packing.attend_packed([4, 9], 6, GPU)(0, q, k, k)
    assert not Cuda.calls.get("torch_attn._varlen_attn.default")
    assert Cuda.attended == {(torch.bfloat16, False), (torch.bfloat16, True)}  # 9 tokens are beyond the window


PRUNERS = [
    ("random", "fastv"),
    ("entropy", "sparsevlm-text"),
    ("infobatch", "random"),
    ("longest", "ppl-keep-high"),
    ("none", "none"),
]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sample_pruner", "token_pruner"), PRUNERS)
def test_every_pruner_runs(checkpoint, rows, tmp_path, sample_pruner, token_pruner, dtype, gpu):
    flags = ["--sample-pruner", sample_pruner, "--token-pruner", token_pruner, "--dtype", dtype, "--max-steps", "1"]
    (metrics,) = run(checkpoint, rows, tmp_path / "run", *flags)
    assert math.isfinite(metrics["loss"])


def resumed(checkpoint, rows, out, monkeypatch, *flags):
    """A run goes on as if never stopped; its checkpoint is read from the mapped file, not onto the GPU, and freed."""
    load, steps, reads, loaded = torch.load, run_folder.Run.steps, [], []

    def watched(file, map_location=None, **settings):
        reads.append((map_location, settings["mmap"]))
        state = load(file, map_location=map_location, **settings)
        moments = [value for of_one in state["optimizer"]["state"].values() for value in of_one.values()]
        loaded.extend(map(weakref.ref, (*state["trainable"].values(), *moments)))
        return state

    def first_step(*args):
        assert not any(part() is not None for part in loaded), "the checkpoint stays in memory"
        return steps(*args)

    monkeypatch.setattr(torch, "load", watched)
    monkeypatch.setattr(run_folder.Run, "steps", first_step)
    flags = [*flags, "--sample-pruner", "infobatch", "--grad-accum", "10"]  # a step takes an epoch's rows
    whole = run(checkpoint, rows, out / "whole", *flags, "--epochs", "8", "--max-steps", "3")
    run(checkpoint, rows, out / "cut", *flags, "--epochs", "8", "--max-steps", "2")
    cut = run(checkpoint, rows, out / "cut", *flags, "--epochs", "8", "--max-steps", "3", "--resume")
    assert loaded and set(reads) == {("cpu", True)}, "the checkpoint is read onto the GPU"
    assert [m["loss"] for m in cut] == [m["loss"] for m in whole]


@pytest.mark.parametrize("flags", [FULL, pytest.param(LORA, marks=pytest.mark.slow)])
def test_resuming_goes_on_as_if_never_stopped(checkpoint, rows, tmp_path, flags, monkeypatch, gpu):
    resumed(checkpoint, rows, tmp_path, monkeypatch, *flags)


def scored_while_training(checkpoint, rows, out, *flags, tasks=("arc",)):
    sets = [f"rows={rows}", *(f"{task}={TINY / task}_test.jsonl" for task in tasks)]
    flags = [*flags, "--template", "alpaca", "--max-length", "120", "--eval-every", "1", "--eval-limit", "2"]
    (metrics,) = run(checkpoint, rows, out, *flags, "--eval-sets", ",".join(sets), "--max-steps", "1")
    assert {"eval_rows_nll", *(f"eval_{task}" for task in tasks)} <= metrics.keys()
    assert {dtype for dtype, _ in Cuda.attended} == {torch.bfloat16}, "texts are generated in fp32"


def test_sets_are_scored_while_training_in_16_bits(checkpoint, rows, tmp_path, gpu):
    scored_while_training(checkpoint, rows, tmp_path / "run", *FULL)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FULL, LORA])
def test_texts_are_generated_while_training_in_16_bits(checkpoint, rows, tmp_path, flags, gpu):
    scored_while_training(checkpoint, rows, tmp_path / "run", *flags, tasks=("gsm8k",))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_rank_that_keeps_nothing_gives_zero_gradients(folders, kind, gpu):
    dtype = torch.float32 if kind == "full" else torch.bfloat16
    net = Transformer.from_pretrained(folders["llama"], device="cuda", dtype=dtype)
    net = lora.add_lora(net, 4, 8) if kind == "lora" else net
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, nll = TokenLoss(net)(*pack([scoring.NOTHING], GPU), torch.ones(0, device=GPU))
    (loss * 8).backward()
    assert loss.item() == 0 and len(nll) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in net.parameters() if p.requires_grad)


WHATS = ["base_nll", "rating", "embedding"]


def dtypes_of_weights(monkeypatch):
    """A list that gets the dtype of each model that is read from here on."""
    read, dtypes = Transformer.from_pretrained.__func__, []

    def watched(cls, *args, dtype=torch.float32, **kwargs):
        dtypes.append(dtype)
        return read(cls, *args, dtype=dtype, **kwargs)

    monkeypatch.setattr(Transformer, "from_pretrained", classmethod(watched))
    return dtypes


def side_files(checkpoint, rows, out, monkeypatch, whats):
    dtypes = dtypes_of_weights(monkeypatch)
    for what in whats:
        argv = [what, "--model", checkpoint, "--data", rows, "--scores", out / "side"]
        argv += ["--warmup", out / "warmup", "--targets", rows] if what == "less" else []
        score_rows.main([str(arg) for arg in argv])
        assert len((out / "side" / f"{what}.jsonl").read_text().splitlines()) == 40
    assert dtypes == [torch.float32 if what == "less" else torch.bfloat16 for what in whats], "fp32 weights on the GPU"
    assert all(settings["cache_enabled"] is False for settings in Cuda.autocasts), "autocast keeps its casts"


def test_side_files(checkpoint, rows, tmp_path, monkeypatch, gpu):
    side_files(checkpoint, rows, tmp_path, monkeypatch, WHATS)


@pytest.mark.slow
def test_side_files_of_the_slow_kinds(checkpoint, rows, tmp_path, monkeypatch, gpu):
    run(checkpoint, rows, tmp_path / "warmup", "--lora-rank", "2", "--sample-pruner", "none", "--max-steps", "1")
    side_files(checkpoint, rows, tmp_path, monkeypatch, ["complexity", "quality", "cond_gain", "less"])


BENCHMARKS = [(arc, []), (gsm8k, ["--max-new-tokens", "2"])]


def benchmark(task, folder, out, *flags):
    """Score two items, without --device and --dtype unless in the flags; the dtype that the result file names."""
    rows = TINY / f"{task.__name__.removeprefix('eval.')}_test.jsonl"
    argv = ["--model", folder, "--data", rows, "--limit", 2, "--out", out, *flags]
    task.main([str(arg) for arg in argv])
    return json.loads(out.read_text())["dtype"]


@pytest.mark.parametrize(("task", "flags"), BENCHMARKS)
def test_benchmarks_compute_in_bf16_where_the_gpu_has_it(folders, tmp_path, monkeypatch, task, flags, gpu):
    dtypes = dtypes_of_weights(monkeypatch)
    assert benchmark(task, folders["llama"], tmp_path / "out.json", *flags) == "bf16"
    assert dtypes == [torch.bfloat16] and {dtype for dtype, _ in Cuda.attended} == {torch.bfloat16}


def test_a_gpu_without_bf16_trains_and_scores_in_fp32(folders, rows, tmp_path, monkeypatch, capsys, gpu):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    dtypes = dtypes_of_weights(monkeypatch)
    run(folders["llama"], rows, tmp_path / "run", *LORA, "--max-steps", "1")
    for task, flags in BENCHMARKS:
        assert benchmark(task, folders["llama"], tmp_path / "out.json", *flags) == "fp32"
    argv = ["base_nll", "--model", folders["llama"], "--data", rows, "--scores", tmp_path / "side"]
    score_rows.main([str(arg) for arg in argv])
    assert dtypes == [torch.float32] * 4
    assert {dtype for dtype, _ in Cuda.attended} == {torch.float32} and not Cuda.autocasts
    assert not Cuda.calls.get("torch_attn._varlen_attn.default")
    with pytest.raises(SystemExit) as end:
        benchmark(arc, folders["llama"], tmp_path / "out.json", "--dtype", "bf16")
    assert end.value.code == 2
    assert "eval.arc: --dtype bf16: a pretended GPU does not compute in bf16" in capsys.readouterr().err


def waits(folder, rows, out, *flags):
    """How often the host waits for the GPU in the second step of a run."""
    counts, real = [], train.choose_samples

    def choose_samples(*args):
        counts.append(sum(Cuda.waits.values()))
        return real(*args)

    train.choose_samples = choose_samples
    try:
        run(folder, rows, out, *LORA, "--max-steps", "3", "--epochs", "9", *flags)
    finally:
        train.choose_samples = real
    return counts[2] - counts[1]


def few_waits(folders, rows, out):
    """Not one a row, a token or a layer; and in each pass only for what goes to the GPU."""
    few = waits(folders["llama"], rows, out / "few", "--grad-accum", "4")
    assert few <= 17, few
    assert waits(folders["deep"], rows, out / "many rows, twice the layers", "--grad-accum", "8") == few
    alone = waits(folders["llama"], rows, out / "alone", "--grad-accum", "4", "--pass-tokens", "1")
    scored, trained = 16, 8  # passes, one a row
    assert alone - few <= 6 * (scored - 1) + 7 * (trained - 1), (few, alone)


def test_the_host_does_not_wait_for_each_row_or_layer(folders, rows, tmp_path, gpu):
    few_waits(folders, rows, tmp_path)


def test_masks_are_built_only_for_rows_that_read_them(folders, monkeypatch, gpu):
    built, real = [], model_file.visible
    monkeypatch.setattr(model_file, "visible", lambda *args: built.append(1) or real(*args))
    for device, dtype, expected in (("cuda", torch.bfloat16, 0), ("cuda", torch.float32, 2), ("cpu", torch.float32, 2)):
        built.clear()
        net = Transformer.from_pretrained(folders["mistral"], device=device, dtype=dtype)
        ids, lengths = packing.end_to_end([[1] * n for n in (9, 7, 9, 3)], device)
        net.hidden_states(ids, *packing.packed(net, lengths))
        assert len(built) == expected, (device, dtype)  # of rows of 9 and of 7, once for all layers; 3 is in the window


# ------------------------------------------------------------------------- mistakes that must be caught

MISTAKES = {
    "labels stay on the CPU": (packing.pack, ".labels[1:]], device=device)", ".labels[1:]])", "scores"),
    "the ends of rows are int64": (packing.attend_packed, "dtype=torch.int32, ", "", "scores"),
    "the longest row is the first": (packing.attend_packed, "max(lengths)", "lengths[-1]", "scores"),
    "the window sees one more": (packing.varlen_attention, "window - 1", "window", "scores of mistral"),
    "attention looks ahead": (packing.varlen_attention, "window - 1, 0)", "window - 1, -1)", "scores"),
    "q and k are left in fp32": (model_file.Attention.qkv, "self.k_norm(k).to(v.dtype)", "self.k_norm(k)", "qwen3"),
    "16-bit products are rounded": (head.matmul_fp32, "a.is_cuda and", "False and", "llama"),
    "fp32 products as if of 16 bits": (head.matmul_fp32, " and a.dtype != torch.float32", "", "fp32"),
    "grouped heads in fp32": (model_file.attention, "q.dtype == torch.float32", "False", "fp32"),
    "a long row goes alone": (
        packing.attend_packed,
        "if q.is_cuda and",
        "if len(lengths) > 1 and q.is_cuda and",
        "drop",
    ),
    "autocast keeps its casts": (train.train_on, "cache_enabled=False", "cache_enabled=True", "llama"),
    "the loss of a pass is read": (train.train_on, "loss_sum += loss.detach()", "loss_sum += loss.item()", "waits"),
    "a check in every layer": (
        model_file.DecoderLayer.forward,
        "return x + self.mlp",
        "assert x.isfinite().all()\n    return x + self.mlp",
        "waits",
    ),
    "a row's loss is read": (
        scoring.kept_batches,
        "counts = kept[group].sum(dim=1)",
        "counts = kept[group].sum(dim=1)\n        [torch.zeros(1, device=ranks.device).item() for _ in group]",
        "waits",
    ),
    "the checkpoint goes to the GPU": (
        checkpoint_file.read_checkpoint,
        'map_location="cpu"',
        'map_location="cuda"',
        "resume",
    ),
    "the checkpoint stays in memory": (
        run_folder.Run.resume,
        'done = state["step"]',
        'done, self.state = state["step"], state',
        "resume",
    ),
    "texts are generated in fp32": (eval.during.eval_scores, "with autocast:", "if True:", "eval"),
    "side files from fp32 weights": (
        score_rows.score_missing,
        "torch.bfloat16 if bf16 else torch.float32, device",
        "torch.float32, device",
        "side files",
    ),
    "side files keep autocast's casts": (
        score_rows.score_missing,
        "cache_enabled=False",
        "cache_enabled=True",
        "side files",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(folders, checkpoint, rows, tmp_path, monkeypatch, mistake, gpu):
    function, old, new, look = MISTAKES[mistake]
    monkeypatch.setattr(function, "__code__", mutated(function, old, new))
    looks = {
        "scores": lambda: scores_agree(folders["llama"], rows),
        "scores of mistral": lambda: scores_agree(folders["mistral"], rows),
        "llama": lambda: compared(folders["llama"], rows, tmp_path, *FULL),
        "qwen3": lambda: compared(folders["qwen3"], rows, tmp_path, *FULL),
        "drop": lambda: compared(folders["mistral"], rows, tmp_path, *LORA, *PATHS["drop"], "--pass-tokens", "1"),
        "fp32": lambda: fp32(folders["llama"], rows, tmp_path),
        "waits": lambda: few_waits(folders, rows, tmp_path),
        "resume": lambda: resumed(checkpoint, rows, tmp_path, monkeypatch, *FULL),
        "eval": lambda: scored_while_training(checkpoint, rows, tmp_path, *FULL),
        "side files": lambda: side_files(checkpoint, rows, tmp_path, monkeypatch, ["base_nll"]),
    }
    with pytest.raises(AssertionError):
        looks[look]()
