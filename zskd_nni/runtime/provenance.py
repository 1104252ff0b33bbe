"""The origin of a result: commit, versions, device."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def version() -> str:
    """The version of this package."""
    return importlib.metadata.version("zskd-nni")


def commit() -> str | None:
    """The commit of this package's checkout, with ``+changes`` if it was edited; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", "runtime/provenance.py") != "runtime/provenance.py":
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def provenance(device: torch.device | str, seed: int) -> dict[str, Any]:
    """Commit, versions, device, threads and seed, JSON-able."""
    versions = {"zskd_nni": version(), "python": platform.python_version()}
    for package in ("torch", "torchvision", "nni", "numpy", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
    return {"commit": commit(), "versions": versions, "device": name, "threads": torch.get_num_threads(), "seed": seed}
