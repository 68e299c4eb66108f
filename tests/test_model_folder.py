"""Model folders of others: what is read, copied and refused, and that sizes are checked before they are built."""

import json
import os
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_model

import train
from model import Transformer
from training.model_folder import tokenizer_files, weight_files

TOKENS = torch.tensor([[1, 2, 3, 4]])
TINY = Path(__file__).resolve().parents[1] / "data" / "tiny" / "base"
INDEX = "model.safetensors.index.json"


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, message, error=ValueError):
    with pytest.raises(error, match=message):
        Transformer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["llama"]}, r"config\.json: model_type \['llama'\] is not implemented; expected one of llama,"),
        ({"model_type": {}}, r"model_type \{\} is not implemented"),
        ({"hidden_size": 16.0}, r"hidden_size must be a positive integer, got 16\.0"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, got True"),
        ({"vocab_size": "31"}, "vocab_size must be a positive integer, got '31'"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings must be a positive integer, got 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps must be a positive number, got 10000\d*\.\.\.\d*0000$"),
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta must be a positive number, got 0"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "rope_theta must be a positive number, got 1000"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta must be a positive number, got inf"),
        ({"rope_parameters": 5}, "rope_parameters must be an object or null, got 5"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, got 'linear'"),
        ({"rope_scaling": []}, r"rope_scaling must be an object or null, got \[\]"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_scaling: rope_type = \['linear'\] is not implemented"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "rope_parameters: full_attention = "),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling: factor must be a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"bos_token_id": "<s>"}, "bos_token_id must be an integer or null, got '<s>'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer, a list of integers or null, got '</s>'"),
        ({"eos_token_id": [2, None]}, r"eos_token_id must be an integer, a list of integers or null, got \[2, None\]"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id must be an integer, a list of integers or null"),
        ({"layer_types": 7}, "layer_types = 7 is not implemented"),
        ({"layer_types": {"0": "full_attention"}}, "layer_types = .* is not implemented"),
        ({"attention_dropout": float("nan")}, "attention_dropout = nan is not implemented; expected 0"),
        ({"hidden_act": ["silu"] * 10**6}, r"hidden_act = \['silu', .*\.\.\.\] is not implemented; expected 'silu'$"),
    ],
)
def test_a_key_of_the_wrong_kind_is_refused_by_file_and_key(folder, changes, message):
    change_json(folder / "config.json", **changes)
    refused(folder, message)


def test_llama3_scaling_needs_the_higher_factor_to_be_the_higher(folder):
    llama3 = {"factor": 4.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    change_json(folder / "config.json", rope_parameters=None, rope_scaling={"rope_type": "llama3", **llama3})
    refused(folder, "rope_scaling: high_freq_factor must be above low_freq_factor")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("text", ["[]", "null", '"x"', "3", "[" * 100_000 + "]" * 100_000, "9" * 5000, "", "\udcff"])
def test_a_file_that_holds_no_object_is_refused_by_name(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, rf"{name}: (expected a JSON object, got|not valid JSON \()")


def test_generation_config_is_named_for_its_own_keys(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    refused(folder, r"generation_config\.json: eos_token_id must be an integer")


def test_a_byte_order_mark_is_no_part_of_the_json(folder):
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    Transformer.from_pretrained(folder)


# -------------------------------------------------------------------------------- sizes against the headers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, r"config\.json: hidden_size is 1000000000, but tensor '.*' has shape \(31, 16\)"),
        ({"hidden_size": 10**18}, r"config\.json: hidden_size is 10+, but"),
        ({"vocab_size": 10**12}, r"config\.json: vocab_size is 10+, but tensor '.*embed_tokens.weight' has shape"),
        ({"intermediate_size": 10**12}, r"config\.json: intermediate_size is 10+, but tensor '.*gate_proj.weight'"),
        ({"num_hidden_layers": 10**7}, r"config\.json: num_hidden_layers is 10000000, but the weights hold 2"),
        ({"num_hidden_layers": 10**18}, r"config\.json: num_hidden_layers is 10+, but the weights hold 2"),
        ({"num_hidden_layers": 1}, r"config\.json: num_hidden_layers is 1, but the weights hold 2"),
        ({"num_attention_heads": 10**10}, r"config\.json: num_attention_heads x head_dim is 40+, but tensor"),
        ({"num_key_value_heads": 4}, r"config\.json: num_key_value_heads x head_dim is 16, but tensor '.*k_proj"),
        ({"head_dim": 2 * 10**11}, r"config\.json: num_attention_heads x head_dim is 80+, but tensor '.*q_proj"),
    ],
)
def test_sizes_that_the_weights_do_not_have_end_in_a_second_and_take_no_memory(folder, changes, message):
    change_json(folder / "config.json", **changes)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, message)
    assert time.perf_counter() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_no_tensor_is_read_before_all_headers_fit(folder, monkeypatch):
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 15)
    save_file(state, folder / "model.safetensors")
    monkeypatch.setattr("model.checkpoint_tensors", lambda files: pytest.fail("a tensor was read"))
    refused(folder, r"'model.layers.1.mlp.up_proj.weight' must have shape \(24, 16\) by config.json, got \(24, 15\)")


