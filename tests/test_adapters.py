"""Adapters of others: settings that change nothing load, and every other one is refused by name."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_model

from training.lora import LoRALinear, add_lora, load_adapter, save_adapter

TOKENS = torch.tensor([[1, 2, 3, 4]])
Q0, Q1, DOWN0 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def adapted(targets=("q_proj", "down_proj")):
    model = add_lora(small_model(), 2, 4, targets)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.3)
    return model


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder, message, error=ValueError):
    """It is, and the model is as it was."""
    model = small_model()
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "changes",
    [
        *({"init_lora_weights": start} for start in (True, False, "gaussian", "orthogonal")),
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
        {"peft_version": "0.21.2", "revision": "main", "base_model_name_or_path": "someone/base", "task_type": None},
        {"lora_dropout": 0.05, "inference_mode": False, "megatron_core": "megatron.core", "qalora_group_size": 32},
        {"rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {}, "modules_to_save": None, "use_dora": False},
        {"a_setting_of_a_later_peft": None, "another": False, "and_another": []},
    ],
)
def test_settings_that_change_nothing_load(folder, changes):
    change(folder, **changes)
    assert torch.equal(load_adapter(small_model(), folder)(TOKENS), adapted()(TOKENS))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", start) for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
        *(("init_lora_weights", start) for start in ("eva", "mica", "something", None, 1, 0, ["gaussian"], {})),
        *(("use_rslora", True), ("use_dora", True), ("use_qalora", True), ("lora_bias", True)),
        *(("alora_invocation_tokens", [1, 5]), ("trainable_token_indices", [1]), ("layer_replication", [[0, 2]])),
        *(("target_parameters", ["mlp.up_proj.weight"]), ("modules_to_save", ["lm_head"]), ("bias", "all")),
        *(("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 16}), ("loftq_config", {"loftq_bits": 4})),
        *(("eva_config", {"rho": 2.0}), ("corda_config", {"a": 1}), ("lora_ga_config", {"a": 1})),
        *(("megatron_config", {"a": 1}), ("layers_pattern", "h"), ("fan_in_fan_out", True), ("peft_type", "LOHA")),
        *(("peft_type", None), ("peft_type", ["LORA"]), ("a_setting_of_a_later_peft", True), ("another", "x")),
    ],
)
def test_a_setting_that_changes_the_model_is_refused_by_name(folder, key, value):
    change(folder, **{key: value})
    refused(folder, rf"adapter_config\.json: {key} = .* is not implemented")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2.0}, r"r must be a positive integer, got 2\.0"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"r": None}, "r must be a positive integer, got None"),
        ({"r": [2]}, r"r must be a positive integer, got \[2\]"),
        ({"lora_alpha": "4"}, "lora_alpha must be a number, got '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number, got inf"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number, got 1000"),
        ({"target_modules": None}, "target_modules must be a list of names, got None"),
        ({"target_modules": ["q_proj", 5]}, r"target_modules must be a list of names, got \['q_proj', 5\]"),
        ({"target_modules": {"q_proj": 1}}, "target_modules must be a list of names, got {'q_proj': 1}"),
        ({"target_modules": []}, "LoRA targets must be among .* got none"),
        ({"target_modules": ["lm_head"]}, "LoRA targets must be among .* got lm_head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA targets must be among .* got embed_tokens"),
        ({"exclude_modules": 5.5}, r"exclude_modules must be a list of names, got 5\.5"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a list of integers, got '0'"),
        ({"layers_to_transform": [True]}, r"layers_to_transform must be a list of integers, got \[True\]"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(folder, changes, message):
    change(folder, **changes)
    refused(folder, rf"adapter_config\.json: {message}")


def test_a_rank_that_the_tensors_do_not_have_takes_no_memory(folder):
    change(folder, r=10**12)
    started = time.perf_counter()
    refused(folder, r"lora_.\.weight' must have shape \(.*10{12}.*\) by adapter_config\.json, got \(.*2.*\)")
    assert time.perf_counter() - started < 1


# ------------------------------------------------------------------------------------ which layers have LoRA


@pytest.mark.parametrize(
    ("targets", "changes"),
    [
        (["q_proj", "down_proj"], {"target_modules": r".*\.(q_proj|down_proj)"}),
        (["q_proj", "down_proj"], {"target_modules": "all-linear"}),
        (["q_proj", "down_proj"], {"target_modules": "(a+)+$"}),  # not run: the tensors' names settle it
        (["q_proj"], {"target_modules": ["self_attn.q_proj"]}),
        ([Q0, DOWN0], {"target_modules": [Q0, "0.mlp.down_proj"]}),
        ([Q1], {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ([Q1], {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
        ([Q1], {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        ([Q1, DOWN0], {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*(0.*q|1.*down)_proj"}),
    ],
)
def test_the_layers_of_the_tensors_get_lora(tmp_path, targets, changes):
    model = adapted(targets)
    save_adapter(model, tmp_path)
    change(tmp_path, **changes)
    loaded = load_adapter(small_model(), tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    names = {name for name, module in loaded.named_modules() if isinstance(module, LoRALinear)}
    assert names == {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@pytest.mark.parametrize("targets", [["q_proj"], [Q0], [Q0, Q1, DOWN0]])
def test_an_adapter_of_some_layers_is_saved_and_loaded(tmp_path, targets):
    save_adapter(adapted(targets), tmp_path)
    assert torch.equal(load_adapter(small_model(), tmp_path)(TOKENS), adapted(targets)(TOKENS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"tensor '.*down_proj\.lora_A\.weight' is unexpected"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, r"tensor '.*k_proj\.lora_A\.w.* is missing"),
        ({"layers_to_transform": [1]}, r"tensor '.*layers\.0.*' is unexpected"),
        ({"exclude_modules": ["q_proj"]}, r"tensor '.*q_proj.*' is unexpected"),
    ],
)
def test_lists_of_layers_must_be_those_of_the_tensors(folder, changes, message):
    change(folder, **changes)
    refused(folder, rf"adapter_model\.safetensors: {message}")


def change_tensors(folder, change):
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")


def test_with_a_regular_expression_every_tensor_must_still_be_half_of_an_update(folder):
    change(folder, target_modules=".*")
    prefix = f"base_model.model.{Q0}"
    change_tensors(folder, lambda state: state.pop(f"{prefix}.lora_B.weight"))
    refused(folder, rf"tensor 'base_model\.model\.{Q0}\.lora_B\.weight' is missing")
    change_tensors(folder, lambda state: state.pop(f"{prefix}.lora_A.weight"))
    load_adapter(small_model(), folder)
    for name in ("base_model.model.lm_head.lora_A.weight", f"{prefix}.lora_magnitude_vector.weight", "x"):
        change_tensors(folder, lambda state, name=name: state.update({name: torch.zeros(2, 16)}))
        refused(folder, "tensor '.*' is (unexpected|missing)")
        change_tensors(folder, lambda state, name=name: state.pop(name))
    change_tensors(folder, lambda state: state.clear())
    refused(folder, r"adapter_model\.safetensors: expected tensors, got none")


def test_adapter_tensors_are_floats(folder):
    name = f"base_model.model.{Q0}.lora_A.weight"
    change_tensors(folder, lambda state: state.update({name: state[name].char()}))
    refused(folder, r"tensor '.*lora_A\.weight' must be fp32, fp16 or bf16, got I8")


# --------------------------------------------------------------------------------------------------- files


def test_only_the_adapters_own_file_of_weights_is_read(folder):
    small_model().save_pretrained(folder, max_shard_bytes=5_000)
    (folder / "model.safetensors").write_bytes(b"not an adapter")
    (folder / "adapter_model.bin").write_bytes(b"not read")
    assert torch.equal(load_adapter(small_model(), folder)(TOKENS), adapted()(TOKENS))


def test_a_folder_with_a_pickle_alone_says_so(folder):
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    refused(folder, r"adapter_model\.safetensors: no such file$", FileNotFoundError)
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    refused(folder, r"no such file; adapter_model\.bin is not read: a pickle can run code", FileNotFoundError)


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "3", "[" * 100_000 + "]" * 100_000, ""])
def test_a_config_that_holds_no_object_is_refused_by_name(folder, text):
    (folder / "adapter_config.json").write_text(text)
    refused(folder, r"adapter_config\.json: (expected a JSON object, got|not valid JSON \()")
