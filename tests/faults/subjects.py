"""The runs that are killed and damaged: small versions of all long work, each in a folder of its own.

A subject runs in another process, is killed, and is run again. What it leaves must not depend on that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers import SMALL, STORE_SETTINGS, make_store, prepare_torch, shard_hashes, small_network, small_teacher
from torch import Tensor

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.data.sources import StoredSource
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.files import remove_leftovers, sha256_of_file
from zskd_nni.runtime.tensors import load_sealed, save_tensors
from zskd_nni.training.distillation import DistillationSettings
from zskd_nni.training.supervised import SupervisedSettings, train_supervised

SHARDS, STEPS, ROUNDS = 8, 40, 10


@dataclass(frozen=True)
class Subject:
    """A run that can be killed.

    Attributes:
        run: does the work in a folder, or what is left of it.
        finished: names and SHA-256 of what it leaves for good.
        done: the share of the work that a folder holds, in [0, 1].
    """

    run: Callable[[Path], None]
    finished: Callable[[Path], dict[str, str]]
    done: Callable[[Path], float]


def _result(folder: Path) -> dict[str, str]:
    return {"result": sha256_of_file(folder / "result.safetensors")}


def _checkpointed(total: int) -> Callable[[Path], float]:
    def done(folder: Path) -> float:
        steps = [_step(path) for path in folder.glob("*.checkpoint.pt")]
        return max(steps, default=0) / total

    return done


def _step(path: Path) -> int:
    return load_sealed(path)["step"]


# Synthesis.


def synthesis(folder: Path) -> None:
    make_store(folder / "store", size=20 * SHARDS, **{**STORE_SETTINGS, "max_steps": 8})


def _store(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "store" / "manifest.json").read_text())
    kept = {index: entry["sha256"] for index, entry in manifest["shards"].items()}
    return {**shard_hashes(folder / "store"), "manifest": json.dumps(dict(sorted(kept.items())))}


def _shards(folder: Path) -> float:
    manifest = folder / "store" / "manifest.json"
    return len(json.loads(manifest.read_text())["shards"]) / SHARDS if manifest.exists() else 0.0


# Students, teachers, ZSKT.


def _keep(folder: Path, state: dict[str, Tensor], losses: list[float]) -> None:
    remove_leftovers(folder, "result")
    save_tensors(folder / "result.safetensors", state, {"losses": json.dumps(losses)})


def student(folder: Path) -> None:
    from zskd_nni.training.distillation import distill

    prepare_torch()
    images = torch.rand((48, *SMALL.shape), generator=torch.Generator().manual_seed(3))
    network = small_network(1, dropout=0.2)
    settings = DistillationSettings(temperature=4, steps=STEPS, batch=16, warmup=4)
    history = distill(
        network,
        small_teacher(),
        StoredSource(images, 16, 5, "set"),
        settings,
        seed=2,
        checkpoint=folder / "student.checkpoint.pt",
        checkpoint_every=0.0,
        quiet=True,
    )
    _keep(folder, network.state_dict(), history.losses)


def teacher(folder: Path) -> None:
    prepare_torch()
    draws = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (80, *SMALL.shape), generator=draws, dtype=torch.uint8)
    data = LabelledImages(images, images.float().mean((1, 2, 3)).long() % 5, "made up")
    network = small_network(2, dropout=0.2)
    history = train_supervised(
        network,
        data,
        SMALL,
        SupervisedSettings(epochs=STEPS // 5, batch=16),
        checkpoint=folder / "teacher.checkpoint.pt",
        checkpoint_every=0.0,
        quiet=True,
    )
    _keep(folder, network.state_dict(), history.losses)


def zskt(folder: Path) -> None:
    from zskd_nni.methods.zskt.settings import ZsktSettings
    from zskd_nni.methods.zskt.train import train_zskt

    prepare_torch()
    network = small_network(1)
    history = train_zskt(
        network,
        small_teacher(),
        ZsktSettings(rounds=ROUNDS, student_steps=4, batch=8, latent=6, width=4),
        seed=3,
        checkpoint=folder / "zskt.checkpoint.pt",
        checkpoint_every=0.0,
        quiet=True,
    )
    _keep(folder, network.state_dict(), history.losses)


# NNI: pruned on a schedule, quantized and distilled in one training.


def fused(folder: Path) -> None:
    from nni.compression.pruning import AGPPruner, L1NormPruner
    from nni.compression.quantization import QATQuantizer

    from zskd_nni.compression import DataFreeEvaluator, ZeroShotDistiller
    from zskd_nni.compression.evaluator import EvaluatorOptions
    from zskd_nni.models.teacher import Teacher

    prepare_torch()
    images = torch.rand((64, *SMALL.shape), generator=torch.Generator().manual_seed(3))
    network = small_network(0)
    evaluator = DataFreeEvaluator(
        Teacher(network, SMALL),
        StoredSource(images, 16, 5, "set"),
        DistillationSettings(warmup=2, learning_rate=1e-3),
        checkpoint=folder / "fused.checkpoint.pt",
        quiet=True,
        options=EvaluatorOptions(checkpoint_every=0.0),
    )
    pruner = AGPPruner(L1NormPruner(network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator), 4, 6)
    targets = {"target_names": ["_input_", "weight"], "quant_dtype": "int8", "quant_scheme": "affine"}
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_types": ["Conv2d", "Linear"], **targets}])
    distiller = ZeroShotDistiller.from_compressor(quantizer, [], evaluator.teacher)
    state = distiller.compress(STEPS, None).state_dict()
    _keep(folder, {name: value for name, value in state.items() if value is not None}, evaluator.histories[-1].losses)


# A transfer set of arbitrary images.


def arbitrary_set(folder: Path) -> None:
    from zskd_nni.data import candidates
    from zskd_nni.methods.ats import method as ats

    prepare_torch()
    candidates._BLOCK = 50
    settings = ats.AtsSettings(sources=("noise-uniform", "shapes"), candidates=8, tries=2)
    ats.SAVE_EVERY = 0.0
    ats.make_transfer_set(small_teacher(), settings, size=100, seed=1, folder=folder / "set", quiet=True)


def _set(folder: Path) -> dict[str, str]:
    return {name: sha256_of_file(folder / "set" / name) for name in ("set.safetensors", "set.json")}


def _blocks(folder: Path) -> float:
    if (folder / "set" / "set.json").exists():
        return 1.0
    path = folder / "set" / "progress.pt"
    if not path.exists():
        return 0.0
    return int(load_sealed(path)["classes"]["block"]) / 32


# A whole recipe.

TINY = (
    "transfer.size=100",
    "transfer.held_out=40",
    "transfer.synthesis.shard=20",
    "transfer.synthesis.max_steps=8",
    "compression.pruning.steps=10",
    "distillation.steps=20",
    "controls=[none]",
)


def recipe(folder: Path) -> None:

    prepare_torch()
    Run(load_recipe("digits-prune50", TINY), folder / "out", quiet=True).compress()


def _recipe_files(folder: Path) -> dict[str, str]:
    out = folder / "out"
    names = [
        *(path.relative_to(out) for path in out.glob("impressions*/shard-*")),
        *(path.relative_to(out) for path in out.glob("state/*.safetensors")),
        "student.safetensors",
        "student.onnx",
        "student-int8.onnx",
    ]
    return {str(name): sha256_of_file(out / name) for name in names}


def _recipe_done(folder: Path) -> float:
    out = folder / "out"
    if (out / "report.json").exists():
        return 1.0
    found = len(list(out.glob("impressions*/shard-*"))) + 2 * len(list(out.glob("state/*.json")))
    return min(0.99, found / 18)


SUBJECTS = {
    "synthesis": Subject(synthesis, _store, _shards),
    "student": Subject(student, _result, _checkpointed(STEPS)),
    "teacher": Subject(teacher, _result, _checkpointed(STEPS)),
    "zskt": Subject(zskt, _result, _checkpointed(4 * ROUNDS)),
    "fused": Subject(fused, _result, _checkpointed(STEPS)),
    "arbitrary set": Subject(arbitrary_set, _set, _blocks),
    "recipe": Subject(recipe, _recipe_files, _recipe_done),
}
