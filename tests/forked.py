"""Several ranks without torchrun: forked processes, which need no seconds to import torch again."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch._dynamo  # the optimizer imports it; once here, not in every process
import torch.distributed as dist
import torch.distributed.tensor  # noqa: F401 - the same for DistributedDataParallel


class Failed(AssertionError):
    """A rank ended with another status than 0.

    Attributes:
        codes, errors: each rank's exit status and what it wrote to stderr.
    """

    def __init__(self, codes, errors):
        super().__init__(f"exit status of each rank: {codes}\n" + "\n".join(errors))
        self.codes, self.errors = codes, errors


def on_ranks(world, work, *args, seconds=90):
    """What work(*args) returns on each of `world` ranks, under the variables that torchrun sets.

    As under torchrun, the store outlives every rank, and the others are ended some time after the first has failed.

    Raises:
        Failed: a rank exits with another status than 0, or with an exception.
    """
    context = multiprocessing.get_context("fork")
    reply = context.SimpleQueue()
    store = context.Process(target=_keep_store, args=(reply,))  # its threads are none of this process, which forks
    store.start()
    port = reply.get()
    with tempfile.TemporaryDirectory() as folder:
        queues = [context.SimpleQueue() for _ in range(world)]
        errors = [Path(folder) / f"{rank}.txt" for rank in range(world)]
        ranks = [
            context.Process(target=_rank, args=(rank, world, port, queues[rank], errors[rank], seconds, work, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline, found = time.monotonic() + seconds, [None] * world
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            for rank, queue in enumerate(queues):  # emptied meanwhile, as a full pipe would block its writer
                found[rank] = queue.get() if not queue.empty() else found[rank]
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + 20)
            time.sleep(0.01)
        for rank, queue in enumerate(queues):
            found[rank] = queue.get() if not queue.empty() else found[rank]
        for process in (*ranks, store):
            process.kill()
            process.join()
        codes, texts = [process.exitcode for process in ranks], [path.read_text() for path in errors]
    if any(codes):
        raise Failed(codes, texts)
    return found


def _keep_store(reply):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reply.put(store.port)
    time.sleep(3600)


def _rank(rank, world, port, queue, stderr, seconds, work, args):
    gc.freeze()  # what the parent has left is not this process's to tear down
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
        faulthandler.dump_traceback_later(seconds - 2, file=2)  # what a rank that hangs was doing
        sys.stderr = os.fdopen(2, "w")
        with contextlib.redirect_stdout(sys.stderr):
            queue.put(work(*args))
