"""load_adapter against peft itself; skipped where the `parity` extra is not installed."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_model

from model import Transformer
from training.lora import ONLY, READ, WITHOUT_EFFECT, load_adapter

transformers = pytest.importorskip("transformers", reason="pip install transformers peft (the parity extra)")
peft = pytest.importorskip("peft", reason="pip install transformers peft (the parity extra)")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
OURS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    return folder


def theirs(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def written_by_peft(base, folder, **settings):
    """Train-like: peft's own start with a step away from it, saved by peft; the logits with peft's loader."""
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(**{**OURS, **settings}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(theirs(base), folder)(TOKENS).logits


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": start} for start in (True, False, "gaussian", "orthogonal")),
        *({"target_modules": targets} for targets in (r".*\.(q|up)_proj", "all-linear", [Q0, "1.mlp.down_proj"])),
        *({"layers_to_transform": layers} for layers in (1, [0], [0, 1])),
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        *({"exclude_modules": excluded} for excluded in ([Q0, "1.mlp.down_proj"], r".*layers\.1.*")),
        {"lora_dropout": 0.3, "task_type": "CAUSAL_LM", "revision": "main", "inference_mode": True},
        {"megatron_core": "another.core", "qalora_group_size": 8, "ensure_weight_tying": True},
    ],
)
def test_what_loads_gives_the_logits_of_peft(base, tmp_path, settings):
    expected = written_by_peft(base, tmp_path, **settings)
    ours = load_adapter(Transformer.from_pretrained(base), tmp_path)(TOKENS)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, Transformer.from_pretrained(base)(TOKENS), atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": start} for start in ("pissa", "pissa_niter_4", "olora")),
        {"alora_invocation_tokens": [1, 5]},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 9}},
    ],
)
def test_what_is_refused_would_give_other_logits(base, tmp_path, settings):
    expected = written_by_peft(base, tmp_path, **settings)
    (key,) = settings
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} = .* is not implemented"):
        load_adapter(Transformer.from_pretrained(base), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ignored = load_adapter(Transformer.from_pretrained(base), tmp_path)(TOKENS)
    assert (ignored - expected).abs().max() > 0.5


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    written_by_peft(base, folder)
    return folder


FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_every_setting_of_the_installed_peft_loads_at_its_default_and_is_refused_otherwise(base, plain, field):
    file = plain / "adapter_config.json"
    config = {**peft.LoraConfig(**OURS).to_dict(), "peft_type": "LORA"}
    file.write_text(json.dumps(config, default=list))
    load_adapter(Transformer.from_pretrained(base), plain)
    for value in (True, 7, "some", [3], {"a": 3}):
        if field not in READ | WITHOUT_EFFECT and not (field in ONLY and value in ONLY[field]):
            file.write_text(json.dumps({**config, field: value}, default=list))
            with pytest.raises(ValueError, match=rf"adapter_config\.json: {field} = .* is not implemented"):
                load_adapter(Transformer.from_pretrained(base), plain)


def test_the_settings_that_are_known_are_those_of_peft():
    assert READ | WITHOUT_EFFECT | ONLY.keys() <= FIELDS


def test_tied_embeddings_under_the_heads_name_load_as_transformers_loads_them(tmp_path):
    small_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, expected = Transformer.from_pretrained(tmp_path)(TOKENS), theirs(tmp_path)(TOKENS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
