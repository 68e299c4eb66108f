"""The processes of a run: what each of them is, how work is shared out, and draws that are the same on all."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


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


def chosen_dtype(name: str, device: str) -> str:
    """The computing dtype that --dtype asks for: "bf16" or "fp32"; auto: bf16 on a GPU that has it.

    Raises:
        ValueError: --dtype bf16 on a GPU without it.
    """
    on_gpu = device == "cuda"
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and on_gpu and not has_bf16:
        raise ValueError(
            f"--dtype bf16: {torch.cuda.get_device_name()} does not compute in bf16 (compute capability 8.0 and newer "
            f"do); --dtype fp32 runs on it"
        )
    return ("bf16" if has_bf16 else "fp32") if name == "auto" else name


def share(costs: Sequence[int], world: int) -> list[list[int]]:
    """Each rank's items, ascending: the dearest first, each to the rank with the least work so far."""
    hands, load = [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        to = load.index(min(load))
        hands[to].append(i)
        load[to] += costs[i]
    return [sorted(hand) for hand in hands]


# ------------------------------------------------------------------------------------------------ errors


def fails_first() -> bool:
    """Whether this process is the first of its job to fail. Asked again, it answers the same."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or _first_on_store()


@functools.cache
def _first_on_store() -> bool:
    """Whether no other rank has counted itself as failed on torchrun's store, which outlives each of them."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=10))
        return store.add(f"failed in attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # no store: better said twice than never
        return True


USERS = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)  # errors that a user can put right


def in_one_line(error: BaseException) -> str:
    """The message of one of USERS; of several ranks, with this one's number."""
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):  # train.py says more: see training/memory.py
        message = f"out of GPU memory, try smaller batches: {message}"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    return f"{rank}{' '.join(message.split())}"


@contextlib.contextmanager
def errors_in_one_line(prog: str) -> Iterator[None]:
    """End the process with status 2 and the line `prog: message` where a user can put things right.

    Of several ranks, the first to fail prints, with its rank. The others fail in its wake, and end without a word.
    """
    try:
        yield
    except USERS as error:
        if fails_first():
            print(f"{prog}: {in_one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError:  # among others from a collective that another rank has left
        if fails_first():
            raise
        raise SystemExit(2) from None


LEAVING = 30  # seconds that leaving the group may take after an error


def end_now(unsaid: list[BaseException]) -> None:
    """End this process, whatever it waits for, and say why where nobody has."""
    for error in unsaid:
        if isinstance(error, USERS):
            print(in_one_line(error), file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(2)


# ------------------------------------------------------------------------------------------------- ranks


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without torchrun."""

    rank: int = 0
    world: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    @contextlib.contextmanager
    def joined(cls, kind: str, patience: datetime.timedelta = datetime.timedelta(days=1)) -> Iterator[Ranks]:
        """Join the process group that torchrun describes, on devices of this kind ("cpu" or "cuda"); leave it again.

        Args:
            patience: how long a rank waits for the others before it fails.
        Raises:
            ValueError: there are more processes than GPUs on this machine.
        """
        rank, world, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            if local >= torch.cuda.device_count():
                found = torch.cuda.device_count()
                raise ValueError(
                    f"process {local} of this machine has no GPU: torch finds {found}; see --nproc_per_node"
                )
            torch.cuda.set_device(device)
        if world == 1:
            yield cls(rank, world, device)
            return
        backend, device_id = ("nccl", device) if kind == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=patience, device_id=device_id)
        unsaid = []
        try:
            yield cls(rank, world, device)
            dist.barrier()  # rank 0 may still be writing
        except BaseException as error:
            if fails_first():  # asked before this rank leaves the group, which makes the others fail
                unsaid.append(error)
            # Leaving may wait for work on the GPU that the others never join: the process ends all the same.
            last_resort = threading.Timer(LEAVING, end_now, args=(unsaid,))
            last_resort.daemon = True
            last_resort.start()
            raise
        finally:
            dist.destroy_process_group()
            unsaid.clear()  # the caller says it

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
        """The lists of all ranks, joined in rank order, on every rank. They travel pickled: for small things."""
        if self.world == 1:
            return local
        parts = [None] * self.world
        dist.all_gather_object(parts, local)
        return [item for part in parts for item in part]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in the dtype and on the device of `values`."""
        if self.world == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def exchange(
        self, sizes: Sequence[int], mine: Mapping[int, Tensor], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Item i's values, (sizes[i],) on the CPU, for all items on every rank; each item is known to one rank.

        They travel as one flat tensor. Each rank fills in its items and leaves 0 elsewhere; the sum is exact.

        Args:
            mine: item -> its values, for the items of this rank.
        """
        if self.world == 1:
            return [mine[i] for i in range(len(sizes))]
        flat = torch.zeros(sum(sizes), dtype=dtype)
        places = flat.split(list(sizes))
        for i, values in mine.items():
            places[i].copy_(values)
        return list(self.sum(flat).split(list(sizes)))

    def check_same(self, number: Callable[[], int], what: str) -> None:
        """Make sure that all ranks have the same `number()`, in [0, 2^63).

        Raises:
            ValueError: `what`, and the ranks whose number is not that of rank 0. On every rank.
        """
        if self.world > 1:
            numbers = torch.zeros(self.world, dtype=torch.int64)
            numbers[self.rank] = number()
            numbers = self.sum(numbers)
            if odd := (numbers != numbers[0]).nonzero()[:, 0].tolist():
                raise ValueError(f"{what}: not the same on rank 0 and on {', '.join(f'rank {rank}' for rank in odd)}")

    def first(self, make: Callable[[], object]) -> object:
        """What `make` returns on rank 0, on every rank."""
        found = [make() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]
