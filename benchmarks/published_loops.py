"""The published schedules as plain PyTorch: the baselines of `bench.py`.

Written for this project, from the papers and from what their released code does. They are not slowed down: weights have
no gradients, denormals are flushed, all cores are used, nothing is printed or written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def zskd_loop(
    model: nn.Module,
    targets: Tensor,
    shape: tuple[int, ...],
    *,
    steps: int = 1500,
    batch: int = 100,
    learning_rate: float = 1e-3,
    temperature: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """ZSKD's schedule (Nayak 2019, released code): every batch takes the same number of Adam steps from noise.

    The whole batch is rescaled to [0, 1] by its extremes before every step.

    Args:
        model: takes images ``(N, C, H, W)`` in [0, 1] and gives logits.
        targets: ``(N, K)`` soft targets.
        shape: of an image.
        steps: Adam steps per batch (1,500).
        batch: images (100).
        learning_rate: of Adam (1e-3).
        temperature: of the teacher (20).

    Returns:
        Images ``(N, C, H, W)``, and their cross-entropy minus the targets' entropy, ``(N,)``.
    """
    images, fits = [], []
    for wanted in targets.split(batch):
        x = torch.rand((len(wanted), *shape), device=targets.device)
        x.requires_grad_(True)
        adam = torch.optim.Adam([x], learning_rate)
        for _ in range(steps):
            with torch.no_grad():
                low, high = x.min(), x.max()
                x.sub_(low).div_(high - low)
            adam.zero_grad()
            logits = model(x) / temperature
            (-(wanted * functional.log_softmax(logits, 1)).sum(1)).mean().backward()
            adam.step()
        with torch.no_grad():
            beliefs = functional.log_softmax(model(x) / temperature, 1)
            fits.append(functional.kl_div(beliefs, wanted, reduction="none").sum(1))
            images.append(x.detach())
    return torch.cat(images), torch.cat(fits)


class ZsktGenerator(nn.Sequential):
    """ZSKT's generator for 32x32 images, as in the released code."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__(
            nn.Linear(100, 128 * 8 * 8),
            nn.Unflatten(1, (128, 8, 8)),
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )


def zskt_loop(
    teacher: nn.Module,
    student: nn.Module,
    groups: tuple[list[nn.Module], list[nn.Module]],
    *,
    rounds: int,
    batch: int = 128,
    student_steps: int = 10,
    attention: float = 250.0,
    memory_format: torch.memory_format = torch.contiguous_format,
    attention_map: Callable[[Tensor], Tensor] | None = None,
    fused: bool = False,
) -> None:
    """ZSKT's training (Micaelli & Storkey 2019, released code): rounds of one generator step and ten student steps.

    Args:
        teacher: in ``eval()``.
        student: in ``train()``.
        groups: the teacher's and the student's modules whose attention maps are compared.
        rounds: of the outer loop.
        batch: pseudo images.
        student_steps: on the images of a round.
        attention: weight of the attention term.
        memory_format: of all three networks.
        attention_map: a function from features to maps; by default the plain formula.
        fused: whether one kernel takes all of Adam's step.
    """
    device = next(student.parameters()).device
    generator = ZsktGenerator().to(device).train()
    for network in (generator, student, teacher):
        network.to(memory_format=memory_format)
    adam_g = torch.optim.Adam(generator.parameters(), 1e-3, fused=fused)
    adam_s = torch.optim.Adam(student.parameters(), 2e-3, fused=fused)
    map_of = attention_map or (lambda features: functional.normalize(features.pow(2).mean(1).flatten(1)))
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, _inputs, output: seen.__setitem__(module, output))
        for side in groups
        for module in side
    ]

    def divergence(beliefs: Tensor, answers: Tensor) -> Tensor:
        # The mean over images and classes, as in the released code.
        answered, believed = functional.softmax(answers, 1), functional.log_softmax(beliefs, 1)
        return functional.kl_div(believed, answered, reduction="sum") / believed.numel()

    def maps(side: list[nn.Module]) -> list[Tensor]:
        return [map_of(seen[module]) for module in side]

    for _ in range(rounds):
        z = torch.randn((batch, 100), device=device)
        x = generator(z)
        loss = -divergence(student(x), teacher(x))
        adam_g.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 5.0)
        adam_g.step()
        with torch.no_grad():
            x = generator(z)
            answers = teacher(x)
            wanted = maps(groups[0])
        for _ in range(student_steps):
            loss = divergence(student(x), answers)
            for ours, theirs in zip(maps(groups[1]), wanted, strict=True):
                loss = loss + attention * (ours - theirs).pow(2).mean()
            adam_s.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            adam_s.step()
    for hook in hooks:
        hook.remove()
