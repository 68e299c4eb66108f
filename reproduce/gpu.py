"""Ten minutes on one GPU: is the CUDA path right, how fast is it, and does it take the memory of the formula?

    python -m reproduce.gpu --out gpu.json               all parts; the file to send us
    python -m reproduce.gpu --parts correct speed        some of them
    python -m reproduce.gpu --device cpu                 small sizes, to check the checks

    correct   bf16 and varlen attention against fp32 row by row: scores, gradients, choices
    trains    train.py on the embedded default: full, LoRA, fp32, --reuse-forward, scores while training, --resume
    speed     tokens per second, share of peak and memory against the formula, for passes of several sizes
    step      train.py at 12.5 % x 50 % on random weights: where the seconds of a step go
    tiles     the head's tiles and blocks of rows, against the defaults of training/head.py
    compile   norms, rotary positions and feed-forward layers under torch.compile, against eager

Weights are random: no download. Each finding is written as soon as it is there, so that a run that is cut off leaves
what it has. What fails is a finding too. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

import model
import train
from data.sft import Sample
from model import ModelConfig, Transformer
from qtuning import IGNORE_INDEX, prune_samples, sample_entropy, sample_perplexity
from training import head, memory, packing
from training.files import read_json, write_json
from training.head import HeadLoss, TokenLoss, head_nll_and_entropy
from training.lora import add_lora
from training.packing import pack
from training.ranks import chosen_device, chosen_dtype, errors_in_one_line
from training.run_folder import code_version, device_name
from training.scoring import score

BASE = Path(train.__file__).parent / "data" / "tiny" / "base"
ROPE = {"max_position_embeddings": 4096}
SHAPES = {
    "SmolLM2-135M": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True, **ROPE),
    "SmolLM2-1.7B": ModelConfig(49152, 2048, 8192, 24, 32, 32, 64, tie_word_embeddings=True, **ROPE),
    "LLaMA2-7B": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, **ROPE),
}
REDUCED = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 FLOP/s of the data sheet, dense


class Report:
    """Findings and checks, written to a file with each of them.

    Attributes:
        device: where the checks run.
        cuda:   whether that is a GPU; otherwise all sizes are reduced.
    """

    def __init__(self, device: torch.device, out: Path):
        self.device, self.cuda, self.out = device, device.type == "cuda", out
        about = {"device": device_name(device.type), "torch": torch.__version__, "reduced": not self.cuda}
        self.found = {**about, **code_version(), "findings": {}, "checks": {}}

    def note(self, key: str, value: object) -> None:
        """Keep a finding."""
        self.found["findings"][key] = value
        write_json(self.out, self.found, indent=1)

    def check(self, key: str, value: float, expected: str, passed: bool) -> None:
        """Keep a check: what was found, what was expected, and whether it passed."""
        self.found["checks"][key] = {"found": value, "expected": expected, "passed": bool(passed)}
        write_json(self.out, self.found, indent=1)

    @contextlib.contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """Make an error a failed check, and go on."""
        try:
            yield
        except Exception as error:
            message = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            self.check(key, message, "no error", False)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def shape(self, name: str, **changes) -> ModelConfig:
        """A model's sizes; on a CPU small ones of the same form."""
        cfg = SHAPES[name]
        if not self.cuda:
            grouped = cfg.num_key_value_heads < cfg.num_attention_heads
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if grouped else 4}
            cfg = dataclasses.replace(cfg, **REDUCED, **heads)
        return dataclasses.replace(cfg, **changes)

    def seconds(self, work: Callable[[], object], least: float = 0.6) -> float:
        """Seconds of one call, a mean over at least two and `least` seconds, after one that is not counted."""
        least, done = least if self.cuda else 0.0, 0
        work()
        self.wait()
        started = time.perf_counter()
        while done < 2 or time.perf_counter() - started < least:
            work()
            self.wait()
            done += 1
        return (time.perf_counter() - started) / done

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """The most memory allocated since `reset_peak`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


# ---------------------------------------------------------------------------------- models and rows


def network(cfg: ModelConfig, lora_rank: int, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Random weights made on the device, with LoRA where the rank is not 0.

    They are drawn wide enough that attention matters to every logit: a mistake in it must show.
    """
    with torch.device("meta"):
        net = Transformer(cfg)
    net = net.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    if cfg.tie_word_embeddings:
        net.lm_head.weight = net.model["embed_tokens"].weight
    torch.manual_seed(0)
    return add_lora(net, lora_rank, alpha=2 * lora_rank) if lora_rank else net


