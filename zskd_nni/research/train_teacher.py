"""How the shipped teachers are trained, by ``zskd-nni train-teacher NAME``.

The shipped teachers were chosen on held-out training images, by how well their impressions train a student. Comments
below also quote the test accuracy of teachers trained for longer; it had no part in the choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.models.build import build_network
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, plain, read_json, sha256_of_file, write_json
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.provenance import provenance
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.runtime.run_identity import with_defaults
from zskd_nni.runtime.tensors import save_tensors
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.metrics import accuracy
from zskd_nni.training.supervised import SupervisedSettings, train_supervised


@dataclass(frozen=True)
class TeacherRecipe:
    """A network, its data, and how it is trained.

    Attributes:
        network: as in ``zoo:NAME``.
        data: name of the data set.
        spec: the input.
        settings: of the training.
        arguments: of the network's factory.
        half: store the weights in half precision; the recorded accuracy is that of the stored weights.
        spares_slice: do not train on the images of :func:`hold_out`, so that settings can be chosen on them with this
            teacher itself.
    """

    network: str
    data: str
    spec: InputSpec
    settings: SupervisedSettings
    arguments: dict[str, Any] = field(default_factory=dict)
    half: bool = False
    spares_slice: bool = False


_CIFAR_NORMALISED = InputSpec((3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))

_CIFAR_ADAMW = SupervisedSettings(
    epochs=18,
    learning_rate=2e-3,
    weight_decay=5e-2,
    augmentation=Augmentation(translation=0.1, flip=0.5, border="border"),
    autocast=True,
)

# A short schedule for residual networks: the rate rises over the first epoch and falls along a cosine.
_CIFAR_SGD = SupervisedSettings(
    epochs=48,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    augmentation=Augmentation(translation=0.125, flip=0.5),
    autocast=True,
)


def _lenet(data: str, **settings: Any) -> TeacherRecipe:
    return TeacherRecipe("zoo:lenet5", data, InputSpec((1, 32, 32)), SupervisedSettings(**settings))


TEACHERS = {
    "lenet5-digits": _lenet(
        "digits",
        epochs=150,
        batch=64,
        learning_rate=3e-3,
        augmentation=Augmentation(rotation=10, translation=0.08, scale=(0.9, 1.1)),
    ),
    # Rotation, shear and 40 epochs give 99.45 % on test data, but impressions of that teacher train worse students.
    "lenet5-mnist": _lenet("mnist", epochs=20, weight_decay=1e-3, augmentation=Augmentation(translation=0.05)),
    # Trained for 60 epochs at 3e-3 it reaches 92.1 % on test data, but its logits are so steep that its impressions
    # train worse students: 76 % instead of about 83 % on held-out training images.
    "lenet5-fashion-mnist": _lenet(
        "fashion-mnist", epochs=22, weight_decay=1e-3, augmentation=Augmentation(translation=0.03)
    ),
    # 80 minutes on one core; half precision keeps its accuracy to 0.05 points.
    "alexnet-cifar10": TeacherRecipe(
        "zoo:alexnet", "cifar10", InputSpec((3, 32, 32)), _CIFAR_ADAMW, {"bn_momentum": 0.01}, half=True
    ),
    # Without BatchNorm. Twenty minutes of one core with fast bfloat16.
    "vgg-cifar10": TeacherRecipe(
        "zoo:vgg",
        "cifar10",
        InputSpec((3, 32, 32)),
        replace(_CIFAR_ADAMW, epochs=24, learning_rate=1e-3),
        half=True,
        spares_slice=True,
    ),
    # An hour and a quarter of one core with fast bfloat16, and half of that.
    "wrn-16-2-cifar10": TeacherRecipe(
        "zoo:wrn", "cifar10", _CIFAR_NORMALISED, _CIFAR_SGD, {"depth": 16, "width": 2}, half=True, spares_slice=True
    ),
    "resnet20-cifar10": TeacherRecipe(
        "zoo:resnet20", "cifar10", _CIFAR_NORMALISED, _CIFAR_SGD, half=True, spares_slice=True
    ),
    "wrn-40-2-cifar10": TeacherRecipe(
        "zoo:wrn",
        "cifar10",
        _CIFAR_NORMALISED,
        SupervisedSettings(
            epochs=200,
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=5e-4,
            augmentation=Augmentation(translation=0.125, flip=0.5),
        ),
        {"depth": 40, "width": 2},
    ),
}
HELD_OUT = 5000


@dataclass(frozen=True)
class TeacherTraining:
    """How a recipe is run.

    Attributes:
        seed: of the initial weights and the order of the images.
        epochs: instead of the recipe's.
        validation: hold back the end of the training split (:func:`hold_out`), and measure on it instead of the test
            split; for choosing settings.
        root: folder of real data.
        download: let torchvision download missing data.
        device: cpu or cuda.
        quiet: show no progress.
    """

    seed: int = 0
    epochs: int | None = None
    validation: bool = False
    root: Path | None = None
    download: bool = False
    device: str = "cpu"
    quiet: bool = False


def hold_out(data: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """A training split without its last 5,000 images, and these images; at most a tenth of a split is held back."""
    kept = len(data) - min(HELD_OUT, len(data) // 10)
    return data.subset(slice(0, kept)), data.subset(slice(kept, None))


def train_teacher(name: str, folder: Path, training: TeacherTraining | None = None) -> dict[str, Any]:
    """Train the teacher ``name`` on real data into ``folder/NAME.safetensors`` and ``folder/NAME.json``.

    Args:
        name: one of :data:`TEACHERS`.
        folder: created if missing. The checkpoint is kept there too, so that the same call resumes the training.
        training: seed, data and device.

    Returns:
        What is written beside the weights. If the same call has finished before, nothing is trained.

    Raises:
        UserError: no such teacher, no such data.
    """
    if name not in TEACHERS:
        raise UserError(f"There is no recipe for a teacher {name!r}; there are {', '.join(TEACHERS)}.")
    training = training or TeacherTraining()
    folder = make_folder(folder)
    with only_writer(folder, name):
        return _train(name, folder, training)


def _train(name: str, folder: Path, training: TeacherTraining) -> dict[str, Any]:
    recipe, seed, device = TEACHERS[name], training.seed, training.device
    settings = recipe.settings if training.epochs is None else replace(recipe.settings, epochs=training.epochs)
    data = load_images(recipe.data, "train", training.root, training.download)
    if training.validation or recipe.spares_slice:
        data, measured = hold_out(data)
    if not training.validation:
        measured = load_images(recipe.data, "test", training.root, training.download)
    described = {
        "name": name,
        "network": recipe.network,
        "arguments": recipe.arguments,
        "input": asdict(recipe.spec),
        "data": recipe.data,
        "trained_on": f"{len(data)} images of the training split",
        "settings": asdict(settings),
    }
    split = "training split, held back" if training.validation else "test split"
    description: dict[str, Any] = plain({**described, "measured_on": f"{len(measured)} images of the {split}"})
    finished = _finished_before(folder / name, description, seed)
    checkpoint = folder / f".{name}.checkpoint.pt"
    if finished is not None:
        checkpoint.unlink(missing_ok=True)  # left by a process that ended between the last two lines of this function
        return finished
    torch.manual_seed(derive_seed(seed, "teacher", name))
    network = build_network(recipe.network, recipe.arguments)
    history = train_supervised(
        network,
        data,
        recipe.spec,
        settings,
        device=device,
        identity=description,
        seed=seed,
        checkpoint=checkpoint,
        label=name,
        quiet=training.quiet,
    )
    weights = network.state_dict()
    if recipe.half:
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        network.load_state_dict(weights)
    logits = logits_on(float_answers(network, recipe.spec), measured, recipe.spec, device)
    checksum = save_tensors(folder / f"{name}.safetensors", weights)
    result = {
        **description,
        "stored": "float16" if recipe.half else "float32",
        "accuracy": round(accuracy(logits, measured.labels), 2),
        "sha256": checksum,
        "seconds": round(history.seconds, 1),
        "provenance": provenance(device, seed),
    }
    write_json(folder / f"{name}.json", result)
    checkpoint.unlink(missing_ok=True)
    return result


def _finished_before(stem: Path, asked: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The description beside the weights, if a training of the same description and seed has finished."""
    weights, beside = stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")
    if not (weights.is_file() and beside.is_file()):
        return None
    try:
        result = read_json(beside)
        # A setting that is newer than the teacher had its default.
        known = with_defaults(result, {"settings": plain(asdict(SupervisedSettings()))})
        same = {key: known[key] for key in asked} == asked and result["provenance"]["seed"] == seed
        return result if same and result["sha256"] == sha256_of_file(weights) else None
    except (UserError, KeyError, TypeError, AttributeError):  # not a teacher, or a damaged one: it is trained again
        return None
