"""LoRA (Hu et al., 2021): low-rank updates of frozen linear layers, saved and loaded in PEFT's adapter layout."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model import Transformer, checkpoint_tensors
from training.files import read_json, write_json, written_aside


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained low-rank update: W x + (alpha / rank) B A x (Hu et al. 2021).

    A (rank, in) starts Kaiming-uniform and B (out, rank) at zero, so that the update starts at zero. Both are
    kept in fp32 whatever the frozen weight is, and computed with in the dtype of the input.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        for name, parameter in base.named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach(), requires_grad=False))
        self.scale = alpha / rank
        device = base.weight.device
        drawn = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5))  # alike on every device
        self.lora_A = nn.Parameter(drawn.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        low = self.scale * F.linear(rows, self.lora_A.to(x.dtype))  # scaled here, where it is small
        y = F.linear(low, self.lora_B.to(x.dtype), self.bias)  # first: checkpointing then need not compute W x again
        # In place saves a pass over memory. Autocast does not cast its operands, so they are cast here.
        return y.addmm_(rows.to(y.dtype), self.weight.T.to(y.dtype)).unflatten(0, x.shape[:-1])

    def merged_weight(self) -> Tensor:
        """W + (alpha / rank) B A, summed in fp32 and rounded once to W's dtype."""
        merged = self.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())
        return merged.to(self.weight.dtype)


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: Transformer, rank: int, alpha: float, targets: tuple[str, ...] = LORA_TARGETS) -> Transformer:
    """Freeze the model and give every linear layer named in `targets` (all but lm_head) a LoRA update, in place.

    Raises:
        ValueError: rank below 1, a target the model does not have, or LoRA there already.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}")
    unknown = sorted(set(targets) - set(LORA_TARGETS))
    if unknown or not targets:
        raise ValueError(f"LoRA targets must be among {', '.join(LORA_TARGETS)}; got {', '.join(unknown) or 'none'}")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA layers already")
    model.requires_grad_(False)
    for layer in model.model["layers"]:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if name in targets:
                    setattr(block, name, LoRALinear(linear, rank, alpha))
    return model


def save_adapter(model: Transformer, folder: str | Path) -> None:
    """Write the LoRA weights in PEFT's layout: adapter_model.safetensors and adapter_config.json."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layers to save; call add_lora first")
    rank = next(iter(layers.values())).lora_A.shape[0]
    state = {
        f"base_model.model.{name}.{part}.weight": getattr(module, part).detach().cpu().contiguous()
        for name, module in layers.items()
        for part in ("lora_A", "lora_B")
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.source or ""),
        "r": rank,
        "lora_alpha": next(iter(layers.values())).scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with written_aside(folder) as new:
        save_file(state, new / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(new / "adapter_config.json", config)


def load_adapter(model: Transformer, folder: str | Path) -> Transformer:
    """Add the LoRA layers of a PEFT folder to `model`, in place; strict about settings, names and shapes.

    Raises:
        FileNotFoundError: adapter_config.json or adapter_model.safetensors is not there.
        ValueError: the adapter asks for what we lack, or its tensors do not fit the model.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    only_value = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
    for key, value in only_value.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}: adapter_config.json: {key} = {config[key]!r} is not implemented")
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        if config.get(key):
            raise ValueError(f"{folder}: adapter_config.json: {key} = {config[key]!r} is not implemented")
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        raise ValueError(f"{folder}: adapter_config.json: target_modules must be a list of names, got {targets!r}")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{folder}: adapter_config.json: {key} must be a number, got {config.get(key)!r}")
    add_lora(model, config["r"], config["lora_alpha"], tuple(targets))
    expected = {
        f"base_model.model.{name}.{part}.weight": getattr(module, part)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for part in ("lora_A", "lora_B")
    }
    found = dict(checkpoint_tensors(folder))
    if found.keys() != expected.keys():
        odd = min(found.keys() ^ expected.keys())
        raise ValueError(f"{folder}: adapter tensor {odd!r} is {'unexpected' if odd in found else 'missing'}")
    with torch.no_grad():
        for name, parameter in expected.items():
            if found[name].shape != parameter.shape:
                want, got = tuple(parameter.shape), tuple(found[name].shape)
                raise ValueError(f"{folder}: adapter tensor {name!r} must have shape {want}, got {got}")
            parameter.copy_(found[name])
    return model
