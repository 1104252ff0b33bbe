"""Reading image sets by name or path: for evaluation, arbitrary transfer sets, runs on real data, and teachers.

Synthesis, distillation on impressions, pruning and calibration never import this.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError

DATA_VARIABLE = "ZSKD_NNI_DATA"
_TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
UNLABELLED = -1
Fit = Literal["exact", "pad", "resize", "crop"]
NAMED_SETS = ("digits", *_TORCHVISION)
CLASS_NAMES = {
    "fashion-mnist": ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    "cifar10": ("aeroplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "lorry"),
}
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class LabelledImages:
    """Images as bytes, with their classes.

    Attributes:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64.
        name: of the set, for reports.
        fit: how images of another size than the network's are fitted, see :func:`fit_shape`.
    """

    images: Tensor
    labels: Tensor
    name: str
    fit: Fit | None = None

    def __len__(self) -> int:
        return len(self.images)

    def require_labels(self, classes: int) -> None:
        """Refuse labels that are not classes of the network.

        Raises:
            UserError: there are images without labels (a folder without class folders), or a class that the network
                does not have.
        """
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0:
            raise UserError(
                f"{self.name} has images without a class, on which no accuracy can be measured; "
                "a folder of images needs one sub-folder for each class, an .npz an array 'labels'."
            )
        if highest >= classes:
            raise UserError(
                f"{self.name} has a class {highest}, the network knows {classes} classes only (0 to {classes - 1})."
            )

    def subset(self, index: Tensor | slice, name: str | None = None) -> LabelledImages:
        """The images at ``index``."""
        return LabelledImages(self.images[index], self.labels[index], name or self.name, self.fit)

    def pixels(self, index: Tensor | slice, spec: InputSpec) -> Tensor:
        """Float images ``(n, *spec.shape)`` in the teacher's value range, resized where the sizes differ."""
        images = fit_shape(self.images[index].float().div_(255), spec.shape, self.fit)
        return images.mul_(spec.high - spec.low).add_(spec.low)


def fit_shape(images: Tensor, shape: tuple[int, int, int], fit: Fit | None = None) -> Tensor:
    """Convert ``(N, c, h, w)`` images in [0, 1] to ``shape`` (C, H, W).

    Grey images are repeated for colour networks, colour images averaged for grey ones.

    Args:
        images: in [0, 1].
        shape: of the network's input.
        fit: ``exact`` refuses other sizes; ``pad`` puts black around; ``crop`` cuts out the middle; ``resize`` scales
            bilinearly. By default 28x28 images are padded to 32x32, as LeCun did for LeNet-5, and others are resized.

    Raises:
        UserError: the channels differ and are not 1 and 3, or the sizes do not allow the fit.

    Example:
        >>> fit_shape(torch.zeros(5, 1, 28, 28), (3, 32, 32)).shape
        torch.Size([5, 3, 32, 32])
    """
    channels, height, width = shape
    if images.shape[1] != channels:
        if {images.shape[1], channels} != {1, 3}:
            raise UserError(
                f"The images have {images.shape[1]} channels of {images.shape[2]}x{images.shape[3]} pixels, the "
                f"network takes {channels} of {height}x{width}; only grey (1) and colour (3) are made into each other."
            )
        images = images.mean(1, keepdim=True).repeat(1, channels, 1, 1)
    down, right = height - images.shape[2], width - images.shape[3]
    if (down, right) == (0, 0):
        return images
    sizes = f"the images are {images.shape[2]}x{images.shape[3]}, the network takes {height}x{width}"
    fit = fit or usual_fit(images, shape) or "resize"
    if fit == "exact":
        raise UserError(
            f"{sizes}: say how they are fitted, as the teacher's training images were: resize scales them, pad puts "
            f"black around them, crop cuts out their middle."
        )
    if fit == "resize":
        return functional.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
    if (min(down, right) < 0) if fit == "pad" else (max(down, right) > 0):
        raise UserError(f"{sizes}, so that {fit} is not possible; resize is.")
    top, left = down // 2, right // 2  # negative: cut off
    return functional.pad(images, (left, right - left, top, down - top))


def usual_fit(images: Tensor, shape: tuple[int, int, int]) -> Fit | None:
    """``pad`` for 28x28 images and networks that take 32x32, as LeNet-5 was trained; otherwise None."""
    return "pad" if tuple(images.shape[2:]) == (28, 28) and shape[1:] == (32, 32) else None


