"""Which rows a step takes: an endless stream of epochs, each in an order of its own."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.sft import Sample


def fingerprint(samples: Sequence[Sample]) -> int:
    """A number in [0, 2^63) that tells lists of tokenised rows apart: a hash of ids, token ids and labels, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        digest.update(f"{sample.id!r} {len(sample.input_ids)} ".encode())
        digest.update(array("q", sample.input_ids + sample.labels).tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def stream_order(num_samples: int, start: int, stop: int, seed: int) -> list[int]:
    """Sample indices at places start..stop-1 of an endless stream of epochs, each reshuffled.

    A pure function of its arguments: a resumed run, or another rank, sees the same stream without replaying
    it, and only the epochs asked for are drawn.
    """
    if num_samples < 1 or not 0 <= start <= stop:
        raise ValueError(
            "stream_order: expected num_samples >= 1 and 0 <= start <= stop, got "
            f"num_samples {num_samples}, start {start}, stop {stop}"
        )
    order = []
    while start < stop:
        epoch, first = divmod(start, num_samples)
        last = min(num_samples, first + stop - start)
        # Hashed, not added: seed 1's first epoch must differ from seed 0's second.
        digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        order += torch.randperm(num_samples, generator=generator)[first:last].tolist()
        start += last - first
    return order


class Stream:
    """Rows of a step and their weights in the loss.

    Args:
        rows: the rows that an epoch runs over.
        seed: sets each epoch's order.
        draw: (row_loss (N,), epoch) -> weights (N,): draws an epoch's rows from all N; weight 0 leaves a row out.
            Default: every epoch runs over `rows`, at weight 1.
        first_losses: () -> row_loss (N,), each row's mean NLL before training; called once if there is a `draw`.
    """

    def __init__(
        self,
        rows: Sequence[int],
        seed: int,
        draw: Callable[[Tensor, int], Tensor] | None = None,
        first_losses: Callable[[], Tensor] | None = None,
    ):
        self.rows, self.seed, self.draw, self.first_losses = rows, seed, draw, first_losses
        self.weights = torch.ones(len(rows), dtype=torch.float64)
        self.epoch = 0
        self.row_loss: Tensor | None = None  # each row's mean NLL when it was last trained on

    def take(self, start: int, stop: int) -> tuple[list[int], Tensor]:
        """The rows at places start..stop-1 of the stream, and their weights (stop - start,) float64."""
        if self.draw and self.row_loss is None:
            self.row_loss = self.first_losses()
            self._draw(0)
        rows, weights = [], []
        while start < stop:
            size = len(self.rows)
            epoch = start // size
            if self.draw and epoch != self.epoch:
                self._draw(epoch)
            last = min(stop, (epoch + 1) * size)
            picked = stream_order(size, start, last, self.seed)
            rows += [self.rows[i] for i in picked]
            weights.append(self.weights[picked])
            start = last
        return rows, torch.cat(weights)

    def _draw(self, epoch: int) -> None:
        weights = self.draw(self.row_loss, epoch)
        self.rows = weights.nonzero()[:, 0].tolist()
        self.weights, self.epoch = weights[self.rows], epoch

    def learn(self, losses: Sequence[tuple[int, float]]) -> None:
        """Remember each row's mean NLL, in the order of training; the next epoch is drawn by them."""
        for row, loss in losses:
            self.row_loss[row] = loss

    def state(self) -> dict | None:
        """What a checkpoint holds of a stream that draws its rows; None for others."""
        if self.row_loss is None:
            return None
        return {"rows": list(self.rows), "weights": self.weights, "epoch": self.epoch, "row_loss": self.row_loss}

    def load(self, state: dict | None) -> None:
        """Continue with the rows of a checkpoint."""
        if state:
            self.rows, self.epoch = state["rows"], state["epoch"]
            self.weights, self.row_loss = state["weights"].cpu(), state["row_loss"].cpu()
