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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training.files import read_json, write_json, written_aside

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

        The network is built on the meta device and takes each tensor as it is read from the memory-mapped
        file, so that what is allocated peaks at one model plus one tensor. On a CPU and with dtype None, which leaves
        each tensor as it is in the file, nothing is allocated: the weights are the mapped file.
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
            merge = hasattr(owner, "merged_weight") and name.endswith(".weight")  # a layer of training/lora.py
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
