"""training/memory.py: the formula against tensors and the allocator, --pass-tokens, and out of memory explained."""

import json
from contextlib import nullcontext

import pytest
import torch
from forked import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

import train
from data.sft import Sample
from model import ModelConfig, Transformer
from reproduce.bench import allocated_peak
from training import memory, packing, ranks
from training.head import HeadLoss, TokenLoss, add_matmul
from training.lora import add_lora
from training.packing import pack
from training.scoring import score


def config(**changes):
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 40}
    return ModelConfig(**{**sizes, **heads, **changes})


def network(cfg, rank, bf16):
    """As train.py has it: fp32 adapters on a base in the computing dtype, or fp32 weights."""
    torch.manual_seed(0)
    net = Transformer(cfg)
    net = net.to(torch.bfloat16) if bf16 and rank else net
    return add_lora(net, rank, alpha=2 * rank) if rank else net


def autocast(bf16):
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()


# ---------------------------------------------------------------------------------------- the formula


def steps(cfg, mode, bf16, tokens, wrap=lambda loss: loss):
    """Two steps of two passes each, or one of scoring."""
    kind = mode.partition(",")[0]
    net = network(cfg, 4 if kind == "lora" else 0, bf16)
    net = net.to(torch.bfloat16) if kind == "score" and bf16 else net
    row = torch.randint(cfg.vocab_size, (tokens + 1,)).tolist()
    sample = Sample("", row, row)

    def work():
        if kind == "score":
            score(net, [sample], tokens, autocast(bf16))
            return
        loss = wrap(TokenLoss(net, "checkpointing" in mode))
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for _ in range(2):
            for _ in range(2):
                with autocast(bf16):
                    total, _ = loss(*pack([sample], "cpu"))
                total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=not isinstance(loss, DistributedDataParallel))

    return sum(p.nbytes for p in net.parameters()), work


SMALL = {"vocab_size": 3000, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 24}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mode", memory.MODES)
def test_the_peak_of_a_step_is_within_a_sixth_of_the_formula(mode, bf16, family):
    cfg = config(**{**SMALL, **({"model_type": "qwen3"} if family == "qwen3" else {})})
    weights, work = steps(cfg, mode, bf16, tokens=128)
    formula = memory.peak_bytes(cfg, 128, mode, lora_rank=4, bf16=bf16, device="cpu")
    assert abs(formula / (weights + allocated_peak(work)) - 1) < 1 / 6


def ddp_peak(cfg):
    with ranks.Ranks.joined("cpu"):
        weights, work = steps(
            cfg,
            "full",
            False,
            64,
            lambda loss: DistributedDataParallel(loss, broadcast_buffers=False, gradient_as_bucket_view=True),
        )
        return weights + allocated_peak(work)


def test_ddp_needs_no_more_than_the_formula_adds():
    cfg = config(**SMALL)
    alone, together = (memory.peak_bytes(cfg, 64, "full", bf16=False, device="cpu", ranks=n) for n in (1, 2))
    for peak in on_ranks(2, ddp_peak, cfg):
        assert 0.8 * alone < peak < 1.1 * together


LLAMA2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA2_7B |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}


@pytest.mark.parametrize("mode", ["full, checkpointing", "lora, checkpointing"])
def test_sharding_divides_all_but_what_is_gathered(mode):
    cfg, ranks = config(**LLAMA2_7B), 8
    total = sum(p.numel() for p in memory.meta_model(cfg).parameters())
    whole, part = (memory.peak_bytes(cfg, 512, mode, ranks=ranks, shard=shard) for shard in (False, True))
    divided = 20 * total if "full" in mode else 2 * total
    assert whole - part < divided
    assert whole - part > 0.7 * divided * (1 - 1 / ranks)


# ------------------------------------------------------------------------------------- --pass-tokens

GIB = 2**30


