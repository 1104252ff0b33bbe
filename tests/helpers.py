"""What several test files need: small networks, real processes, fingerprints of folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zskd_nni import cli
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5
from zskd_nni.models.zoo.trained import trained_weights
from zskd_nni.runtime import signals
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.synthesis import ImpressionStore, SynthesisSettings, synthesize
from zskd_nni.training.checkpoint import History
from zskd_nni.training.loop import TrainingRun, cosine_schedule, fit

SMALL = InputSpec((1, 8, 8))
DATA = "ZSKD_NNI_DATA"
REQUIRE_DATA = "ZSKD_NNI_REQUIRE_DATA"


def prepare_torch() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


class SmallNet(nn.Module):
    """A smooth classifier for 8x8 images; smooth, so that rounding is not amplified by dead units."""

    def __init__(self, classes: int = 5, channels: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.Tanh()
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Linear(54, 24)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm(self.conv(x))).flatten(1))
        return self.head(torch.tanh(self.hidden(x)))


def small_network(seed: int = 0, classes: int = 5, channels: int = 1, dropout: float = 0.0) -> SmallNet:
    """Random weights large enough for decided answers, and running statistics that are not the default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNet(classes, channels, dropout)
        with torch.no_grad():
            for layer in (network.conv, network.hidden, network.head):
                layer.weight.mul_(3)
            network.norm.running_mean.normal_(0, 0.2)
            network.norm.running_var.uniform_(0.5, 2)
    return network


def small_teacher(seed: int = 0, classes: int = 5) -> Teacher:
    return Teacher(small_network(seed, classes), SMALL)


def digits_network() -> nn.Module:
    network = lenet5()
    network.load_state_dict(load_tensors(trained_weights("lenet5-digits"))[0])
    return network


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def soft_targets(count: int, classes: int, seed: int = 0) -> Tensor:
    drawn = np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), count)
    return torch.from_numpy(drawn).float()


def apart(teacher: Teacher, student: nn.Module, probe: Tensor) -> float:
    """KL from the teacher's beliefs to the student's on images, mean over these; leaves the student in ``eval()``."""
    with torch.no_grad():
        p, log_q = teacher(probe).softmax(1), student.eval()(probe).log_softmax(1)
    return float((p * (p.log() - log_q)).sum(1).mean())


# Stores.

STORE_SETTINGS: dict[str, Any] = {"max_steps": 6, "shard": 20, "slots": 10}


def make_store(
    folder: str | Path, size: int = 100, seed: int = 3, teacher_seed: int = 0, floor: float = 1e-4, **settings: Any
) -> ImpressionStore:
    """A store of the small teacher; also run in other processes."""
    prepare_torch()
    teacher = small_teacher(teacher_seed)
    return synthesize(
        teacher,
        ZskdTargets(teacher, ZskdSettings(floor=floor)),
        SynthesisSettings(**{**STORE_SETTINGS, **settings}),
        size=size,
        seed=seed,
        folder=folder,
        quiet=True,
    )


def make_store_stoppably(folder: str | Path, **options: Any) -> None:
    """As the command line does it: a stop leaves with 128 plus the signal's number."""
    try:
        with signals.stoppable():
            make_store(folder, **options)
    except signals.Interrupted as stop:
        sys.exit(128 + stop.signum)


