"""The processes that torchrun starts: how they divide work, and how they agree.

They communicate through ``torch.distributed``. When one of them dies, torchrun stops the others and starts all of them
anew. Outside of a process group a team has one member, and nothing is communicated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.locks import one_of_the_writers, only_writer
from zskd_nni.runtime.torchrun import launched

T = TypeVar("T")
# A process waits as long as another one works; torchrun notices when that one dies.
_TIMEOUT = timedelta(days=7)
_POLL_SECONDS = 0.01
_BROKEN_CONNECTION_WORDS = ("onnection", "gloo", "NCCL", "Broken pipe", "imed out")


class WorkerLostError(UserError):
    """Another process of this launch is gone."""


def share(work: Sequence[T], rank: int, size: int) -> list[T]:
    """Every ``size``-th piece of ``work``, beginning with number ``rank``.

    Example:
        >>> share(range(7), rank=1, size=3)
        [1, 4]
    """
    return list(work[rank::size])


class Team:
    """The processes that work together, seen from one of them. All must call its methods in the same order.

    Args:
        rank: of this process, from 0.
        size: how many processes there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which alone writes files."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part of ``work``, which must be the same for all."""
        return share(work, self.rank, self.size)

    def wait(self) -> None:
        """Wait until all processes have called this; a signal that asks to stop is obeyed meanwhile.

        Raises:
            WorkerLostError: one of them is gone.
        """
        if self.alone:
            return
        with _translate_dist_errors():
            arrival = dist.all_reduce(torch.zeros(1), async_op=True)
            while not arrival.is_completed():
                signals.check()
                time.sleep(_POLL_SECONDS)
            arrival.wait()

    def first(self, work: Callable[[], T]) -> T:
        """Call ``work`` in the first process alone; all return its JSON-able result, and the others wait for it."""
        result = work() if self.leads else None
        return cast(T, result if self.alone else self.collect(result)[0])

    def collect(self, value: T) -> list[T]:
        """The JSON-able ``value`` of every process, in the order of ranks."""
        if self.alone:
            return [value]
        self.wait()
        # Not torch's own exchange of objects, which unpickles what comes over the network.
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        padded = torch.full((self.largest(len(message)),), ord(" "), dtype=torch.uint8)  # JSON may end in spaces
        padded[: len(message)] = message
        messages = [torch.empty_like(padded) for _ in range(self.size)]
        with _translate_dist_errors():
            dist.all_gather(messages, padded)
        return [json.loads(one.numpy().tobytes()) for one in messages]

    def largest(self, value: int) -> int:
        """The largest ``value`` of all processes."""
        if self.alone:
            return value
        held = torch.tensor(value)
        with _translate_dist_errors():
            dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def add(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all processes."""
        if not self.alone:
            with _translate_dist_errors():
                dist.all_reduce(values)

    def broadcast(self, values: Tensor) -> None:
        """Replace ``values`` by those of the first process."""
        if not self.alone:
            with _translate_dist_errors():
                dist.broadcast(values, src=0)


@contextmanager
def _translate_dist_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise when a connection breaks, and much else
        if "No backend type associated" in str(error):
            raise UserError(
                "The process group has no backend for the CPU, through which processes agree; "
                "join it with init_process_group('cpu:gloo,cuda:nccl')."
            ) from error
        broken = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
        if not broken and not any(word in str(error) for word in _BROKEN_CONNECTION_WORDS):
            raise
        raise WorkerLostError(
            "Another process of this launch has ended; its own message gives the reason. What was finished is kept, "
            "and the same command continues from there."
        ) from error


def team() -> Team:
    """The processes of this one's process group, or this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Team(dist.get_rank(), dist.get_world_size())
    return Team()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Within the block the processes that torchrun started are one :func:`team`; yields this process's device.

    Args:
        device: ``cpu``, ``cuda`` (each process of a machine takes a GPU of its own), or ``cuda:N``.

    Raises:
        UserError: there are several machines, and torchrun could not restart on them.
    """
    here = launched()
    if here is None or here.size == 1 or dist.is_initialized():
        yield device
        return
    if here.reused_store and here.size > here.local_size:  # every machine counts its own restarts
        raise UserError(
            "torchrun on several machines needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: "
            "without it, processes that were started anew look for the dead ones."
        )
    backend = "gloo"
    if device == "cuda":
        gpus = torch.cuda.device_count()
        device = f"cuda:{here.local_rank % gpus}"
        if here.local_size <= gpus:
            backend = "cpu:gloo,cuda:nccl"  # NCCL refuses two processes on one GPU, gloo does not
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    if here.reused_store:  # entries of dead processes would be taken for living ones (pytorch/pytorch#135712)
        store = PrefixStore(f"restart {here.restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    yield device
    team().wait()  # no process ends while another still waits for it
    dist.destroy_process_group()  # after an error the group ends with the process


@contextmanager
def only_writers(folder: Path) -> Iterator[Team]:
    """Within the block no other run writes into ``folder``: :func:`~zskd_nni.runtime.locks.only_writer` for a team.

    Every process holds the lock as long as it lives, so that a second launch is refused while any process of the first
    still works.

    Raises:
        FolderInUseError: another run is at work there.
        UserError: the folder cannot be written to.
    """
    here = team()
    with ExitStack() as held:
        if here.alone:
            held.enter_context(only_writer(folder))
        else:
            here.first(lambda: held.enter_context(one_of_the_writers(folder, first=True)))
            if not here.leads:
                held.enter_context(one_of_the_writers(folder, first=False))
        yield here
        here.wait()
    here.wait()  # all have released the lock: the first may take the folder again