@settings(max_examples=15)
@given(
    st.integers(0, 400),
    st.sampled_from([0, 8]),
    st.booleans(),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([0, 9000]),
)
def test_as_many_tokens_as_fit_and_no_more(gib, lora_rank, checkpointing, world, shard, kept):
    cfg = train.Config(lora_rank=lora_rank, activation_checkpointing=checkpointing, dtype="bf16", shard=shard)
    model = config(**{**LLAMA2_7B, "num_hidden_layers": 4})
    gib /= 8
    tokens = memory.fitting_tokens(cfg, model, world, int(gib * GIB), kept)
    assert tokens % memory.STEP == 0 and memory.STEP <= tokens <= memory.MOST_TOKENS

    def fits(tokens):
        sizes = {"lora_rank": lora_rank, "bf16": True, "ranks": world, "shard": shard}
        needed = memory.peak_bytes(model, tokens, memory.mode_of(cfg), **sizes)
        return needed + (2 if lora_rank else 4) * kept * 4 * 4096 <= memory.MARGIN * int(gib * GIB)

    assert fits(tokens) or tokens == memory.STEP
    assert not fits(tokens + memory.STEP) or tokens == memory.MOST_TOKENS


def trained(checkpoint, rows, out, *flags):
    argv = ["--model", checkpoint, "--data", rows, "--out", out, "--micro-batch", "4", "--grad-accum", "2"]
    train.main([str(arg) for arg in [*argv, "--sample-keep-ratio", "0.5", "--max-steps", "1", *flags]])
    return json.loads((out / "config.json").read_text())["pass_tokens"]


def test_config_json_says_what_was_chosen(checkpoint, rows, tmp_path, monkeypatch, gpu):
    assert trained(checkpoint, rows, tmp_path / "gpu") == memory.MOST_TOKENS
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**20, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 2**20)
    assert trained(checkpoint, rows, tmp_path / "full") < memory.MOST_TOKENS
    assert trained(checkpoint, rows, tmp_path / "flag", "--pass-tokens", "77") == 77
    assert trained(checkpoint, rows, tmp_path / "cpu", "--device", "cpu") == 2048


# ------------------------------------------------------------------------------------- out of memory

ERROR = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.15 GiB of which 1.00 GiB is free."
)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("loading", "in loading the model ("),
        ("scoring", "in a scoring pass of "),
        ("training", "in a training pass of "),
        ("optimizer", "in the optimizer's step ("),
    ],
)
def test_out_of_memory_says_what_was_being_done_and_what_helps(
    checkpoint, rows, tmp_path, monkeypatch, capsys, where, said
):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError(ERROR)

    owner, name = {
        "loading": (Transformer, "from_pretrained"),
        "scoring": (Transformer, "hidden_states"),
        "training": (HeadLoss, "apply"),
        "optimizer": (torch.optim.AdamW, "step"),
    }[where]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(SystemExit) as end:
        trained(checkpoint, rows, tmp_path / "run", "--lora-rank", "0")
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1
    assert lines[0].startswith(f"train.py: out of memory {said}")
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in lines[0]
    assert "; what helps: --pass-tokens below 2048, --max-length, --activation-checkpointing, --lora-rank 8" in lines[0]
    if " pass of" in said:
        assert " tokens in " in lines[0] and " rows, the longest " in lines[0]


