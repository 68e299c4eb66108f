"""A literal twin of model.py's forward pass: one sequence, one head at a time, float64, no fused call.

Written from the LLaMA papers' formulas and kept apart from model.py, whose weights alone it reads.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean() + eps).sqrt()


def turn(x, position, theta):
    """Rotary embedding of one head's vector: the pair (i, i + d/2) turns by position * theta^(-2i/d)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def logits(model, ids):
    """(T,) token ids -> (T, V) float64 logits."""
    cfg = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    d, group = cfg.head_dim, cfg.num_attention_heads // cfg.num_key_value_heads
    stream = [w["model.embed_tokens.weight"][i] for i in ids]
    for n in range(cfg.num_hidden_layers):
        at = f"model.layers.{n}."
        normed = [rms_norm(x, w[at + "input_layernorm.weight"], cfg.rms_norm_eps) for x in stream]
        q, k, v = ([w[f"{at}self_attn.{p}_proj.weight"] @ x for x in normed] for p in "qkv")
        for t in range(len(ids)):
            heads = []
            for h in range(cfg.num_attention_heads):
                mine, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
                query = turn(q[t][mine], t, cfg.rope_theta)
                scores = [query @ turn(k[s][shared], s, cfg.rope_theta) / math.sqrt(d) for s in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(a * v[s][shared] for s, a in enumerate(weights)))
            stream[t] = stream[t] + w[at + "self_attn.o_proj.weight"] @ torch.cat(heads)
        for t, x in enumerate(stream):
            x = rms_norm(x, w[at + "post_attention_layernorm.weight"], cfg.rms_norm_eps)
            gate, up = w[at + "mlp.gate_proj.weight"] @ x, w[at + "mlp.up_proj.weight"] @ x
            stream[t] = stream[t] + w[at + "mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
    final = [rms_norm(x, w["model.norm.weight"], cfg.rms_norm_eps) for x in stream]
    return torch.stack([w["lm_head.weight"] @ x for x in final])
