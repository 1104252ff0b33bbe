"""Starting torchrun: as a user does, and quickly.

What costs seconds in a launch is that every process imports torch. :func:`start_launch` runs torchrun's own agent
(``torch.distributed.launcher``, with its rendezvous, restarts and signals) in a process that has torch already, and
takes its workers from a server that imports it once a launch.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from helpers import DATA, _context, _start_forkserver, prepare_torch

from zskd_nni.runtime import distributed, signals


def torchrun_command(count: int, *arguments: object, restarts: int = 0) -> list[str]:
    """The launcher with ``count`` processes of the command line."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "--max-restarts", str(restarts), "-m", "zskd_nni", *map(str, arguments)]


def start_torchrun(count: int, *arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != DATA}
    return subprocess.Popen(
        torchrun_command(count, *arguments, restarts=restarts),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started and that are at work."""
    try:
        found = psutil.Process(pid).children()
        return sorted(child.pid for child in found if child.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return []


def start_launch(count: int, function: Callable[..., Any], *arguments: Any, restarts: int = 0) -> Any:
    """A launch of ``count`` processes, each of which calls ``function`` within the launch's team."""
    _start_forkserver()
    process = _context.Process(target=_agent, args=(count, restarts, function, arguments))
    process.start()  # no daemon: it has children
    return process


def launch(count: int, function: Callable[..., Any], *arguments: Any, restarts: int = 0) -> None:
    process = start_launch(count, function, *arguments, restarts=restarts)
    process.join()
    assert process.exitcode == 0


def _agent(count: int, restarts: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    prepare_torch()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=restarts,
        monitor_interval=0.05,
        # No forks of the agent: it has threads, and a worker that is forked while one of them holds a lock waits for
        # ever. A server of this launch, which has none, imports torch once for all of its workers.
        start_method="forkserver",
    )
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torch._dynamo", "helpers"])
    try:
        elastic_launch(config, _worker)(function, arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _worker(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    prepare_torch()
    try:
        with signals.stoppable(), distributed.joined("cpu"):
            function(*arguments)
    except signals.Interrupted as stop:
        os._exit(128 + stop.signum)


def append(path: str | Path, line: str) -> None:
    """A line that many processes may write at once."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)