def made_rows(cfg: ModelConfig, tokens: int, seed: int = 0) -> list[Sample]:
    """Rows of 150 to 450 tokens, `tokens` in all; the last two thirds of each are the answer."""
    generator, rows = torch.Generator().manual_seed(seed), []
    while tokens > 0:
        size = min(int(torch.randint(150, 451, (), generator=generator)), tokens)
        ids = torch.randint(cfg.vocab_size, (size + 1,), generator=generator).tolist()
        prompt = max(1, len(ids) // 3)
        rows.append(Sample(str(len(rows)), ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
        tokens -= size
    return rows


def loss_of(net: Transformer, rows: list[Sample], autocast, *, checkpointing: bool = False, known=None) -> torch.Tensor:
    with autocast:
        return TokenLoss(net, checkpointing)(*pack(rows, net.lm_head.weight.device), None, known)[0]


def gradient(net: Transformer) -> torch.Tensor:
    """The gradients of all trained parameters, flat and in fp32; they are then cleared."""
    trained = [p for p in net.parameters() if p.requires_grad]
    flat = torch.cat([p.grad.float().flatten() for p in trained])
    for p in trained:
        p.grad = None
    return flat


def flops(cfg: ModelConfig, rows: list[Sample], mode: str) -> float:
    """Operations of the matrix products of a pass: 2 for each token and weight on the way forward, as many on the way
    back for the inputs' gradients, and for the trained weights'; attention's by the length of each row.
    """
    forwards = {"score": 1, "lora": 2, "lora, checkpointing": 3, "full": 3, "full, checkpointing": 4}[mode]
    heads = {"score": 1, "lora": 2, "full": 3}[mode.partition(",")[0]]
    layer = memory.meta_model(dataclasses.replace(cfg, num_hidden_layers=1)).model["layers"][0]
    weights = cfg.num_hidden_layers * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    lengths = [len(row.input_ids) - 1 for row in rows]
    answers = sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:])
    width = cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim
    attention = (
        2 * width * sum(n * n for n in lengths) * {1: 1, 2: 3.5, 3: 3.5 if heads == 3 else 4.5, 4: 4.5}[forwards]
    )
    return 2 * forwards * weights * sum(lengths) + 2 * heads * cfg.vocab_size * cfg.hidden_size * answers + attention


# ------------------------------------------------------------------------------------------- correct


def correct(report: Report) -> None:
    """bf16, packed, against fp32, each row alone: the per-token scores, the gradient, the choices."""
    forms = {
        "llama, grouped heads": {},
        "mistral, rows beyond the window": {"model_type": "mistral", "sliding_window": 128 if report.cuda else 16},
        "qwen2": {"model_type": "qwen2"},
        "qwen3, head_dim 128": {"model_type": "qwen3", "head_dim": 128 if report.cuda else 32},
    }
    layers = 6 if report.cuda else 2
    for (form, changes), lora_rank in itertools.product(forms.items(), (0, 8)):
        key = f"correct: {form}, {'LoRA' if lora_rank else 'full'}"
        with report.attempt(key):
            one_form(report, key, report.shape("SmolLM2-135M", num_hidden_layers=layers, **changes), lora_rank)


def one_form(report: Report, key: str, cfg: ModelConfig, lora_rank: int) -> None:
    rows, device = made_rows(cfg, 3000 if report.cuda else 500), report.device
    exact = network(cfg, lora_rank, torch.float32, device)
    rough = network(cfg, lora_rank, torch.bfloat16 if lora_rank else torch.float32, device)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), rough.parameters(), strict=True):
            p.copy_(q.normal_(0, 0.05) if lora_rank and q.requires_grad else q)  # B is 0 and would hide A
    calls, real = [], packing.varlen_attention
    with mock.patch.object(packing, "varlen_attention", lambda *args: calls.append(1) or real(*args)):
        found = [score(exact, rows, 1, report.autocast(False)), score(rough, rows, 10**6, report.autocast())]
    expected = cfg.num_hidden_layers if report.cuda else 0
    report.check(f"{key}: varlen kernels", len(calls), f"{expected}", len(calls) == expected)
    mask = found[0][2]
    for i, name in ((0, "NLL"), (1, "entropy")):
        error = (found[0][i] - found[1][i])[mask].abs()
        report.note(f"{key}: {name}, largest difference", error.max().item())
        report.check(f"{key}: {name}, mean difference", error.mean().item(), "below 0.03", error.mean() < 0.03)

    for row in rows:
        loss_of(exact, [row], report.autocast(False)).backward()
    loss_of(rough, rows, report.autocast()).backward()
    one, other = gradient(exact), gradient(rough)
    cosine = F.cosine_similarity(one, other, dim=0).item()
    report.check(f"{key}: gradient, cosine", cosine, "above 0.99", cosine > 0.99)
    loss_of(rough, rows, report.autocast()).backward()
    report.note(f"{key}: two backward passes are bit-equal", torch.equal(other, gradient(rough)))

    outputs: dict[int, list] = {}
    score(rough, rows, 10**6, report.autocast(), outputs)
    order = packing.packs([len(row.input_ids) - 1 for row in rows], 10**6)[0]
    known = [torch.cat(parts) for parts in zip(*(outputs[i] for i in order), strict=True)]
    loss_of(rough, [rows[i] for i in order], report.autocast(), checkpointing=True, known=known).backward()
    difference = ((gradient(rough) - other).norm() / other.norm()).item()
    report.check(f"{key}: --reuse-forward, gradient", difference, "below 0.02", difference < 0.02)

    planes = [(sample_perplexity(nll, m), sample_entropy(entropy, m)) for nll, entropy, m in found]
    kept = [prune_samples(ppl, ent, 0.5).keep for ppl, ent in planes]
    report.note(f"{key}: samples kept by both, of", [int((kept[0] & kept[1]).sum()), int(kept[0].sum())])


