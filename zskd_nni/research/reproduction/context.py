"""What all runs of a pair share: folders, device, teacher and data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.research.reproduction.pairs import PAIRS
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy, expected_calibration_error


@dataclass(frozen=True)
class Workspace:
    """Where runs read and write.

    Attributes:
        runs: folder of transfer sets and students.
        results: folder of records.
        root: folder of real data.
        download: let torchvision download missing data.
        device: cpu or cuda.
        quiet: show no progress.
    """

    runs: Path
    results: Path
    root: Path | None = None
    download: bool = False
    device: str = "cpu"
    quiet: bool = False

    @property
    def device_kind(self) -> str:
        """The device without its number: results of one kind of device are not mixed with those of another."""
        return self.device.split(":")[0]


class PairContext:
    """Teacher and data of a pair; each is loaded when it is first needed.

    Args:
        pair: a name of :data:`zskd_nni.research.reproduction.pairs.PAIRS`.
        workspace: folders and device.
    """

    def __init__(self, pair: str, workspace: Workspace) -> None:
        self.pair, self.workspace = PAIRS[pair], workspace

    @cached_property
    def teacher(self) -> Teacher:
        """The trained teacher, on the workspace's device.

        Raises:
            UserError: its weights are missing; the message gives the command that makes them.
        """
        recipe = self.pair.recipe
        weights = f"zoo:{self.pair.teacher}"
        return load_teacher(recipe.network, recipe.spec, weights, recipe.arguments).to(self.workspace.device)

    @cached_property
    def test(self) -> LabelledImages:
        """The test split."""
        classes = self.teacher.num_classes  # first: a missing teacher takes longer to make than missing data
        data = load_images(self.pair.recipe.data, "test", self.workspace.root, self.workspace.download)
        data.require_labels(classes)
        return data

    @cached_property
    def teacher_logits(self) -> Tensor:
        """The teacher's logits ``(N, classes)`` on the test split."""
        return logits_on(self.teacher, self.test, self.teacher.spec, self.workspace.device)

    @cached_property
    def teacher_scores(self) -> tuple[float, float]:
        """The teacher's accuracy in percent and its expected calibration error, on the test split."""
        logits, labels = self.teacher_logits, self.test.labels
        return round(accuracy(logits, labels), 3), round(expected_calibration_error(logits, labels), 6)

    def training_images(self, most: int | None) -> LabelledImages:
        """The training split, or its first ``most`` images; for baselines that read real data."""
        data = load_images(self.pair.recipe.data, "train", self.workspace.root, self.workspace.download)
        return data if most is None else data.subset(slice(0, most))


def available_teachers(pairs: Iterable[str]) -> dict[str, str]:
    """Fingerprints, by pair, of the teachers whose weights are available here."""
    found = {}
    for pair in pairs:
        with contextlib.suppress(UserError):
            found[pair] = PairContext(pair, Workspace(Path(), Path())).teacher.fingerprint
    return found
