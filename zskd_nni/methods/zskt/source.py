"""The generator's side of ZSKT: a live source of images; equations and symbols are those of ``method.py``."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.procedural import start_images
from zskd_nni.methods.zskt.generator import new_generator
from zskd_nni.methods.zskt.image_memory import ImageMemory, images_that_fit
from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.models.hooks import evaluating, without_hooks
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, plain
from zskd_nni.runtime.rng import generator
from zskd_nni.synthesis.batch_norm_statistics import batch_norms, statistics_distances
from zskd_nni.training.checkpoint import load_optimizer_state, optimizer_state
from zskd_nni.training.loop import DivergenceError, cosine_factor
from zskd_nni.training.losses import belief_divergence, total_variation


class ZsktSource:
    """A live transfer source: its generator is trained against the student that asks for images.

    Every ``student_steps`` steps the generator is trained against the student as it is then, in the mode it is in. No
    gradient reaches the student, and its forward hooks do not run meanwhile. Then the student gets images of the new
    generator. Any student will do, also one that NNI has pruned or quantized; its training, loss and optimiser are the
    caller's.

    Step 0 begins a new training with a new generator, so that the images depend on the training's own steps alone.
    Without a student, or where no gradients are recorded (NNI's calibration), the generator only makes images, and
    nothing changes.

    Args:
        teacher: on the device to use.
        settings: of ZSKT.
        batch_size: images in a batch.
        seed: names the random streams.

    Attributes:
        divergence: D of the last generator step, a scalar.
    """

    def __init__(self, teacher: Teacher, settings: ZsktSettings, batch_size: int, seed: int) -> None:
        if batch_size < 2:
            raise UserError(f"ZSKT needs batches of at least 2 images, not {batch_size}.")
        self.teacher, self.settings, self.seed = teacher, settings, seed
        self.size: int | None = None
        self.batch_size = batch_size
        self.fingerprint = fingerprint_of(["zskt", teacher.fingerprint, plain(asdict(settings)), batch_size, seed])
        self.classes = teacher.num_classes if settings.class_weight else 0  # one-hot classes that the generator gets
        self.has_statistics = bool(settings.batch_statistics and batch_norms(teacher.model))
        self._restart()

    def _restart(self) -> None:
        settings = self.settings
        sizes = {"latent": settings.latent, "width": settings.width, "classes": self.classes}
        network = new_generator(self.teacher.spec, self.seed, output_range=settings.generator_range, **sizes)
        self.generator = network.to(self.teacher.device)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), settings.generator_learning_rate, fused=True)
        self.images: Tensor | None = None  # of this round, normalised
        self.memory: ImageMemory | None = None  # of earlier rounds and the figures, normalised
        self.divergence = torch.tensor(math.nan)

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)`` such that the spec's normalisation gives the generator's own output."""
        return self.teacher.spec.denormalise(self.normalised(step, random, student)).contiguous()

    def normalised(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)`` of a step in the teacher's normalised space.

        Raises:
            DivergenceError: the generator's loss or gradient is not finite.
        """
        settings = self.settings
        if student is None or not torch.is_grad_enabled():
            return self._generate_only(random)
        if step == 0:
            self._restart()
        turn, inner = divmod(step, settings.student_steps)  # the round, and the student's step in it
        if settings.memory:
            memory = self._image_memory()
            if step == 0:
                for number in range(settings.filling):
                    z = self._train_generator(turn, None, generator(self.seed, "filling", number, 0))
                    memory.put(self._generate(z))
            if inner == 0:
                memory.put(self._generate(self._train_generator(turn, student, self._stream(turn, 0))))
            return memory.draw(self.batch_size, random)
        if inner == 0 or self.images is None:
            self._train_generator(turn, student, self._stream(turn, 0))
            if settings.latents == "same":  # the latents of the generator's steps once more
                self.images = self._generate(self._draw_latents(self.batch_size, self._stream(turn, 0)))
        if settings.latents == "fresh":
            self.images = self._generate(self._draw_latents(self.batch_size, self._stream(turn, inner + 1)))
        assert self.images is not None
        return self.images

    def _stream(self, turn: int, number: int) -> torch.Generator:
        """Random numbers of a round: number 0 is the generator's, the others are the student steps'."""
        return generator(self.seed, "latents", turn, number)

    def _draw_latents(self, count: int, random: torch.Generator) -> Tensor:
        """``z ~ N(0, I)``, and one-hot classes y after it if the generator gets them: ``(count, latent + K)``."""
        z = torch.randn((count, self.settings.latent), generator=random)
        if self.classes:
            first = int(torch.randint(self.classes, (), generator=random))
            y = (torch.arange(count) + first) % self.classes
            z = torch.cat([z, functional.one_hot(y, self.classes).float()], 1)
        return to_device(z, self.teacher.device)

    def _train_generator(self, turn: int, student: nn.Module | None, random: torch.Generator) -> Tensor:
        """The generator's n_G steps of a round on one batch of latents, which are returned.

        Args:
            turn: the round; the learning rate depends on it.
            student: None while the memory is filled.
            random: source of all draws.
        """
        settings, weights = self.settings, list(self.generator.parameters())
        self._move_to_teachers_device()
        z = self._draw_latents(settings.new_images or self.batch_size, random)
        if settings.renewed:
            self._redraw_first_layer(random)
        decay = 1.0 if settings.renewed else cosine_factor(turn, settings.rounds)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.generator_learning_rate * decay
        with ExitStack() as student_modes:
            if student is not None:
                student_modes.enter_context(without_hooks(student))
                if settings.memory:  # the student's batch statistics are to be those of its own batches
                    student_modes.enter_context(evaluating(student))
            for _ in range(settings.generator_steps):
                loss, self.divergence = self._loss(z, student)
                if not loss.requires_grad:  # no term has a weight
                    break
                # The student's gradients stay as they are.
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                norm = nn.utils.clip_grad_norm_(weights, settings.clip)
                if not finite_if_known(self.divergence, norm):
                    raise _diverged(
                        f"loss or gradient is not finite in round {turn} (student step {turn * settings.student_steps})"
                    )
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return z

    def _loss(self, z: Tensor, student: nn.Module | None) -> tuple[Tensor, Tensor]:
        """``L_G`` (equation 2 or 4), and the divergence D without a gradient (0 without a student)."""
        settings, distances = self.settings, []
        with self.precision(), ExitStack() as hooks:
            x = self.generator(z)
            if self.has_statistics:
                distances = hooks.enter_context(statistics_distances(self.teacher.model))
            answers = self.teacher.output(self.teacher.model(x)).float()  # T(x)
            beliefs = None if student is None else first_tensor(student(x)).float()  # S(x)
        loss = divergence = answers.new_zeros(())
        if beliefs is not None:
            divergence = belief_divergence(beliefs, answers, settings.temperature, settings.divergence)  # equation 1
            loss = loss - settings.adversarial_weight * divergence
        if settings.class_weight:
            loss = loss + settings.class_weight * functional.cross_entropy(answers, z[:, settings.latent :])
        if distances:
            loss = loss + settings.batch_statistics * torch.stack(distances).sum()
        if settings.total_variation:
            value_range = 2 * self.generator.half_range
            loss = loss + settings.total_variation * total_variation(x.float() / value_range).mean()
        return loss, divergence.detach()

    def precision(self) -> torch.autocast:
        """The context of the networks' passes."""
        return torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=self.settings.autocast)

    @torch.no_grad()
    def _generate(self, z: Tensor) -> Tensor:
        with self.precision():
            return self.generator(z).float()

    def _generate_only(self, random: torch.Generator) -> Tensor:
        """A batch that leaves no trace, the generator's running statistics included."""
        if self.memory is not None and self.memory.kept:
            return self.memory.draw(self.batch_size, random)
        before = {name: value.clone() for name, value in self.generator.named_buffers()}
        images = self._generate(self._draw_latents(self.batch_size, random))
        for name, value in self.generator.named_buffers():
            value.copy_(before[name])
        return images

    def _image_memory(self) -> ImageMemory:
        """The memory; made at its first use, with the figures in it."""
        if self.memory is None:
            spec = self.teacher.spec
            room, count = (images_that_fit(n, spec.shape) for n in (self.settings.memory, self.settings.figures))
            figures = torch.zeros((0, *spec.shape))
            if count:
                figures, _ = start_images("mixed", count, spec, generator(self.seed, "figures"))
            self.memory = ImageMemory(room, spec.normalise(figures).to(self.teacher.device))
        return self.memory

    @torch.no_grad()
    def _redraw_first_layer(self, random: torch.Generator) -> None:
        """Draw the first layer's weights as ``nn.Linear`` initialises them, and clear its Adam state."""
        layer = self.generator.layers[0]
        assert isinstance(layer, nn.Linear)
        bound = layer.in_features**-0.5
        for weight in layer.parameters():
            weight.copy_(to_device((2 * torch.rand(weight.shape, generator=random) - 1) * bound, weight.device))
            for entry in self.optimizer.state.get(weight, {}).values():
                entry.zero_()

    def _move_to_teachers_device(self) -> None:
        device = self.teacher.device
        if next(self.generator.parameters()).device != device:
            self.generator.to(device)
            for entry in self.optimizer.state.values():
                entry.update({k: v.to(device) for k, v in entry.items()})

    def state_dict(self) -> dict[str, Any]:
        """Generator, its optimiser, the images of this round and the memory.

        Raises:
            DivergenceError: the generator has diverged; such a state is not kept.
        """
        if not all(bool(torch.isfinite(value).all()) for value in self.generator.state_dict().values()):
            raise _diverged("weights or statistics are no longer finite")
        return copy.deepcopy(
            {
                "generator": self.generator.state_dict(),
                "optimizer": optimizer_state(self.optimizer),
                "images": None if self.images is None else self.images.detach(),
                "memory": None if self.memory is None else self.memory.state_dict(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            UserError: it is another source's.
        """
        self._restart()
        try:
            self.generator.load_state_dict(state["generator"])
        except (KeyError, RuntimeError) as error:
            raise UserError("The checkpoint holds no generator of this transfer source: it is another's.") from error
        load_optimizer_state(self.optimizer, copy.deepcopy(state["optimizer"]))
        images = state["images"]
        self.images = None if images is None else images.clone().to(self.teacher.device)
        if state["memory"] is not None:
            self._image_memory().load_state_dict(state["memory"])


def finite_if_known(*values: Tensor) -> bool:
    """Whether scalars are finite; True for those on a GPU, which a step would have to wait for.

    There :func:`~zskd_nni.training.loop.fit` checks the losses every few dozen steps, and all weights before a
    checkpoint is written.
    """
    return all(value.device.type != "cpu" or math.isfinite(float(value)) for value in values)


def _diverged(what: str) -> DivergenceError:
    return DivergenceError(
        f"ZSKT's generator diverged: its {what}. A smaller learning rate of the student or of the generator usually "
        "helps."
    )
