"""Hypothesis profiles, and what several tests tune: a small checkpoint and rows for it.

The default profile tries the same examples every time. HYPOTHESIS_PROFILE=explore searches at random, deep longer.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from pretended_gpu import gpu  # noqa: F401 - a fixture

from model import ModelConfig, Transformer

settings.register_profile("default", deadline=None, derandomize=True)
# A profile inherits what it does not set from the one that is loaded, so these say that they are random.
settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
settings.register_profile("deep", deadline=None, derandomize=False, print_blob=True, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)  # the tests' tensors are tiny: threads would only wait for each other

BASE = Path(__file__).resolve().parents[1] / "data" / "tiny" / "base"
COLOURS = ["red", "green", "blue", "black", "white"]
PLACES = ["near the river", "in the big town", "on the hill", "by the old mill, far from the sea"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model of random weights, with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vocab = json.loads((BASE / "config.json").read_text())["vocab_size"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=vocab, tie_word_embeddings=True, **heads, **sizes))
    model.source = BASE
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [
        {"id": f"r{i}", "instruction": f"What is number {i}?", "output": f"It is {COLOURS[i % 5]} {PLACES[i % 4]}."}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path
