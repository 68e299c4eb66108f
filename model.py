"""LLaMA-family decoders in one file: configuration, network, Hugging Face folders in and out.

Four families share the network and differ in a few lines: llama (2, 3, SmolLM2), mistral (sliding-window
attention), qwen2 (biases on queries, keys and values) and qwen3 (queries and keys normalised per head).

Modules have the names of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj`), so weights load without a
table of names. LoRA is in training/lora.py; generation and the KV cache are in eval/generation.py.

Shapes: B rows, T positions, H hidden size, V vocabulary, d head size.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from training.files import read_object, shown, shown_key, write_json, write_text, written_aside
from training.model_folder import (
    INDEX,
    Header,
    check_header,
    checkpoint_tensors,
    tensor_headers,
    tokenizer_files,
    weight_files,
)

# ------------------------------------------------------------------------------------- configuration


# The families, and transformers' default for each key that a config.json may leave out.
FAMILIES = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
}
ROPE_SCALING = {  # the keys of each rope_type
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and settings of a decoder, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", and the keys of ROPE_SCALING}
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it; None: all before it
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: dict) -> ModelConfig:
        """The configuration of a parsed config.json.

        Raises:
            ValueError: a key is missing, of the wrong type, or asks for what we lack, by name.
        """
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            expected = ", ".join(FAMILIES)
            raise ValueError(f"config.json: model_type {shown(family)} is not implemented; expected one of {expected}")
        raw = {**FAMILIES[family], **raw}

        def size(key: str, default: int | None = None) -> int:
            return positive(key, default if raw.get(key) is None else raw[key], int)

        window = size("sliding_window") if family == "mistral" and raw["sliding_window"] is not None else None
        only_value = {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0,
            "partial_rotary_factor": 1,
            "use_sliding_window": False,  # qwen's windows, on some layers only
            "quantization_config": None,
        }
        if raw.get("layer_types"):  # written by transformers 5; ours are all of one kind
            num_layers = len(raw["layer_types"]) if isinstance(raw["layer_types"], list) else 1
            only_value["layer_types"] = ["sliding_attention" if window else "full_attention"] * num_layers
        for key, value in only_value.items():
            if raw.get(key, value) != value:
                got, expected = shown(raw[key]), shown(value)
                raise ValueError(f"config.json: {key} = {got} is not implemented; expected {expected}")
        heads, hidden = size("num_attention_heads"), size("hidden_size")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(f"config.json: {heads} attention heads do not share {kv_heads} key-value heads evenly")
        if raw.get("head_dim") is None and hidden % heads:
            raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of the {heads} attention heads")
        head_dim = size("head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim must be even for rotary positions, got {head_dim}")
        tied, bos = raw.get("tie_word_embeddings"), raw.get("bos_token_id")
        if not isinstance(tied, bool | None):
            raise ValueError(f"config.json: tie_word_embeddings must be true or false, got {shown(tied)}")
        if type(bos) not in (int, type(None)):
            raise ValueError(f"config.json: bos_token_id must be an integer or null, got {shown(bos)}")
        rope_theta, rope_scaling = read_rope(raw)
        return cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            model_type=family,
            max_position_embeddings=size("max_position_embeddings"),
            rms_norm_eps=positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_window=window,
            tie_word_embeddings=bool(tied),
            bos_token_id=bos,
            eos_token_ids=read_eos(raw, "config.json"),
        )

    def ending_with(self, token_id: int | None) -> ModelConfig:
        """The same with one more EOS id, unless it has it (or token_id is None)."""
        known = token_id is None or token_id in self.eos_token_ids
        return self if known else replace(self, eos_token_ids=(*self.eos_token_ids, token_id))

    def to_dict(self) -> dict:
        """The config.json that `from_dict`, transformers and vLLM read back."""
        raw = asdict(self)
        eos = raw.pop("eos_token_ids")
        raw["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0] if eos else None
        if self.model_type != "mistral":
            del raw["sliding_window"]
        return {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu", **raw}


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder.

    Where there is a generation_config.json, its EOS ids end a generated text, not config.json's.
    """
    folder = Path(folder)
    raw, path = read_object(folder / "config.json"), folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    try:
        config = ModelConfig.from_dict(raw)
        if "eos_token_id" in generation:
            config = replace(config, eos_token_ids=read_eos(generation, "generation_config.json"))
        return config
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def positive(name: str, value: object, *kinds: type) -> float:
    """The value of a key of config.json, which must be a number above 0 (of the given kinds: int, float or both).

    Python's JSON has NaN, Infinity and integers of any length; torch's have 64 bits.
    """
    if type(value) not in (kinds or (int, float)) or not 0 < value < (2**63 if type(value) is int else math.inf):
        what = "integer" if kinds == (int,) else "number"
        raise ValueError(f"config.json: {name} must be a positive {what}, got {shown(value)}")
    return value


