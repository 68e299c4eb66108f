"""--shard: weights, gradients and moments divided among the ranks, by PyTorch's FSDP2 (`fully_shard`).

Each rank keeps its part of every parameter. A layer is gathered while it runs, so the ranks run their passes together,
as many on each. A checkpoint and a saved model hold whole tensors: they are the same files as without --shard.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Transformer
from training.lora import add_lora
from training.ranks import Ranks


def shard(model: Transformer, ranks: Ranks, dtype: torch.dtype) -> None:
    """Leave this rank its part of each parameter, on its device; in place.

    The model is read on the CPU in the dtype of its file, whose mapped pages all ranks of a machine share; one layer at
    a time is whole on the device.

    Args:
        dtype: of all parameters but LoRA's own, which stay in fp32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for part in (*model.model["layers"], model):
        for name, parameter in part.named_parameters():
            if not isinstance(parameter, DTensor) and "lora_" not in name:
                parameter.data = parameter.data.to(dtype)
        fully_shard(part, mesh=mesh)
    # The root of all passes: it gathers what no layer holds, the head too, which is needed when it has returned.
    register_fsdp_forward_method(model, "hidden_states")


def whole(state: object, ranks: Ranks) -> object:
    """The same dicts and lists with whole tensors on the CPU of rank 0, None on the others; all ranks call it."""
    if isinstance(state, dict):
        return {key: whole(value, ranks) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, ranks) for value in state]
    if not isinstance(state, DTensor):
        return state
    full = state.detach().full_tensor()
    return full.cpu() if ranks.rank == 0 else None


def part_of(full: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that every rank has, divided as `like` is."""
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def own_parts(state: dict, trainable: dict[str, nn.Parameter]) -> dict:
    """A checkpoint's state with this rank's parts of weights and moments in place of the whole."""
    weights = {name: part_of(state["trainable"][name], like) for name, like in trainable.items()}
    moments = {
        number: {
            name: part_of(value, like) if value.shape == like.shape else value
            for name, value in state["optimizer"]["state"][number].items()
        }
        for number, like in enumerate(trainable.values())
    }
    return state | {"trainable": weights, "optimizer": state["optimizer"] | {"state": moments}}


def whole_model(model: Transformer, ranks: Ranks, lora_rank: int) -> Transformer | None:
    """The model with its trained weights whole, on the CPU of rank 0, to be saved; None on the others."""
    trained = whole({name: p for name, p in model.named_parameters() if p.requires_grad}, ranks)
    if ranks.rank:
        return None
    with torch.device("meta"):
        plain = Transformer(model.config)
        if lora_rank:
            add_lora(plain, lora_rank, alpha=2 * lora_rank)
    plain.load_state_dict(trained, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        plain.lm_head.weight = plain.model["embed_tokens"].weight
    plain.source = model.source
    return plain
