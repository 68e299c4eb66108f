"""training/lora.py: updates that start at zero, merge, and travel as adapters."""

import json

import pytest
import torch
from small import FAMILIES, lora_model, small_model
from train_runs import run

from model import Transformer
from training.lora import add_lora, load_adapter, save_adapter


def test_fresh_lora_changes_no_logit_and_trains_only_its_own_weights():
    model, tokens = small_model(), torch.tensor([[1, 2, 3, 4]])
    before = model(tokens)
    add_lora(model, rank=2, alpha=4)
    assert torch.equal(model(tokens), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * model.config.num_hidden_layers
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_lora_gives_the_same_logits(tmp_path, family):
    model, tokens = lora_model(**FAMILIES[family]), torch.tensor([[1, 2, 3, 4]])
    model.save_pretrained(tmp_path)
    merged = Transformer.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(tokens), small_model(**FAMILIES[family])(tokens), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_saved_and_loaded_onto_the_base_gives_the_same_logits(tmp_path, family):
    model, tokens = lora_model(**FAMILIES[family]), torch.tensor([[1, 2, 3, 4]])
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(small_model(**FAMILIES[family]), tmp_path)(tokens), model(tokens))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)


def test_adapters_are_fp32_on_a_bf16_base():
    model = add_lora(small_model().to(torch.bfloat16), rank=2, alpha=4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path):
    save_adapter(lora_model(), tmp_path)
    whole = json.loads((tmp_path / "adapter_config.json").read_text())

    def refuse(message, **changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**whole, **changes}))
        with pytest.raises(ValueError, match=message):
            load_adapter(small_model(), tmp_path)

    refuse("use_dora = True is not implemented", use_dora=True)
    refuse("lora_alpha must be a number, got None", lora_alpha=None)
    refuse("target_modules must be a list", target_modules=7)
    refuse("LoRA targets must be among .* got embed_tokens", target_modules=["embed_tokens"])
    refuse("lora_A.weight' must have shape", r=2)
    refuse("is unexpected", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has LoRA layers already"):
        add_lora(lora_model(), 2, 4)
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(small_model(), tmp_path)
    with pytest.raises(ValueError, match=r"must be in \[1, hidden_size 16\], got 0"):
        add_lora(small_model(), 0, 1)


def test_lora_runs_write_an_adapter_that_has_learnt(checkpoint, rows, tmp_path):
    metrics = run(checkpoint, rows, tmp_path / "run", "--lora-rank", "2", "--sample-pruner", "none", "--epochs", "6")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    model, tokens = Transformer.from_pretrained(checkpoint), torch.tensor([[5, 6, 7]])
    before = model(tokens)
    load_adapter(model, tmp_path / "run" / "adapter")
    assert not torch.allclose(model(tokens), before, atol=1e-3)