def read_eos(raw: dict, file: str) -> tuple[int, ...]:
    """eos_token_id of a parsed config.json or generation_config.json: an integer, a list of them, or null."""
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(f"{file}: eos_token_id must be an integer, a list of integers or null, got {shown(eos)}")
    return tuple(ids)


def read_rope(raw: dict) -> tuple[float, dict | None]:
    """rope_theta and rope_scaling of a config.json.

    `rope_parameters` (transformers 5) holds both. Earlier files have rope_theta outside of `rope_scaling`; the
    earliest spell its rope_type `type`. Refused by name: other rope types, keys that we do not know.
    """
    spellings = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key) is not None]
    for key in spellings:
        if not isinstance(raw[key], dict):
            raise ValueError(f"config.json: {key} must be an object or null, got {shown(raw[key])}")
        for inner, value in raw[key].items():
            if isinstance(value, dict | list):
                raise ValueError(f"config.json: {key}: {shown_key(inner)} = {shown(value)} is not implemented")
    spellings = [key for key in spellings if raw[key]]
    if len(spellings) == 2 and raw["rope_scaling"] != raw["rope_parameters"]:
        raise ValueError("config.json: rope_scaling and rope_parameters are both there and differ; expected one")
    where = spellings[0] if spellings else "rope_theta"
    rope = dict(raw[where]) if spellings else {}

    thetas = [theta for theta in (rope.pop("rope_theta", None), raw.get("rope_theta")) if theta is not None]
    theta = float(positive("rope_theta", thetas[0] if thetas else 10_000.0))
    old_spelling = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", old_spelling)
    if rope_type not in ROPE_SCALING:
        got, known = shown(rope_type), ", ".join(ROPE_SCALING)
        raise ValueError(f"config.json: {where}: rope_type {got} is not implemented; expected one of {known}")
    scaling = {key: positive(f"{where}: {key}", rope.pop(key, None)) for key in ROPE_SCALING[rope_type]}
    if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"config.json: {where}: high_freq_factor must be above low_freq_factor, got {scaling}")
    for key, value in rope.items():
        if (key, value) != ("partial_rotary_factor", 1):
            what = f"{shown_key(key)} = {shown(value)}"
            raise ValueError(f"config.json: {where}: {what} is not implemented for rope_type {rope_type!r}")
    return theta, {"rope_type": rope_type, **scaling} if scaling else None


# ------------------------------------------------------------------------------------------- network


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean square is taken in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_frequencies(cfg: ModelConfig, device: torch.device | None = None) -> Tensor:
    """The angle that a pair of a head turns by from one position to the next: (d/2,), fp32.

    Pair i turns by theta^(-2i/d). Scaling stretches the positions of a model trained on shorter rows: `linear`
    slows every pair down by `factor`; `llama3` only those that turn less than low_freq_factor times within the
    original length, leaves those that turn more than high_freq_factor times, and blends in between.
    """
    exponent = torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float32) / cfg.head_dim
    frequency = 1.0 / cfg.rope_theta**exponent
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequency
    slowed = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * slowed


