"""The game of ZSKT: the generator's settings and the live source of its images."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.procedural import start_images
from zskd_nni.methods.zskt.generator import RANGES, new_generator
from zskd_nni.methods.zskt.image_memory import ImageMemory, that_fit
from zskd_nni.models.hooks import evaluating, without_hooks
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.runtime.rng import generator
from zskd_nni.synthesis.batch_norm_statistics import batch_norms, statistics_distances
from zskd_nni.training.checkpoint import load_optimizer_state, optimizer_state
from zskd_nni.training.hints import Pairs
from zskd_nni.training.loop import DivergenceError
from zskd_nni.training.losses import belief_divergence, total_variation


@dataclass(frozen=True)
class ZsktSettings:
    """The adversarial game.

    Attributes:
        rounds: N; both learning rates reach 0 there (80,000 for CIFAR-10, 50,000 for SVHN). As a live source the
            generator's schedule ends there: set it to the training's steps divided by ``student_steps``.
        generator_steps: n_G of a round.
        student_steps: n_S of a round.
        batch: images in a batch; a live source has the size it is asked for.
        latent: size of z.
        width: channels of the generator's first two convolutions, the third has half of them (the code's: 128). On a
            CPU and with a small student the generator is by far the dearest; a quarter of the width costs a tenth.
        latents: ``same`` for all steps of a round, or ``fresh`` for each student step.
        generator_learning_rate: of Adam.
        student_learning_rate: of Adam; of no meaning to a live source.
        clip: largest norm of a gradient, of either network; a live source clips the generator's alone.
        temperature: t.
        divergence: mean over ``elements`` (code) or ``images`` (paper).
        attention: ``auto``, ``none``, or pairs ``[teacher path, student path]``; of no meaning to a live source.
        attention_weight: beta.
        attention_distance: ``squared-mean`` (code) or ``norm`` (paper).
        generator_range: the generator's images start out with mean 0 and deviation 1 in normalised space (``unit``,
            the code's) or in the middle of the value range (``input``); or they never leave that (``bounded``).
        autocast: the networks' passes in bfloat16, the losses in float32: about twice as fast with wide residual
            networks; weights and optimisers stay in float32. A live source leaves the student's own passes alone.
        memory: images of earlier rounds that are kept, the oldest leave first; the student's are drawn from them. 0
            for none: it sees its round's alone. No more of either these or the figures are kept than a GiB holds: some
            3,500 of 3 x 224 x 224.
        new_images: that a round makes for the memory; 0 for as many as a batch has.
        filling: rounds that make images for the memory before the student's first step, without a part in the loss for
            a student that knows nothing yet.
        figures: procedural images (``mixed`` of :mod:`zskd_nni.data.procedural`) that the memory holds besides, from
            before the first round to the last.
        adversarial_weight: of the divergence in the generator's loss.
        class_weight: of the cross-entropy to the class that each image is meant to be of. Above 0, the generator is
            told the class too, and classes are dealt out in turn.
        batch_statistics: weight of the images' distance from what the teacher's BatchNorm layers remember
            (:mod:`zskd_nni.synthesis.batch_norm_statistics`); of no meaning to a teacher without such layers.
        total_variation: weight of the smoothness prior, of images in units of the value range.
        renewed: the generator's first layer is drawn anew each round, and its learning rate stays as it is.

    Raises:
        ValueError: a value outside its range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    rounds: int = 80_000
    generator_steps: int = 1
    student_steps: int = 10
    batch: int = 128
    latent: int = 100
    width: int = 128
    latents: str = "same"
    generator_learning_rate: float = 1e-3
    student_learning_rate: float = 2e-3
    clip: float = 5.0
    temperature: float = 1.0
    divergence: str = "elements"
    attention: str | Pairs = "auto"
    attention_weight: float = 250.0
    attention_distance: str = "squared-mean"
    generator_range: str = "unit"
    autocast: bool = False
    memory: int = 0
    new_images: int = 0
    filling: int = 0
    figures: int = 0
    adversarial_weight: float = 1.0
    class_weight: float = 0.0
    batch_statistics: float = 0.0
    total_variation: float = 0.0
    renewed: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "generator_steps", "student_steps", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width must be an even number of channels, not {self.width}")
        if self.batch < 2:
            raise ValueError(f"batch must be at least 2 for the generator's batch statistics, not {self.batch}")
        for name in ("generator_learning_rate", "student_learning_rate", "clip", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in (
            *("attention_weight", "adversarial_weight", "class_weight", "batch_statistics", "total_variation"),
            *("memory", "new_images", "filling", "figures"),
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.new_images == 1:
            raise ValueError("new_images must be at least 2 for the generator's batch statistics, not 1")
        if not self.memory and (self.filling or self.new_images or self.figures):
            raise ValueError("filling, new_images and figures are of images for the memory, and memory is 0")
        for name, known in (
            ("latents", ("same", "fresh")),
            ("divergence", ("elements", "images")),
            ("attention_distance", ("squared-mean", "norm")),
            ("generator_range", RANGES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if isinstance(self.attention, str) and self.attention not in ("auto", "none"):
            raise ValueError(
                f"attention is auto, none, or pairs of [teacher path, student path], not {self.attention!r}"
            )


def cosine(done: int, total: int) -> float:
    """Half a cosine from 1 at 0 down to 0 at ``total``."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done / total)))


class ZsktSource:
    """A live transfer source: its generator is trained against whatever student it is given.

    At every ``student_steps``-th step the generator takes its steps against the student as it is then (in the mode it
    is in; no gradient reaches the student, its forward hooks are silent meanwhile), and then the student is given
    images of the new generator. Any student will do, also one that NNI has pruned or quantized: its own training,
    loss and optimiser stay its caller's.

    A step 0 begins a new training, with a generator from the start: what a training sees depends on its own steps
    alone, not on what this process ran before. Without a student, or where no gradients are recorded (NNI's
    calibration), the generator only makes images, and nothing is changed.

    Args:
        teacher: on the device to use.
        settings: of the game.
        batch_size: images in a batch.
        seed: names the random streams.
    """

    def __init__(self, teacher: Teacher, settings: ZsktSettings, batch_size: int, seed: int) -> None:
        if batch_size < 2:
            raise UserError(f"ZSKT needs batches of at least 2 images, not {batch_size}.")
        self.teacher, self.settings, self.seed = teacher, settings, seed
        self.size: int | None = None
        self.batch_size = batch_size
        described = {name: str(getattr(settings, name)) for name in asdict(settings)}
        self.fingerprint = fingerprint_of(["zskt", teacher.fingerprint, described, batch_size, seed])
        self.classes = teacher.num_classes if settings.class_weight else 0
        self.watches_statistics = bool(settings.batch_statistics and batch_norms(teacher.model))
        self._restart()

    def _restart(self) -> None:
        settings = self.settings
        made = new_generator(
            self.teacher.spec,
            self.seed,
            latent=settings.latent,
            width=settings.width,
            classes=self.classes,
            output_range=settings.generator_range,
        )
        self.generator = made.to(self.teacher.device)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), settings.generator_learning_rate, fused=True)
        self.images: Tensor | None = None  # of this round, normalised
        self.memory: ImageMemory | None = None  # of earlier rounds and the figures, normalised
        self.divergence = torch.tensor(math.nan)  # D of the last generator step
        self.span: Tensor | None = None

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)`` such that the spec's normalisation gives the generator's own output."""
        return self.teacher.spec.denormalise(self.normalised(step, random, student)).contiguous()

    def normalised(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)`` of a step in the teacher's normalised space.

        Raises:
            UserError: the generator's loss or gradient is not finite.
        """
        if student is None or not torch.is_grad_enabled():
            return self._only_images(random)
        if step == 0:
            self._restart()
        turn, inner = divmod(step, self.settings.student_steps)
        if self.settings.memory:
            memory = self._memory()
            if step == 0:
                for number in range(self.settings.filling):
                    memory.put(self._made(self._train_generator(turn, None, ("filling", number))))
            if inner == 0:
                memory.put(self._made(self._train_generator(turn, student)))
            return memory.draw(self.batch_size, random)
        if inner == 0 or self.images is None:
            self._train_generator(turn, student)
            if self.settings.latents == "same":
                self.images = self._made(self._latents(turn, 0))
        if self.settings.latents == "fresh":
            self.images = self._made(self._latents(turn, inner + 1))
        assert self.images is not None
        return self.images

    def _latents(self, turn: int, number: int) -> Tensor:
        """``z ~ N(0, I)``, ``(batch_size, latent)``, and classes one-hot behind it; number 0 is the generator's."""
        return self._drawn(self.batch_size, generator(self.seed, "latents", turn, number))

    def _drawn(self, count: int, random: torch.Generator) -> Tensor:
        z = torch.randn((count, self.settings.latent), generator=random)
        if self.classes:
            first = int(torch.randint(self.classes, (), generator=random))
            meant = (torch.arange(count) + first) % self.classes
            z = torch.cat([z, functional.one_hot(meant, self.classes).float()], 1)
        return to_device(z, self.teacher.device)

    def _memory(self) -> ImageMemory:
        """The memory; before its first use it is made, with the figures in it."""
        if self.memory is None:
            spec = self.teacher.spec
            room, count = (that_fit(n, spec.shape) for n in (self.settings.memory, self.settings.figures))
            figures = torch.zeros((0, *spec.shape))
            if count:
                figures, _ = start_images("mixed", count, spec, generator(self.seed, "figures"))
            self.memory = ImageMemory(room, spec.normalise(figures).to(self.teacher.device))
        return self.memory

    def precision(self) -> torch.autocast:
        """The context of the networks' passes."""
        return torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=self.settings.autocast)

    @torch.no_grad()
    def _made(self, z: Tensor) -> Tensor:
        with self.precision():
            return self.generator(z).float()

    def _only_images(self, random: torch.Generator) -> Tensor:
        if self.memory is not None and self.memory.kept:
            return self.memory.draw(self.batch_size, random)
        z = self._drawn(self.batch_size, random)
        kept = {name: value.clone() for name, value in self.generator.named_buffers()}
        images = self._made(z)
        for name, value in self.generator.named_buffers():
            value.copy_(kept[name])  # batch statistics serve; the running ones stay as they were
        return images

    def _train_generator(self, turn: int, student: nn.Module | None, stream: tuple[str, int] | None = None) -> Tensor:
        """The generator's steps of a round on one batch of latents (equation 2).

        Args:
            turn: the round, which the learning rate depends on.
            student: None where there is none to disagree with yet.
            stream: of the random numbers, where not the round's own.

        Returns:
            The latents.
        """
        self._follow_the_teacher()
        settings, name = self.settings, stream or ("latents", turn)
        random = generator(self.seed, *name, 0)
        z = self._drawn(settings.new_images or self.batch_size, random)
        rate = settings.generator_learning_rate
        if settings.renewed:
            self._renew_first_layer(random)
        else:
            rate *= cosine(turn, settings.rounds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weights = list(self.generator.parameters())
        with ExitStack() as stack:
            if student is not None:
                stack.enter_context(without_hooks(student))
                if settings.memory:  # its batch statistics are those of the images it learns on
                    stack.enter_context(evaluating(student))
            for _ in range(settings.generator_steps):
                value, divergence = self._generator_loss(z, student)
                if not value.requires_grad:  # there is nothing to learn yet: no student, no class, no statistics
                    break
                gradients = torch.autograd.grad(value, weights)  # the student's gradients are left alone
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                norm = nn.utils.clip_grad_norm_(weights, settings.clip)
                self.divergence = divergence
                if not _is_finite(divergence, norm):
                    raise DivergenceError(
                        f"ZSKT's generator diverged: its loss or gradient is not finite in round {turn} (student step "
                        f"{turn * settings.student_steps}). A smaller learning rate of the student or of the generator "
                        "usually mends it."
                    )
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return z

    def _generator_loss(self, z: Tensor, student: nn.Module | None) -> tuple[Tensor, Tensor]:
        """L_G, and the divergence D without a gradient (0 without a student)."""
        settings = self.settings
        crowd: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.watches_statistics:
            crowd = statistics_distances(self.teacher.model)
        with self.precision():
            x = self.generator(z)
            with crowd as distances:
                answers = self.teacher.output(self.teacher.model(x)).float()
            beliefs = None if student is None else first_tensor(student(x)).float()
        value = answers.new_zeros(())
        divergence = answers.new_zeros(())
        if beliefs is not None:
            divergence = belief_divergence(beliefs, answers, settings.temperature, settings.divergence)
            value = value - settings.adversarial_weight * divergence  # equation 2
        if settings.class_weight:
            value = value + settings.class_weight * functional.cross_entropy(answers, z[:, settings.latent :])
        if distances:
            value = value + settings.batch_statistics * torch.stack(distances).sum()
        if settings.total_variation:
            value = value + settings.total_variation * total_variation(x.float() / self._span(x.device)).mean()
        return value, divergence.detach()

    def _span(self, device: torch.device) -> Tensor:
        """``(C, 1, 1)`` the width of each channel's normalised range; kept, a copy from the CPU would wait for it."""
        if self.span is None or self.span.device != device:
            low, high = self.teacher.spec.normalised_range()
            self.span = (high - low).view(-1, 1, 1).to(device)
        return self.span

    def _renew_first_layer(self, random: torch.Generator) -> None:
        """Draw the first layer anew, as ``nn.Linear`` begins, and forget what Adam knows of it."""
        layer = self.generator.layers[0]
        assert isinstance(layer, nn.Linear)
        bound = layer.in_features**-0.5
        with torch.no_grad():
            for weight in layer.parameters():
                weight.copy_(to_device((2 * torch.rand(weight.shape, generator=random) - 1) * bound, weight.device))
                for entry in self.optimizer.state.get(weight, {}).values():
                    entry.zero_()

    def _follow_the_teacher(self) -> None:
        device = self.teacher.device
        if next(self.generator.parameters()).device == device:
            return
        self.generator.to(device)
        for entry in self.optimizer.state.values():
            entry.update({k: v.to(device) for k, v in entry.items()})

    def state_dict(self) -> dict[str, Any]:
        """Generator, its optimiser and the images of this round.

        Raises:
            UserError: the generator has diverged; such a state is not kept.
        """
        if not all(bool(torch.isfinite(value).all()) for value in self.generator.state_dict().values()):
            raise DivergenceError(
                "ZSKT's generator diverged: its weights or statistics are no longer finite. A smaller learning rate of "
                "the student or of the generator usually mends it."
            )
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
            self._memory().load_state_dict(state["memory"])


def _is_finite(*values: Tensor) -> bool:
    """Whether scalars are finite, as far as that is known without waiting for a GPU.

    There nothing is asked in a step: :func:`~zskd_nni.training.loop.fit` looks at the losses every few dozen steps, and
    at all weights before a checkpoint is written.
    """
    return all(value.device.type != "cpu" or math.isfinite(float(value)) for value in values)
