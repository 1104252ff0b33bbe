"""Several processes at one piece of work, as torchrun starts them: how it is divided, and how they agree.

What they say to each other goes through ``torch.distributed``; when one of them dies, torchrun stops the others and
starts all of them anew. Outside of a process group a team has one member, and nothing here costs anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

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
# One process may wait for another as long as that works, and torchrun notices those that do not live any more.
_PATIENCE = timedelta(days=7)
_BETWEEN_LOOKS = 0.01
_OF_BROKEN_CONNECTIONS = ("onnection", "gloo", "NCCL", "Broken pipe", "imed out")


class WorkerLostError(UserError):
    """Another process of this launch is gone."""


def share(work: Sequence[T], rank: int, size: int) -> list[T]:
    """The part of ``work`` that is ``rank``'s out of ``size``: every ``size``-th piece, so that all get as much."""
    return list(work[rank::size])


class Team:
    """The processes that work together, seen from one of them. All of them must call its methods in the same order.

    Args:
        rank: of this process, from 0.
        size: how many processes there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that does what one alone may do."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part of ``work``, which must be the same for all."""
        return share(work, self.rank, self.size)

    def wait(self) -> None:
        """Until all are here; a signal that asks to stop is answered meanwhile.

        Raises:
            WorkerLostError: one of them is gone.
        """
        if self.alone:
            return
        with _translate_dist_errors():
            arrival = dist.all_reduce(torch.zeros(1), async_op=True)
            while not arrival.is_completed():
                signals.check()
                time.sleep(_BETWEEN_LOOKS)
            arrival.wait()

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives (JSON-able) where the first alone calls it, for all; the others wait for it."""
        if self.alone:
            return work()
        answer = work() if self.leads else None
        self.wait()
        message = _encoded(answer) if self.leads else torch.empty(0, dtype=torch.uint8)
        size = self.largest(len(message))
        if not self.leads:
            message = torch.empty(size, dtype=torch.uint8)
        self.take_from_first(message)
        return cast(T, answer if self.leads else _decoded(message))

    def collect(self, value: T) -> list[T]:
        """Everybody's ``value`` (JSON-able), in the order of ranks, for all."""
        if self.alone:
            return [value]
        self.wait()
        message = _encoded(value)
        room = torch.full((self.largest(len(message)),), ord(" "), dtype=torch.uint8)  # JSON may end in spaces
        room[: len(message)] = message
        messages = [torch.empty_like(room) for _ in range(self.size)]
        with _translate_dist_errors():
            dist.all_gather(messages, room)
        return [_decoded(one) for one in messages]

    def largest(self, value: int) -> int:
        """The largest of everybody's ``value``."""
        if self.alone:
            return value
        held = torch.tensor(value)
        with _translate_dist_errors():
            dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def add(self, values: Tensor) -> None:
        """Put the sum of everybody's ``values`` in their place."""
        if not self.alone:
            with _translate_dist_errors():
                dist.all_reduce(values)

    def take_from_first(self, values: Tensor) -> None:
        """Put the first process's ``values`` in the place of everybody's."""
        if not self.alone:
            with _translate_dist_errors():
                dist.broadcast(values, src=0)


def _encoded(value: Any) -> Tensor:
    # Not torch's own exchange of objects, which unpickles what comes over the network.
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(message: Tensor) -> Any:
    return json.loads(message.numpy().tobytes())


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
        if not broken and not any(word in str(error) for word in _OF_BROKEN_CONNECTIONS):
            raise
        raise WorkerLostError(
            "Another process of this launch has ended; its own message tells why. What was finished is kept, and the "
            "same command goes on from there."
        ) from error


def team() -> Team:
    """All processes of the process group that this one has joined; otherwise it is alone."""
    if dist.is_available() and dist.is_initialized():
        return Team(dist.get_rank(), dist.get_world_size())
    return Team()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Within the block the processes that torchrun started are a :func:`team`; gives this one's own device.

    Args:
        device: ``cpu``, ``cuda`` (each process of a machine takes a GPU of its own), or ``cuda:N``.

    Raises:
        UserError: several machines, and a restart would not work on them.
    """
    here = launched()
    if here is None or here.size == 1 or dist.is_initialized():
        yield device
        return
    if here.reused_store and here.size > here.local_size:  # machines count their restarts each for itself
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
    if here.reused_store:  # what the dead left in it would be taken for the living (pytorch/pytorch#135712)
        store = PrefixStore(f"restart {here.restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    yield device
    team().wait()  # nobody leaves while another is still to find it
    dist.destroy_process_group()  # after an error it ends with the process, which nobody then waits for


@contextmanager
def only_writers(folder: Path) -> Iterator[Team]:
    """As :func:`~zskd_nni.runtime.locks.only_writer`, for all of a team.

    Within the block nobody else writes into ``folder``.

    The lock is held by every process as long as it lives, so that a second launch is refused while one of the first
    is still at work, whichever that is.

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
    here.wait()  # all have let go: the first may take the folder again
