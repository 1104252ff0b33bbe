"""Whole compressions on another device, with NNI's pruners and quantizers, and the papers' tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from zskd_nni.data.datasets import load_images
from zskd_nni.models.zoo import wrn
from zskd_nni.recipes.load import load_recipe
from zskd_nni.research.reproduction.context import Workspace
from zskd_nni.research.reproduction.session import Selection, run_table
from zskd_nni.runtime.files import read_json
from zskd_nni.runtime.tensors import save_tensors

SMALL = (
    "transfer.size=60",
    "transfer.held_out=40",
    "transfer.synthesis.shard=60",
    "transfer.synthesis.max_steps=20",
    "compression.pruning.steps=12",
    "compression.quantization.steps=12",
    "distillation.steps=12",
    "distillation.batch=20",
    "controls=[]",
)
WEIGHTS = "[{op_names: [conv2, fc1], target_names: [weight], quant_dtype: %s, quant_scheme: symmetric}]"
WAYS = {
    "L1NormPruner, QATQuantizer": (),
    "TaylorPruner, PtqQuantizer": (),
    "FPGMPruner, LsqQuantizer": (),
    "MovementPruner, LsqPlusQuantizer": (),
    "LevelPruner, DoReFaQuantizer": (f"compression.quantization.config_list={WEIGHTS % 'int8'}",),
    "L2NormPruner, BNNQuantizer": (f"compression.quantization.config_list={WEIGHTS % 'null'}",),
}


def alike(recipe: str, changes: Sequence[str], device: torch.device, folder: Path) -> dict[str, Any]:
    """The report of a run on the device, after comparing it with the CPU.

    The same of the network is left, and it has learnt the same. On the CPU nothing is exported: that would take most
    of the time, and export happens on the CPU wherever the student was trained.
    """
    from zskd_nni.pipeline import Run
    from zskd_nni.pipeline.report import measure

    loaded = load_recipe(recipe, changes, 0)
    there = Run(loaded, folder / "there", device=str(device), quiet=True).compress()
    here = Run(loaded, folder / "here", quiet=True)
    with here.owned():
        held_out = here.held_out()
        student = here.students.make("student", here.transfer())
    assert there["parameters"]["student"] == sum(weight.numel() for weight in student.network.parameters())
    assert there["pruning"]["removed_channels"] == student.record["pruning"]["removed_channels"]
    assert there["history"]["losses"] == pytest.approx(student.record["distillation"]["losses"], rel=0.05)
    test = None if loaded.recipe.evaluation is None else load_images(loaded.recipe.evaluation.data, "test")
    measured = measure({"student": student}, here.teacher.to("cpu"), here.out, held_out, test).accuracy
    assert len(measured) == (0 if test is None else 3)
    for network, accuracy in measured.items():
        assert there["accuracy"][network] == pytest.approx(accuracy, abs=3), network
    return there


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe(way: str, device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("nni")
    pruner, quantizer = way.split(", ")
    changes = [f"compression.pruning.pruner={pruner}", f"compression.quantization.quantizer={quantizer}", *WAYS[way]]
    alike("digits-prune50", [*SMALL, *changes], device, tmp_path)


RESIDUAL = """
name: residual
teacher:
  model: zoo:wrn
  arguments: {depth: 10, width: 1}
  weights: teacher.safetensors
  input: {shape: [3, 16, 16], mean: [0.5, 0.4, 0.4], std: [0.2, 0.2, 0.3]}
transfer:
  method: %s
  preset: best
  size: 40
  held_out: 40
  %s
compression:
  pruning:
    pruner: %s
    config_list: [{op_types: [%s], sparse_ratio: 0.5}]
    schedule: {name: %s, interval: 3, total_times: 3}
    steps: 10
  quantization:
    quantizer: QATQuantizer
    config_list:
      - op_types: [Conv2d, Linear]
        target_names: [_input_, weight]
        quant_dtype: int8
        quant_scheme: affine
        target_settings: {weight: {quant_dtype: int8, quant_scheme: symmetric, granularity: out_channel}}
    fuse_batch_norm: true
    fused: true
    steps: 6
distillation: {temperature: 4, steps: 20, batch: 8, augmentation: {translation: 0.1, flip: 0.5}}
controls: []
"""
SYNTHESIS = "synthesis: {max_steps: 4, shard: 40, slots: 20}"
GAME = "memory: 32\n  new_images: 8\n  filling: 1\n  figures: 8\n  generator_steps: 1\n  student_steps: 4"


@pytest.mark.parametrize(
    "parts",
    [
        ("zskd", SYNTHESIS, "L1NormPruner", "Conv2d", "AGPPruner"),
        ("zskt", GAME, "SlimPruner", "BatchNorm2d", "LinearPruner"),
    ],
    ids=["impressions, AGP", "belief matching, linear"],
)
def test_pruned_and_quantized_in_one_training(parts: tuple[str, ...], device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("nni")
    torch.manual_seed(0)
    save_tensors(tmp_path / "teacher.safetensors", wrn(10, 1).state_dict())
    (tmp_path / "residual.yml").write_text(RESIDUAL % parts)
    report = alike(str(tmp_path / "residual.yml"), [], device, tmp_path)
    assert report["parameters"]["student"] < report["parameters"]["teacher"]


@pytest.mark.parametrize("cell", ["digits-zskd-best", "digits-ats-paper", "digits-zskt-best", "digits-real-labels"])
def test_a_cell_of_the_tables(cell: str, device: torch.device, tmp_path: Path) -> None:
    records = []
    for where in (torch.device("cpu"), device):
        workspace = Workspace(tmp_path / where.type, tmp_path / where.type / "results", device=str(where), quiet=True)
        run_table(Selection("digits", [cell], [0], "smoke"), workspace, lambda said: None)
        records += [read_json(path) for path in workspace.results.glob("*.json")]
    here, there = records
    assert there["accuracy"]["teacher"] == pytest.approx(here["accuracy"]["teacher"], abs=0.3)
    assert there["accuracy"]["student"] == pytest.approx(here["accuracy"]["student"], abs=3)
