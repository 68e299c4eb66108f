"""The language-model head on answer tokens: NLL and entropy without gradients, the loss with them.

The head runs a tile of its logits at a time: no tensor of (all tokens, V) exists in scoring or in training.
`qtuning.token_nll_and_entropy` is the definition, and the tests hold `head_nll_and_entropy` against it.

Shapes: N tokens, A answer tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model import Transformer
from qtuning import IGNORE_INDEX
from training.layers import checkpointed, replayed
from training.packing import packed

TILE = {"cpu": (512, 2048), "cuda": (4096, 16_384)}  # rows x vocabulary entries of logits that exist at once, scoring
LOSS_ROWS = {"cpu": 128, "cuda": 1024}  # rows of whole logits that exist at once, training


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer would compute in: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as fp32; on a GPU 16-bit products stay in the fp32 that they were summed in."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def add_matmul(total: Tensor, a: Tensor, b: Tensor, num_rows: int) -> None:
    """total += a @ b in place, summed in fp32, without a second tensor of `total`'s size."""
    if a.dtype == total.dtype == torch.float32:
        total.addmm_(a, b)
        return
    for start in range(0, len(total), num_rows):  # no in-place product mixes dtypes
        total[start : start + num_rows] += matmul_fp32(a[start : start + num_rows], b)


@torch.no_grad()
def head_nll_and_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """NLL and predictive entropy under the softmax of hidden @ weight.T, by an online softmax over vocabulary tiles.

        m = max z,  s = sum exp(z - m),  d = sum exp(z - m) (z - m):   NLL = m + log s - z_label,  Ent = log s - d / s

    Args:
        hidden: (A, H); weight: (V, H); labels: (A,) int64 in [0, V).
    Returns:
        nll (A,), entropy (A,), float32, both at least 0.
    """
    dtype, (num_rows, num_columns) = compute_dtype(hidden), TILE[hidden.device.type]
    # for each token: the running maximum m, s and d as above, and its label's logit
    m = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    s, d, of_label = (torch.zeros_like(m) for _ in range(3))
    with torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, len(weight), num_columns):
            tile = weight[first : first + num_columns].to(dtype).T
            for start in range(0, len(hidden), num_rows):
                rows = slice(start, start + num_rows)
                z = matmul_fp32(hidden[rows].to(dtype), tile)
                inside = (labels[rows] >= first) & (labels[rows] < first + z.shape[1])
                place = (labels[rows] - first).clamp(0, z.shape[1] - 1)
                of_label[rows] += torch.where(inside, z.gather(1, place[:, None])[:, 0], 0.0)
                highest = torch.maximum(m[rows], z.amax(dim=1))
                z -= highest[:, None]
                e = z.exp()
                shrink = (m[rows] - highest).exp()  # 0 in the first tile
                lower = torch.where(shrink > 0, m[rows] - highest, 0.0)
                d[rows] = shrink * (d[rows] + lower * s[rows]) + z.mul_(e).sum(dim=1)
                s[rows] = shrink * s[rows] + e.sum(dim=1)
                m[rows] = highest
    return (m + s.log() - of_label).clamp(min=0), (s.log() - d / s).clamp(min=0)


class HeadLoss(torch.autograd.Function):
    """sum_n w_n NLL_n under the softmax of hidden @ weight.T, with its gradients computed in the forward pass.

    The logits of a block of rows are thus made once and dropped. fp32 from the logits on.

    Args:
        hidden: (A, H); weight: (V, H), differentiated where it trains; labels: (A,); token_weights: (A,) float32.
    Returns:
        the sum, a float32 scalar, and the NLLs (A,), not differentiable.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights):
        kind = hidden.device.type
        dtype, num_rows, num_columns = compute_dtype(hidden), LOSS_ROWS[kind], TILE[kind][1]
        nll = torch.empty(len(hidden), device=hidden.device)
        into_hidden = torch.empty_like(hidden)
        into_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for start in range(0, len(hidden), num_rows):
                rows = slice(start, start + num_rows)
                h, y = hidden[rows].to(dtype), labels[rows, None]
                z = matmul_fp32(h, w.T)
                log_sum = z.logsumexp(dim=1, keepdim=True)
                nll[rows] = (log_sum - z.gather(1, y))[:, 0]
                p = z.sub_(log_sum).exp_()
                p.scatter_add_(1, y, torch.full_like(log_sum, -1.0)).mul_(token_weights[rows, None])
                p = p.to(dtype)
                into_hidden[rows] = (p @ w).to(hidden.dtype)
                if into_weight is not None:
                    add_matmul(into_weight, p.T, h, num_columns)
        ctx.save_for_backward(into_hidden, into_weight)
        ctx.mark_non_differentiable(nll)
        return (nll * token_weights).sum(), nll

    @staticmethod
    def backward(ctx, into_loss, _):
        into_hidden, into_weight = ctx.saved_tensors
        if into_weight is not None:
            into_weight.mul_(into_loss)  # in place: it is as large as the weight, and backward runs once
        return into_hidden.mul_(into_loss), into_weight, None, None


class TokenLoss(nn.Module):
    """The weighted sum of the labelled tokens' NLL: the module that is differentiated, and that DDP wraps.

    Rows without a labelled token give 0 and zero gradients.

    Args:
        checkpointing: keep only the layers' inputs for the backward pass.
    """

    def __init__(self, model: Transformer, checkpointing: bool = False):
        super().__init__()
        self.model, self.checkpointing = model, checkpointing

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        lengths: list[int],
        token_weights: Tensor | None = None,
        known: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum, a scalar, and the NLLs (A,).

        Args:
            input_ids, labels, lengths: from `packing.pack`.
            token_weights: (A,); default: 1 each.
            known: each layer's output (N, H), if `scoring.score` has kept them.
        """
        kept = labels != IGNORE_INDEX
        run_layer = replayed(known) if known else checkpointed if self.checkpointing else None
        hidden = self.model.hidden_states(input_ids, *packed(self.model, lengths), run_layer)[0, kept]
        if token_weights is None:
            token_weights = torch.ones(len(hidden), device=hidden.device)
        return HeadLoss.apply(hidden, self.model.lm_head.weight, labels[kept], token_weights)
