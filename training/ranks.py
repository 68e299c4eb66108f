"""The processes of a run: what each of them is, how work is shared out, and draws that are the same on all."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist


def seeded(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on the key alone: the same draws on every rank, and after --resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def chosen_device(name: str) -> str:
    """The device kind that --device asks for: "cpu" or "cuda".

    Raises:
        ValueError: --device cuda where torch finds no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def share(costs: Sequence[int], world: int) -> list[list[int]]:
    """Each rank's items, ascending: the dearest first, each to the rank with the least work so far."""
    hands, load = [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        to = load.index(min(load))
        hands[to].append(i)
        load[to] += costs[i]
    return [sorted(hand) for hand in hands]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without torchrun."""

    rank: int = 0
    world: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    @contextlib.contextmanager
    def joined(cls, kind: str) -> Iterator[Ranks]:
        """Join the process group that torchrun describes, on devices of this kind ("cpu" or "cuda"); leave it again."""
        rank, world, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        if world > 1:
            # The first rank to finish waits for the last one's work, which may take long.
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
        try:
            yield cls(rank, world, device)
            if world > 1:
                dist.barrier()
        finally:
            if world > 1:
                dist.destroy_process_group()

    @classmethod
    def current(cls) -> Ranks:
        """This process in the group that it has joined; its device is the CPU (for code that only shares results)."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, costs: Sequence[int]) -> list[int]:
        """This rank's items of those with these costs."""
        return share(costs, self.world)[self.rank]

    def gather(self, local: list) -> list:
        """The lists of all ranks, joined in rank order, on every rank."""
        if self.world == 1:
            return local
        parts = [None] * self.world
        dist.all_gather_object(parts, local)
        return [item for part in parts for item in part]

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks, in float64."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def max(self, values: list[int]) -> list[int]:
        """The largest of each number over all ranks."""
        if self.world == 1:
            return values
        largest = torch.tensor(values, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def first(self, make: Callable[[], object]) -> object:
        """What `make` returns on rank 0, on every rank."""
        found = [make() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]
