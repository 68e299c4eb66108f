"""A model's passes over samples: NLL and entropy without gradients, the loss with them, nothing padded.

Rows stand end to end, as many as fit a token budget; the linear layers see one long row, attention each row alone
(`Transformer.hidden_states(lengths=...)`). The head runs on answer tokens only and a tile of its logits at a time:
no tensor of (all tokens, V) exists in scoring or in training. `qtuning.token_nll_and_entropy` stays the definition,
and the tests hold `head_nll_and_entropy` against it.

Shapes: B rows, N tokens, A answer tokens, T label positions of the longest row, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines import received_attention, sparsevlm_text_score
from data.sft import Sample
from model import Transformer
from qtuning import IGNORE_INDEX

# ------------------------------------------------------------------------------------------- packing


def packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows into as few groups of at most max_tokens tokens as first-fit finds; a longer row goes alone.

    Returns: the groups, each a list of row indices, longest first; ties by index.
    """
    groups, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((g for g, room in enumerate(free) if lengths[i] <= room), None)
        if place is None:
            groups.append([])
            free.append(max_tokens)
            place = -1
        groups[place].append(i)
        free[place] -= lengths[i]
    return groups


def end_to_end(rows: Sequence[list[int]], device: str | torch.device) -> tuple[Tensor, list[int]]:
    """Token ids of rows as one: (1, N) int64, and the rows' lengths."""
    return torch.tensor([[token for row in rows for token in row]], device=device), [len(row) for row in rows]


def pack(samples: Sequence[Sample], device: str | torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Samples end to end, shifted: label n belongs to the token after input n.

    Returns:
        input_ids (1, N) int64, labels (N,) int64, the length of each row in them (one less than the sample's).
    """
    input_ids, lengths = end_to_end([s.input_ids[:-1] for s in samples], device)
    return input_ids, torch.tensor([label for s in samples for label in s.labels[1:]], device=device), lengths


# ------------------------------------------------------------------------------------------- the head

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
    # of each token the running maximum m, s and d as above, and its label's logit
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
    """sum_n w_n NLL_n under the softmax of hidden @ weight.T, with its gradients made on the way forward.

    So the logits of a block of rows are made once and dropped. fp32 from the logits on.

    Args:
        hidden: (A, H); weight: (V, H), differentiated where it trains; labels: (A,); token_weights: (A,) float32.
    Returns:
        the sum, a float32 scalar, and the NLLs (A,), not differentiable.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights):
        dtype, num_rows = compute_dtype(hidden), LOSS_ROWS[hidden.device.type]
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
                    into_weight += matmul_fp32(p.T, h)
        ctx.save_for_backward(into_hidden, into_weight)
        ctx.mark_non_differentiable(nll)
        return (nll * token_weights).sum(), nll

    @staticmethod
    def backward(ctx, into_loss, _):
        into_hidden, into_weight = ctx.saved_tensors
        if into_weight is not None:
            into_weight.mul_(into_loss)  # in place: it is as large as the weight, and there is one way back only
        return into_hidden.mul_(into_loss), into_weight, None, None


class TokenLoss(nn.Module):
    """The weighted sum of the labelled tokens' NLL: what is differentiated, and what DDP wraps.

    Rows without a labelled token give 0 and zero gradients.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        lengths: list[int],
        token_weights: Tensor | None = None,
        known: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of what `pack` returns, and token_weights (A,) (1 each when None): the sum, and the NLLs (A,).

        known: each layer's output (N, H) where `score` has left it, for `Transformer.hidden_states`.
        """
        kept = labels != IGNORE_INDEX
        known = known and [output[None] for output in known]
        hidden = self.model.hidden_states(input_ids, lengths=lengths, known=known)[0, kept]
        if token_weights is None:
            token_weights = torch.ones(len(hidden), device=hidden.device)
        return HeadLoss.apply(hidden, self.model.lm_head.weight, labels[kept], token_weights)


# ---------------------------------------------------------------------------------- scores of samples


@torch.no_grad()
def score(
    model: Transformer,
    samples: Sequence[Sample],
    pass_tokens: int,
    autocast,
    outputs: dict[int, list[Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL and predictive entropy of every answer token, with the current weights (choice C18).

    Args:
        outputs: takes what every layer gave for sample i, (len(input_ids) - 1, H) each: views of what a pass left.
    Returns:
        nll, token_entropy (B, T) float32 and loss_mask (B, T) bool on the CPU; column t belongs to the token after
        input_ids[t].
    """
    model.eval()
    device, weight = model.lm_head.weight.device, model.lm_head.weight
    groups = packs([len(s.input_ids) - 1 for s in samples], pass_tokens)
    parts = []
    for group in groups:
        input_ids, labels, lengths = pack([samples[i] for i in group], device)
        trainable = labels != IGNORE_INDEX
        of_layers = None if outputs is None else []
        with autocast:
            hidden = model.hidden_states(input_ids, lengths=lengths, outputs=of_layers)[0, trainable]
            parts.append(torch.stack(head_nll_and_entropy(hidden, weight, labels[trainable])))
        if outputs is not None:
            of_rows = zip(*(output[0].split(lengths) for output in of_layers), strict=True)
            outputs.update(zip(group, of_rows, strict=True))
    model.train()

    T = max(len(s.input_ids) for s in samples) - 1
    rows = [i for group in groups for i in group]  # in the order of the values
    in_order = torch.zeros(len(samples), T, dtype=torch.bool)
    for place, i in enumerate(rows):
        labels = torch.tensor(samples[i].labels[1:])
        in_order[place, : len(labels)] = labels != IGNORE_INDEX
    tables = torch.zeros(2, len(samples), T)
    tables[:, in_order] = torch.cat(parts, dim=1).cpu()
    back = torch.tensor(rows).argsort()
    nll, entropy = tables[:, back]
    return nll, entropy, in_order[back]


@torch.no_grad()
def attention_score(
    model: Transformer, samples: Sequence[Sample], token_pruner: str, pass_tokens: int, autocast
) -> Tensor:
    """The score of `fastv` or `sparsevlm-text` for every token, in the last layer of the current model.

    Returns:
        (B, T) float32 on the CPU; as in `score`, column t belongs to the token after input_ids[t].
    Raises:
        ValueError: a row is longer than the model's sliding window; the attention here is causal over the whole row.
    """
    longest, window = max(len(s.input_ids) for s in samples), model.config.sliding_window
    if window is not None and longest > window:
        raise ValueError(
            f"--token-pruner {token_pruner}: a row has {longest} tokens, and the model attends to windows of {window}; "
            f"--max-length {window} would cut it"
        )
    model.eval()
    device = model.lm_head.weight.device
    table = torch.zeros(len(samples), longest - 1)
    for group in packs([len(s.input_ids) for s in samples], pass_tokens):
        input_ids, lengths = end_to_end([samples[i].input_ids for i in group], device)
        with autocast:
            queries, keys, hidden = model.queries_and_keys(input_ids, lengths=lengths)
        rows = zip(group, queries.split(lengths, 2), keys.split(lengths, 2), hidden.split(lengths, 1), strict=True)
        for i, q, k, x in rows:
            attended = torch.ones(1, x.shape[1], dtype=torch.bool, device=device)
            answer = torch.tensor([samples[i].labels], device=device) != IGNORE_INDEX
            if token_pruner == "fastv":
                values = received_attention(q, k, attended)
            else:
                values = sparsevlm_text_score(q, k, x, attended, answer)
            table[i, : x.shape[1] - 1] = values[0, 1:].cpu()
    model.train()
    return table
