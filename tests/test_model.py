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
from small import FAMILIES, VOCAB, families, ids, lora_model, small_config, small_model

from model import Transformer, rotary, rotary_frequencies, rotate

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))


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
