"""Make the golden files: small random models of every family, as transformers writes and computes them.

    python tests/golden/make.py          (needs the `parity` extra; writes beside this file)

Each folder holds config.json and model.safetensors from transformers' save_pretrained, and golden.safetensors:
input_ids (B, T), logits (B, T, V) in fp32, and for `llama` the gradients of the mean next-token NLL.
The tests read them without transformers.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
}
# With heads of 6 and theta 100 the pairs turn once in 6, 29 and 135 positions: llama3's three bands at a length of 64.
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral_no_window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
}


def make(name: str, settings: dict) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # large enough that attention, biases and norms all matter
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    input_ids = torch.randint(config.vocab_size, (2, 24))
    logits = model(input_ids).logits
    golden = {"input_ids": input_ids, "logits": logits.detach()}
    if name == "llama":
        F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
        golden |= {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()}
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    save_file(golden, folder / "golden.safetensors")


if __name__ == "__main__":
    for name, settings in MODELS.items():
        make(name, settings)