def fitted(data: LabelledImages, shape: tuple[int, int, int], fit: Fit | None = None) -> LabelledImages:
    """The images with the fit that a user names, or else that of a known rule, or else ``exact``.

    28x28 images are padded for networks that take 32x32, and the 8x8 ``digits`` are made larger.

    Raises:
        UserError: they do not fit the network's input.
    """
    shipped = data.name == "digits" and tuple(data.images.shape[1:]) == (1, 8, 8)
    usual = "resize" if shipped else usual_fit(data.images, shape)
    result = replace(data, fit=fit or usual or "exact")
    fit_shape(result.images[:1].float(), shape, result.fit)
    return result


def describe_fit(data: LabelledImages, shape: tuple[int, int, int]) -> str:
    """How images are made into a network's input, in words; empty where they are taken as they are."""
    found, parts = data.images.shape[1:], []
    if tuple(found[1:]) != shape[1:]:
        fit = data.fit or usual_fit(data.images, shape) or "resize"
        done = {"pad": "padded", "crop": "cropped", "resize": "resized"}.get(fit, fit)
        parts.append(f"{found[1]}x{found[2]} {done} to {shape[1]}x{shape[2]}")
    if found[0] != shape[0]:
        parts.append("colours averaged to grey" if shape[0] == 1 else "grey repeated as colours")
    return ", ".join(parts)


