"""model.py against transformers' own results (tests/golden) and a literal float64 twin, and the claims it makes."""

import json
import tempfile
from pathlib import Path

import llama_twin
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import (
    KVCache,
    LoRALinear,
    ModelConfig,
    Transformer,
    add_lora,
    generate,
    load_adapter,
    rotary,
    rotary_frequencies,
    rotate,
    save_adapter,
)

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
VOCAB = 31
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": {},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "mistral": {"model_type": "mistral", "sliding_window": 3},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 6},
}


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


def lora_model(seed=0, rank=3, **changes):
    model = add_lora(small_model(seed, **changes), rank, alpha=2 * rank)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.normal_(std=0.3)
    return model


ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
families = st.sampled_from(list(FAMILIES))


# ------------------------------------------------------------------------------ against transformers' results


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_logits_equal_those_of_transformers(name):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    ours = Transformer.from_pretrained(GOLDEN / name)(golden["input_ids"])
    assert (ours - golden["logits"]).norm() <= 1e-5 * golden["logits"].norm()
    assert (ours - golden["logits"]).abs().max() <= 1e-5 * golden["logits"].abs().max()


def test_there_is_a_golden_model_of_every_family():
    expected = {"llama", "llama_tied", "llama_linear", "llama3", "mistral", "mistral_no_window", "qwen2", "qwen3"}
    assert set(GOLDEN_MODELS) == expected


def test_gradients_equal_those_of_transformers():
    golden, model = load_file(GOLDEN / "llama" / "golden.safetensors"), Transformer.from_pretrained(GOLDEN / "llama")
    input_ids = golden["input_ids"]
    torch.nn.functional.cross_entropy(model(input_ids)[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"grad.{name}"]
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("name", ["llama", "llama_linear", "llama3", "mistral"])
def test_both_spellings_of_rotary_scaling_mean_the_same(tmp_path, name):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((GOLDEN / name / file).read_bytes())
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    for scaling in ({"rope_type": rope_type, **rope}, {"type": rope_type, **rope}, None):
        if scaling is None and rope_type != "default":
            continue  # no scaling is one more way to write the default
        change_config(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
        ours = Transformer.from_pretrained(tmp_path)(golden["input_ids"])
        assert (ours - golden["logits"]).norm() <= 1e-5 * golden["logits"].norm()


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


@given(families, ids, st.data())
def test_a_token_changes_no_logit_before_it(family, tokens, data):
    model = small_model(**FAMILIES[family])
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:at], data.draw(st.integers(0, VOCAB - 1)), *tokens[at + 1 :]]
    before, after = model(torch.tensor([tokens]))[0, :at], model(torch.tensor([other]))[0, :at]
    torch.testing.assert_close(before, after)


@given(st.integers(1, 4), st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=14), st.data())
def test_a_window_hides_what_lies_further_back_in_every_layer(window, tokens, data):
    model = small_model(model_type="mistral", sliding_window=window)
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:at], (tokens[at] + 1) % VOCAB, *tokens[at + 1 :]]
    before, after = model(torch.tensor([tokens]))[0], model(torch.tensor([other]))[0]
    reach = model.config.num_hidden_layers * (window - 1)  # each layer hands a token on by window - 1 places
    torch.testing.assert_close(before[at + reach + 1 :], after[at + reach + 1 :])
    near = slice(at, at + reach + 1)
    assert not torch.isclose(before[near], after[near], rtol=1e-6, atol=1e-7).all(-1).any()


def test_a_window_as_wide_as_the_row_changes_nothing():
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    plain = small_model(model_type="mistral")(tokens)
    torch.testing.assert_close(small_model(model_type="mistral", sliding_window=8)(tokens), plain)
    assert not torch.allclose(small_model(model_type="mistral", sliding_window=7)(tokens)[0, -1], plain[0, -1])


@given(families, st.lists(ids, min_size=1, max_size=4), st.integers(0, VOCAB - 1))
def test_right_padding_and_company_change_no_logit_of_a_row(family, rows, pad):
    model = small_model(**FAMILIES[family])
    width = max(map(len, rows))
    batch = model(torch.tensor([row + [pad] * (width - len(row)) for row in rows]))
    for row, logits in zip(rows, batch, strict=True):
        torch.testing.assert_close(logits[: len(row)], model(torch.tensor([row]))[0], rtol=1e-4, atol=1e-5)


