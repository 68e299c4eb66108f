"""Models of a few thousand random weights in every family, and rows for them: what many tests share."""

import torch
from hypothesis import strategies as st

from data.sft import Sample
from model import ModelConfig, Transformer
from training.lora import LoRALinear, add_lora

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
    """`small_model` with LoRA updates that are not zero."""
    model = add_lora(small_model(seed, **changes), rank, alpha=2 * rank)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.normal_(std=0.3)
    return model


families = st.sampled_from(list(FAMILIES))
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
token_ids = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=12)


@st.composite
def samples(draw, max_size=6):
    """Rows in which some tokens after the first are answers, at least one."""
    rows = []
    for i, row in enumerate(draw(st.lists(token_ids, min_size=1, max_size=max_size))):
        answer = draw(st.lists(st.booleans(), min_size=len(row) - 1, max_size=len(row) - 1).filter(any))
        labels = [-100, *(token if is_answer else -100 for token, is_answer in zip(row[1:], answer, strict=True))]
        rows.append(Sample(str(i), row, labels))
    return rows


def assert_same_gradients(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 2e-5 * q.grad.norm() + 2e-5, name