def data_root(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of real data: ``given``, or the one in the variable ``ZSKD_NNI_DATA``, or None."""
    value = given or os.environ.get(DATA_VARIABLE)
    return Path(value) if value else None


def load_images(
    name: str, split: str = "test", root: str | os.PathLike[str] | None = None, download: bool = False
) -> LabelledImages:
    """Read a set by name or path.

    Args:
        name: ``digits`` (embedded in scikit-learn), ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``, ``svhn``,
            or the path of an ``.npz`` (``images`` ``(N, H, W[, C])``, uint8 or in [0, 1], and ``labels``) or of
            a folder of images with one sub-folder for each class. Without labels or sub-folders they are unlabelled.
        split: ``train`` or ``test``; ignored for a path.
        root: folder of the named sets, in torchvision's layout; by default that of ``ZSKD_NNI_DATA``.
        download: let torchvision fetch a named set into ``root``.

    Raises:
        UserError: the set does not exist, or cannot be read.

    Example:
        >>> images = load_images("digits")
        >>> images.images.shape, images.images.dtype, len(images.labels)
        (torch.Size([360, 1, 8, 8]), torch.uint8, 360)
    """
    if split not in ("train", "test"):
        raise UserError(f"A data set's split is train or test, not {split!r}.")
    if name == "digits":
        return _digits(split)
    if name in _TORCHVISION:
        return _named(name, split, data_root(root), download)
    path = Path(name)
    if path.suffix == ".npz":
        return _npz(path)
    with contextlib.suppress(OSError, ValueError):  # the name may be one that no folder can have
        if path.is_dir():
            return _folder(path)
    raise UserError(
        f"There is no data set {name!r}: name one of {', '.join(NAMED_SETS)}, an .npz file or a folder of images."
    )


def _digits(split: str) -> LabelledImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    held_out = torch.arange(len(labels)) % 5 == 0  # every fifth image, 360 of 1,797
    return LabelledImages(images, labels, "digits").subset(held_out if split == "test" else ~held_out)


def _named(name: str, split: str, root: Path | None, download: bool) -> LabelledImages:
    import torchvision

    if root is None:
        raise UserError(
            f"The data set {name} needs a folder: give --data-root DIR or set {DATA_VARIABLE}; "
            "--download lets torchvision fetch it there."
        )
    archive = root / f"{name}-{split}.npz"
    if archive.is_file():
        return _npz(archive, name)
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        dataset = getattr(torchvision.datasets, _TORCHVISION[name])(root, download=download, **which)
    except RuntimeError as error:
        if download:
            raise UserError(f"torchvision could not fetch the data set {name} into {root} ({error}).") from error
        raise UserError(
            f"The data set {name} is not in {root} (torchvision's layout, or {name}-{split}.npz); "
            "--download lets torchvision fetch it there."
        ) from error
    except Exception as error:  # damaged files raise anything
        raise UserError(f"The data set {name} could not be read in {root} ({error}).") from error
    images = torch.as_tensor(np.asarray(dataset.data))
    if name == "svhn":  # torchvision keeps it as (N, 3, 32, 32)
        return LabelledImages(images, torch.as_tensor(dataset.labels, dtype=torch.int64), name)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.as_tensor(dataset.targets, dtype=torch.int64), name)


def _npz(path: Path, name: str | None = None) -> LabelledImages:
    try:
        with np.load(path, allow_pickle=False) as content:
            images = content["images"]
            labels = content["labels"] if "labels" in content else np.full(images.shape[:1], UNLABELLED)
        if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):
            raise ValueError("they are no arrays")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except Exception as error:  # a damaged archive raises anything
        raise UserError(
            f"{path} holds no array 'images', or none that can be read beside its 'labels' ({error})."
        ) from error
    labelled = labels.shape == images.shape[:1] != (0,) and labels.dtype.kind in "iu"
    if images.ndim in (3, 4) and labelled:
        images = _as_bytes(images, path)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not labelled:
        raise UserError(
            f"{path}: 'images' must be uint8 of shape (N, H, W) or (N, H, W, C) with one integer label each, "
            f"not {images.dtype} {images.shape} beside {labels.dtype} {labels.shape}."
        )
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        raise UserError(
            f"{path}: 'images' is of shape {images.shape}, with the channels first; they belong last, (N, H, W, C): "
            "images.transpose(0, 2, 3, 1)."
        )
    tensor = torch.from_numpy(images)
    tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
    return LabelledImages(tensor, torch.from_numpy(labels.astype(np.int64)), name or path.stem)


def _as_bytes(images: np.ndarray[Any, Any], path: Path) -> np.ndarray[Any, Any]:
    """Images as bytes: whole numbers from 0 to 255, and real ones in [0, 1], are converted."""
    if images.dtype == np.uint8 or images.dtype.kind not in "iuf" or not images.size:
        return images
    low, high = float(images.min()), float(images.max())
    if not np.isfinite([low, high]).all() or (low == high and not 0 <= low <= 255):
        raise UserError(
            f"{path}: 'images' are {images.dtype} from {low:g} to {high:g}, which are no pixels; they belong in "
            "[0, 1], or as uint8 in [0, 255]."
        )
    if images.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(images * 255).astype(np.uint8)
    bytes_elsewhere = low >= 0 and 1 < high <= 255
    if images.dtype.kind in "iu" and bytes_elsewhere:
        return images.astype(np.uint8)
    found = (
        f"{path}: 'images' are {images.dtype} from {low:g} to {high:g}; they belong in [0, 1], or as uint8 in [0, 255]"
    )
    if bytes_elsewhere:
        raise UserError(f"{found}. This converts bytes in another type: images = np.rint(images).astype(np.uint8)")
    raise UserError(
        f"{found}. If {low:g} is black and {high:g} white, this converts them: "
        f"images = np.rint(255 * (images - {low:g}) / {high - low:g}).astype(np.uint8)"
    )


def _colours(image: Any, file: Path) -> np.ndarray[Any, Any]:
    """``(H, W, 3)`` bytes of an opened image; 16-bit grey is scaled, which Pillow would clip at 255."""
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(f"{file} has pixels of 32 bits, whose range is unknown; save it with 8 or 16.")
    return np.asarray(image.convert("RGB"))


def _folder(path: Path) -> LabelledImages:
    from PIL import Image

    # Not classes: .ipynb_checkpoints and __MACOSX, which would shift the numbers of all others.
    classes = sorted(e.name for e in path.iterdir() if e.is_dir() and not e.name.startswith((".", "__")))
    files = [(file, index) for index, name in enumerate(classes) for file in sorted((path / name).iterdir())]
    if not classes:
        files = [(file, UNLABELLED) for file in sorted(path.iterdir())]
    files = [(file, index) for file, index in files if file.suffix.lower() in _IMAGE_ENDINGS]
    empty = set(range(len(classes))) - {index for _, index in files}
    if files and empty:
        raise UserError(
            f"{path / classes[min(empty)]} holds no images, and as a class it would shift the numbers of those behind "
            "it; remove the folder, or number the classes in an .npz."
        )
    if not files:
        raise UserError(f"The folder {path} holds no images ({', '.join(sorted(_IMAGE_ENDINGS))}).")
    arrays = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                arrays.append(_colours(image, file))
        except UserError:
            raise
        except Exception as error:  # damaged and oversized images raise anything
            raise UserError(f"{file} cannot be read as an image ({error}).") from error
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise UserError(
            f"The images in {path} differ in size ({', '.join(map(str, sorted(shapes)[:3]))}); resize them."
        )
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.tensor([index for _, index in files]), path.name)
