"""Runs the code that ZSKT's authors released, from a clone of it; none of that code is kept here.

    git clone https://github.com/polo5/ZeroShotKnowledgeTransfer
    python benchmarks/bench.py --only peer --peer ZeroShotKnowledgeTransfer

Its solver, networks, generator and losses run as they are. Its logger is left out (it needs TensorFlow 1 and
scipy.misc), and so is its test after every hundredth of the rounds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEACHER, STUDENT = "WRN-40-2", "WRN-16-1"


def authors_rounds(clone: Path, rounds: int, batch: int, device: str) -> Callable[[], None]:
    """A function that runs so many rounds of the authors' solver, WRN-40-2 to WRN-16-1.

    Args:
        clone: of polo5/ZeroShotKnowledgeTransfer.
        rounds: one generator step and ten student steps each.
        batch: images.
        device: cpu or cuda.
    """
    if not (clone / "solver.py").exists():
        raise SystemExit(f"{clone} has no solver.py: it must be a clone of polo5/ZeroShotKnowledgeTransfer.")
    silent = types.ModuleType("utils.logger")
    silent.Logger = _NoLogger  # type: ignore[attr-defined]
    sys.modules["utils.logger"] = silent
    sys.path.insert(0, str(clone))
    from models.selector import select_model  # type: ignore[import-not-found]
    from solver import ZeroShotKTSolver  # type: ignore[import-not-found]

    sys.modules["solver"].get_test_loader = lambda _: None  # type: ignore[attr-defined]
    folder = Path(tempfile.mkdtemp(prefix="peer-"))
    torch.manual_seed(0)
    weights = folder / "CIFAR10" / TEACHER / "last.pth.tar"
    weights.parent.mkdir(parents=True)
    torch.save({"state_dict": select_model("CIFAR10", TEACHER).state_dict()}, weights)
    settings = Namespace(
        dataset="CIFAR10",
        total_n_pseudo_batches=rounds,
        n_generator_iter=1,
        n_student_iter=10,
        batch_size=batch,
        z_dim=100,
        student_learning_rate=2e-3,
        generator_learning_rate=1e-3,
        teacher_architecture=TEACHER,
        student_architecture=STUDENT,
        KL_temperature=1.0,
        AT_beta=250.0,
        pretrained_models_path=str(folder),
        log_directory_path=str(folder),
        save_model_path=str(folder),
        experiment_name="peer",
        save_final_model=False,
        save_n_checkpoints=0,
        log_freq=10**9,
        use_gpu=device != "cpu",
        device=torch.device(device),
    )

    def run_rounds() -> None:
        solver = ZeroShotKTSolver(settings)
        solver.test = lambda: 0.0
        solver.run()

    return run_rounds


def commit_of(clone: Path) -> str:
    """The short hash of the commit that is checked out in a clone."""
    command = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"git knows no commit of {clone}: {result.stderr.strip()}")
    return result.stdout.strip()


class _NoLogger:
    def __init__(self, **_: Any) -> None:
        pass
