"""The pictures of the methods' pages: what their images look like, made from shipped teachers.

    python benchmarks/method_pictures.py             # all of them, into docs/pictures; minutes on a CPU
    python benchmarks/method_pictures.py zskd ats    # some

Each column is a class. Its images are the first that the teacher puts into that class, in the order in which they were
made; where it puts none there, the place is empty. Below an image stands the teacher's confidence. Everything is made
with seed 0, and no picture was chosen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zskd_nni import DistillationSettings, distill, load_teacher, transfer_source
from zskd_nni.data.candidates import procedural_images
from zskd_nni.data.datasets import CLASS_NAMES
from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.methods.zskt.source import ZsktSource
from zskd_nni.models.build import build_network
from zskd_nni.models.teacher import Teacher
from zskd_nni.research.display import Picture, finish, new_figure, show_image

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
SEED = 0
_INCHES_A_COLUMN, _INCHES_A_ROW, _INCHES_OF_NAMES, _DPI = 0.62, 0.84, 1.0, 200


@dataclass(frozen=True)
class Row:
    """Images under one name.

    Attributes:
        name: at the left; its lines are short.
        images: ``(N, C, H, W)`` in the value range.
        shares: whether the share of the images in each class is written below, too.
    """

    name: str
    images: Tensor
    shares: bool = False


def grid(teacher: Teacher, names: tuple[str, ...], rows: list[Row], alt: str) -> Picture:
    """The first image of each class of each row, with the teacher's confidence."""
    width = _INCHES_OF_NAMES + _INCHES_A_COLUMN * len(names)
    figure = new_figure(width, 0.2 + sum(_INCHES_A_ROW + 0.12 * row.shares for row in rows), _DPI)
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        confidence, chosen = teacher(row.images).softmax(1).max(1)
        for label, (axis, first) in enumerate(zip(line, first_of_each(chosen, len(names)), strict=True)):
            title = names[label] if row is rows[0] else ""
            if first is None:
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
                axis.text(0.5, 0.5, "none", ha="center", va="center", fontsize=8, transform=axis.transAxes)
                axis.set_title(title, fontsize=8, pad=3)
                continue
            note = f"{100 * float(confidence[first]):.0f} %"
            if row.shares:
                note += f"\n({100 * float((chosen == label).float().mean()):.2g} %)"
            show_image(axis, row.images[first], teacher.spec, title, note, size=8)
        line[0].set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    return finish(figure, alt)


def first_of_each(chosen: Tensor, classes: int) -> list[int | None]:
    """For every class the first image that the teacher puts into it; None where there is none."""
    found = [(chosen == label).nonzero().flatten().tolist() for label in range(classes)]
    return [rows[0] if rows else None for rows in found]


def impressions(teacher: Teacher, method: str, preset: str, size: int) -> Tensor:
    """``(size, C, H, W)`` images of a method that makes a set of them."""
    with tempfile.TemporaryDirectory() as folder:
        source = transfer_source(teacher, folder, size, method=method, preset=preset, batch_size=size, seed=SEED)
        return source.batch(0, torch.Generator().manual_seed(SEED)).float()


def zskd(size: int = 200) -> Picture:
    """Both presets, with the teacher of Fashion-MNIST."""
    teacher = load_teacher("lenet5-fashion-mnist")
    rows = [Row(preset, impressions(teacher, "zskd", preset, size)) for preset in ("paper", "best")]
    return grid(teacher, CLASS_NAMES["fashion-mnist"], rows, "Impressions by ZSKD's presets paper and best.")


def zskd_colour(size: int = 200) -> Picture:
    """What colour impressions start from, what becomes of it, and the paper's preset."""
    teacher = load_teacher("alexnet-cifar10")
    starts = procedural_images("leaves", size, teacher.spec, torch.Generator().manual_seed(SEED), 0.0)
    rows = [
        Row("paper", impressions(teacher, "zskd", "paper", size)),
        Row("best:\nstarts", starts),
        Row("best:\nimpressions", impressions(teacher, "zskd", "best", size)),
    ]
    alt = "Impressions of an AlexNet for CIFAR-10, and the dead leaves that they start from."
    return grid(teacher, CLASS_NAMES["cifar10"], rows, alt)


def sts(size: int = 200) -> Picture:
    """Both presets, with the teacher of Fashion-MNIST."""
    teacher = load_teacher("lenet5-fashion-mnist")
    rows = [Row(preset, impressions(teacher, "sts", preset, size)) for preset in ("paper", "best")]
    return grid(teacher, CLASS_NAMES["fashion-mnist"], rows, "Impressions by STS's presets paper and best.")


def ats(size: int = 5000) -> Picture:
    """Candidates of each procedural source, with the teacher of Fashion-MNIST."""
    teacher = load_teacher("lenet5-fashion-mnist")
    names = {"noise-uniform": "uniform\nnoise", "noise-gaussian": "Gaussian\nnoise", "structured": "structured",
             "shapes": "shapes", "mixed": "mixed"}  # fmt: skip
    rows = [
        Row(name, procedural_images(kind, size, teacher.spec, torch.Generator().manual_seed(SEED), 0.25), shares=True)
        for kind, name in names.items()
    ]
    alt = "Candidates of five sources in the class that the teacher puts them into; noise lacks some classes."
    return grid(teacher, CLASS_NAMES["fashion-mnist"], rows, alt)


def zskt(steps: int = 200) -> Picture:
    """Both presets after a short training of a LeNet-5-Half, with the teacher of Fashion-MNIST."""
    teacher = load_teacher("lenet5-fashion-mnist")
    paper = ZsktSettings(rounds=steps // 10, width=32, generator_range="input", divergence="images")
    # `best` without the shapes in its memory, which are the same as in the row of ATS.
    best = ZsktSettings(generator_range="bounded", divergence="images", memory=24_000, new_images=256, filling=10,
                        generator_steps=10, student_steps=50, class_weight=0.3, renewed=True, width=32)  # fmt: skip
    rows = []
    for name, settings in {"paper": paper, "best": best}.items():
        torch.manual_seed(SEED)
        student = build_network("zoo:lenet5_half")
        source = ZsktSource(teacher, settings, 128, SEED)
        recipe = DistillationSettings(temperature=4, steps=steps, batch=128, learning_rate=0.005)
        distill(student, teacher, source, recipe, seed=SEED)
        random = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            rows.append(Row(name, torch.cat([source.batch(steps, random) for _ in range(8)])))
    return grid(
        teacher, CLASS_NAMES["fashion-mnist"], rows, "Images of ZSKT's generator by the presets paper and best."
    )


PAGES: dict[str, Callable[[], Picture]] = {
    "zskd": zskd,
    "zskd-colour": zskd_colour,
    "sts": sts,
    "ats": ats,
    "zskt": zskt,
}


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAGES)}; all where none is named")
    names = parser.parse_args().names or list(PAGES)
    if unknown := sorted(set(names) - set(PAGES)):
        parser.error(f"no picture is called {', '.join(unknown)}; there are {', '.join(PAGES)}")
    for name in names:
        picture = PAGES[name]()
        picture.save(PICTURES / f"method-{name}.png")
        print(f"docs/pictures/method-{name}.png: {picture.alt}")


if __name__ == "__main__":
    main()
