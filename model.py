"""LLaMA-family decoders in one file: the network, Hugging Face folders in and out, LoRA, generation.

Four families share the network and differ in a few lines: llama (2, 3, SmolLM2), mistral (attention through a
sliding window), qwen2 (biases on queries, keys and values) and qwen3 (queries and keys normalised per head).

Read it top to bottom: configuration, RMSNorm, rotary positions, attention, feed-forward, decoder,
checkpoints, LoRA and PEFT's adapter layout, generation with a KV cache. Modules carry the names of
Hugging Face checkpoints (`model.layers.0.self_attn.q_proj`), so weights load without a table of names.

Shapes: B rows, T positions, H hidden size, V vocabulary, d head size, L layers, S cache slots.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ------------------------------------------------------------------------------------- configuration


# The families, and what transformers takes where a config.json of theirs is silent.
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
        """Read a parsed config.json; ValueError names the key that is missing or asks for what we lack."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(
                f"config.json: model_type {family!r} is not implemented; expected one of {', '.join(FAMILIES)}"
            )
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
            only_value["layer_types"] = ["sliding_attention" if window else "full_attention"] * len(raw["layer_types"])
        for key, value in only_value.items():
            if raw.get(key, value) != value:
                raise ValueError(f"config.json: {key} = {raw[key]!r} is not implemented; expected {value!r}")
        heads, hidden = size("num_attention_heads"), size("hidden_size")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(f"config.json: {heads} attention heads do not share {kv_heads} key-value heads evenly")
        if raw.get("head_dim") is None and hidden % heads:
            raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of the {heads} attention heads")
        head_dim = size("head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim must be even for rotary positions, got {head_dim}")
        rope_theta, rope_scaling = read_rope(raw)
        eos = raw.get("eos_token_id")
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
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def to_dict(self) -> dict:
        """The config.json that `from_dict`, transformers and vLLM read back."""
        raw = asdict(self)
        eos = raw.pop("eos_token_ids")
        raw["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0] if eos else None
        if self.model_type != "mistral":
            del raw["sliding_window"]
        return {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu", **raw}


def positive(name: str, value: object, *kinds: type) -> float:
    """The value of a key of config.json, which must be a number above 0 (of the given kinds: int, float or both)."""
    if type(value) not in (kinds or (int, float)) or not 0 < value < math.inf:
        what = "integer" if kinds == (int,) else "number"
        raise ValueError(f"config.json: {name} must be a positive {what}, got {value!r}")
    return value


def read_rope(raw: dict) -> tuple[float, dict | None]:
    """rope_theta and rope_scaling of a config.json.

    `rope_parameters` (transformers 5) holds both; before it rope_theta stood outside of `rope_scaling`, whose
    rope_type was spelled `type` still earlier. Refused by name: other rope types, keys we do not know.
    """
    spellings = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if len(spellings) == 2 and raw["rope_scaling"] != raw["rope_parameters"]:
        raise ValueError("config.json: rope_scaling and rope_parameters are both there and differ; expected one")
    where = spellings[0] if spellings else "rope_theta"
    rope = dict(raw[where]) if spellings else {}

    theta = float(positive("rope_theta", rope.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0))
    old_spelling = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", old_spelling)
    if rope_type not in ROPE_SCALING:
        known = ", ".join(ROPE_SCALING)
        raise ValueError(f"config.json: {where}: rope_type {rope_type!r} is not implemented; expected one of {known}")
    scaling = {key: positive(f"{where}: {key}", rope.pop(key, None)) for key in ROPE_SCALING[rope_type]}
    for key, value in rope.items():
        if (key, value) != ("partial_rotary_factor", 1):
            raise ValueError(f"config.json: {where}: {key} = {value!r} is not implemented for rope_type {rope_type!r}")
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


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v over the slots that `seen` allows; causal where it is None."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True)


def visible(position_ids: Tensor, slots: int, window: int | None) -> Tensor:
    """Which of the slots 0..S-1 a token at each position attends to: (B, T) -> (B, 1, T, S) bool."""
    distance = position_ids[:, None, :, None] - torch.arange(slots, device=position_ids.device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attend_rows(T: int, window: int | None, device: torch.device) -> Attend:
    """Rows of T tokens side by side: causal in row order."""
    order = torch.arange(T, device=device)[None]
    seen = visible(order, T, window) if window is not None and window < T else None
    return lambda layer, q, k, v: attention(q, k, v, seen)


def attend_cached(cache: KVCache, position_ids: Tensor, window: int | None) -> Attend:
    """Every token sees what its row has put into the cache so far."""
    seen = visible(position_ids, cache.move_to(position_ids), window)
    return lambda layer, q, k, v: attention(q, *cache.extend(layer, k, v), seen)


def attend_packed(lengths: list[int], window: int | None, device: torch.device) -> Attend:
    """Rows of these lengths end to end in one: each sees itself alone.

    On a GPU in 16 bits one varlen_attn call, else one call a row: a mask over all pairs of tokens costs far more.
    """
    if len(lengths) == 1:
        return attend_rows(lengths[0], window, device)
    each = {length: attend_rows(length, window, device) for length in set(lengths)}
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            return varlen_attention(q, k, v, ends, max(lengths), window)
        rows = zip(lengths, *(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([each[length](layer, *qkv) for length, *qkv in rows], dim=2)

    return attend


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: int | None) -> Tensor:
    """attend_packed on torch's kernel for rows of unequal length; (1, heads, N, d) in and out."""
    from torch.nn.attention import varlen  # not in every torch that the rest runs on

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, heads, d)
    options = {"window_size": (-1 if window is None else window - 1, 0)}  # how many are seen to the left, to the right
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        options["enable_gqa"] = True
    else:  # torch 2.11
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return varlen.varlen_attn(q, k, v, ends, ends, longest, longest, **options).transpose(0, 1)[None]


class KVCache:
    """Keys and values of every layer; slot p of row b holds position p of that row.

    Rows of unequal length sit side by side: each writes at its own positions and sees no slot past them,
    so that what a shorter row's padding wrote is overwritten before it can be read.
    """

    def __init__(self, model: Transformer, rows: int, slots: int):
        cfg, weight = model.config, model.lm_head.weight
        shape = (cfg.num_hidden_layers, rows, cfg.num_key_value_heads, slots, cfg.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)

    def move_to(self, position_ids: Tensor) -> int:
        """Say where the tokens of the coming forward pass stand, (B, T); return how many slots are in use then.

        Raises:
            ValueError: a position has no slot.
        """
        self.position_ids, self.slots = position_ids, int(position_ids.max()) + 1
        if self.slots > self.keys.shape[3]:
            raise ValueError(f"position {self.slots - 1} does not fit: the cache has {self.keys.shape[3]} slots")
        return self.slots

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, heads, T, d) of one layer; return all its keys and values so far."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[layer][rows, :, self.position_ids] = k.transpose(1, 2)
        self.values[layer][rows, :, self.position_ids] = v.transpose(1, 2)
        return self.keys[layer][:, :, : self.slots], self.values[layer][:, :, : self.slots]

    def keep_rows(self, rows: Tensor) -> None:
        """Let the other rows leave the batch."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


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
        if self.normalised:
            q, k = self.q_norm(q), self.k_norm(k)
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


def replay(layer: nn.Module, known: Tensor, x: Tensor, *places) -> Tensor:
    """layer(x, *places) whose value is known: the layer runs on the way back alone, for its gradients."""

    def run(x: Tensor) -> Tensor:
        return layer(x, *places) if torch.is_grad_enabled() else known  # `checkpoint` comes first without gradients

    x = x if x.requires_grad else x.detach().requires_grad_()  # frozen embeddings: or checkpoint finds nothing to do
    return checkpoint(run, x, use_reentrant=True, preserve_rng_state=False)


class Transformer(nn.Module):
    """The decoder and its language-model head. Fresh weights are normal(0, 0.02); norms are ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # keep only the layers' inputs for the backward pass; make the rest again
        self.source: Path | None = None  # the folder that from_pretrained read, whose tokenizer files travel on
        layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding.from_pretrained(  # which, unlike nn.Embedding, draws no weights of its own
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
        cache: KVCache | None = None,
        lengths: list[int] | None = None,
        outputs: list[Tensor] | None = None,
        known: list[Tensor] | None = None,
    ) -> Tensor:
        """The last layer's normalised output, before the head: (B, T) -> (B, T, H).

        Attention is causal in row order, so padding on the right needs no mask: no real token sees it.

        Args:
            input_ids:    (B, T) int64.
            position_ids: (B, T) int64, rotary positions; 0..T-1 when not given.
            cache:        attend to earlier tokens too, and remember these.
            lengths:      input_ids (1, N) is packed: rows of these lengths stand end to end, with positions from 0
                          each, and none sees another. No cache then.
            outputs:      takes what each layer gives, (B, T, H); for a later pass with the same weights:
            known:        what each layer gives for these input_ids. No layer is run then; each is made again from its
                          input on the way back, as with activation_checkpointing.
        """
        x, *places = self._enter(input_ids, position_ids, cache, lengths)
        for number, layer in enumerate(self.model["layers"]):
            if known is not None:
                x = replay(layer, known[number], x, *places)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *places, use_reentrant=False)
            else:
                x = layer(x, *places)
            if outputs is not None:
                outputs.append(x)
        return self.model["norm"](x)

    def _enter(self, input_ids, position_ids=None, cache=None, lengths=None) -> tuple[Tensor, Tensor, Tensor, Attend]:
        """What the layers take: embeddings (B, T, H), cos, sin, and who attends to whom."""
        T, device, window = input_ids.shape[1], input_ids.device, self.config.sliding_window
        if position_ids is None:
            order = torch.cat([torch.arange(length) for length in lengths or [T]]).to(device)
            position_ids = order.expand_as(input_ids)
        if cache is not None:
            attend = attend_cached(cache, position_ids, window)
        elif lengths is not None:
            attend = attend_packed(lengths, window, device)
        else:
            attend = attend_rows(T, window, device)
        cos, sin = rotary(position_ids, rotary_frequencies(self.config, device))
        return self.model["embed_tokens"](input_ids), cos, sin, attend

    def queries_and_keys(
        self, input_ids: Tensor, layer: int = -1, lengths: list[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention of one layer computes with, for those who study it; `lengths` as in hidden_states.

        Returns:
            Queries (B, heads, T, d), keys (B, key-value heads, T, d), both turned to their positions, and the
            normalised hidden states (B, T, H) that they were made from.
        """
        x, *places = self._enter(input_ids, lengths=lengths)
        *before, last = self.model["layers"][: layer % len(self.model["layers"]) + 1]
        for earlier in before:
            x = earlier(x, *places)
        x = last.input_layernorm(x)
        q, k, _ = last.self_attn.qkv(x, *places[:2])
        return q, k, x

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Next-token logits: (B, T) -> (B, T, V). Right padding needs no mask."""
        return self.lm_head(self.hidden_states(input_ids, position_ids))

    # --------------------------------------------------------------------------------- checkpoints

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Transformer:
        """Load a Hugging Face folder: config.json and one .safetensors file or a sharded index.

        The network is built on the meta device and takes each tensor as it is read from the memory-mapped
        file, so that what is allocated peaks at one model plus one tensor.
        Strict: a missing, extra, truncated or misshapen tensor is an error, as is one that is not in fp32, fp16
        or bf16. Where there is a generation_config.json, its EOS ids end a generated text, not config.json's.

        Raises:
            FileNotFoundError: no such folder, config.json or weights.
            ValueError: what config.json asks for is not implemented, or the weights do not fit it.
        """
        folder = Path(folder)
        raw = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():
            raw["eos_token_id"] = read_json(folder / "generation_config.json").get(
                "eos_token_id", raw.get("eos_token_id")
            )
        try:
            config = ModelConfig.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        with torch.device("meta"):
            model = cls(config)
        model.source = folder
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = {}
        for name, tensor in checkpoint_tensors(folder):
            if name.endswith("rotary_emb.inv_freq"):
                continue  # older checkpoints store these angles; config.json determines them
            if name not in expected:
                raise ValueError(f"{folder}: unexpected tensor {name!r}")
            if tensor.shape != expected[name]:
                want, got = tuple(expected[name]), tuple(tensor.shape)
                raise ValueError(f"{folder}: tensor {name!r} must have shape {want} by config.json, got {got}")
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"{folder}: tensor {name!r} must be fp32, fp16 or bf16, got {tensor.dtype}")
            state[name] = tensor.to(device=device, dtype=dtype)
        if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
            embedding = state["model.embed_tokens.weight"]
            if not torch.equal(state.get("lm_head.weight", embedding), embedding):
                raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head and embed_tokens differ")
            state["lm_head.weight"] = embedding
        missing = [name for name in expected if name not in state]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
        model.load_state_dict(state, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model["embed_tokens"].weight  # one Parameter, not two of one storage
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write the weights (LoRA merged, tied embeddings once), the tokenizer's files and config.json.

        One model.safetensors, or shards of at most max_shard_bytes (or one tensor) and their index; one shard at
        a time is held beside the model. Weights of an earlier save into the folder are replaced.
        """
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
            merge = isinstance(owner, LoRALinear) and name.endswith(".weight")
            return (owner.merged_weight() if merge else tensors[name]).detach().cpu().contiguous()

        with written_aside(folder) as new:
            for file, names in zip(files, shards, strict=True):
                save_file({name: final(name) for name in names}, new / file, metadata={"format": "pt"})
            if len(files) > 1:
                weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
                total = sum(tensor.nbytes for tensor in tensors.values())
                write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            for name in TOKENIZER_FILES:
                if self.source is not None and (self.source / name).is_file():
                    shutil.copyfile(self.source / name, new / name)
            dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
            write_json(new / "config.json", {**self.config.to_dict(), "torch_dtype": dtype})
            written = {file.name for file in new.iterdir()}
        for file in Path(folder).iterdir():
            if re.fullmatch(WEIGHT_FILES, file.name) and file.name not in written:
                file.unlink()


INDEX = "model.safetensors.index.json"
WEIGHT_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Each (name, tensor) of a folder's .safetensors files, one at a time."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: expected a 'weight_map' of tensor names to files, got {weight_map!r}")
        files = sorted(set(weight_map.values()))
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{folder}: expected model.safetensors, {INDEX} or one other .safetensors file, found {len(files)}"
            )
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: not a whole safetensors file ({error})") from None


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def write_aside(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: str | Path, value: dict, indent: int = 2) -> None:
    write_aside(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A folder to write files into; each is renamed into `folder` once all of them are whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as new:
        yield Path(new)
        for file in sorted(Path(new).iterdir(), key=lambda path: path.stat().st_mtime_ns):
            os.replace(file, folder / file.name)


# ---------------------------------------------------------------------------------------------- LoRA


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
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        low = self.scale * F.linear(rows, self.lora_A.to(x.dtype))  # scaled here, where it is small
        y = F.linear(low, self.lora_B.to(x.dtype), self.bias)  # first: checkpointing then need not make W x again
        # In place, which is a pass over memory less, but goes without autocast's cast: that is made here.
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


# ---------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_ids: tuple[int, ...] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    temperature: float = 0.0,
    generators: list[torch.Generator] | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> list[list[int]]:
    """Continue each prompt; greedy unless `temperature` is above 0. Batching does not change a row's text;
    sampled ones need generators for that.

    Args:
        prompts:        token ids, each at least one token long; lengths may differ.
        max_new_tokens: at most so many ids are added to each.
        eos_ids:        a row ends with the first of these; the config's EOS when None, never when empty.
        stop:           called with a row's new ids after every token; True ends the row.
        temperature:    0 takes the most likely token, else tokens are drawn from softmax(logits / temperature).
        generators:     when temperature > 0: each prompt's source of randomness; torch's own, for all, when None.
        batch_size:     rows decoded together, shortest prompts first; a finished row leaves the batch.
    Returns:
        The new ids of each prompt, in the prompts' order, with the EOS that ended it (if one did).
    Raises:
        ValueError: an empty prompt, or one that with max_new_tokens passes max_position_embeddings.
    """
    eos_ids = model.config.eos_token_ids if eos_ids is None else eos_ids
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; expected at least one token id")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it passes the model's "
                f"max_position_embeddings {limit}"
            )

    def ended(new_ids: list[int]) -> bool:
        return new_ids[-1] in eos_ids or (stop is not None and stop(new_ids))

    continued: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(prompts), desc="generate", unit="row", disable=not progress) as bar:
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            sources = None if generators is None else [generators[i] for i in rows]
            pick = functools.partial(_next_tokens, temperature=temperature, generators=sources)
            new_ids = _continue_batch(model, [prompts[i] for i in rows], max_new_tokens, pick, ended)
            for i, row in zip(rows, new_ids, strict=True):
                continued[i] = row
            bar.update(len(rows))
    return continued


def _next_tokens(
    logits: Tensor, rows: list[int], temperature: float, generators: list[torch.Generator] | None
) -> Tensor:
    """One token for each of these rows of the batch: (rows, V) -> (rows,)."""
    if temperature <= 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if generators is None:
        return torch.multinomial(probabilities, 1)[:, 0]
    drawn = zip(probabilities, rows, strict=True)
    return torch.cat([torch.multinomial(of_row, 1, generator=generators[row]) for of_row, row in drawn])


def shared_length(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with alike, leaving each row a last token of its own."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in alike), min(map(len, rows)) - 1)


def _continue_batch(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    pick: Callable[[Tensor, list[int]], Tensor],
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Decode prompts side by side: `pick` chooses the next tokens, `ended` takes a row out of the batch."""
    device = model.lm_head.weight.device
    new_ids: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those still in the batch
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    shared = shared_length(prompts) if len(prompts) > 1 else 0
    cache = KVCache(model, 1 if shared else len(prompts), longest + max_new_tokens)
    if shared:  # worked examples before every question, say: they run once
        model.hidden_states(torch.tensor([prompts[0][:shared]], device=device), cache=cache)
        cache.keep_rows(torch.zeros(len(prompts), dtype=torch.long, device=device))
    own = [prompt[shared:] + [0] * (longest - len(prompt)) for prompt in prompts]
    input_ids = torch.tensor(own, device=device)
    position_ids = torch.arange(shared, longest, device=device).expand_as(input_ids)
    last = lengths - 1 - shared  # the column of each row's last real token
    for _ in range(max_new_tokens):
        hidden = model.hidden_states(input_ids, position_ids, cache)
        token = pick(model.lm_head(hidden[torch.arange(len(rows), device=device), last]).float(), rows)
        for row, new_id in zip(rows, token.tolist(), strict=True):
            new_ids[row].append(new_id)
        stay = [j for j, row in enumerate(rows) if not ended(new_ids[row])]
        if not stay:
            break
        if len(stay) < len(rows):
            keep = torch.tensor(stay, device=device)
            rows, token, lengths = [rows[j] for j in stay], token[keep], lengths[keep]
            cache.keep_rows(keep)
        input_ids, position_ids = token[:, None], lengths[:, None]  # the new token stands after the row's last
        lengths, last = lengths + 1, torch.zeros_like(lengths)
    return new_ids
