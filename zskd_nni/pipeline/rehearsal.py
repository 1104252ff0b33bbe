"""Measuring, before a run begins, how long it takes and how much memory it needs.

The run is rehearsed: its own code runs on copies, in a temporary folder, for a few steps of each training at the
recipe's batch. What a step took, times the steps that the recipe asks for, is the forecast. Nothing of the run moves:
the global random state is put back, and every draw of a run comes from streams named after its seed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.data.procedural import start_images
from zskd_nni.data.sources import DrawnSource, ProceduralSource, TransferSource
from zskd_nni.methods.ats.method import Ats
from zskd_nni.methods.from_targets import ImpressionMethod
from zskd_nni.methods.procedural import Procedural
from zskd_nni.methods.real import Real
from zskd_nni.methods.registry import find_method
from zskd_nni.methods.zskt.method import Zskt
from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.pipeline.export import INTEGERS, export_student, integer_answers
from zskd_nni.pipeline.forecast import Forecast
from zskd_nni.pipeline.neutral import COUNT, neutral_images
from zskd_nni.pipeline.report import CONTROL_IMAGES
from zskd_nni.pipeline.steps import EVALUATION, EXPORT, headings, students_of
from zskd_nni.pipeline.students import StudentResult, Students
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.schema import Recipe
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder
from zskd_nni.runtime.memory import peak_memory
from zskd_nni.synthesis import SynthesisSettings, synthesize
from zskd_nni.synthesis.image_grid import impressions_picture
from zskd_nni.training.inference import float_answers

_SECONDS_OF_STEPS = 1.5  # that the steps of one training may take in the rehearsal, about
_FEWEST, _MOST = 3, 12  # steps of one training in the rehearsal
_SHARD_COPIES = 4  # starts, results, and what is written of a shard, in float32
_LABEL = "forecast"


def forecast_run(students: Students, test: LabelledImages | None, given: bool = False) -> Forecast:
    """Forecast a whole run from a rehearsal of its stages.

    Args:
        students: of the run, checked; left as they are, and so is their teacher.
        test: the test data that the finished networks are measured on.
        given: whether the impressions are given.
    """
    with _unnoticed(students.device), tempfile.TemporaryDirectory(prefix="zskd-nni-forecast-") as folder:
        return _Rehearsal(students, test, given, Path(folder)).forecast()


@contextmanager
def _unnoticed(device: str) -> Iterator[None]:
    """Put the global random state back afterwards, and keep warnings quiet: the run itself gives them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[device] if device != "cpu" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Clock:
    """Notes when each step begins."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun = device, list[float]()

    def now(self) -> float:
        """The time when the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def step(self, *_: Any) -> None:
        """A step begins."""
        self.begun.append(self.now())


@dataclass
class _Stage:
    """A stage of the rehearsal.

    Attributes:
        seconds: of the whole stage.
        begun: when each of its steps began.
    """

    seconds: float
    begun: list[float]

    @property
    def step(self) -> float:
        """Seconds of a step; the first one is left out where there are more, as it sets things up."""
        steps = [after - before for before, after in zip(self.begun, self.begun[1:], strict=False)]
        return statistics.median(steps[1:] or steps) if steps else self.seconds

    def of(self, steps: float) -> float:
        """Seconds of the stage with so many steps."""
        return self.seconds + max(0.0, steps - len(self.begun)) * self.step