# --------------------------------------------------------------------------------------------- weight files


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/secret.safetensors", "sub/model.safetensors", "..\\secret.safetensors", ".."),
        *("", ".safetensors/", "a\0.safetensors", "a\n.safetensors", "\ud800.safetensors", "config.json"),
        *(None, 5, True, ["model.safetensors"], {"a": "model.safetensors"}),
    ],
)
def test_an_index_names_plain_files_of_its_own_folder(folder, name):
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(folder, r"index\.json: weight_map: 'model\.norm\.weight' must be the name of a \.safetensors file in this")


def test_a_file_of_the_index_that_is_not_there_or_no_file_is_named(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00002.safetensors"}}))
    refused(folder, r"model-00002\.safetensors: no such file; model\.safetensors\.index\.json", FileNotFoundError)
    (folder / "model-00002.safetensors").mkdir()
    refused(folder, r"model-00002\.safetensors: no such file; model\.safetensors\.index\.json", FileNotFoundError)


def test_a_tensor_in_two_files_is_refused(folder):
    model = (folder / "model.safetensors").read_bytes()
    (folder / "twice.safetensors").write_bytes(model)
    names = {"a": "model.safetensors", "b": "twice.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    refused(folder, r"twice\.safetensors: tensor '.*' is in another file of the folder too")


def test_tied_embeddings_load_from_either_name_alone(tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors")
    loaded = Transformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.lm_head.weight is loaded.model["embed_tokens"].weight
    change_json(tmp_path / "config.json", tie_word_embeddings=False)
    refused(tmp_path, "1 tensors are missing, the first is 'model.embed_tokens.weight'")


# ---------------------------------------------------------------------------------------------------- links


def cached(folder):
    """The folder as huggingface_hub keeps it: each file of a snapshot is a link into the repository's blobs."""
    repository = folder.parent / "models--someone--small"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        (repository / "blobs" / f"hash{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash{number}")
    return snapshot


def test_a_snapshot_of_the_hugging_face_cache_loads_and_is_saved_with_its_tokenizer(tmp_path):
    small_model().save_pretrained(tmp_path / "model", max_shard_bytes=5_000)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ 1 }}")
    snapshot = cached(tmp_path / "model")
    assert all(file.is_symlink() for file in weight_files(snapshot))
    Transformer.from_pretrained(snapshot).save_pretrained(tmp_path / "saved")
    for name, text in (("tokenizer.json", "{}"), ("chat_template.jinja", "{{ 1 }}")):
        assert (tmp_path / "saved" / name).read_text() == text
        assert not (tmp_path / "saved" / name).is_symlink()


@pytest.mark.parametrize(
    "link", ["../secret", "{root}/secret", "inner/../../secret", "hop", "../blobs/secret", "linked/secret"]
)
def test_a_tokenizers_file_that_links_out_of_the_folder_is_not_copied(folder, tmp_path, link):
    (folder / "inner").mkdir()
    (tmp_path / "blobs").mkdir()
    (folder / "linked").symlink_to(tmp_path)
    for secret in (tmp_path / "secret", tmp_path / "blobs" / "secret"):
        secret.write_text("a key")
    (folder / "hop").symlink_to(tmp_path / "secret")
    (folder / "chat_template.jinja").symlink_to(link.format(root=tmp_path))
    model = Transformer.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: a link to .*secret, outside of the model's folder"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_training_refuses_such_a_link_before_it_reads_a_row(folder, tmp_path, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    (tmp_path / "secret").write_text("{{ 1 }}")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(SystemExit) as ended:
        train.main(["--model", str(folder), "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "chat_template.jinja: a link to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_blobs_of_another_repository_and_links_in_them_are_outside(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    snapshot = cached(folder)
    assert len(tokenizer_files(snapshot)) == 1
    blob = (snapshot / "tokenizer.json").resolve()
    blob.unlink()
    blob.symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("a key")
    with pytest.raises(ValueError, match=r"tokenizer\.json: a link to .*secret, outside"):
        tokenizer_files(snapshot)
    other = tmp_path / "models--someone--other" / "blobs"
    other.mkdir(parents=True)
    (other / "hash").write_text("another's")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(other / "hash")
    with pytest.raises(ValueError, match=r"tokenizer\.json: a link to .*hash, outside"):
        tokenizer_files(snapshot)


def test_links_within_the_folder_and_to_the_whole_folder_are_followed(folder, tmp_path):
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "a.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to("tokenizers/a.json")
    os.symlink(folder, tmp_path / "link")
    Transformer.from_pretrained(tmp_path / "link").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
