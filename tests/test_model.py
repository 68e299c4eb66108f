"""model.py against a literal float64 twin, and the claims its docstrings make."""

import json

import llama_twin
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import (
    LoRALinear,
    ModelConfig,
    Transformer,
    add_lora,
    generate,
    load_adapter,
    rotary,
    rotate,
    save_adapter,
)

VOCAB = 31


def small_config(**changes):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 40}
    return ModelConfig(**{**sizes, **heads, **changes})


def small_model(seed=0, **changes):
    """Random weights large enough that attention and the norms matter."""
    torch.manual_seed(seed)
    model = Transformer(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return model


def lora_model(seed=0, rank=3):
    model = add_lora(small_model(seed), rank, alpha=2 * rank)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.normal_(std=0.3)
    return model


ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


# ------------------------------------------------------------------------------------------ the network


@given(ids, st.booleans(), st.integers(0, 3))
@settings(max_examples=15)
def test_logits_equal_the_literal_float64_twin(tokens, tied, seed):
    model = small_model(seed, tie_word_embeddings=tied)
    ours = model(torch.tensor([tokens]))[0]
    torch.testing.assert_close(ours.double(), llama_twin.logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_logits_equal_the_twin_with_one_key_value_head_per_query_head_and_with_a_single_shared_one():
    for kv_heads in (4, 1):
        model = small_model(num_key_value_heads=kv_heads, rope_theta=50.0)
        tokens = [3, 1, 4, 1, 5, 9, 2, 6]
        ours = model(torch.tensor([tokens]))[0]
        torch.testing.assert_close(ours.double(), llama_twin.logits(model, tokens), rtol=1e-5, atol=1e-5)


@given(ids, st.data())
def test_a_token_changes_no_logit_before_it(tokens, data):
    model = small_model()
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:at], data.draw(st.integers(0, VOCAB - 1)), *tokens[at + 1 :]]
    before, after = model(torch.tensor([tokens]))[0, :at], model(torch.tensor([other]))[0, :at]
    torch.testing.assert_close(before, after)


@given(st.lists(ids, min_size=1, max_size=4), st.integers(0, VOCAB - 1))
def test_right_padding_and_company_change_no_logit_of_a_row(rows, pad):
    model = small_model()
    width = max(map(len, rows))
    batch = model(torch.tensor([row + [pad] * (width - len(row)) for row in rows]))
    for row, logits in zip(rows, batch, strict=True):
        torch.testing.assert_close(logits[: len(row)], model(torch.tensor([row]))[0], rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_rotary_positions_keep_lengths_and_make_products_depend_on_distance_alone(p, shift):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def product(a, b):
        angles = [rotary(torch.tensor([[position]]), 8, 100.0) for position in (a, b)]
        turned = [rotate(x, *angle) for x, angle in zip((q, k), angles, strict=True)]
        for x, y in zip((q, k), turned, strict=True):
            torch.testing.assert_close(x.norm(), y.norm(), rtol=1e-4, atol=1e-4)
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(p, p + 3), product(p + shift, p + shift + 3), rtol=2e-3, atol=2e-3)


def test_position_ids_move_rotary_positions_and_default_to_the_row_order():
    model, tokens = small_model(), torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(tokens), model(tokens, torch.arange(4)[None]))
    torch.testing.assert_close(model(tokens), model(tokens, torch.arange(4)[None] + 9), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model(tokens), model(tokens, torch.tensor([[0, 2, 4, 6]])), atol=1e-3)


def test_bf16_weights_give_logits_near_fp32_ones():
    model, tokens = small_model(), torch.tensor([[1, 2, 3, 4, 5]])
    exact = model(tokens)
    rough = model.to(torch.bfloat16)(tokens)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.05


# ------------------------------------------------------------------------------------------ generation


def greedy_by_recomputation(model, prompt, steps, eos_ids=()):
    row = list(prompt)
    for _ in range(steps):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        if row[-1] in eos_ids:
            break
    return row[len(prompt) :]


@given(st.lists(ids, min_size=1, max_size=5), st.integers(1, 4), st.sets(st.integers(0, VOCAB - 1), max_size=8))
@settings(max_examples=25)
def test_cached_batched_generation_equals_recomputing_each_row_alone(prompts, batch_size, eos_ids):
    model = small_model(1)
    expected = [greedy_by_recomputation(model, prompt, 6, eos_ids) for prompt in prompts]
    assert generate(model, prompts, 6, eos_ids=tuple(eos_ids), batch_size=batch_size) == expected


def test_generation_ends_at_the_configs_eos_and_where_stop_says():
    prompt = [4, 8]
    free = generate(small_model(1), [prompt], 8)[0]
    assert len(free) == 8
    eos = free[3]
    ended = generate(small_model(1, eos_token_ids=(eos,)), [prompt], 8)[0]
    assert ended == free[: free.index(eos) + 1]
    assert generate(small_model(1), [prompt], 8, stop=lambda new: len(new) == 5)[0] == free[:5]


