"""ZSKT: Zero-shot Knowledge Transfer via Adversarial Belief Matching (Micaelli & Storkey, NeurIPS 2019, 1905.09768v3).

A generator learns to make images on which the student's belief is far from the teacher's, and the student learns to
believe what the teacher does on them. With ``D(x) = KL(softmax(T(x) / t) || softmax(S(x) / t))``, ``t = 1``, teacher
first (equation 1), and the attention map ``f(A) = 1 / N_c sum_c a_c^2`` of a layer:

    L_G = -D(G(z))                                                                        (the generator's, equation 2)
    L_S = D(x) + beta sum_l || f(A_l^T) / |f(A_l^T)| - f(A_l^S) / |f(A_l^S)| ||           (the student's, equation 3)

Paper and code were both read. What the paper fixes: one generator step and ten student steps a round on one batch of
latents, Adam with a cosine down to 0, beta 250 on the outputs of the three groups of a wide residual network, 80,000
rounds for CIFAR-10 and 50,000 for SVHN, the last student is the result. What its code does instead or adds, and the
presets follow:

- the generator's learning rate is 1e-3, the student's 2e-3 (the paper: 2e-3);
- gradients of both are clipped to the norm 5;
- the divergence is the mean over images *and classes*, a tenth of the paper's with ten classes, so that beta and the
  clipping weigh accordingly (``divergence: elements``, or ``images``);
- the attention distance is the mean of the squared differences (``attention_distance: squared-mean``, or ``norm``);
- batches of 128; the generator's layers, which the paper only counts.

``paper`` keeps one batch of latents for all steps of a round: the images are made once more from the same latents
behind the generator's step, and the student takes its ten steps on them. ``fresh`` draws new latents for each student
step, which a reproduction (Ferles et al.) found one to three points better.

What we chose: sizes other than 32x32, as multiples of 4; attention layers found by themselves (see
:func:`attention_pairs`); all random numbers come from streams named after seed, round and step, so that nothing but
tensors must be saved, and a resumed run goes on bit by bit on the CPU.

The images live in the teacher's *normalised* space and are not bounded to its value range: the last layer is a
BatchNorm with weights of its own, without a tanh, as in the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.distillation import check_student
from zskd_nni.errors import UserError
from zskd_nni.feature_points import FeaturePoint, module_at, probing, watched
from zskd_nni.files import fingerprint_of
from zskd_nni.inputs import InputSpec
from zskd_nni.losses import attention_distance, attention_map, belief_divergence
from zskd_nni.methods.registry import TransferRequest, preset_options
from zskd_nni.seeds import derive_seed, generator
from zskd_nni.teacher import Teacher, first_tensor
from zskd_nni.training import Checkpoint, DivergenceError, History, fit, lay_out_like_parameters, training_mode

Pairs = tuple[tuple[str, str], ...]


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
            the code's) or in the middle of the value range (``input``).
        autocast: the networks' passes in bfloat16, the losses in float32: about twice as fast with wide residual
            networks; weights and optimisers stay in float32. A live source leaves the student's own passes alone.

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
        if not 0 <= self.attention_weight < float("inf"):
            raise ValueError(f"attention_weight must not be negative, not {self.attention_weight}")
        for name, known in (
            ("latents", ("same", "fresh")),
            ("divergence", ("elements", "images")),
            ("attention_distance", ("squared-mean", "norm")),
            ("generator_range", ("unit", "input")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if isinstance(self.attention, str) and self.attention not in ("auto", "none"):
            raise ValueError(
                f"attention is auto, none, or pairs of [teacher path, student path], not {self.attention!r}"
            )


class Generator(nn.Module):
    """ZSKT's generator: a linear layer, two enlargements, three convolutions, BatchNorm at the end.

    Args:
        spec: shape of the images; height and width are multiples of 4.
        latent: size of z.
        width: channels.

    Shape:
        input ``(N, latent)``, output ``(N, C, H, W)`` in the teacher's normalised space.

    Raises:
        UserError: the image's sides are not multiples of 4.
    """

    def __init__(self, spec: InputSpec, latent: int = 100, width: int = 128) -> None:
        super().__init__()
        channels, rows, columns = spec.shape
        if rows % 4 or columns % 4:
            raise UserError(
                f"ZSKT's generator makes images whose sides are multiples of 4, not {rows} x {columns}; pad the "
                "network's input, or use another method."
            )
        small = (rows // 4, columns // 4)
        self.layers = nn.Sequential(
            nn.Linear(latent, width * small[0] * small[1]),
            nn.Unflatten(1, (width, *small)),  # (N, 128, H/4, W/4)
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),  # (N, 128, H/2, W/2)
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),  # (N, 64, H, W)
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),  # (N, C, H, W)
            nn.BatchNorm2d(channels),  # with weights of its own; no tanh
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` of latents ``(N, latent)``."""
        return self.layers(z)


