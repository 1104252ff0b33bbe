"""A neutral set of images on which students of one teacher are compared where there is no test data.

A student agrees with its teacher best on images of the kind that it was trained on, so that agreement on a method's own
held-out images says more about the method than about the student. These images belong to no method: half of them are
figures and smooth noise, half are dead leaves, and each class (as the teacher sees it) has about as many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zskd_nni.data.procedural import start_images
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.rng import generator

COUNT = 600
KINDS = ("mixed", "leaves")
_CANDIDATES = 4  # candidates for each image that is taken
_SEED = 0  # of every run: the same teacher has the same images
# MNIST: measured on LeNet-5 with noise on its weights, two seeds each, on 2,000 test images. CIFAR-10: of the recorded
# runs, which `benchmarks/agreement_worth.py` prints. There a student of real images has less agreement (49 %) and more
# accuracy (83 %) than one of impressions.
WORTH = (
    "Agreement on procedural images orders students of one teacher that were trained alike, and is lower than "
    "accuracy: with LeNet-5 on MNIST, 85 % agreement went with 99.1 % accuracy, 53 % with 97.9 %, 29 % with 74 %; with "
    "AlexNet on CIFAR-10, 54 % with 81 % in a pruned network, and with 72 % in a new one"
)
# Of the recorded data-free runs with test data: how many, and by how many points agreement on held-out images was below
# agreement on test data, at least and at most.
HELD_OUT_BELOW_TEST = (38, 4, 16)


def neutral_images(teacher: Teacher, count: int = COUNT) -> Tensor:
    """Procedural images ``(count, C, H, W)`` on the CPU, balanced by the teacher's classes as far as can be.

    Args:
        teacher: on any device; only its classes choose among the images.
        count: at least one of each kind.

    Example:
        >>> from zskd_nni import load_teacher
        >>> images = neutral_images(load_teacher("lenet5-digits"), 20)
        >>> images.shape
        torch.Size([20, 1, 32, 32])
    """
    shares = (count - count // 2, count // 2)
    return torch.cat([_balanced(teacher, kind, share) for kind, share in zip(KINDS, shares, strict=True)])


@torch.no_grad()
def _balanced(teacher: Teacher, kind: str, count: int) -> Tensor:
    batch = min(teacher.spec.inference_batch_on(teacher.device), 250)
    room = torch.full((teacher.num_classes,), -(-count // teacher.num_classes))
    taken: list[Tensor] = []
    spare: list[Tensor] = []
    for start in range(0, _CANDIDATES * count, batch):
        signals.check()
        images = start_images(kind, batch, teacher.spec, generator(_SEED, "neutral", kind, start))[0]
        fits = torch.zeros(len(images), dtype=torch.bool)
        for index, label in enumerate(teacher(images.to(teacher.device)).argmax(1).tolist()):
            fits[index] = room[label] > 0
            room[label] -= int(fits[index])
        taken.append(images[fits])
        spare += [images[~fits]] if sum(map(len, spare)) < count else []
        if sum(map(len, taken)) >= count:
            break
    return torch.cat([*taken, *spare])[:count]
