"""The formula of memory: parameters of the paper's models, tensors that autograd keeps, and the committed peaks."""

import pytest
import torch
from small import FAMILIES, lora_model, small_model

from reproduce import memory
from training import memory as formula
from training.files import read_json
from training.layers import checkpointed


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("LLaMA2-7B", 6_738_415_616),
        ("Mistral-7B", 7_241_732_096),
        ("LLaMA3-8B", 8_030_261_248),
        ("SmolLM2-1.7B", 1_711_376_384),
        ("SmolLM2-135M", 134_515_008),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-32B", 32_762_123_264),
    ],
)
def test_models_have_their_published_number_of_parameters(name, count):
    assert sum(parameter.numel() for parameter in memory.meta_model(memory.MODELS[name]).parameters()) == count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_keep_exactly_the_bytes_of_the_formula(family, rank, bf16, checkpointing):
    changes = {**FAMILIES[family], "sliding_window": None}  # a window adds its mask, once
    model = lora_model(rank=rank, **changes) if rank else small_model(**changes)
    if bf16 and rank:  # as in train.py: a 16-bit base under fp32 adapters
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # alive, so that no other tensor takes its address
        return tensor

    tokens = 11
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=bf16):
        model.hidden_states(torch.arange(tokens)[None], run_layer=checkpointed if checkpointing else None)
    expected = formula.activation_bytes(model.config, tokens, rank, bf16, checkpointing)
    if checkpointing:  # the backward pass makes those of one layer
        expected -= formula.layer_bytes(model.config, tokens, rank, bf16)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) == expected


def test_the_committed_peaks_are_within_a_twentieth_of_the_formula():
    results = read_json(memory.RESULT)
    assert {row["mode"] for row in results["measured"]} == set(memory.MODES)
    for row in results["measured"]:
        cfg, bf16 = memory.MODELS[memory.MEASURED_MODEL], row["dtype"] == "bf16"
        formula = memory.peak_bytes(cfg, results["measured_tokens"], row["mode"], bf16=bf16, device="cpu")
        assert row["formula_gib"] == formula / 2**30
        assert abs(row["formula_gib"] / row["measured_gib"] - 1) < 1 / 20, row
    for name, row in results["gib"].items():
        for mode, gib in row.items():
            assert gib == memory.peak_bytes(memory.MODELS[name], results["tokens"], mode) / 2**30
    for name, gib in results["sharded_gib"].items():
        assert gib == memory.sharded(memory.MODELS[name]) / 2**30
