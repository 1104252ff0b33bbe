"""NNI's experiment manager, kept to this machine, to one folder, and to the life of the process that started it.

NNI 3.0's manager is a node process with a web server. The server listens on every interface and asks for no password,
and NNI has no setting for either. Here a small script is loaded in front of it (``nni_manager_preload.js``): every
server of the process listens on 127.0.0.1, under a path prefix drawn anew for each start. Other users of the machine,
and web pages in a browser on it, do not know the prefix.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

import zskd_nni
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError

PRELOAD = Path(__file__).with_name("nni_manager_preload.js")
LOOPBACK = "127.0.0.1"
_SECONDS_TO_START = 120  # NNI allows itself three and its tuner ten, too little on a busy machine
_SECONDS_TO_STOP = 40.0  # NNI gives its tuner 30 at most


def is_running(process: psutil.Process) -> bool:
    """Whether a process exists and is no zombie; it may end while it is asked."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Manager:
    """A running NNI experiment.

    Args:
        config: an ``nni.experiment.ExperimentConfig``.
        folder: where NNI writes everything; also the home folder that it sees.
        portal: listen on every interface instead of 127.0.0.1.
        port: of the web server; a free one where absent.
        paths: folders from which local trials import.

    Attributes:
        name: NNI's identifier of the experiment, ``search-1`` or a higher number.
    """

    def __init__(
        self, config: Any, folder: Path, *, portal: bool = False, port: int | None = None, paths: Sequence[str] = ()
    ) -> None:
        from nni.experiment import Experiment

        self.folder, self.portal, self.paths = folder, portal, paths
        self.port = port or _free_port()
        config.experiment_working_directory = str(folder)
        self.name = f"search-{1 + sum(1 for _ in folder.glob('search-*'))}"
        self.experiment = Experiment(config, self.name)
        self.experiment.url_prefix = secrets.token_hex(16)
        self._seen: dict[int, psutil.Process] = {}

    @property
    def address(self) -> str:
        """The web portal's address, with the part that nobody else knows."""
        host = socket.gethostname() if self.portal else LOOPBACK
        return f"http://{host}:{self.port}/{self.experiment.url_prefix}/"

    @property
    def log(self) -> Path:
        """The log of NNI's manager."""
        return self.folder / self.name / "log" / "nnimanager.log"

    def start(self) -> None:
        """Start the manager and a new experiment.

        Raises:
            UserError: it did not come up.
        """
        from nni.runtime.log import silence_stdout

        silence_stdout()
        try:
            with self._patched_nni():
                self.experiment.start(self.port)
        except BaseException as error:
            self.stop()
            if not isinstance(error, Exception):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # of requests, of the system, of NNI
            raise UserError(f"NNI's manager did not start ({reason}); its log is {self.log}.") from error
        self.remember_processes()

    @contextlib.contextmanager
    def _patched_nni(self) -> Iterator[None]:
        """Set the environment of the manager and its children, and patch NNI's launcher.

        The launcher then keeps its list of experiments in our folder, as the preloaded script tells the manager to, and
        waits longer.
        """
        from nni.experiment import launcher

        for name in ("NO_PROXY", "no_proxy"):  # for good: neither NNI's requests nor its websockets are for a proxy
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", LOOPBACK)))
        options = os.environ.get("NODE_OPTIONS")
        host, home = None if self.portal else LOOPBACK, str(self.folder)
        settings = {"host": host, "home": home, "patience": _SECONDS_TO_START, "node_options": options}
        required = str(PRELOAD).replace("\\", "\\\\").replace('"', '\\"')
        # Local trials run this very package, wherever it was started from.
        package = str(Path(zskd_nni.__file__).resolve().parent.parent)
        environment = {
            "ZSKD_NNI_MANAGER": json.dumps(settings),
            "NODE_OPTIONS": f'{options or ""} --require "{required}"'.strip(),
            "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"), *self.paths))),
        }
        experiments = launcher.Experiments
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(launcher, "Experiments", lambda: experiments(str(self.folder / "nni-experiments"))),
            mock.patch.object(launcher, "_check_rest_server", _wait_for_server),
        ):
            yield

    def is_alive(self) -> bool:
        """Whether the manager's process runs."""
        process = self.experiment._proc
        return process is not None and process.poll() is None

    def remember_processes(self) -> None:
        """Note the manager's processes, so that :meth:`stop` finds even those whose parent has ended."""
        process = self.experiment._proc
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                manager = psutil.Process(process.pid)
                for each in (manager, *manager.children(recursive=True)):
                    self._seen.setdefault(each.pid, each)

    def stop(self) -> None:
        """Stop the manager, its tuner and its trials: first by NNI's request, then by signals."""
        from nni.experiment import rest
        from nni.runtime.log import stop_experiment_logging

        experiment, process = self.experiment, self.experiment._proc
        try:
            if process is not None:
                self.remember_processes()
                with contextlib.suppress(Exception):
                    rest.delete(experiment.port, "/experiment", experiment.url_prefix)
                with contextlib.suppress(Exception):
                    process.wait(_SECONDS_TO_STOP)
        finally:
            for end in (psutil.Process.terminate, psutil.Process.kill):
                self.remember_processes()
                left = list(filter(is_running, self._seen.values()))
                for each in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        end(each)
                psutil.wait_procs(left, timeout=3)
            if process is not None:
                with contextlib.suppress(Exception):
                    process.wait(5)
            experiment._proc = experiment.port = None
            stop_experiment_logging(self.name)
            atexit.unregister(experiment.stop)


def _wait_for_server(port: int, retry: int = 0, url_prefix: str | None = None) -> None:
    from nni.experiment import rest

    end = time.monotonic() + _SECONDS_TO_START
    while True:
        signals.check()
        try:
            rest.get(port, "/check-status", url_prefix)
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _free_port() -> int:
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind((LOOPBACK, 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind((LOOPBACK, port + 1))  # NNI wants it as well for some training services
                return port
    raise UserError("No two free ports side by side were found for NNI's manager; name one with --port.")
