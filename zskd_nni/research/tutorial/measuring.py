"""Networks side by side: accuracy, agreement with their teacher, and an embedding of images by the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zskd_nni.data.datasets import DATA_VARIABLE, LabelledImages, load_images
from zskd_nni.models.hooks import FeaturePoint, recording_features
from zskd_nni.models.teacher import Teacher
from zskd_nni.research.display import Table
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.metrics import accuracy, agreement

Network = nn.Module | Callable[[Tensor], Tensor]


def images_if_there(name: str, split: str = "test") -> LabelledImages | None:
    """A data set to measure on; None, with a printed sentence, if it is not there."""
    try:
        return load_images(name, split)
    except UserError:
        print(f"There is no {name} here: no accuracy is measured. Set {DATA_VARIABLE} to a folder that holds it.")
        return None


@dataclass(frozen=True)
class Measured:
    """How one network performs.

    Attributes:
        accuracy: on the test data, in percent; None without.
        agreement: with the teacher on the test data, in [0, 1]; None without.
        agreement_held_out: the same on images that no student was trained on, in [0, 1].
        parameters: their number; None for what is no module.
    """

    accuracy: float | None
    agreement: float | None
    agreement_held_out: float
    parameters: int | None


@torch.no_grad()
def measure(
    networks: Mapping[str, Network | Teacher], teacher: Teacher, data: LabelledImages | None, held_out: Tensor
) -> dict[str, Measured]:
    """Measure networks against their teacher.

    Args:
        networks: by name: modules, which take normalised images; teachers or other functions, which take images in
            the value range, such as onnxruntime's.
        teacher: they are compared with it.
        data: labelled test images, or None.
        held_out: images ``(N, C, H, W)`` in the value range that no student was trained on.
    """
    spec, device = teacher.spec, str(teacher.device)

    def asked(network: Network | Teacher) -> Callable[[Tensor], Tensor]:
        if not isinstance(network, nn.Module):
            return network
        return float_answers(network.eval().to(device), spec)

    teachers = None if data is None else logits_on(teacher, data, spec, device)
    expected = teacher.predict(held_out.float())
    result = {}
    for name, network in networks.items():
        answer, right, alike = asked(network), None, None
        if data is not None and teachers is not None:
            logits = logits_on(answer, data, spec, device)
            right, alike = accuracy(logits, data.labels), agreement(logits, teachers)
        own = torch.cat([answer(part.to(device)).cpu() for part in held_out.float().split(500)])
        module = network.model if isinstance(network, Teacher) else network
        count = sum(weight.numel() for weight in module.parameters()) if isinstance(module, nn.Module) else None
        result[name] = Measured(right, alike, agreement(own, expected), count)
    return result


def measured_table(measured: Mapping[str, Measured], data: LabelledImages | None) -> Table:
    """The results of :func:`measure` as a table."""
    with_data = data is not None
    columns = ["network", *(["accuracy", "agreement"] if with_data else []), "agreement, held out", "parameters"]
    rows = []
    for name, found in measured.items():
        row = [name]
        if with_data:
            assert found.accuracy is not None and found.agreement is not None
            row += [f"{found.accuracy:.2f} %", f"{100 * found.agreement:.2f} %"]
        row += [f"{100 * found.agreement_held_out:.2f} %", "-" if found.parameters is None else f"{found.parameters:,}"]
        rows.append(row)
    where = f"{len(data):,} test images of {data.name}, opened to measure" if data is not None else "no test data here"
    return Table(columns, rows, f"{where}; held out: impressions that no student was trained on")


@torch.no_grad()
def features(teacher: Teacher, images: Tensor, batch: int = 500) -> Tensor:
    """What the teacher's classifier reads of ``(N, C, H, W)`` images: ``(N, D)``, on the CPU."""
    point = FeaturePoint(teacher.classifier_path, "input")
    parts = []
    for part in images.split(batch):
        with recording_features(teacher.model, point) as seen:
            teacher(part.float().to(teacher.device))
        parts.append(seen[-1].flatten(1).float().cpu())
    return torch.cat(parts)


def embed(teacher: Teacher, sets: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """All sets in one plane by t-SNE of the teacher's features: near points are images that the teacher finds similar.

    For illustration only: distances between far points mean nothing.

    Args:
        teacher: whose features are taken.
        sets: images ``(n, C, H, W)`` by name, in the value range.
        seed: of the embedding.

    Returns:
        Points ``(n, 2)`` by name.

    Raises:
        UserError: fewer than ten images in all.
    """
    from sklearn.manifold import TSNE

    sizes = [len(images) for images in sets.values()]
    if sum(sizes) < 10:
        raise UserError(f"An embedding needs at least 10 images, not {sum(sizes)}.")
    found = torch.cat([features(teacher, images) for images in sets.values()])
    perplexity = min(30.0, (len(found) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(found.numpy())
    return dict(zip(sets, torch.from_numpy(plane).float().split(sizes), strict=True))