# -------------------------------------------------------------------------------------------- trains


def run_train(report: Report, out: Path, *flags: object) -> list[dict]:
    """Train in this process, silently; metrics.jsonl."""
    report.reset_peak()
    argv = ["--out", out, "--device", report.device.type, *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(train.parse_config([str(arg) for arg in argv]))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def trains(report: Report) -> None:
    """train.py on the embedded default, in every way that takes another path on a GPU."""
    steps = ("--max-steps", 4)
    ways = {
        "full": [],
        "LoRA": ["--lora-rank", 8],
        "fp32": ["--dtype", "fp32"],
        "drop": ["--token-pruning", "drop"],
        "fastv": ["--token-pruner", "fastv"],
        "reuse": ["--activation-checkpointing", "--reuse-forward"],
        "scores while training": ["--eval-every", 4, "--eval-limit", 4],
    }
    losses = {}
    for name, flags in ways.items():
        with report.attempt(f"trains: {name}"), tempfile.TemporaryDirectory() as folder:
            metrics = run_train(report, Path(folder) / "run", *steps, *flags)
            losses[name] = [m["loss"] for m in metrics]
            report.note(f"trains: {name}", metrics[-1])
    with report.attempt("trains: bf16 as fp32"):
        gap = max(abs(a / b - 1) for a, b in zip(losses["full"], losses["fp32"], strict=True))
        report.check("trains: losses of bf16 against fp32", gap, "within 0.1", gap < 0.1)
    with report.attempt("trains: resume"), tempfile.TemporaryDirectory() as folder:
        run_train(report, Path(folder) / "cut", "--max-steps", 2)
        cut = [m["loss"] for m in run_train(report, Path(folder) / "cut", *steps, "--resume")]
        gap = max(abs(a / b - 1) for a, b in zip(cut, losses["full"], strict=True))
        report.check("trains: losses of a resumed run against a whole one", gap, "within 0.02", gap < 0.02)
        report.note("trains: the resumed run is bit-equal", cut == losses["full"])


# --------------------------------------------------------------------------------------------- speed


def speed(report: Report) -> None:
    """Tokens per second and memory of passes, by model, mode and size."""
    peak = next((value for name, value in PEAK.items() if name in report.found["device"]), None)
    matmul = rate_of_products(report, 8192 if report.cuda else 256)
    report.note("speed: FLOP/s of a square matrix product, of the data sheet", [matmul, peak])
    sizes = (2048, 4096, 8192, 16_384) if report.cuda else (64, 128)
    for name, mode in itertools.product(reversed(SHAPES), memory.MODES):
        if name == "LLaMA2-7B" and mode.startswith("full"):  # one GPU does not hold its weights and moments
            continue
        with report.attempt(f"speed: {name}, {mode}"):
            passes(report, name, mode, sizes, peak or matmul)


def rate_of_products(report: Report, size: int) -> float:
    """FLOP/s of the product of two square matrices; nothing of them stays in memory."""
    a, b = (torch.randn(size, size, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / report.seconds(lambda: a @ b)


def passes(report: Report, name: str, mode: str, sizes: tuple[int, ...], peak: float) -> None:
    """One model in one mode, in passes of growing size, until one does not fit."""
    kind, cfg = mode.partition(",")[0], report.shape(name)
    dtype = torch.float32 if kind == "full" else torch.bfloat16
    net = network(cfg, 8 if kind == "lora" else 0, dtype, report.device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for tokens in sizes:
        rows, key = made_rows(cfg, tokens), f"speed: {name}, {mode}, {tokens} tokens"

        def work(rows=rows) -> None:
            if kind == "score":
                score(net, rows, 10**6, report.autocast())
            else:
                loss_of(net, rows, report.autocast(), checkpointing="checkpointing" in mode).backward()
                optimizer.step()
                optimizer.zero_grad()

        formula = memory.peak_bytes(cfg, tokens, mode, device=report.device.type) / 2**30
        report.reset_peak()
        try:
            seconds = report.seconds(work)
        except torch.OutOfMemoryError:
            free = torch.cuda.get_device_properties(report.device).total_memory / 2**30
            report.check(f"{key}: out of memory", formula, f"of {free:.1f} GiB", formula > memory.MARGIN * free)
            return
        found = {"tokens_per_s": tokens / seconds, "of_peak": flops(cfg, rows, mode) / seconds / peak}
        report.note(key, found | {"gib": report.peak_gib(), "formula_gib": formula})
        if report.cuda:
            ratio, more = report.peak_gib() / formula, report.peak_gib() - formula
            passed = 0.75 < ratio < 1.1 or 0 < more < 0.1  # cuBLAS takes its workspaces from torch's allocator
            report.check(f"{key}: memory over formula", ratio, "0.75 to 1.1, or at most 0.1 GiB more", passed)


# ---------------------------------------------------------------------------------------------- step


def step(report: Report) -> None:
    """train.py at 12.5 % x 50 % on random weights: the seconds of each part of a step, and full data beside it."""
    full = ("--sample-pruner", "none", "--token-pruner", "none", "--sample-keep-ratio", 1)
    ways = {
        "LLaMA2-7B": (),
        "LLaMA2-7B, reuse": ("--activation-checkpointing", "--reuse-forward"),
        "LLaMA2-7B, full data": full,
        "SmolLM2-1.7B": (),
        "SmolLM2-1.7B, full data": full,
        "SmolLM2-135M": (),
    }
    keys = ("score_s", "select_s", "train_s", "optimizer_s", "tokens_scored", "tokens_trained", "peak_mem_gib")
    rates = {}
    for name, flags in ways.items():
        with report.attempt(f"step: {name}"), tempfile.TemporaryDirectory() as folder:
            cfg, data = report.shape(name.partition(",")[0], tie_word_embeddings=False), Path(folder) / "rows.jsonl"
            numbers = torch.randint(10, 99, (32 * 7, 100 if report.cuda else 12)).tolist()
            rows = [{"instruction": str(row[: len(row) // 3]), "output": str(row[len(row) // 3 :])} for row in numbers]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

            def random_weights(folder, *, dtype=torch.float32, device="cpu", cfg=cfg):
                net = network(cfg, 0, dtype, torch.device(device))
                net.source = BASE
                return net

            with mock.patch.object(Transformer, "from_pretrained", random_weights):
                argv = ("--model", BASE, "--data", data, "--epochs", 1, "--max-steps", 5 if report.cuda else 2, *flags)
                metrics = run_train(report, Path(folder) / "run", *argv)
            mean = {key: sum(m[key] for m in metrics[1:]) / len(metrics[1:]) for key in keys}
            rates[name] = mean["score_s"] + mean["train_s"]
            report.note(f"step: {name}", mean)
            if report.cuda:
                share = mean["select_s"] / rates[name]
                report.check(f"step: {name}: share of the choices", share, "below 0.1", share < 0.1)
    for name in ("LLaMA2-7B", "SmolLM2-1.7B"):
        if {name, f"{name}, full data"} <= rates.keys():
            report.note(f"step: {name}: time over that of full data", rates[name] / rates[f"{name}, full data"])


# --------------------------------------------------------------------------------------------- tiles


def tiles(report: Report) -> None:
    """Sizes of the head's tiles and blocks of rows: is the default near the best?"""
    heads = ((32_000, 4096), (151_936, 4096), (49_152, 2048)) if report.cuda else ((2000, 64),)
    grid = ((1024, 2048, 4096, 8192), (4096, 8192, 16_384, 32_768)) if report.cuda else ((128, 512), (512, 2048))
    blocks, answers = ((256, 512, 1024, 2048, 4096), 6400) if report.cuda else ((64, 128), 256)
    for vocabulary, width in heads:
        weight = torch.randn(vocabulary, width, device=report.device, dtype=torch.bfloat16) * 0.02
        hidden = torch.randn(answers, width, device=report.device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(vocabulary, (answers,), device=report.device)
        scored = functools.partial(head_nll_and_entropy, hidden, weight, labels)
        swept(report, f"tiles: score, V {vocabulary}, H {width}", head.TILE, itertools.product(*grid), scored)
        ones = torch.ones(answers, device=report.device)
        trained = functools.partial(head_gradient, hidden, weight, labels, ones)
        swept(report, f"tiles: train, V {vocabulary}, H {width}", head.LOSS_ROWS, blocks, trained)


def head_gradient(*inputs: torch.Tensor) -> None:
    HeadLoss.apply(*inputs)[0].backward()


def swept(report: Report, key: str, sizes: dict, choices: Iterable, work: Callable[[], object]) -> None:
    """Time and memory with each of the choices in the place of the default in `sizes`."""
    kind = report.device.type
    default, found = sizes[kind], {}
    with report.attempt(key):
        for choice in dict.fromkeys([default, *choices]):
            with mock.patch.dict(sizes, {kind: choice}):
                report.reset_peak()
                found[str(choice)] = [1e3 * report.seconds(work, least=0.05), report.peak_gib()]
        report.note(f"{key}: ms, GiB", found)
        if report.cuda:
            slower = found[str(default)][0] / min(ms for ms, _ in found.values())
            report.check(f"{key}: the default {default} over the best", slower, "below 1.15", slower < 1.15)


# ------------------------------------------------------------------------------------------- compile


def compiled(report: Report) -> None:
    """Milliseconds of a scoring and of a training pass, eager and with torch.compile on what is pointwise."""
    cfg = report.shape("LLaMA2-7B")
    net = network(cfg, 8, torch.bfloat16, report.device)
    scored, kept = made_rows(cfg, 8192 if report.cuda else 128), made_rows(cfg, 1024 if report.cuda else 64, seed=1)
    compiler = functools.partial(torch.compile, dynamic=True, backend="inductor" if report.cuda else "eager")
    for way in ("eager", "compiled"):
        with report.attempt(f"compile: {way}"), contextlib.ExitStack() as patches:
            if way == "compiled":
                for owner, name in ((model.RMSNorm, "forward"), (model.FeedForward, "forward"), (model, "rotate")):
                    patches.enter_context(mock.patch.object(owner, name, compiler(getattr(owner, name))))
            started = time.perf_counter()
            found = {
                "score_ms": 1e3 * report.seconds(lambda: score(net, scored, 10**6, report.autocast())),
                "train_ms": 1e3 * report.seconds(lambda: loss_of(net, kept, report.autocast()).backward()),
            }
            report.note(f"compile: {way}", found | {"all_s": time.perf_counter() - started})


# ------------------------------------------------------------------------------------------- command

PARTS = {"correct": correct, "trains": trains, "speed": speed, "step": step, "tiles": tiles, "compile": compiled}
IN_FP32_TOO = ("trains", "step")  # train.py chooses the dtype of these; the others are about bf16


def check_bf16(parts: list[str], kind: str) -> None:
    """Refuse parts about bf16 on a GPU without it.

    Raises:
        ValueError: the parts, and those that run there.
    """
    refused = [part for part in parts if part not in IN_FP32_TOO]
    if refused and kind == "cuda" and chosen_dtype("auto", kind) != "bf16":
        raise ValueError(
            f"--parts {' '.join(refused)}: expected a GPU that computes in bf16 (compute capability 8.0 or newer), got "
            f"{torch.cuda.get_device_name()}; --parts {' '.join(IN_FP32_TOO)} runs on it, in fp32"
        )


def table(found: dict) -> str:
    """The checks as a Markdown table, and how many failed."""
    lines = ["| check | found | expected | |", "| --- | --- | --- | --- |"]
    for key, check in found["checks"].items():
        value = f"{check['found']:.4g}" if isinstance(check["found"], float) else check["found"]
        lines.append(f"| {key} | {value} | {check['expected']} | {'pass' if check['passed'] else 'FAIL'} |")
    failed = sum(not check["passed"] for check in found["checks"].values())
    sizes = ", reduced sizes" if found["reduced"] else ""
    lines += ["", f"{found['device']}{sizes}, torch {found['torch']}: {failed} of {len(found['checks'])} checks failed"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto]")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help="[all]")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of findings and checks [%(default)s]")
    parser.add_argument("--table", action="store_true", help="print the table of --out, run nothing")
    args = parser.parse_args(argv)
    with errors_in_one_line("reproduce.gpu"):
        if args.table:
            found = read_json(args.out)
        else:
            kind = chosen_device(args.device)
            check_bf16(args.parts, kind)
            if kind == "cuda" and chosen_dtype("auto", kind) == "bf16":
                packing.check_varlen()
            report = Report(torch.device(kind, 0) if kind == "cuda" else torch.device("cpu"), args.out)
            for part in tqdm(args.parts, desc="gpu checks", disable=not sys.stderr.isatty()):
                with report.attempt(part):
                    PARTS[part](report)
            found = report.found
    print(table(found))
    if not all(check["passed"] for check in found["checks"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
