"""LoRA (Hu et al., 2021): low-rank updates of frozen linear layers, saved and loaded in PEFT's adapter layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model import Transformer, read_eos, write_tokenizer_files
from training.files import read_object, shown, shown_key, write_json, written_aside
from training.model_folder import check_header, checkpoint_tensors, tensor_headers


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


PREFIX = "base_model.model."  # of the names of tensors, in PEFT's layout
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: Transformer, rank: int, alpha: float, targets: Sequence[str] = LORA_TARGETS) -> Transformer:
    """Freeze the model and give every linear layer that `targets` name (all but lm_head) a LoRA update, in place.

    Raises:
        ValueError: rank below 1, a target the model does not have, or LoRA there already.
    """
    if not 1 <= rank <= model.config.hidden_size:
        raise ValueError(f"LoRA rank (--lora-rank) must be in [1, hidden_size {model.config.hidden_size}], got {rank}")
    layers = targeted(model, targets)
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA layers already")
    model.requires_grad_(False)
    for name in layers:
        block, _, last = name.rpartition(".")
        setattr(model.get_submodule(block), last, LoRALinear(model.get_submodule(name), rank, alpha))
    return model


def targeted(model: Transformer, targets: Sequence[str]) -> list[str]:
    """The names of the linear layers (all but lm_head) that `targets` name, in the model's order.

    As in peft, a target is a layer's whole name or the last parts of it: `q_proj`, `0.self_attn.q_proj`.

    Raises:
        ValueError: a target names no such layer, or there is none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    ends = {name: {name.split(".", skipped)[-1] for skipped in range(name.count(".") + 1)} for name in linear}
    unknown = sorted(set(targets) - set().union(*ends.values()))
    if unknown or not targets:
        got = ", ".join(map(shown_key, unknown[:3])) or "none"
        raise ValueError(f"LoRA targets must be among {', '.join(LORA_TARGETS)}; got {got}")
    return [name for name in linear if not ends[name].isdisjoint(targets)]


def save_adapter(model: Transformer, folder: str | Path, files: dict[str, object] | None = None) -> None:
    """Write the LoRA weights in PEFT's layout: adapter_model.safetensors and adapter_config.json.

    The tokenizer's files are written beside them; files: as in `model.write_tokenizer_files`.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layers to save; call add_lora first")
    rank = next(iter(layers.values())).lora_A.shape[0]
    ends = sorted({name.rpartition(".")[2] for name in layers})
    state = {
        f"{PREFIX}{name}.{part}.weight": getattr(module, part).detach().cpu().contiguous()
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
        "target_modules": ends if targeted(model, ends) == list(layers) else list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with written_aside(folder) as new:
        save_file(state, new / "adapter_model.safetensors", metadata={"format": "pt"})
        write_tokenizer_files(model, new, files or {})
        write_json(new / "adapter_config.json", config)


# What load_adapter does with the keys of adapter_config.json; the names are those of peft's LoraConfig.
READ = {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
ONLY = {  # what is implemented
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The weights at the start of training, which those of the file replace. PiSSA, OLoRA, CorDA, LoftQ and others
    # also change the base, and their adapters are an update of that changed base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
WITHOUT_EFFECT = {  # on a loaded adapter, whatever their value
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# Every other key, of peft today or later, must be unset: null, false, 0 or empty.


def load_adapter(model: Transformer, folder: str | Path) -> Transformer:
    """Add the LoRA layers of a PEFT folder to `model`, in place; strict about settings, names and shapes.

    The tensors' names in adapter_model.safetensors, the only file of weights that is read, say which layers have
    LoRA. adapter_config.json must name the same layers, except where it does so by a regular expression: a
    stranger's is not run, because it can take forever.

    Raises:
        FileNotFoundError: adapter_config.json or adapter_model.safetensors is not there.
        ValueError: the adapter asks for what we lack, by key, or its tensors do not fit the model. The model is
            then as it was.
    """
    config_file, file = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    config = read_object(config_file)
    linear = {name: model.get_submodule(name) for name in targeted(model, LORA_TARGETS)}
    try:
        check_adapter_config(config)
        named = layers_of(config, model)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    if not file.is_file():
        pickled = "; adapter_model.bin is not read: a pickle can run code. Save it with safe_serialization=True"
        raise FileNotFoundError(f"{file}: no such file{pickled if file.with_suffix('.bin').is_file() else ''}")
    found, rank = tensor_headers([file]), config["r"]
    if named is None:
        in_file = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in found}
        named = [name for name in linear if name in in_file]
    expected = {f"{PREFIX}{name}.lora_A.weight": (rank, linear[name].in_features) for name in named}
    expected |= {f"{PREFIX}{name}.lora_B.weight": (linear[name].out_features, rank) for name in named}
    if odd := sorted(found.keys() ^ expected.keys()):
        what = "unexpected" if odd[0] in found else "missing"
        raise ValueError(f"{file}: tensor {shown(odd[0])} is {what}")
    if not found:
        raise ValueError(f"{file}: expected tensors, got none")
    for name, header in found.items():
        check_header(name, header, expected[name], "adapter_config.json")
    add_lora(model, rank, config["lora_alpha"], named)
    with torch.no_grad():
        for name, tensor in checkpoint_tensors([file]):
            model.get_parameter(name.removeprefix(PREFIX).removesuffix(".weight")).copy_(tensor)
    join_end_tokens(model, Path(folder))
    return model


def check_adapter_config(config: dict) -> None:
    """ValueError where an adapter_config.json asks for what we lack, or a number in it is none, by key."""
    for key, value in {"peft_type": None, **config}.items():
        if key in ONLY:
            accepted = any(type(value) is type(other) and value == other for other in ONLY[key])
        else:
            accepted = key in READ or key in WITHOUT_EFFECT or not value
        if not accepted:
            raise ValueError(f"{shown_key(key)} = {shown(value)} is not implemented")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r must be a positive integer, got {shown(rank)}")
    if type(alpha) not in (int, float) or not abs(alpha) < 2**63:
        raise ValueError(f"lora_alpha must be a number, got {shown(alpha)}")


def layers_of(config: dict, model: Transformer) -> list[str] | None:
    """The layers that an adapter_config.json names, as peft reads it; None where it has a regular expression.

    Raises:
        ValueError: a key is of another type, or names a layer that the model does not have.
    """

    def entries(key: str, kind: type, what: str) -> list:
        value = config.get(key)
        value = [value] if type(value) is int else [] if value is None and key != "target_modules" else value
        if not isinstance(value, list) or any(type(entry) is not kind for entry in value):
            raise ValueError(f"{key} must be a list of {what}, got {shown(config.get(key))}")
        return value

    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise ValueError(f"layers_pattern = {shown(config['layers_pattern'])} is not implemented")
    if any(isinstance(config.get(key), str) for key in ("target_modules", "exclude_modules")):
        return None
    excluded = entries("exclude_modules", str, "names")
    numbers = entries("layers_to_transform", int, "integers")
    return [
        name
        for name in targeted(model, entries("target_modules", str, "names"))
        if not any(f".{name}".endswith(f".{entry}") for entry in excluded)
        and (not numbers or int(name.split(".")[2]) in numbers)
    ]


def join_end_tokens(model: Transformer, folder: Path) -> None:
    """Let the EOS ids of an adapter's generation_config.json end the model's answers too."""
    path = folder / "generation_config.json"
    for token_id in read_eos(read_object(path), str(path)) if path.is_file() else ():
        model.config = model.config.ending_with(token_id)
