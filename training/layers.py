"""Ways to run a decoder layer, for the `run_layer` of `Transformer.hidden_states`: checkpointed, recorded, replayed."""

from __future__ import annotations

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from model import RunLayer


def checkpointed(number: int, layer: nn.Module, *inputs) -> Tensor:
    """The layer's output; only its inputs are kept, and the backward pass runs the layer again."""
    return checkpoint(layer, *inputs, use_reentrant=False) if is_grad_enabled() else layer(*inputs)


def recorded(outputs: list[Tensor]) -> RunLayer:
    """Run each layer and append its output, (1, N, H), to `outputs`."""

    def run(number: int, layer: nn.Module, *inputs) -> Tensor:
        outputs.append(layer(*inputs))
        return outputs[-1]

    return run


def replayed(known: list[Tensor]) -> RunLayer:
    """Take layer i's output from known[i], (N, H); only the backward pass runs the layer, for its gradients."""

    def run(number: int, layer: nn.Module, x: Tensor, *rest) -> Tensor:
        output = known[number][None]
        # With frozen embeddings x needs no gradient, and checkpoint would build no graph.
        x = x if x.requires_grad else x.detach().requires_grad_()
        # checkpoint calls this first without gradients, and again on the way back with them.
        return checkpoint(
            lambda x: layer(x, *rest) if is_grad_enabled() else output, x, use_reentrant=True, preserve_rng_state=False
        )

    return run
