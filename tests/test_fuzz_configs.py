"""Files of other people's folders, changed at random: each loads, or is refused in one line that names the file.

HYPOTHESIS_PROFILE=deep tries thousands of each kind; by default it is a few hundred.
"""

import contextlib
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small import FAMILIES, VOCAB, small_model

from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer
from model import Transformer
from pruners.side_files import open_side_file, read_side_file, sample_values, token_values
from qtuning import IGNORE_INDEX
from training.lora import add_lora, load_adapter, save_adapter

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny" / "base"
MANY = settings(max_examples=max(200, settings.default.max_examples), suppress_health_check=list(HealthCheck))

# ------------------------------------------------------------------------------- what a file may hold instead

DEEP, DIGITS, EXPONENT = "@deep", "@digits", "@exponent"  # what json.dumps cannot write; `text_of` puts them in
ODD = [
    *(None, True, False, 0, 1, 2, -1, 0.5, 1.0, 10**9, 10**30, 10**400, 5e-324, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "1", "none", "\ud800", "a\0b", "line\nline", "x" * 300, "..", "../x", "/etc/hostname", "(a+)+$"),
    *([], [[]], [None], [1], [1, "a"], ["x"], [{}], {}, {"": None}, {"a": {"b": 1}}, {"rope_type": []}),
    *(DEEP, DIGITS, EXPONENT, [DEEP]),
]
odd = st.sampled_from(ODD)


def places(value, path=()):
    """The path of each value within a parsed JSON document, the document's own () included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


def place_of(value, path):
    for key in path:
        value = value[key]
    return value


def changed(value, path, change, other):
    """A copy of a document with the value at a path replaced, taken out, doubled, or with a sibling of any name."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = path[0]
    if len(path) > 1:
        copy[key] = changed(copy[key], path[1:], change, other)
    elif change == "take out":
        del copy[key]
    elif change == "add" and isinstance(copy, dict):
        copy[f"{key}_"] = other
    elif change == "double" and isinstance(copy, list):
        copy.insert(key, copy[key])
    else:
        copy[key] = other
    return copy


@st.composite
def documents(draw, whole, keys=()):
    """A JSON document with one to three values changed, or quite another one.

    keys: names to set besides those that it holds.
    """
    if draw(st.integers(0, 9)) == 9:
        return draw(odd)
    value = whole
    for _ in range(draw(st.integers(1, 3))):
        if keys and isinstance(value, dict) and draw(st.booleans()):
            value = {**value, draw(st.sampled_from(keys)): draw(odd)}
            continue
        paths = list(places(value))[1:]
        if not paths:
            break
        other = draw(st.one_of(odd, st.just(value), st.sampled_from([place_of(value, path) for path in paths])))
        change = draw(st.sampled_from(["replace", "replace", "take out", "add", "double"]))
        value = changed(value, draw(st.sampled_from(paths)), change, other)
    return value


def text_of(value) -> bytes:
    text = json.dumps(value)
    for mark, other in ((DEEP, "[" * 100_000 + "]" * 100_000), (DIGITS, "9" * 5_000), (EXPONENT, "1e999")):
        text = text.replace(f'"{mark}"', other)
    return text.encode()