@given(st.sampled_from(["llama", "llama, linear", "llama3"]), st.integers(0, 1000), st.integers(0, 1000))
def test_rotary_positions_keep_lengths_and_make_products_depend_on_distance_alone(family, p, shift):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    frequencies = rotary_frequencies(small_config(head_dim=8, rope_theta=100.0, **FAMILIES[family]))

    def product(a, b):
        angles = [rotary(torch.tensor([[position]]), frequencies) for position in (a, b)]
        turned = [rotate(x, *angle) for x, angle in zip((q, k), angles, strict=True)]
        for x, y in zip((q, k), turned, strict=True):
            torch.testing.assert_close(x.norm(), y.norm(), rtol=1e-4, atol=1e-4)
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(p, p + 3), product(p + shift, p + shift + 3), rtol=2e-3, atol=2e-3)


def test_linear_scaling_divides_positions_and_llama3_slows_only_long_waves():
    plain = rotary_frequencies(small_config(head_dim=8, rope_theta=100.0))
    linear = rotary_frequencies(small_config(head_dim=8, rope_theta=100.0, **FAMILIES["llama, linear"]))
    torch.testing.assert_close(linear, plain / 2)
    ratio = rotary_frequencies(small_config(head_dim=8, rope_theta=100.0, **FAMILIES["llama3"])) / plain
    turns = 64 * plain / (2 * torch.pi)  # within the original length: 10.2, 3.2, 1.02, 0.3
    assert ratio[0] == 1  # above high_freq_factor 4: untouched
    torch.testing.assert_close(ratio[1:3], 1 / 4 + (1 - 1 / 4) * (turns[1:3] - 1) / 3)
    torch.testing.assert_close(ratio[3], torch.tensor(1 / 4))  # below low_freq_factor 1: slowed by the whole factor


@given(families, ids)
@settings(max_examples=20)
def test_queries_and_keys_are_those_that_the_layer_attends_with(family, tokens):
    model = small_model(**FAMILIES[family])
    for layer in (0, -1):
        attention, outputs = model.model["layers"][layer].self_attn, []
        hook = attention.register_forward_hook(lambda module, inputs, output, outputs=outputs: outputs.append(output))
        model(torch.tensor([tokens]))
        hook.remove()
        q, k, x = model.queries_and_keys(torch.tensor([tokens]), layer)
        v = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
        hidden = (distance < 0) | (distance >= (model.config.sliding_window or len(tokens)))
        weights = (q @ k.transpose(-1, -2) / attention.head_dim**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(family, lora):
    input_ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    gradients, kept = [], []
    for on in (False, True):
        model = lora_model(**FAMILIES[family]) if lora else small_model(**FAMILIES[family])
        model.activation_checkpointing = on
        bytes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=bytes_kept: seen.append(t.nbytes) or t, lambda t: t
        ):
            hidden = model.hidden_states(input_ids)
        hidden.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(bytes_kept))
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert kept[1] < kept[0] / 2


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


@given(
    families,
    st.one_of(st.just([]), ids),
    st.lists(ids, min_size=1, max_size=5),
    st.integers(1, 4),
    st.sets(st.integers(0, VOCAB - 1), max_size=8),
)
@settings(max_examples=50)
def test_cached_batched_generation_equals_recomputing_each_row_alone(family, beginning, ends, batch_size, eos_ids):
    model, prompts = small_model(1, **FAMILIES[family]), [beginning + end for end in ends]
    expected = [greedy_by_recomputation(model, prompt, 6, eos_ids) for prompt in prompts]
    assert generate(model, prompts, 6, eos_ids=tuple(eos_ids), batch_size=batch_size) == expected


