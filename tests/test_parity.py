"""model.py against transformers and peft themselves; skipped where the `parity` extra is not installed."""

import pytest
import torch
from small import FAMILIES, lora_model, small_model

from eval.generation import generate
from model import Transformer
from training.lora import LoRALinear, add_lora, load_adapter, save_adapter

transformers = pytest.importorskip("transformers", reason="pip install transformers peft (the parity extra)")
peft = pytest.importorskip("peft", reason="pip install transformers peft (the parity extra)")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_write_and_computes_the_same(tmp_path, family, tied):
    ours = small_model(**FAMILIES[family], tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path, max_shard_bytes=9_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    continued = theirs.generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(ours, TOKENS.tolist(), 6) == continued[:, TOKENS.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_what_transformers_writes(tmp_path, family):
    small_model(**FAMILIES[family]).save_pretrained(tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "b")
    ours = Transformer.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_transformers(tmp_path):
    ours = small_model()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for logits in (ours(TOKENS), theirs(TOKENS).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_travel_to_peft_and_back(tmp_path, family):
    small_model(**FAMILIES[family]).save_pretrained(tmp_path / "base")
    ours = lora_model(**FAMILIES[family])
    save_adapter(ours, tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(small_model(**FAMILIES[family]), tmp_path / "theirs")
    assert torch.equal(again(TOKENS), ours(TOKENS))


def test_fresh_lora_covers_the_layers_that_peft_covers():
    ours = add_lora(small_model(), rank=2, alpha=4)
    names = {name for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    linear = {name for name, module in small_model().named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == linear - {"lm_head"}