def rotary(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and -+sin of each position's angles, as `rotate` takes them: (B, T), (d/2,) -> two (B, 1, T, d), fp32.

    At position p the pair (x_i, x_{i+d/2}) of every head is turned by p * frequencies[i].
    """
    angles = (position_ids.float()[..., None] * frequencies)[:, None]  # (B, 1, T, d/2): the same for every head
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's pairs (x_i, x_{i+d/2}) by their position's angle: (B, heads, T, d)."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


# ----------------------------------------------------------------------------- who attends to whom

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""A layer's number, its queries (B, heads, T, d), keys and values (B, kv_heads, T, d) -> (B, heads, T, d)."""

RunLayer = Callable[..., Tensor]
"""A layer's number, the layer, and its inputs (x, cos, sin, attend) -> its output (B, T, H)."""


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v over the slots that `seen` allows; causal where it is None."""
    if q.is_cuda and q.shape[1] != k.shape[1] and (q.dtype == torch.float32 or seen is not None):
        # Grouped heads: flash attention takes neither fp32 nor a mask, and of the other kernels only the one that
        # writes out all T x T weights takes them. With a key and a value for each query head, others do.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True)


def visible(position_ids: Tensor, slots: int, window: int | None) -> Tensor:
    """Which of the slots 0..S-1 a token at each position attends to: (B, T) -> (B, 1, T, S) bool."""
    distance = position_ids[:, None, :, None] - torch.arange(slots, device=position_ids.device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attend_rows(T: int, window: int | None, device: torch.device) -> Attend:
    """Causal attention in rows of T tokens, within the sliding window if there is one."""
    order = torch.arange(T, device=device)[None]
    seen = visible(order, T, window) if window is not None and window < T else None
    return lambda layer, q, k, v: attention(q, k, v, seen)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads and rotary positions."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, cfg.head_dim
        bias = cfg.model_type == "qwen2"
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, bias=bias)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim, bias=bias)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim, bias=bias)
        self.o_proj = nn.Linear(cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size, bias=False)
        self.normalised = cfg.model_type == "qwen3"
        if self.normalised:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B, T, H), each (B, heads, T, d); queries and keys are turned."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.normalised:  # under autocast, fp32 norm weights give fp32: back to what attention computes in
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        y = attend(self.layer, *self.qkv(x, cos, sin))
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = FeedForward(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder and its language-model head. Fresh weights are normal(0, 0.02); norms are ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # the folder that from_pretrained read; save_pretrained copies its tokenizer
        layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding.from_pretrained(  # unlike nn.Embedding, it draws no weights of its own
                    torch.empty(config.vocab_size, config.hidden_size), freeze=False
                ),
                "layers": layers,
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        for parameter in self.parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attend: Attend | None = None,
        run_layer: RunLayer | None = None,
    ) -> Tensor:
        """The last layer's normalised output, before the head: (B, T) -> (B, T, H).

        Attention is causal in row order, so padding on the right needs no mask: no real token sees it.

        Args:
            input_ids:    (B, T) int64.
            position_ids: (B, T) int64, rotary positions; default: 0..T-1.
            attend:       which tokens see which; default: each token sees its row up to itself. `training.packing`
                          has it for rows that stand end to end, `eval.generation` for a KV cache.
            run_layer:    how each layer is run; default: layer(x, cos, sin, attend). `training.layers` has others.
        """
        T, device = input_ids.shape[1], input_ids.device
        if position_ids is None:
            position_ids = torch.arange(T, device=device).expand_as(input_ids)
        attend = attend or attend_rows(T, self.config.sliding_window, device)
        cos, sin = rotary(position_ids, rotary_frequencies(self.config, device))
        x = self.model["embed_tokens"](input_ids)
        for number, layer in enumerate(self.model["layers"]):
            x = run_layer(number, layer, x, cos, sin, attend) if run_layer else layer(x, cos, sin, attend)
        return self.model["norm"](x)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Next-token logits: (B, T) -> (B, T, V). Right padding needs no mask."""
        return self.lm_head(self.hidden_states(input_ids, position_ids))

    # --------------------------------------------------------------------------------- checkpoints

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
    ) -> Transformer:
        """Load a Hugging Face folder: config.json and one .safetensors file or a sharded index.

        Sizes, names, shapes and types are checked on the headers of the files, before memory is taken. The network
        is then built on the meta device and takes each tensor as it is read from the memory-mapped file, so that
        what is allocated peaks at one model plus one tensor. On a CPU and with dtype None, which leaves each tensor
        as it is in the file, nothing is allocated: the weights are the mapped file.
        Strict: a missing, extra, truncated or misshapen tensor is an error, as is one that is not in fp32, fp16
        or bf16. Tied embeddings may be stored under either name.

        Raises:
            FileNotFoundError: no such folder, config.json or weights.
            ValueError: what config.json asks for is not implemented, or the weights do not fit it.
        """
        folder, config = Path(folder), read_config(folder)
        files = weight_files(folder)
        stored = {
            name: header
            for name, header in tensor_headers(files).items()
            if not name.endswith("rotary_emb.inv_freq")  # older checkpoints store it; config.json determines it
        }
        check_sizes(folder, config, stored)
        with torch.device("meta"):
            model = cls(config)
        model.source = folder
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = TIED if config.tie_word_embeddings else ()
        for name, header in stored.items():
            if name not in expected:
                raise ValueError(f"{header.file}: unexpected tensor {shown(name)}")
            check_header(name, header, expected[name], "config.json")
        missing = [name for name in expected if name not in stored and name not in tied]  # check_sizes found one tied
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}; config.json asks for it"
            )
        state = {
            name: tensor.to(device=device, dtype=dtype)
            for name, tensor in checkpoint_tensors(files)
            if name in expected
        }
        if tied:
            embedding, head = (state.get(name) for name in TIED)
            if embedding is not None and head is not None and not torch.equal(embedding, head):
                raise ValueError(
                    f"{folder}: config.json: tie_word_embeddings is true, but lm_head and embed_tokens differ"
                )
            state |= dict.fromkeys(TIED, head if embedding is None else embedding)
        model.load_state_dict(state, assign=True)
        if tied:
            model.lm_head.weight = model.model["embed_tokens"].weight  # one Parameter, not two of one storage
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = 5_000_000_000,
        extra_files: dict[str, object] | None = None,
    ) -> None:
        """Write the weights (LoRA merged, tied embeddings once), the tokenizer's files and config.json.

        One model.safetensors, or shards of at most max_shard_bytes (or one tensor) and their index; one shard at
        a time is held beside the model. Weights of an earlier save into the folder are replaced.

        Args:
            extra_files: the `files` of `write_tokenizer_files`.
        Raises:
            ValueError: a tokenizer's file is a link that `model_folder.tokenizer_files` refuses.
        """
        if self.source:
            tokenizer_files(self.source)  # a link that could not be copied is refused before anything is written
        tensors = {name: tensor for name, tensor in self.state_dict().items() if "lora_" not in name}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        shards, size = [[]], 0
        for name, tensor in tensors.items():
            size += tensor.nbytes
            if size > max_shard_bytes and shards[-1]:
                shards.append([])
                size = tensor.nbytes
            shards[-1].append(name)
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        files = files if len(files) > 1 else ["model.safetensors"]

        def final(name: str) -> Tensor:
            owner = self.get_submodule(name.rpartition(".")[0])
            merge = hasattr(owner, "merged_weight") and name.endswith(".weight")  # a layer of training/lora.py
            return (owner.merged_weight() if merge else tensors[name]).detach().cpu().contiguous()

        with written_aside(folder) as new:
            for file, names in zip(files, shards, strict=True):
                save_file({name: final(name) for name in names}, new / file, metadata={"format": "pt"})
            if len(files) > 1:
                weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
                total = sum(tensor.nbytes for tensor in tensors.values())
                write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            write_tokenizer_files(self, new, extra_files or {})
            dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
            write_json(new / "config.json", {**self.config.to_dict(), "torch_dtype": dtype})
            written = {file.name for file in new.iterdir()}
        for file in Path(folder).iterdir():
            if re.fullmatch(WEIGHT_FILES, file.name) and file.name not in written:
                file.unlink()


