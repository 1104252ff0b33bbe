"""Which of several processes this is, as torchrun tells every process that it starts. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A process's place in a launch of torchrun.

    Attributes:
        rank: its number, from 0 to ``size - 1``, over all machines.
        size: how many processes there are, on all machines.
        local_rank: its number on its machine.
        local_size: how many processes its machine runs.
        restart: how often its machine has started its processes anew.
        reused_store: whether the processes find each other in a store that outlives a restart.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    restart: int
    reused_store: bool


def launched() -> Launch | None:
    """What torchrun's environment says, or None where torchrun did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    if not {"TORCHELASTIC_RUN_ID", *names} <= set(os.environ):  # a single one of them may be left over in a shell
        return None
    rank, size, local_rank, local_size, restart = (int(os.environ[name]) for name in names)
    reused = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank, size, local_rank, local_size, restart, reused)