def test_the_cpus_allocator_is_understood_and_other_errors_pass():
    cfg = train.resolve(train.Config(shard=True, lora_rank=8, activation_checkpointing=True))
    said = r"in a pass of 5 tokens in 2 rows, the longest 4 .*: --pass-tokens below 2048, --max-length$"
    with pytest.raises(MemoryError, match=said), memory.explained(cfg, 2), memory.noted("a pass", [4, 1]):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match=r"^a bug$") as error, memory.explained(cfg, 2), memory.noted("a pass"):
        raise RuntimeError("a bug")
    assert not hasattr(error.value, "__notes__")
    for said in ("CUDA error: out of memory\nhints", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"):
        with (
            pytest.raises(MemoryError, match=r"in a pass \(CUDA error"),
            memory.explained(cfg, 2),
            memory.noted("a pass"),
        ):
            raise RuntimeError(said)


# ------------------------------------------------------------------------- what each part takes


def test_the_heads_weight_gradient_takes_no_second_tensor_of_its_size():
    torch.manual_seed(0)
    total, a, b = torch.randn(4000, 64), torch.randn(4000, 16), torch.randn(16, 64)
    expected = total + a @ b
    for dtype in (torch.float32, torch.bfloat16):
        ours, x, y = total.clone(), a.to(dtype), b.to(dtype)
        assert allocated_peak(lambda ours=ours, x=x, y=y: add_matmul(ours, x, y, 100)) < total.nbytes / 10
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_scoring_under_autocast_keeps_no_copies_of_the_weights():
    net = network(config(**{**SMALL, "num_hidden_layers": 8}), 0, False)
    sample = Sample("", list(range(9)), list(range(9)))

    def peak(cache):
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache)
        return allocated_peak(lambda: score(net, [sample], 100, autocast))

    linear = sum(p.numel() for p in net.model["layers"].parameters() if p.dim() == 2)
    assert peak(True) - peak(False) > 0.8 * 2 * linear


def ddp_settings(argv):
    seen, real = [], train.DistributedDataParallel

    def watched(module, **kwargs):
        seen.append(kwargs)
        return real(module, **kwargs)

    train.DistributedDataParallel = watched
    train.main(argv)
    return seen


def test_ddp_keeps_one_copy_of_the_gradients(checkpoint, rows, tmp_path):
    argv = ["--model", checkpoint, "--data", rows, "--out", tmp_path / "run", "--micro-batch", "4", "--grad-accum", "2"]
    argv = [str(arg) for arg in [*argv, "--sample-keep-ratio", "0.5", "--max-steps", "1"]]
    for (found,) in on_ranks(2, ddp_settings, argv):
        assert found == {"device_ids": None, "broadcast_buffers": False, "gradient_as_bucket_view": True}


# ------------------------------------------------------------------------------ where it cannot run


def test_a_gpu_without_bf16_takes_fp32_and_refuses_bf16(monkeypatch, gpu):
    assert ranks.chosen_dtype("auto", "cuda") == "bf16" and ranks.chosen_dtype("auto", "cpu") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert ranks.chosen_dtype("auto", "cuda") == "fp32" and ranks.chosen_dtype("bf16", "cpu") == "bf16"
    with pytest.raises(
        ValueError, match=r"--dtype bf16: a pretended GPU does not compute in bf16 .* --dtype fp32 runs"
    ):
        ranks.chosen_dtype("bf16", "cuda")


@pytest.mark.parametrize("found", [lambda query, key, is_causal=False: None, None])
def test_a_torch_without_the_kernel_is_refused_at_the_start(monkeypatch, found, gpu):
    from torch.nn.attention import varlen

    packing.check_varlen()
    monkeypatch.setattr(varlen, "varlen_attn", found) if found else monkeypatch.delattr(varlen, "varlen_attn")
    with pytest.raises(ValueError, match=r"needs torch 2\.11 or newer .* found .*; --dtype fp32 runs without it"):
        train.resolve(train.parse_config([]))
    assert train.resolve(train.parse_config(["--dtype", "fp32"])).dtype == "fp32"
    assert train.resolve(train.parse_config(["--device", "cpu", "--dtype", "bf16"])).dtype == "bf16"


def test_more_processes_than_gpus_are_refused(monkeypatch, gpu):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match="process 1 of this machine has no GPU: torch finds 1; see --nproc_per_node"),
        ranks.Ranks.joined("cuda"),
    ):
        pass


def test_lora_starts_from_the_same_numbers_on_every_device(gpu):
    found = []
    for device in ("cpu", "cuda"):
        net = Transformer(config()).to(device)
        torch.manual_seed(0)
        add_lora(net, 2, 4)
        found.append([p.detach().cpu() for name, p in net.named_parameters() if "lora_A" in name])
    assert all(map(torch.equal, *found))
