"""NNI's experiment manager, kept to this machine, to one folder, and to the life of the process that started it.

NNI 3.0's manager is a node process with a web server that listens on every interface, asks for no password, and has no
setting for either. Here it is started with a small script in front (``nni_manager_preload.js``) that makes every
server of the process listen on 127.0.0.1, and under a path prefix that is drawn anew for each start: other users of the
machine, and web pages in a browser on it, do not know it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError

PRELOAD = Path(__file__).with_name("nni_manager_preload.js")
LOOPBACK = "127.0.0.1"
_SECONDS_TO_START = 120  # NNI allows itself three and its tuner ten, too little on a busy machine
_SECONDS_TO_STOP = 40.0  # NNI gives its tuner 30 at most


def lives(process: psutil.Process) -> bool:
    """Whether a process still does anything; it may end while it is asked."""
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
        paths: folders that local trials import from.

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
        self._family: dict[int, psutil.Process] = {}

    @property
    def address(self) -> str:
        """Of the web portal, with the part that nobody else knows."""
        host = socket.gethostname() if self.portal else LOOPBACK
        return f"http://{host}:{self.port}/{self.experiment.url_prefix}/"

    @property
    def log(self) -> Path:
        """What NNI's manager writes about itself."""
        return self.folder / self.name / "log" / "nnimanager.log"

    def start(self) -> None:
        """Start the manager and a new experiment.

        Raises:
            UserError: it did not come up.
        """
        from nni.runtime.log import silence_stdout

        silence_stdout()
        try:
            with self._environment(), _launching(self.folder):
                self.experiment.start(self.port)
        except Exception as error:  # of requests, of the operating system, of NNI
            self.stop()
            raise UserError(f"NNI's manager did not start ({_first_line(error)}); its log is {self.log}.") from error
        except BaseException:
            self.stop()
            raise
        self.watch()

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        """What the manager, and only it and its children, find in their environment."""
        settings = {
            "host": None if self.portal else LOOPBACK,
            "home": str(self.folder),
            "patience": _SECONDS_TO_START,
            "node_options": os.environ.get("NODE_OPTIONS"),
        }
        required = str(PRELOAD).replace("\\", "\\\\").replace('"', '\\"')
        local = f"localhost,{LOOPBACK}"
        changes = {
            "ZSKD_NNI_MANAGER": json.dumps(settings),
            "NODE_OPTIONS": f'{os.environ.get("NODE_OPTIONS", "")} --require "{required}"'.strip(),
            "PYTHONPATH": _python_path(self.paths),
            # Neither NNI's requests nor its websockets are for a proxy.
            **{name: ",".join(filter(None, (os.environ.get(name), local))) for name in ("NO_PROXY", "no_proxy")},
        }
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                if name in ("NO_PROXY", "no_proxy"):
                    continue  # this process goes on asking
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def is_alive(self) -> bool:
        """Whether the manager's process is."""
        process = self.experiment._proc
        return process is not None and process.poll() is None

    def watch(self) -> None:
        """Remember the manager's processes, so that :meth:`stop` finds those whose parent is gone as well."""
        process = self.experiment._proc
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            manager = psutil.Process(process.pid)
            for one in (manager, *manager.children(recursive=True)):
                self._family.setdefault(one.pid, one)

    def processes(self) -> list[psutil.Process]:
        """The manager and all that it started, as far as they live."""
        self.watch()
        return [one for one in self._family.values() if lives(one)]

    def stop(self) -> None:
        """Stop the manager, its tuner and its trials, kindly at first; nothing of them is left."""
        from nni.experiment import rest
        from nni.runtime.log import stop_experiment_logging

        process, experiment = self.experiment._proc, self.experiment
        try:
            if process is not None:
                self.watch()
                with contextlib.suppress(Exception):
                    rest.delete(experiment.port, "/experiment", experiment.url_prefix)
                with contextlib.suppress(Exception):
                    process.wait(_SECONDS_TO_STOP)
        finally:
            self._end_all()
            if process is not None:
                with contextlib.suppress(Exception):
                    process.wait(5)
            experiment._proc = experiment.port = None
            stop_experiment_logging(self.name)
            _forget_at_exit(experiment)

    def _end_all(self) -> None:
        for end in ("terminate", "kill"):
            left = self.processes()
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(one, end)()
            psutil.wait_procs(left, timeout=3)


@contextlib.contextmanager
def _launching(folder: Path) -> Iterator[None]:
    """NNI's launcher keeps its list of experiments in ``folder``, as the manager is told to, and is patient."""
    from nni.experiment import launcher, rest

    def wait_for_server(port: int, retry: int = 0, url_prefix: str | None = None) -> None:
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

    experiments, check = launcher.Experiments, launcher._check_rest_server
    launcher.Experiments = lambda: experiments(str(folder / "nni-experiments"))
    launcher._check_rest_server = wait_for_server
    try:
        yield
    finally:
        launcher.Experiments, launcher._check_rest_server = experiments, check


def _forget_at_exit(experiment: Any) -> None:
    import atexit

    atexit.unregister(experiment.stop)


def _python_path(paths: Sequence[str]) -> str:
    """Local trials shall run this very package, wherever it was started from."""
    import zskd_nni

    package = str(Path(zskd_nni.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"), *paths)))


def _free_port() -> int:
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind((LOOPBACK, 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind((LOOPBACK, port + 1))  # NNI wants it as well for some training services
                return port
    raise UserError("No two free ports side by side were found for NNI's manager; name one with --port.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
