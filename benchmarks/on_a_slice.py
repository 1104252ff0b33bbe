"""One cell of a table with changed settings, on a validation slice: how the presets of the tables are chosen.

    python benchmarks/on_a_slice.py fashion-mnist-zskd-best --seeds 0 1 --set student.weight_decay=0.1
    python benchmarks/on_a_slice.py mnist-zskd-paper --set student.augmentation.rotation=16 synthesis.learning_rate=3.0

The last 5,000 images of the training split are held back. A teacher is trained on the rest (once, in ``--out``), and
rows that read real images read the rest. Accuracy and agreement are measured on the held-out images; test data is not
read. On Fashion-MNIST seeds differ by up to two points: compare means of several.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.research.reproduction.cells import Plan, resolve
from zskd_nni.research.reproduction.context import PairContext, Workspace
from zskd_nni.research.reproduction.sources import make_source
from zskd_nni.research.reproduction.students import train_student
from zskd_nni.research.reproduction.tables import TABLES
from zskd_nni.research.train_teacher import TeacherTraining, hold_out, train_teacher
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.metrics import accuracy, agreement


class HeldOutContext(PairContext):
    """A pair whose teacher has not seen the held-out images, which take the place of the test split.

    Args:
        pair: see :class:`PairContext`.
        workspace: the same.
        epochs: of the teacher's training; by default those of its recipe.
    """

    def __init__(self, pair: str, workspace: Workspace, epochs: int | None = None) -> None:
        super().__init__(pair, workspace)
        self.epochs = epochs

    @cached_property
    def teacher(self) -> Teacher:
        """Trained on the rest of the split, unless it has been before."""
        name, recipe, workspace = self.pair.teacher, self.pair.recipe, self.workspace
        folder = workspace.runs / "teachers"
        training = TeacherTraining(epochs=self.epochs, validation=True, root=workspace.root, quiet=workspace.quiet)
        train_teacher(name, folder, training)
        weights = str((folder / f"{name}.safetensors").resolve())
        return load_teacher(recipe.network, recipe.spec, weights, recipe.arguments).to(workspace.device)

    @cached_property
    def _split(self) -> tuple[LabelledImages, LabelledImages]:
        return hold_out(load_images(self.pair.recipe.data, "train", self.workspace.root))

    @cached_property
    def test(self) -> LabelledImages:
        """The held-out images."""
        return self._split[1]

    def training_images(self, most: int | None) -> LabelledImages:
        """The rest of the split."""
        rest = self._split[0]
        return rest if most is None else rest.subset(slice(0, most))


def changed(plan: Plan, changes: list[str]) -> Plan:
    """The plan with ``size``, ``student.KEY``, ``student.augmentation.KEY`` or a path of the method's options set."""
    for change in changes:
        path, _, text = change.partition("=")
        keys, value = path.split("."), json.loads(text)
        if keys == ["size"]:
            plan = replace(plan, size=value)
        elif keys[:2] == ["student", "augmentation"]:
            value = tuple(value) if isinstance(value, list) else value
            moves = Augmentation(**{**asdict(plan.student.augmentation), keys[2]: value})
            plan = replace(plan, student=replace(plan.student, augmentation=moves))
        elif keys[0] == "student":
            plan = replace(plan, student=replace(plan.student, **{keys[1]: value}))
        else:
            part: Any = plan.options if len(keys) == 1 else getattr(plan.options, keys[0])
            part = replace(part, **{keys[-1]: value})
            plan = replace(plan, options=part if len(keys) == 1 else replace(plan.options, **{keys[0]: part}))
    return plan


def main() -> None:
    """Run the cell seed by seed and print accuracy and agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cell", choices=sorted({cell.name for table in TABLES.values() for cell in table.cells}), metavar="CELL"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=JSON")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--scale", default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/slice"))
    parser.add_argument("--teacher-epochs", type=int, help="instead of those of the teacher's recipe; for a trial run")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cell = next(cell for table in TABLES.values() for cell in table.cells if cell.name == given.cell)
    plan = changed(resolve(cell, given.scale), given.set)
    root = os.environ.get("ZSKD_NNI_DATA")
    workspace = Workspace(given.out, given.out / "records", root=Path(root) if root else None)
    context = HeldOutContext(cell.pair, workspace, given.teacher_epochs)
    spec, found = context.teacher.spec, []
    for seed in given.seeds:
        source = make_source(plan, context, seed).source
        (given.out / "students").mkdir(parents=True, exist_ok=True)
        name = "-".join([given.cell, given.scale, *given.set, f"seed{seed}"])
        student = train_student(plan, context, seed, source, given.out / "students" / f"{name}.pt").network
        logits = logits_on(float_answers(student, spec), context.test, spec)
        found.append((accuracy(logits, context.test.labels), 100 * agreement(logits, context.teacher_logits)))
        print(
            f"{given.cell} seed {seed} {given.set}: accuracy {found[-1][0]:.2f}, agreement {found[-1][1]:.2f}",
            flush=True,
        )
    if len(found) > 1:
        for name, values in zip(("accuracy", "agreement"), zip(*found, strict=True), strict=True):
            print(f"{name}: {statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}")


if __name__ == "__main__":
    main()
