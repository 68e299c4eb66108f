"""DS2: ratings corrected by their neighbours, then the best and most unusual rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.deita import centred_units
from pruners.samples import check_enough, check_scores


def nearest_neighbours(embedding: Tensor, num: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Each row's `num` nearest other rows by centred cosine: their indices and distances 1 - cos, (N, num) each.

    A row is no neighbour of itself; a copy of it is.
    """
    if not 1 <= num < len(embedding):
        raise ValueError(f"expected more than {num} rows to find {num} neighbours, got {len(embedding)}")
    unit, indices, distances = centred_units(embedding), [], []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T  # (block, N)
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -math.inf
        nearest = cosine.topk(num, dim=-1)
        indices.append(nearest.indices)
        distances.append(1 - nearest.values)
    return torch.cat(indices), torch.cat(distances)


def merge_rare_classes(rating: Tensor, min_share: float = 0.01) -> Tensor:
    """Ratings (N,) to the nearest whole number, halves upwards, then to classes 0, 1, ... in their order; int64.

    A class of less than `min_share` of the rows joins the nearest that is not: too few rows to tell how it is
    confused with others.
    """
    classes, place, count = (rating.double() + 0.5).floor().unique(return_inverse=True, return_counts=True)
    common = classes[(count >= min_share * len(rating)) | (count == count.max())]
    nearest = (classes[:, None] - common).abs().argmin(dim=-1)  # (classes,) -> common
    return nearest[place]


def transition_matrix(
    label: Tensor, neighbours: Tensor, num_classes: int, *, steps: int = 1501
) -> tuple[Tensor, Tensor]:
    """How raters confuse the classes, from how often a row and its two nearest neighbours agree.

        c1_a = sum_i p_i T_ia,  c2_ab = sum_i p_i T_ia T_ib,  c3_abc = sum_i p_i T_ia T_ib T_ic

    T and p are those that come nearest to the frequencies seen, if a row and its neighbours share their true class.

    Args:
        label:      (N,) int64 in [0, num_classes), as rated.
        neighbours: (N, 2 or more) int64, the nearest first.
    Returns:
        T (K, K), T[a, b] = P(rated b | truly a), and p (K,), P(truly a). float64.
    Source: the higher-order consensus of DS2 (Pang et al., ICLR 2025): the sum of three Frobenius norms, Adam
        at 0.1. One pass over all rows in place of means over 50 random subsets. Rows stand once: a copy of the
        data, as in the official loader, would make every row its own neighbour, and T the identity.
    """
    one_hot = F.one_hot(label, num_classes).double()
    first, second = one_hot[neighbours[:, 0]], one_hot[neighbours[:, 1]]
    seen = (
        one_hot.mean(0),
        torch.einsum("na,nb->ab", one_hot, first) / len(label),
        torch.einsum("na,nb,nc->abc", one_hot, first, second) / len(label),
    )
    logits = (5 * torch.eye(num_classes, dtype=torch.float64) - 1).requires_grad_()
    prior = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, prior], lr=0.1)
    for _ in range(steps):
        T, p = logits.softmax(-1), prior.softmax(-1)
        model = (p @ T, torch.einsum("i,ia,ib->ab", p, T, T), torch.einsum("i,ia,ib,ic->abc", p, T, T, T))
        distance = sum(torch.linalg.vector_norm(m - s) for m, s in zip(model, seen, strict=True))
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    return logits.softmax(-1).detach(), prior.softmax(-1).detach()


def curate_labels(label: Tensor, neighbours: Tensor, distances: Tensor, T: Tensor, prior: Tensor) -> Tensor:
    """Replace the ratings that a row's neighbours contradict, in each class as many as T says are wrong.

    A row's neighbours, and itself at the distance 2 d_1 - d_2, vote for their classes with 1 - distance. In the
    rows rated b the share 1 - T_bb p_b / P(rated b) of the weakest own vote is flagged; a flagged row takes the
    class of the most votes, if that has more than its own.

    Args:
        label:      (N,) int64 in [0, K).
        neighbours, distances: (N, k) of `nearest_neighbours`, k >= 2.
        T, prior:   of `transition_matrix`.
    Returns:
        (N,) int64.
    Source: DS2's ranking by neighbour votes. It repeats this on 51 random subsets and replaces what is flagged
        in most; here one pass over all rows, which draws nothing, and the votes' majority in that place.
    """
    num_classes = len(prior)
    votes = torch.zeros(len(label), num_classes, dtype=torch.float64)
    votes.scatter_add_(1, label[neighbours], 1 - distances.double())
    own_distance = 2 * distances[:, :1].double() - distances[:, 1:2].double()
    votes.scatter_add_(1, label[:, None], 1 - own_distance)
    support = F.normalize(votes, dim=-1).gather(1, label[:, None])[:, 0]  # -log of it is the badness
    flagged = torch.zeros(len(label), dtype=torch.bool)
    for rated in range(num_classes):
        rows = (label == rated).nonzero()[:, 0]
        if len(rows):
            right = float(T[rated, rated] * prior[rated]) * len(label) / len(rows)
            num_wrong = round(min(max(1 - right, 0.0), 1.0) * len(rows))
            flagged[rows[support[rows].sort(stable=True).indices[:num_wrong]]] = True
    suggested = votes.argmax(dim=-1)
    return torch.where(flagged, suggested, label)


def ds2_rows(rating: Tensor, embedding: Tensor, num_keep: int, *, num_neighbours: int = 10) -> Tensor:
    """Correct the ratings by their neighbours, then keep the best class down, in the last one the most unusual rows.

    Args:
        rating:    (N,) float on a scale of whole numbers, best highest (DS2: 0 to 5).
        embedding: (N, D) float.
    Returns:
        the kept rows (num_keep,), ascending.
    Original: DS2 (Pang et al., ICLR 2025): ratings of three LLMs in 6 classes, sentence embeddings, score
        curation by a transition matrix, long-tail diversity. Paper: one sentence. Here: ratings and embeddings
        are from whoever wrote them (pruners.score_rows: a local model), a rating counts to the nearest whole number,
        neighbours are by centred cosine; what else differs stands in the parts. A row is the more unusual, the
        larger its mean distance to its neighbours. (A US patent application, 2026/0093981, names the pipeline.)
    """
    check_scores("rating", rating)
    check_enough(num_keep, len(rating))
    label = merge_rare_classes(rating)
    neighbours, distances = nearest_neighbours(embedding, num_neighbours)
    num_classes = int(label.max()) + 1
    if num_classes > 1:
        T, prior = transition_matrix(label, neighbours, num_classes)
        others = num_neighbours - 1  # with itself a row has num_neighbours votes
        label = curate_labels(label, neighbours[:, :others], distances[:, :others], T, prior)
    unusual = distances.double().mean(dim=-1)
    by_unusual = unusual.sort(descending=True, stable=True).indices
    order = by_unusual[label[by_unusual].sort(descending=True, stable=True).indices]
    return order[:num_keep].sort().values
