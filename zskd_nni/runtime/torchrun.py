"""This process's place among those that torchrun started. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A process's place in a launch of torchrun.

    Attributes:
        rank: its number, from 0 to ``size - 1``, over all machines.
        size: number of processes, on all machines.
        local_rank: its number on its machine.
        local_size: number of processes on its machine.
        restart: how often its machine has restarted its processes.
        reused_store: whether the processes find each other in a store that outlives a restart.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    restart: int
    reused_store: bool


def launched() -> Launch | None:
    """The place that torchrun's environment variables describe; None if torchrun did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    if not {"TORCHELASTIC_RUN_ID", *names} <= set(os.environ):  # a shell may have one of them left over
        return None
    rank, size, local_rank, local_size, restart = (int(os.environ[name]) for name in names)
    reused = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank, size, local_rank, local_size, restart, reused)