def test_a_full_cache_refuses_the_next_token():
    model = small_model()
    cache = KVCache(model, rows=1, slots=3)
    model.hidden_states(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(ValueError, match="position 3 does not fit: the cache has 3 slots"):
        model.hidden_states(torch.tensor([[4]]), torch.tensor([[3]]), cache)


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
        return generate(model, [[1, 2]], 12, temperature=temperature, generators=[torch.Generator().manual_seed(seed)])

    assert draw(0, 2.0) == draw(0, 2.0)
    assert draw(0, 2.0) != draw(1, 2.0)
    assert draw(0, 1e-4) == draw(1, 0.0)


def test_what_a_prompt_draws_does_not_depend_on_its_neighbours():
    model, prompts = small_model(1, eos_token_ids=(3,)), [[1, 2], [4, 5, 6], [7], [4, 5, 6]]

    def draw(prompts, seeds, batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate(model, prompts, 12, temperature=2.0, generators=generators, batch_size=batch_size)

    alone = [draw([prompt], [seed], 1)[0] for seed, prompt in enumerate(prompts)]
    assert len(set(map(len, alone))) > 1  # rows leave the batch at different times
    assert alone[1] != alone[3]
    assert [draw(prompts, range(4), batch_size) for batch_size in (1, 3, 4)] == [alone] * 3


def test_generation_refuses_an_empty_prompt_and_one_that_would_leave_the_context():
    model = small_model()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match=r"prompt 0 has 38 tokens.*max_new_tokens 3.*max_position_embeddings 40"):
        generate(model, [[1] * 38], 3)
    assert len(generate(model, [[1] * 38], 2)[0]) == 2


# ----------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_the_same_logits(tmp_path, family, tied):
    changes = {**FAMILIES[family], "tie_word_embeddings": tied, "eos_token_ids": (2, 3)}
    model, tokens = small_model(**changes), torch.tensor([[1, 2, 3]])
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


@given(st.integers(1, 15_000))
@settings(max_examples=15)
def test_shards_stay_under_their_limit_and_hold_every_tensor_once(max_shard_bytes):
    model = lora_model(model_type="qwen2", tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_bytes=max_shard_bytes)
        files = sorted(Path(folder).glob("*.safetensors"))
        shards = {file.name: load_file(file) for file in files}
        for shard in shards.values():
            assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= max_shard_bytes
        index = json.loads((Path(folder) / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
        assert sum(map(len, shards.values())) == len(index["weight_map"])
        assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())
        tokens = torch.tensor([[1, 2, 3]])
        torch.testing.assert_close(Transformer.from_pretrained(folder)(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_a_save_replaces_the_weights_of_an_earlier_one_and_nothing_else(tmp_path):
    tokens = torch.tensor([[1, 2, 3]])
    (tmp_path / "adapter_model.safetensors").write_bytes(b"another's")
    for limit, files in ((9_000, 3), (10**9, 1), (5_000, 5)):
        model = small_model(limit)
        model.save_pretrained(tmp_path, max_shard_bytes=limit)
        assert len(list(tmp_path.glob("model*.safetensors"))) == files
        assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
        assert torch.equal(Transformer.from_pretrained(tmp_path)(tokens), model(tokens))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"another's"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_every_float_type_load_in_the_type_asked_for(tmp_path, stored):
    model, tokens = small_model(), torch.tensor([[1, 2, 3]])
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda s: s.update({name: tensor.to(stored) for name, tensor in s.items()}))
    rounded = small_model().to(stored).float()
    assert torch.equal(Transformer.from_pretrained(tmp_path)(tokens), rounded(tokens))
    loaded = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_generation_config_says_where_a_text_ends(tmp_path):
    small_model(eos_token_ids=(2,)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Transformer.from_pretrained(tmp_path).config.eos_token_ids == (2, 7)


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"or one other \.safetensors file, found 2"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: expected a 'weight_map' of tensor names to files, got None"):
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
        r"'model.norm.weight' must be fp32, fp16 or bf16, got I8": lambda s: s.update({norm: s[norm].char()}),
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
    with pytest.raises(FileNotFoundError, match=r"or one other \.safetensors file, found 0"):
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
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented; expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "model_type 'qwen3_moe' is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"attention_bias": True}, "attention_bias = True is not implemented"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types = \['full_attention', 'sliding_att"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not implemented"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: rope_type 'yarn' is not implemented; expected one of"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling: rope_type 'dynamic' is not implemented"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type 'longrope' is not implemented"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a positive number, got '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "rope_scaling: mscale = 1 is not implemented"),
        ({"rope_scaling": {"factor": 2}, "rope_parameters": {"rope_theta": 2}}, "both there and differ; expected one"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_key_value_heads": 3}, "4 attention heads do not share 3 key-value heads evenly"),
        ({"head_dim": None, "hidden_size": 18}, "hidden_size 18 is not a multiple of the 4 attention heads"),
        ({"head_dim": 5}, "head_dim must be even for rotary positions, got 5"),
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
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_lora(small_model(), 0, 1)
