"""Tokenizer files that are not what they should be end in one line with the file; found by drawing wrong values."""

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import NAMED, RAW, folder_with, write

from data.sft import load_samples
from data.tokenizer import TextTokenizer

DEEP = "[" * 100_000
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONFIG_KEYS = ["bos_token", "eos_token", "pad_token", "added_tokens_decoder", "legacy", "tokenizer_class"]
CONFIG_KEYS += ["add_prefix_space", "split_special_tokens", "add_bos_token", "special_token"]
wrong_configs = json_values | st.dictionaries(st.sampled_from(CONFIG_KEYS), json_values, max_size=3)
TOKEN = {"content": "<new>", "special": True}


def loads_or_refuses(files):
    """Load a row with a tokenizer folder of these files: a sample, or an error of one line."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folder_with(folder, RAW)
        for name, value in files.items():
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        rows = write(folder, [{"prompt": "Hi", "response": "Yes"}])
        try:
            load_samples(rows, TextTokenizer.from_pretrained(folder), "chatml")
        except (ValueError, OSError) as error:
            assert str(folder) in str(error) or "needs the token" in str(error)


@given(wrong_configs)
@example({"added_tokens_decoder": {"135": TOKEN}})
@example({"added_tokens_decoder": {"x": TOKEN}})
@example({"added_tokens_decoder": {"140": TOKEN}})
@example({"added_tokens_decoder": {"135": {"content": ""}}})
@example({"added_tokens_decoder": {"135": {"content": "\ud800"}}})
@example({"added_tokens_decoder": [TOKEN]})
@example({"bos_token": {"content": ["<s>"]}})
@example({"bos_token": "\ud800"})
def test_a_wrong_tokenizer_config_loads_or_ends_in_one_line(config):
    loads_or_refuses({"tokenizer_config.json": config})
    if isinstance(config, dict):
        loads_or_refuses({"tokenizer_config.json": NAMED | config})


@given(json_values | st.dictionaries(st.text(max_size=6), st.integers(-2, 200) | st.text(max_size=2), max_size=3))
@example({"<new>": 135})
@example({"a": 135})
@example({"": 135})
@example({"": float("inf")})
def test_a_wrong_added_tokens_json_loads_or_ends_in_one_line(tokens):
    loads_or_refuses({"added_tokens.json": tokens})


def test_json_nested_too_deep_and_no_json_end_in_one_line():
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json"):
        for text in (DEEP, "{", "", '{"a": 1e999'):
            loads_or_refuses({name: text})


paths = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@settings(max_examples=150)
@given(paths, json_values | st.just({"type": "Precompiled", "precompiled_charsmap": "AAAA"}))
@example([7], {"type": "Precompiled", "precompiled_charsmap": "AAAA"})
def test_a_wrong_tokenizer_json_loads_or_ends_in_one_line(path, value):
    state = json.loads(RAW.to_str())
    target = state
    for step in path[:-1]:
        inner = list(target.values())[step % len(target)] if isinstance(target, dict) and target else None
        target = inner if isinstance(inner, dict) and inner else target
    target[list(target)[path[-1] % len(target)]] = value
    loads_or_refuses({"tokenizer.json": state})
