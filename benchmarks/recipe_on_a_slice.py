"""A packaged recipe with changed settings, on a validation slice: how the settings of recipes are chosen.

    python benchmarks/recipe_on_a_slice.py cifar10-prune50 --seeds 0 1 --set distillation.learning_rate=0.002

The last 5,000 images of the training split are held back. A teacher is trained on the rest (once, in ``--out``) and
takes the place of the shipped one. Accuracy is measured on the held-out images, for the student and its controls; test
data is not read. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
from pathlib import Path

import numpy as np
import torch

from zskd_nni.data.datasets import load_images
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.research.train_teacher import TEACHERS, TeacherTraining, hold_out, train_teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, write_atomic
from zskd_nni.runtime.provenance import version

_SHIPPED = "zoo:"


def held_out_images(name: str, folder: Path, root: Path | None) -> Path:
    """The held-out images of a data set as a file that a recipe can name; the rest is in a file beside it."""
    paths = [folder / f"{name}-{part}.npz" for part in ("rest", "slice")]
    for path, part in zip(paths, hold_out(load_images(name, "train", root)), strict=True):
        if not path.exists():
            pixels = part.images[:, 0] if part.images.shape[1] == 1 else part.images.permute(0, 2, 3, 1)
            content = io.BytesIO()
            np.savez(content, images=pixels.numpy(), labels=part.labels.numpy())
            write_atomic(path, content.getvalue())
    return paths[1]


def slice_teacher(recipe: str, out: Path, epochs: int | None = None) -> tuple[Path, Path]:
    """The weights of a teacher that has not seen the slice, trained unless it is there, and the slice's images.

    Args:
        recipe: a packaged one, of a shipped teacher.
        out: folder below which the teacher and the images lie.
        epochs: instead of those of the teacher's recipe; for a trial run.

    Raises:
        UserError: the recipe's teacher is not one that ``train-teacher`` makes.
    """
    root = Path(data) if (data := os.environ.get("ZSKD_NNI_DATA")) else None
    weights = load_recipe(recipe).recipe.teacher.weights or ""
    name = weights.removeprefix(_SHIPPED)
    if not weights.startswith(_SHIPPED) or name not in TEACHERS:
        raise UserError(f"The teacher of {recipe} is not one that train-teacher makes ({weights or 'none'}).")
    teachers = make_folder(out / "teachers")
    train_teacher(name, teachers, TeacherTraining(epochs=epochs, validation=True, root=root))
    return (teachers / f"{name}.safetensors").resolve(), held_out_images(TEACHERS[name].data, teachers, root).resolve()


def slice_settings(weights: Path, images: Path, real_data: bool = False) -> list[str]:
    """Settings of a recipe that is measured on the slice; with ``real_data`` its student is trained on the rest."""
    rest = images.with_name(images.name.replace("-slice", "-rest"))
    real = [f"transfer={{method: real, data: {rest}, size: 100000}}"]
    fit = ", fit: resize" if images.name.startswith("digits") else ""  # as the named set is fitted
    evaluation = f"evaluation={{data: {images}{fit}}}"
    return [f"teacher.weights={weights}", evaluation, *(real if real_data else [])]


def main() -> None:
    """Run the recipe seed by seed and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a packaged recipe, of a shipped teacher")
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=YAML")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--scale", default="full")
    parser.add_argument("--real-data", action="store_true", help="train on the rest of the training split instead")
    parser.add_argument("--out", type=Path, default=Path("runs/slice"))
    parser.add_argument("--teacher-epochs", type=int, help="instead of those of the teacher's recipe; for a trial run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--impressions", type=Path, help="a finished store of the slice's teacher to train on")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    weights, images = slice_teacher(given.recipe, given.out, given.teacher_epochs)
    changes = [*slice_settings(weights, images, given.real_data), *given.set]
    label = f"{given.recipe}-{given.scale}{'-real' if given.real_data else ''}"
    found: dict[str, list[float]] = {}
    for seed in given.seeds:
        loaded = load_recipe(given.recipe, changes, seed, given.scale)
        folder = given.out / f"{label}-{fingerprint_of([version(), given.set])[:8]}-seed{seed}"
        report = Run(loaded, folder, impressions=given.impressions).compress()
        accuracy = {**report["accuracy"], **{key: each["accuracy"] for key, each in report["controls"].items()}}
        for kind, value in accuracy.items():
            if value is not None:
                found.setdefault(kind, []).append(value)
        print(f"{label} seed {seed} {given.set}: {accuracy}", flush=True)
    for kind, values in found.items():
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{kind}: {statistics.mean(values):.2f}{spread}")


if __name__ == "__main__":
    main()