def new_generator(spec: InputSpec, settings: ZsktSettings, seed: int) -> Generator:
    """A fresh generator in training mode, its weights drawn from a stream of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "generator"))
        network = Generator(spec, settings.latent, settings.width).train()
    # On the CPU convolutions are half as fast again with the channels last in memory.
    network = network.to(memory_format=torch.channels_last)
    if settings.generator_range == "input":
        last = network.layers[-1]
        assert isinstance(last, nn.BatchNorm2d)
        ends = spec.normalise(torch.tensor([spec.low, spec.high]).view(2, 1, 1, 1).expand(2, spec.shape[0], 1, 1))
        low, high = ends.flatten(1).unbind()
        with torch.no_grad():
            last.bias.copy_((low + high) / 2)
            last.weight.copy_((high - low) / math.sqrt(12))  # the deviation of uniform noise over the range
    return network


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
        self.fingerprint = fingerprint_of(
            ["zskt", teacher.fingerprint, {k: str(v) for k, v in asdict(settings).items()}, batch_size, seed]
        )
        self._restart()

    def _restart(self) -> None:
        self.generator = new_generator(self.teacher.spec, self.settings, self.seed).to(self.teacher.device)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), self.settings.generator_learning_rate, fused=True
        )
        self.images: Tensor | None = None  # of this round, normalised
        self.divergence = math.nan  # D of the last generator step

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)`` such that the spec's normalisation gives the generator's own output."""
        spec = self.teacher.spec
        images = self.normalised(step, random, student)
        if spec.mean == (0.0,) and spec.std == (1.0,):
            return images
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
        return images * std + mean

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
        if inner == 0 or self.images is None:
            self._train_generator(turn, student)
            if self.settings.latents == "same":
                self.images = self._made(self._latents(turn, 0))
        if self.settings.latents == "fresh":
            self.images = self._made(self._latents(turn, inner + 1))
        assert self.images is not None
        return self.images

    def _latents(self, turn: int, number: int) -> Tensor:
        """``z ~ N(0, I)``, ``(batch_size, latent)``; number 0 is the generator's."""
        shape = (self.batch_size, self.settings.latent)
        return torch.randn(shape, generator=generator(self.seed, "latents", turn, number)).to(self.teacher.device)

    def precision(self) -> torch.autocast:
        """The context of the networks' passes."""
        return torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=self.settings.autocast)

    @torch.no_grad()
    def _made(self, z: Tensor) -> Tensor:
        with self.precision():
            return self.generator(z).float()

    def _only_images(self, random: torch.Generator) -> Tensor:
        z = torch.randn((self.batch_size, self.settings.latent), generator=random).to(self.teacher.device)
        kept = {name: value.clone() for name, value in self.generator.named_buffers()}
        images = self._made(z)
        for name, value in self.generator.named_buffers():
            value.copy_(kept[name])  # batch statistics serve; the running ones stay as they were
        return images

    def _train_generator(self, turn: int, student: nn.Module) -> None:
        """The generator's steps of a round on one batch of latents (equation 2)."""
        self._follow_the_teacher()
        z, settings = self._latents(turn, 0), self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.generator_learning_rate * cosine(turn, settings.rounds)
        weights = list(self.generator.parameters())
        for _ in range(settings.generator_steps):
            with self.precision():
                x = self.generator(z)
                with _silent_hooks(student):
                    beliefs = first_tensor(student(x))
                answers = self.teacher.output(self.teacher.model(x))
            divergence = belief_divergence(beliefs.float(), answers.float(), settings.temperature, settings.divergence)
            gradients = torch.autograd.grad(-divergence, weights)  # L_G; the student's gradients are left alone
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            norm = nn.utils.clip_grad_norm_(weights, settings.clip)
            self.divergence = float(divergence.detach())
            if not (math.isfinite(self.divergence) and math.isfinite(float(norm))):
                raise DivergenceError(
                    f"ZSKT's generator diverged: its loss or gradient is not finite in round {turn} (student step "
                    f"{turn * settings.student_steps}). A smaller learning rate of the student or of the generator "
                    "usually mends it."
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _follow_the_teacher(self) -> None:
        device = self.teacher.device
        if next(self.generator.parameters()).device == device:
            return
        self.generator.to(device)
        for entry in self.optimizer.state.values():
            entry.update({k: v.to(device) for k, v in entry.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Generator, its optimiser and the images of this round.

        Raises:
            UserError: the generator has diverged; such a state is not kept.
        """
        if not all(bool(torch.isfinite(value).all()) for value in self.generator.state_dict().values()):
            raise DivergenceError(
                "ZSKT's generator diverged: its weights or statistics are no longer finite. A smaller learning rate of "
                "the student or of the generator usually mends it."
            )
        state = {f"generator.{name}": value for name, value in self.generator.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            state.update({f"optimizer.{index}.{name}": value for name, value in entry.items()})
        if self.images is not None:
            state["images"] = self.images
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            UserError: it is another source's.
        """
        self._restart()
        weights = {name[10:]: value for name, value in state.items() if name.startswith("generator.")}
        try:
            self.generator.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError("The checkpoint holds no generator of this transfer source: it is another's.") from error
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        lay_out_like_parameters(self.optimizer)
        self.images = state["images"].to(self.teacher.device, copy=True) if "images" in state else None


@contextmanager
def _silent_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block no forward hook of the model runs: what distillers and pruners gather there is not this."""
    kept = [(module, module._forward_hooks) for module in model.modules()]
    for module, hooks in kept:
        module._forward_hooks = type(hooks)()
    try:
        yield
    finally:
        for module, hooks in kept:
            module._forward_hooks = hooks


# Attention transfer.


def attention_pairs(student: nn.Module, teacher: Teacher, settings: ZsktSettings) -> Pairs:
    """Paths ``(teacher's, student's)`` of the layers whose attention maps are compared.

    By themselves, for each spatial size that both networks have: the last module of that size with modules in it (a
    group of a wide residual network, a stage of a ResNet, as in the paper), or the last layer where a network has
    none. Sizes of one pixel hold no attention. There may be no common size: then there is no attention transfer.

    Raises:
        UserError: a named module is not there, gives no ``(N, C, H, W)``, or the two sizes differ.
    """
    if settings.attention == "none" or settings.attention_weight == 0:
        return ()
    probe = teacher.spec.normalise(teacher.spec.midpoint(2)).to(teacher.device)
    if isinstance(settings.attention, str):
        sizes = [_last_of_each_size(network, probe) for network in (teacher.model, student)]
        return tuple((sizes[0][size], sizes[1][size]) for size in sizes[0] if size in sizes[1])
    for ours, theirs in settings.attention:
        shapes = [
            _size_at(network, path, probe, whose)
            for network, path, whose in ((teacher.model, ours, "The teacher"), (student, theirs, "The student"))
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"Attention cannot be compared between the teacher's {ours!r} ({shapes[0][0]} x {shapes[0][1]}) and "
                f"the student's {theirs!r} ({shapes[1][0]} x {shapes[1][1]}): choose layers of the same height and "
                "width, attention: auto finds such, or set attention: none."
            )
    return settings.attention


def _size_at(model: nn.Module, path: str, probe: Tensor, whose: str) -> tuple[int, int]:
    module_at(model, path, whose)
    with watched(model, FeaturePoint(path)) as seen, probing(model):
        model(probe)
    if not seen or not isinstance(seen[-1], Tensor) or seen[-1].ndim != 4:
        shape = list(seen[-1].shape) if seen and isinstance(seen[-1], Tensor) else "nothing"
        raise UserError(
            f"{whose}'s layer {path!r} has no attention map: it gives {shape}, not (N, channels, height, width)."
        )
    return seen[-1].shape[2], seen[-1].shape[3]


def _last_of_each_size(model: nn.Module, probe: Tensor) -> dict[tuple[int, int], str]:
    groups: dict[tuple[int, int], str] = {}
    layers: dict[tuple[int, int], str] = {}

    def note(module: nn.Module, _inputs: Any, output: Any, path: str = "") -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            has_modules = next(module.children(), None) is not None
            (groups if has_modules else layers)[output.shape[2], output.shape[3]] = path

    hooks = [
        module.register_forward_hook(lambda m, i, o, path=path: note(m, i, o, path))
        for path, module in model.named_modules()
        if path
    ]
    try:
        with probing(model):
            model(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return {**layers, **groups}


# The whole game.


def train_zskt(
    student: nn.Module,
    teacher: Teacher,
    settings: ZsktSettings | None = None,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    label: str = "ZSKT",
    quiet: bool = False,
) -> History:
    """Teach ``student`` in place by ZSKT; it comes back in ``eval()`` mode, as its last step left it.

    Args:
        student: takes what the teacher takes, on the teacher's device; trained in ``train()`` mode throughout.
        teacher: in ``eval()``, as ever.
        settings: the preset ``paper`` by default.
        seed: names the random streams.
        checkpoint: a file to keep generator, student, both optimisers and schedules in; the same call again goes on
            from it, bit by bit on the CPU.
        checkpoint_every: seconds between two writes.
        label: shown beside the progress.
        quiet: no progress.

    Returns:
        The student's loss along its ``rounds * student_steps`` steps.

    Raises:
        UserError: networks or attention layers that do not fit, a checkpoint of another run, or divergence (names
            the step; the last good checkpoint is kept).
    """
    settings = settings or ZsktSettings()
    check_student(student, teacher)
    student.to(memory_format=torch.channels_last)
    pairs = attention_pairs(student, teacher, settings)
    source = ZsktSource(teacher, settings, settings.batch, seed)
    optimizer = torch.optim.Adam(student.parameters(), settings.student_learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step // settings.student_steps, settings.rounds)
    )

    def clip(*_: Any) -> None:
        norm = nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
        if not math.isfinite(float(norm)):
            raise DivergenceError("ZSKT diverged: the student's gradient is not finite in step {step}.")

    answered: tuple[Tensor, Tensor, list[Tensor]] | None = None

    def answer(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits and attention maps, asked for once a batch of images."""
        nonlocal answered
        if answered is None or answered[0] is not images:
            with torch.no_grad(), source.precision(), ExitStack() as stack:
                seen = [stack.enter_context(watched(teacher.model, FeaturePoint(path))) for path, _ in pairs]
                logits = teacher.output(teacher.model(images))
            answered = images, logits, [attention_map(features[-1].float()) for features in seen]
        return answered[1], answered[2]

    current = 0

    def loss(step: int, random: torch.Generator) -> Tensor:
        nonlocal current
        current = step
        images = source.normalised(step, random, student)
        answers, attended = answer(images)
        with source.precision(), ExitStack() as stack:
            seen = [stack.enter_context(watched(student, FeaturePoint(path))) for _, path in pairs]
            beliefs = first_tensor(student(images))
        # Equation 3.
        value = belief_divergence(beliefs.float(), answers.float(), settings.temperature, settings.divergence)
        for ours, theirs in zip(seen, attended, strict=True):
            distance = attention_distance(attention_map(ours[-1].float()), theirs, settings.attention_distance)
            value = value + settings.attention_weight * distance
        if not math.isfinite(float(value.detach())):
            raise DivergenceError("ZSKT diverged: the student's loss is not finite in step {step}.")
        return value

    kept = None
    if checkpoint is not None:
        shapes = {name: list(value.shape) for name, value in student.state_dict().items()}
        fingerprint = fingerprint_of([source.fingerprint, [list(pair) for pair in pairs], shapes])
        kept = Checkpoint(Path(checkpoint), fingerprint, checkpoint_every)
    hook = optimizer.register_step_pre_hook(clip)
    try:
        with training_mode(student):
            return fit(
                student,
                optimizer,
                scheduler,
                loss,
                steps=settings.rounds * settings.student_steps,
                seed=seed,
                label=label,
                checkpoint=kept,
                extra=source,
                quiet=quiet,
            )
    except DivergenceError as error:
        raise DivergenceError(str(error).replace("{step}", str(current))) from error
    finally:
        hook.remove()


PRESETS: dict[str, dict[str, Any]] = {
    # The paper, with its code's reductions, learning rates and clipping.
    "paper": {"latents": "same"},
    # New latents for each student step: one to three points better in a reproduction. It costs a pass of generator and
    # teacher for each student step instead of each round.
    "fresh": {"latents": "fresh"},
}


class Zskt:
    """ZSKT as a method of recipes: a live source for whatever student the recipe makes."""

    name = "zskt"
    presets = tuple(PRESETS)
    default_preset = "fresh"

    def options(self, preset: str, given: Mapping[str, Any]) -> ZsktSettings:
        """The preset with the recipe's own keys over it."""
        return preset_options(ZsktSettings, self.name, PRESETS, preset, given)

    def source(self, teacher: Teacher, request: TransferRequest) -> ZsktSource:
        """A generator that learns against the student it is given; ``size`` and ``folder`` are of no meaning.

        Raises:
            UserError: pairs of attention layers are named: the student's loss is its caller's.
        """
        if not isinstance(request.options.attention, str):
            raise UserError(
                "transfer.attention: as a recipe's source ZSKT has no part in the student's loss, so that layers for "
                "attention transfer cannot be named; leave the key out (train_zskt in Python plays the whole game)."
            )
        return ZsktSource(teacher, request.options, request.batch_size, request.seed)


METHOD = Zskt()