@st.composite
def files(draw, whole, keys=()):
    """The bytes of a JSON file: changed values, or a text that was cut, has other bytes in it or another encoding."""
    text = text_of(draw(documents(whole, keys)))
    kind = draw(st.sampled_from(["values"] * 9 + ["cut", "bytes", "mark", "utf-16"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if kind == "bytes":
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.binary(min_size=1, max_size=4)) + text[at + draw(st.integers(0, 4)) :]
    return b"\xef\xbb\xbf" + text if kind == "mark" else text.decode().encode("utf-16") if kind == "utf-16" else text


@contextlib.contextmanager
def loads_or_names(*names):
    """What is done inside ends well, or in a ValueError or OSError of one line that holds one of the names."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        assert any(name in message for name in names), message
        assert "\n" not in message and len(message) < 1000, message


# ---------------------------------------------------------------------------------------- models and adapters

MODELS = {**FAMILIES, "tied": {"tie_word_embeddings": True}, "ends": {"eos_token_ids": (2,), "bos_token_id": 1}}
CONFIG_KEYS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("model_type", "hidden_act", "attention_bias", "mlp_bias", "attention_dropout", "partial_rotary_factor"),
    *("use_sliding_window", "quantization_config", "layer_types", "sliding_window", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype"),
]
ADAPTER_KEYS = [
    *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "use_dora", "use_rslora", "fan_in_fan_out", "init_lora_weights", "modules_to_save", "rank_pattern"),
    *("alpha_pattern", "lora_dropout", "task_type", "alora_invocation_tokens", "layer_replication", "megatron_core"),
]


def folder_of(family, root):
    folder = Path(root) / family
    small_model(**MODELS[family]).save_pretrained(folder)
    return folder


ROOT = tempfile.TemporaryDirectory()  # for the folders below, which each case changes one file of and puts back
FOLDERS = {family: folder_of(family, ROOT.name) for family in MODELS}
CONFIGS = {family: json.loads((folder / "config.json").read_text()) for family, folder in FOLDERS.items()}
TOKENS = torch.tensor([[1, 2, 3, 4]])


@contextlib.contextmanager
def file_of(folder, name, data: bytes):
    """The folder's file holds these bytes, for a while."""
    path = Path(folder) / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield path
    finally:
        path.unlink() if before is None else path.write_bytes(before)


CONFIG_FILES = {family: files(config, CONFIG_KEYS) for family, config in CONFIGS.items()}


def load_and_run(folder):
    assert Transformer.from_pretrained(folder)(TOKENS).shape == (1, 4, VOCAB)


@given(st.sampled_from(list(MODELS)).flatmap(lambda family: st.tuples(st.just(family), CONFIG_FILES[family])))
@example(("tied", text_of({**CONFIGS["tied"], "tie_word_embeddings": False})))
@MANY
def test_a_changed_config_loads_or_is_refused(family_and_file):
    family, changed_file = family_and_file
    with file_of(FOLDERS[family], "config.json", changed_file), loads_or_names("config.json"):
        load_and_run(FOLDERS[family])


@given(files({"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": True}, ["eos_token_id"]))
@example(b"9" * 4000)
@MANY
def test_a_changed_generation_config_loads_or_is_refused(changed_file):
    folder = FOLDERS["llama"]
    with file_of(folder, "generation_config.json", changed_file), loads_or_names("generation_config.json"):
        load_and_run(folder)


def sharded(root):
    folder = Path(root) / "sharded"
    small_model().save_pretrained(folder, max_shard_bytes=5_000)
    return folder


SHARDED = sharded(ROOT.name)
INDEX = json.loads((SHARDED / "model.safetensors.index.json").read_text())


@given(files(INDEX, ["weight_map"]))
@MANY
def test_a_changed_index_loads_or_is_refused(changed_file):
    name = "model.safetensors.index.json"
    with file_of(SHARDED, name, changed_file), loads_or_names(name, ".safetensors", "config.json", "missing"):
        load_and_run(SHARDED)


def split(file):
    """A safetensors file's header, parsed, and its bytes after that."""
    raw = Path(file).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


HEADER, WEIGHTS = split(FOLDERS["llama"] / "model.safetensors")


@given(files(HEADER), st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
@MANY
def test_a_changed_safetensors_header_loads_or_is_refused(header, off):
    size = min(max(len(header) + off, 0), 2**64 - 1)
    data = size.to_bytes(8, "little") + header + WEIGHTS
    with (
        file_of(FOLDERS["llama"], "model.safetensors", data),
        loads_or_names("model.safetensors", "config.json", "missing"),
    ):
        load_and_run(FOLDERS["llama"])


def adapter_of(root):
    folder = Path(root) / "adapter"
    save_adapter(add_lora(small_model(), rank=2, alpha=4), folder)
    return folder


ADAPTER = adapter_of(ROOT.name)
ADAPTER_CONFIG = json.loads((ADAPTER / "adapter_config.json").read_text())


def load_adapter_and_run(folder):
    model = small_model()
    try:
        load_adapter(model, folder)
    except (ValueError, OSError):
        assert not any("lora" in name for name, _ in model.named_parameters()), "refused, but the model has changed"
        raise
    assert model(TOKENS).shape == (1, 4, VOCAB)


@given(files(ADAPTER_CONFIG, ADAPTER_KEYS))
@MANY
def test_a_changed_adapter_config_loads_or_is_refused(changed_file):
    with (
        file_of(ADAPTER, "adapter_config.json", changed_file),
        loads_or_names("adapter_config.json", "adapter_model.safetensors"),
    ):
        load_adapter_and_run(ADAPTER)


ADAPTER_HEADER, ADAPTER_WEIGHTS = split(ADAPTER / "adapter_model.safetensors")


@given(files(ADAPTER_HEADER))
@example(text_of({"x": {"dtype": "line\nline", "shape": [1], "data_offsets": [0, 4]}}))
@MANY
def test_a_changed_adapter_header_loads_or_is_refused(header):
    data = len(header).to_bytes(8, "little") + header + ADAPTER_WEIGHTS
    names = ("adapter_model.safetensors",)
    with file_of(ADAPTER, "adapter_model.safetensors", data), loads_or_names(*names):
        load_adapter_and_run(ADAPTER)


# ------------------------------------------------------------------------------------ side files and results


SIDE_VALUES = {"number": 0.5, "embedding": "ADwAQA==", "reference_nll": [0.5, 1.0]}
SIDE_FILES = {
    field: st.lists(files({"id": "a", field: value}, ["id", field]), min_size=1, max_size=2)
    for field, value in SIDE_VALUES.items()
}
SETTINGS = {"settings": {"model": "m"}}


def line(**row):
    return [text_of({"id": "a", **row})]


@given(
    st.sampled_from(list(SIDE_FILES)).flatmap(lambda field: st.tuples(st.just(field), SIDE_FILES[field])),
    st.one_of(st.just(text_of(SETTINGS)), files(SETTINGS)),
)
@example(("number", line(number=10**400)), text_of(SETTINGS))
@example(("number", line(number=DEEP)), text_of(SETTINGS))
@example(("number", line(number=1)), text_of([]))
@example(("number", line(number=1)), text_of({}))
@example(("number", line(number=1)), text_of({"settings": "x"}))
@example(("embedding", line(embedding="ADwAQA==") + line(id="b", embedding="ADw=")), text_of(SETTINGS))
@example(("reference_nll", line(reference_nll=0.5)), text_of(SETTINGS))
@example(("reference_nll", line(reference_nll=[10**400, 1])), text_of(SETTINGS))
@MANY
def test_a_changed_side_file_is_read_or_refused(field_and_lines, about):
    field, lines = field_and_lines
    with tempfile.TemporaryDirectory() as folder, loads_or_names(f"{field}.json"):
        folder = Path(folder)
        (folder / f"{field}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        (folder / f"{field}.json").write_bytes(about)
        open_side_file(folder, field, {"model": "m"})
        sample = Sample("a", [1, 2, 3], [IGNORE_INDEX, 2, 3])
        if field == "reference_nll":
            token_values(field, [sample], str(folder))
        elif field == "embedding":
            sample_values(field, [sample], "rows.json", str(folder))
        else:
            read_side_file(folder, field)


RESULT = {
    "task": "arc",
    "protocol": "paper",
    "score": 50.0,
    "items": [{"id": f"i{i}", "prompt_id": f"p{i}", "correct": i < 2, "acc_norm": 0.5} for i in range(3)],
}


ITEM = RESULT["items"][0]


@given(files(RESULT, ["task", "protocol", "items"]), st.sampled_from(["correct", "acc_norm", "id"]), st.booleans())
@example(text_of({**RESULT, "items": 5}), "correct", False)
@example(text_of({**RESULT, "items": "items"}), "correct", False)
@example(text_of({**RESULT, "items": [{**ITEM, "id": ["i0"]}]}), "correct", False)
@example(text_of({**RESULT, "items": [{**ITEM, "id": 5}, ITEM]}), "correct", False)
@example(text_of({**RESULT, "items": [{**ITEM, "correct": 10**400}]}), "correct", True)
@example(text_of({**RESULT, "task": {}}), "correct", True)
@example(text_of(DEEP), "correct", True)
@MANY
def test_a_changed_result_file_is_compared_or_refused(changed_file, metric, both):
    from eval import compare

    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a.json", Path(folder) / "b.json"
        a.write_bytes(changed_file if both else text_of(RESULT))
        b.write_bytes(changed_file)
        with loads_or_names("a.json", "b.json"):
            compare.compare_files(str(a), str(b), metric)


def test_two_items_of_one_id_are_refused():
    from eval import compare

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_bytes(text_of({**RESULT, "items": [ITEM, {**ITEM, "correct": False}]}))
        with pytest.raises(
            ValueError, match=r"a\.json: items\[1\]: id must be a text that no item before has, got 'i0'"
        ):
            compare.read_result(str(path))


# ------------------------------------------------------------------------------------------------- tokenizers

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
TOKENIZER_CONFIG = {
    **{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "add_eos_token": False},
    "chat_template": [{"name": "default", "template": TEMPLATE}],
}
CHAT_TEMPLATES = st.sampled_from(
    [*("{{ 1 / 0 }}", "{{ messages[9]['x']['y'] }}", "{% for", "{{ messages | join(1) }}", "{{ ''.x.y }}"), TEMPLATE]
)
WORDS = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", "hello", "world", "user", ":"])}
TOKENIZER = {
    **{"version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"}},
    "added_tokens": [
        {
            **{"id": number, "content": word, "single_word": False, "lstrip": False, "rstrip": False},
            **{"normalized": False, "special": True},
        }
        for word, number in list(WORDS.items())[:3]
    ],
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>"},
}


def tokenizer_folder(root):
    folder = Path(root) / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(text_of(TOKENIZER))
    (folder / "tokenizer_config.json").write_bytes(text_of(TOKENIZER_CONFIG))
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}
    (folder / "rows.json").write_bytes(text_of([row]))
    return folder


WITH_TOKENIZER = tokenizer_folder(ROOT.name)


def tokenise(folder):
    tokenizer = TextTokenizer.from_pretrained(folder)
    tokenizer.decode(tokenizer.encode("hello world"))
    load_samples(folder / "rows.json", tokenizer, "auto", 40)


TOKENIZER_CONFIG_KEYS = ["bos_token", "eos_token", "add_bos_token", "add_eos_token", "chat_template"]
OTHER_TEMPLATES = st.builds(lambda template: {**TOKENIZER_CONFIG, "chat_template": template}, CHAT_TEMPLATES)


@given(st.one_of(files(TOKENIZER_CONFIG, TOKENIZER_CONFIG_KEYS), OTHER_TEMPLATES.map(text_of)))
@example(b"{}")  # no EOS for the default template
@MANY
def test_a_changed_tokenizer_config_loads_or_is_refused(changed_file):
    names = ("tokenizer_config.json", "chat_template", "bos_token", "eos_token", "rows.json")
    with file_of(WITH_TOKENIZER, "tokenizer_config.json", changed_file), loads_or_names(*names):
        tokenise(WITH_TOKENIZER)


@given(files(TOKENIZER))
@example(text_of({**TOKENIZER, "model": {**TOKENIZER["model"], "unk_token": "<none>"}}))
@MANY
def test_a_changed_tokenizer_loads_or_is_refused(changed_file):
    names = ("tokenizer.json", "rows.json")
    with file_of(WITH_TOKENIZER, "tokenizer.json", changed_file), loads_or_names(*names):
        tokenise(WITH_TOKENIZER)