def test_sampling_follows_its_generator_and_zero_temperature_is_greedy():
    model = small_model(1)

    def draw(seed, temperature):
        return generate(model, [[1, 2]], 12, temperature=temperature, generator=torch.Generator().manual_seed(seed))

    assert draw(0, 2.0) == draw(0, 2.0)
    assert draw(0, 2.0) != draw(1, 2.0)
    assert draw(0, 1e-4) == draw(1, 0.0)


def test_generation_refuses_an_empty_prompt_and_one_that_would_leave_the_context():
    model = small_model()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match=r"prompt 0 has 38 tokens.*max_new_tokens 3.*max_position_embeddings 40"):
        generate(model, [[1] * 38], 3)
    assert len(generate(model, [[1] * 38], 2)[0]) == 2


# ----------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_with_the_same_logits(tmp_path, tied):
    model, tokens = small_model(tie_word_embeddings=tied, eos_token_ids=(2, 3)), torch.tensor([[1, 2, 3]])
    model.save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    again = Transformer.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert (again.lm_head.weight is again.model["embed_tokens"].weight) is tied
    assert torch.equal(again(tokens), model(tokens))
    assert Transformer.from_pretrained(tmp_path / "m", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert not [path for path in (tmp_path / "m").iterdir() if path.name.startswith(".")]


def test_tokenizer_files_travel_with_the_model(tmp_path):
    small_model().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    Transformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"found 2 \.safetensors files"):
        Transformer.from_pretrained(tmp_path)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(Transformer.from_pretrained(tmp_path)(tokens), model(tokens))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    norm, q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
    cases = {
        r"1 tensors are missing, the first is 'model.norm.weight'": lambda s: s.pop(norm),
        r"unexpected tensor 'model.layers.1.self_attn.q_norm.weight'": lambda s: s.update(
            {"model.layers.1.self_attn.q_norm.weight": torch.ones(4)}
        ),
        r"q_proj.weight' must have shape \(16, 16\) by config.json, got \(8, 16\)": lambda s: s.update({q: s[q][:8]}),
    }
    for i, (message, change) in enumerate(cases.items()):
        small_model().save_pretrained(tmp_path / str(i))
        change_weights(tmp_path / str(i), change)
        with pytest.raises(ValueError, match=message):
            Transformer.from_pretrained(tmp_path / str(i))


def test_missing_and_truncated_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        Transformer.from_pretrained(tmp_path / "none")
    small_model().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"found 0 \.safetensors files"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        Transformer.from_pretrained(tmp_path)


def test_tied_embeddings_may_be_stored_twice_but_must_agree(tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embedding = "model.embed_tokens.weight"
    change_weights(tmp_path, lambda s: s.update({"lm_head.weight": s[embedding].clone()}))
    assert torch.equal(Transformer.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    change_weights(tmp_path, lambda s: s.update({"lm_head.weight": s[embedding] + 1}))
    with pytest.raises(ValueError, match="lm_head and embed_tokens differ"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"attention_bias": True}, "attention_bias = True is not implemented"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling = {'rope_type': 'yarn'} is not implemented"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3' is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not implemented"),
        ({"hidden_size": None}, "'hidden_size' must be an integer, got None"),
        ({"num_key_value_heads": 3}, "4 attention heads do not share 3 key-value heads evenly"),
    ],
)
def test_what_config_json_asks_for_and_we_lack_is_refused_by_key_and_value(tmp_path, changes, message):
    small_model().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------ LoRA


def test_fresh_lora_changes_no_logit_and_trains_only_its_own_weights():
    model, tokens = small_model(), torch.tensor([[1, 2, 3, 4]])
    before = model(tokens)
    add_lora(model, rank=2, alpha=4)
    assert torch.equal(model(tokens), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * model.config.num_hidden_layers
    assert all("lora_" in name for name in trained)


def test_merging_lora_gives_the_same_logits(tmp_path):
    model, tokens = lora_model(), torch.tensor([[1, 2, 3, 4]])
    model.save_pretrained(tmp_path)
    merged = Transformer.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(tokens), small_model()(tokens), atol=1e-2)


def test_an_adapter_saved_and_loaded_onto_the_base_gives_the_same_logits(tmp_path):
    model, tokens = lora_model(), torch.tensor([[1, 2, 3, 4]])
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(small_model(), tmp_path)(tokens), model(tokens))
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
    refuse("target_modules must be a list", target_modules="all-linear")
    refuse("LoRA targets must be among .* got embed_tokens", target_modules=["embed_tokens"])
    refuse("lora_A.weight' must have shape", r=2)
    refuse("is unexpected", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has LoRA layers already"):
        add_lora(lora_model(), 2, 4)
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(small_model(), tmp_path)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_lora(small_model(), 0, 1)