class _ClockedSource:
    """A source that tells the clock when a training asks for a batch, and notes how long each batch took."""

    def __init__(self, source: TransferSource, clock: _Clock) -> None:
        self.source, self.clock = source, clock
        self.size, self.batch_size, self.fingerprint = source.size, source.batch_size, source.fingerprint
        self.seconds: list[float] = []  # of the last training

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """The source's batch."""
        training = torch.is_grad_enabled()  # no calibration
        if training:
            self.clock.step()
        began = self.clock.now()
        images = self.source.batch(step, random, student)
        if training:
            self.seconds = [*([] if step == 0 else self.seconds), self.clock.now() - began]
        return images

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a rehearsal is not resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is restored."""


@dataclass
class _Rehearsal:
    students: Students
    test: LabelledImages | None
    given: bool
    folder: Path
    stages: dict[str, _Stage] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe, self.device = self.students.recipe, torch.device(self.students.device)
        self.teacher = copy.deepcopy(self.students.teacher).to(self.device)
        self.clock, self.spec = _Clock(self.device), self.teacher.spec
        self.section = self.recipe.transfer
        self.options = self.section.options(self.teacher)
        self.method = find_method(self.section.method)
        batch = self.spec.uniform_noise(self.recipe.distillation.batch).to(self.device)
        with torch.no_grad():
            self.teacher(batch)
            self.of_teacher = self._seconds_of(lambda: self.teacher(batch))  # a batch of the distillation
        self.short = _shortened(self.students.loaded, 4 * self.of_teacher)

    def forecast(self) -> Forecast:
        """Rehearse everything."""
        synthesis = self._synthesis()
        source = _ClockedSource(self._source(), self.clock)
        student = self._student(source)
        trainings = self._trainings(source)
        self.teacher.to("cpu")
        seconds = {
            "synthesis": synthesis,
            **trainings,
            EXPORT: self._export(student),
            EVALUATION: self._evaluation(student),
        }
        memory = peak_memory(self.device)
        if "cpu" in memory:
            memory["cpu"] += self._further_bytes()
        return Forecast(seconds, memory, self.left_out)

    def _seconds_of(self, work: Callable[[], Any]) -> float:
        began = self.clock.now()
        work()
        return self.clock.now() - began

    # Images.

    def _synthesis(self) -> float:
        """Seconds of the transfer set and of the held-out images."""
        size = self.section.held_out + (0 if self.given else self.section.size)
        if isinstance(self.method, ImpressionMethod):
            return self._impressions(self.method, self.options.synthesis, size)
        if isinstance(self.method, Ats):
            few = max(10 * self.teacher.num_classes, size // 50)
            made = [partial(self._made, f"set-of-{count}", size=count) for count in (few, 2 * few)]
            once, twice = map(self._seconds_of, made)
            return max(once, once + (twice - once) * (size - few) / few)
        if isinstance(self.method, Real):
            return 2 * self._seconds_of(lambda: self._made("real"))
        if not isinstance(self.method, (Zskt, Procedural)):
            self.left_out.append(f"the images of the method {self.section.method}")
        return 0.0

    def _made(self, name: str, **changes: Any) -> TransferSource:
        where = {"root": None, "quiet": True, **changes}
        return self.students.loaded.transfer_source(self.teacher, make_folder(self.folder / name), **where)

    def _impressions(self, method: ImpressionMethod, settings: SynthesisSettings, size: int) -> float:
        """Seconds of ``size`` impressions, from a batch of them with few steps."""
        few = 3 if 4 * self.of_teacher * settings.slots / self.recipe.distillation.batch < 1 else 2
        count = min(settings.slots, size)
        short = dataclasses.replace(settings, max_steps=few, tolerance=None, patience=0)
        plan = method.plan(self.teacher, self.options.targets)
        self.clock.begun.clear()
        hook = self.teacher.model.register_forward_pre_hook(self.clock.step)
        try:
            folder = self.folder / "impressions"
            whole = self._seconds_of(
                lambda: synthesize(self.teacher, plan, short, size=count, seed=0, folder=folder, quiet=True)
            )
        finally:
            hook.remove()
        stage = _Stage(whole, self.clock.begun[-few - 1 :])
        beside = max(0.0, whole - (few + 1) * stage.step)  # starts, targets, the file
        low, high = settings.step_limits
        steps = low if low == high else (high - low) / math.log(high / low)  # they are drawn log-uniformly
        return size / count * (beside + (steps + 1) * stage.step)

    def _source(self) -> TransferSource:
        """Images that cost a training as much as the recipe's."""
        batch = self.recipe.distillation.batch
        if self.section.held_out and isinstance(self.method, (Zskt, Procedural)) and not self.given:
            return self.short.transfer_source(self.teacher, make_folder(self.folder / "live"), quiet=True)
        size = self.section.size
        noise = DrawnSource(self.spec.uniform_noise(min(batch, size)), min(batch, size), "noise")
        noise.size = size
        return self.students.loaded.with_further_images(noise, self.teacher)

    # Students.

    def _student(self, source: _ClockedSource) -> StudentResult:
        """The student after trainings of a few steps; untrained where that fails, as the run itself then may not."""

        @contextmanager
        def timed(stage: str) -> Iterator[None]:
            self.clock.begun.clear()
            began = self.clock.now()
            try:
                yield
            finally:
                self.stages[stage] = _Stage(self.clock.now() - began, list(self.clock.begun))

        folder = self.folder / "state"
        rehearsed = Students(self.short, self.teacher, folder, timed, device=str(self.device), quiet=True)
        if self.recipe.compression.pruning is not None:
            rehearsed.pruning_plan = self.students.pruning_plan
        quantization = self.recipe.compression.quantization
        try:
            if quantization is not None and quantization.fused and "none" in self.recipe.controls:
                rehearsed.make("control-none", source, train=False)  # in stages, unlike the student
            return rehearsed.make("student", source)
        except UserError:
            return StudentResult(rehearsed.fresh())

    def _trainings(self, source: _ClockedSource) -> dict[str, float]:
        """Seconds of the stages of all students."""
        of_images = statistics.median(source.seconds[1:] or source.seconds) if source.seconds else 0.0
        rounds = self._rounds(source)
        names = {file: name for name, file in students_of(self.recipe).items()}
        seconds = {}
        for key in headings(self.recipe, self.given):
            work, _, file = key.partition(" of ")
            stage = self.stages.get(key) or self.stages.get(f"{work} of student")
            if stage is None or not file:
                continue
            control = names[file]
            steps = _steps(self.recipe, work, trains=control != "none")
            seconds[key] = stage.of(steps)
            if self.recipe.distillation.repeats > 1 and work == "distillation":
                saved = min(0.9 * stage.step, self.of_teacher + of_images)
                seconds[key] -= steps * (1 - 1 / self.recipe.distillation.repeats) * saved
            if control in CONTROL_IMAGES:
                seconds[key] += steps * (self._of_kind(CONTROL_IMAGES[control][0]) - of_images)
            elif control != "none" and steps:
                seconds[key] += rounds(steps)
            seconds[key] = max(0.0, seconds[key])
        return seconds

    def _of_kind(self, kind: str) -> float:
        """Seconds of a batch of procedural images."""
        images = ProceduralSource(kind, self.spec, self.recipe.distillation.batch)
        return self._seconds_of(lambda: images.batch(0, torch.Generator().manual_seed(0)))

    def _rounds(self, source: _ClockedSource) -> Callable[[int], float]:
        """Seconds of a live source's own training beside so many steps of the student."""
        if not isinstance(self.options, ZsktSettings) or len(source.seconds) < 2:
            return lambda steps: 0.0
        options, one = self.options, max(0.0, source.seconds[0] - source.seconds[1])
        few = max(1, options.figures // 50)
        figures = self._seconds_of(lambda: start_images("mixed", few, self.spec, torch.Generator().manual_seed(0)))
        begin = options.filling * one + figures * options.figures / few
        return lambda steps: begin + one * steps / options.student_steps

    # The end of a run.

    def _export(self, student: StudentResult) -> float:
        section, images = self.recipe.compression.quantization, self.spec.uniform_noise(self.section.held_out)
        fold_asked = section is not None and section.fuse_batch_norm
        make_folder(self.folder / "state")

        def export() -> None:
            self.students.save(StudentResult(student.network), self.folder / "student.json")
            with suppress(UserError):  # noise is not what the integers were calibrated for
                export_student(student, self.teacher, self.folder, images, fold_asked)

        return self._seconds_of(export)

    def _evaluation(self, student: StudentResult) -> float:
        """Seconds of the measuring of all networks, and of the picture."""
        others = len(students_of(self.recipe)) - 1
        teacher, floats = self._of_an_image(self.teacher), self._of_an_image(float_answers(student.network, self.spec))
        of_all, networks = teacher + (1 + others) * floats, 2 + others
        if student.quantization is not None:
            exported = integer_answers(student.quantization, self.spec, self.folder / INTEGERS)
            simulated = integer_answers(student.quantization, self.spec)
            of_all += self._of_an_image(exported) + others * self._of_an_image(simulated)
            networks += 1 + others
        tested = 0 if self.test is None else len(self.test)
        seconds = 10 * self._seconds_of(lambda: neutral_images(self.teacher, COUNT // 10))
        seconds += of_all * (self.section.held_out + COUNT + tested)
        if self.test is not None:
            part = slice(0, min(tested, 200))
            reading = self._seconds_of(lambda: self.test is not None and self.test.pixels(part, self.spec))
            seconds += networks * reading * tested / part.stop
        if isinstance(self.method, ImpressionMethod):
            images, logits = self.spec.uniform_noise(60), torch.eye(self.teacher.num_classes)[torch.zeros(60).long()]
            seconds += self._seconds_of(lambda: impressions_picture(images, logits, self.spec, self.folder / "all.png"))
        return seconds

    def _of_an_image(self, network: Callable[[Tensor], Tensor]) -> float:
        """Seconds of an image in a batch of the size that networks are measured with."""
        count = self.spec.inference_batch_on("cpu")
        images = self.spec.uniform_noise(count)
        with torch.no_grad():
            network(images)  # the first pass sets things up
            return self._seconds_of(lambda: network(images)) / count

    def _further_bytes(self) -> int:
        """What the run holds beside what the rehearsal held."""
        image = 4 * math.prod(self.spec.shape)
        if isinstance(self.method, ImpressionMethod):
            shard, slots = self.options.synthesis.shard, self.options.synthesis.slots
            return _SHARD_COPIES * image * max(0, min(shard, self.section.size) - slots)
        if isinstance(self.method, Ats):
            return image * self.section.size  # twice in half precision
        if isinstance(self.options, ZsktSettings):
            return (image // 2) * (self.options.memory + self.options.figures)
        return 0


def _shortened(loaded: LoadedRecipe, step: float) -> LoadedRecipe:
    """The recipe with trainings of a few steps, fewer where a step takes long; all else costs what it costs.

    Args:
        loaded: the recipe.
        step: about the seconds of a step.
    """
    recipe = loaded.recipe
    few = min(max(int(_SECONDS_OF_STEPS / max(step, 1e-9)), _FEWEST), _MOST)
    pruning, quantization = recipe.compression.pruning, recipe.compression.quantization
    if pruning is not None:
        scored = pruning.pruner in ("TaylorPruner", "SlimPruner")
        pruning = dataclasses.replace(
            pruning,
            pruner="L1NormPruner" if pruning.pruner == "MovementPruner" else pruning.pruner,
            arguments={**pruning.arguments, "training_steps": few} if scored else {},
            schedule=None,
            steps=min(few, pruning.steps),
        )
    if quantization is not None:
        arguments = {**quantization.arguments}
        arguments.pop("quant_start_step", None)
        quantization = dataclasses.replace(quantization, arguments=arguments, steps=min(few, quantization.steps))
    compression = recipe.compression.model_copy(update={"pruning": pruning, "quantization": quantization})
    distillation = dataclasses.replace(recipe.distillation, steps=min(few, recipe.distillation.steps))
    transfer = recipe.transfer
    if isinstance(transfer.options(), ZsktSettings):
        transfer = transfer.model_copy(update={"filling": 0, "figures": 0})
    changes = {"compression": compression, "distillation": distillation, "transfer": transfer}
    return dataclasses.replace(loaded, recipe=recipe.model_copy(update=changes))


def _steps(recipe: Recipe, work: str, trains: bool) -> int:
    """Steps of a stage, those in which channels are scored included."""
    pruning, quantization = recipe.compression.pruning, recipe.compression.quantization
    if work == "distillation":
        return recipe.distillation.steps
    if work == "quantization":
        assert quantization is not None
        return quantization.steps if trains and quantization.quantizer not in ("PtqQuantizer", "ptq") else 0
    assert pruning is not None
    from zskd_nni.compression.pruning.nni_pruner import default_arguments, is_data_driven

    steps = pruning.steps if trains else 0
    if work != "pruning":
        steps += recipe.distillation.steps + (0 if quantization is None else quantization.steps)
    if not is_data_driven(pruning) or (trains and steps and pruning.schedule is not None):
        return steps
    scores = {**default_arguments(pruning), **pruning.arguments}
    return steps + int(scores.get("training_steps", 0 if steps else pruning.steps or 30))