def shard_hashes(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of everything in a store but its manifest and lock."""
    return {
        entry.name: sha256_of_file(entry)
        for entry in sorted(folder.iterdir())
        if entry.name not in ("manifest.json", ".lock")
    }


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest without what differs from run to run: seconds."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["shards"].values():
        entry.pop("seconds")
    manifest["shards"] = dict(sorted(manifest["shards"].items(), key=lambda item: int(item[0])))
    return manifest


def same_store(first: Path, second: Path) -> bool:
    return shard_hashes(first) == shard_hashes(second) and manifest_of(first) == manifest_of(second)


# Training runs.


def tensors_in(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state, by path."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors_in(value, f"{path}.{key}")


def stop_after(steps: int | None) -> Callable[[int], None]:
    """An ``after_step`` that sends this process SIGTERM after so many steps."""

    def after_step(done: int) -> None:
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return after_step


def train(
    folder: str | Path | None,
    steps: int = 120,
    every: float = 1e9,
    pause: float = 0.0,
    stop: int | None = None,
    identity: str = "run",
    dropout: float = 0.3,
) -> tuple[nn.Module, History]:
    """A training run with dropout, batch statistics, Adam and a schedule; also run in other processes."""
    prepare_torch()
    network = small_network(7, dropout=dropout).train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    scheduler = cosine_schedule(optimizer, steps, warmup=10)

    def loss(step: int, draws: torch.Generator) -> Tensor:
        time.sleep(pause)
        images = torch.rand((16, *SMALL.shape), generator=draws)
        labels = (images.mean((1, 2, 3)) * 40).long() % 5
        return nn.functional.cross_entropy(network(images), labels)

    run = TrainingRun(
        steps,
        seed=11,
        checkpoint=None if folder is None else Path(folder) / "run.pt",
        checkpoint_every=every,
        after_step=stop_after(stop),
        quiet=True,
        identity=identity,
    )
    return network, fit(network, optimizer, scheduler, loss, run)


def train_stoppably(folder: str, result: str, **options: Any) -> None:
    """As the command line does it: a stop leaves with 128 plus the signal's number."""
    try:
        with signals.stoppable():
            network, history = train(folder, **options)
    except signals.Interrupted as stop:
        sys.exit(128 + stop.signum)
    record = {"steps": json.dumps(history.steps), "losses": json.dumps(history.losses)}
    save_tensors(result, network.state_dict(), record)


# Processes.

_context = multiprocessing.get_context("forkserver")
# What optimisers, NNI and pytest's own start import at their first use takes seconds as well.
_context.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "pytest",
        "helpers",
        "zskd_nni.cli",
        "zskd_nni.pipeline",
        "zskd_nni.compression",
        "zskd_nni.compression.quantization.stage",
        "nni.compression.pruning",
        "nni.compression.quantization",
    ]
)


def _start_forkserver() -> None:
    # Python 3.11 preloads with a search path of its own, in which this folder is not.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def start_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A real process that runs ``function``, without the seconds that importing torch takes."""
    _start_forkserver()
    process = _context.Process(target=function, args=arguments, kwargs=options, daemon=True)
    process.start()
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.002)


def finished_shards(folder: Path) -> int:
    try:
        return len(json.loads((folder / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def cli_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "zskd_nni", *map(str, arguments)]


def cli_environment() -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if key != DATA}, "OMP_NUM_THREADS": "1"}


def start_cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a user starts it, to its end."""
    options = {"env": cli_environment(), "timeout": 240, **options}
    return subprocess.run(cli_command(*arguments), capture_output=True, text=True, **options)


def run_cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which has torch already: starting it anew takes seconds each time."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("out", "err")]
        _start_forkserver()
        process = _context.Process(target=_cli, args=(words, cli_environment(), str(cwd or Path.cwd()), *paths))
        process.start()
        process.join(240)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, 240)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in paths))


def _cli(words: list[str], environment: dict[str, str], folder: str, out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = ["zskd-nni", *words]
    cli.main()


def is_one_sentence(text: str) -> bool:
    """One line that starts with ``Error:`` and shows no traceback; on a busy machine, signs of life before it."""
    lines = [line for line in text.splitlines() if not line.endswith(" so far")]
    return len(lines) == 1 and lines[0].startswith("Error: ") and text.endswith("\n")


def require_real_data() -> Path:
    """The folder of real data sets; skips without one, but fails where the environment says it must be there."""
    value = os.environ.get(DATA)
    if value and Path(value).is_dir():
        return Path(value)
    reason = f"{DATA} names no folder of real data sets"
    if os.environ.get(REQUIRE_DATA) == "1":
        pytest.fail(f"{reason}, although {REQUIRE_DATA}=1")
    pytest.skip(reason)