WEIGHT_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"


def write_tokenizer_files(model: Transformer, folder: Path, files: dict[str, object]) -> None:
    """Write the tokenizer's files of the folder that the model was loaded from, and generation_config.json.

    The EOS ids of generation_config.json are those of model.config; its other keys are the source's.

    Args:
        files: file name -> what to write in place of the copy: a text, a JSON value, or None to leave it out.
    Raises:
        ValueError: a file is a link that `model_folder.tokenizer_files` refuses.
    """
    for file in tokenizer_files(model.source) if model.source else []:
        if file.name not in files:
            shutil.copyfile(file, folder / file.name)
    for name, value in files.items():
        if value is not None:
            write_text(folder / name, value) if isinstance(value, str) else write_json(folder / name, value)
    path = folder / "generation_config.json"
    eos = model.config.to_dict()["eos_token_id"]
    generation = read_object(path) if path.is_file() else {"bos_token_id": model.config.bos_token_id}
    if eos is not None and generation.get("eos_token_id") != eos:
        write_json(path, {**generation, "eos_token_id": eos})


TIED = ("model.embed_tokens.weight", "lm_head.weight")  # one tensor where tie_word_embeddings is true


def check_sizes(folder: Path, config: ModelConfig, stored: dict[str, Header]) -> None:
    """ValueError where a size in config.json is not that of the weights, by key.

    It reads headers alone and comes before the network is built, which for sizes that the weights do not have could
    take any amount of time and memory.
    """
    layers = {name.split(".")[2] for name in stored if re.match(r"model\.layers\.\d+\.", name)}
    if len(layers) != config.num_hidden_layers:
        expected, got = config.num_hidden_layers, len(layers)
        raise ValueError(f"{folder}: config.json: num_hidden_layers is {expected}, but the weights hold {got}")
    embedding = next((name for name in TIED if name in stored), TIED[0])
    q, k, gate = (f"model.layers.0.{name}_proj.weight" for name in ("self_attn.q", "self_attn.k", "mlp.gate"))
    for key, expected, name, axis in (
        ("vocab_size", config.vocab_size, embedding, 0),
        ("hidden_size", config.hidden_size, embedding, 1),
        ("num_attention_heads x head_dim", config.num_attention_heads * config.head_dim, q, 0),
        ("num_key_value_heads x head_dim", config.num_key_value_heads * config.head_dim, k, 0),
        ("intermediate_size", config.intermediate_size, gate, 0),
    ):
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name!r} is missing")
        shape = stored[name].shape
        if len(shape) != 2 or shape[axis] != expected:
            got = f"tensor {name!r} has shape {shown(shape)}"
            raise ValueError(f"{folder}: config.json: {key} is {expected}, but {got}")
