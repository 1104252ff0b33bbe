"""A distiller for NNI that needs no labels and by default matches the logits."""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.distillation.basic_distiller import TeacherModelBasedDistiller
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.utils.evaluator import Evaluator, ForwardHook, TorchEvaluator
from schema import SchemaError
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings, check_student
from zskd_nni.training.losses import distillation_loss

_logger = logging.getLogger(__name__)
TeacherPredict = Callable[[Any, nn.Module], Any]

_SELECTION_KEYS = ("op_types", "op_names", "op_names_re", "exclude_op_names", "exclude_op_types", "exclude_op_names_re")
_SETTING_KEYS = ("lambda", "link", "apply_method", "temperature")
_CONFIG_KEYS = (*_SELECTION_KEYS, "target_names", "target_settings", *_SETTING_KEYS)
_IMAGE_KEYS = ("images", "x", "input", "pixel_values")


class ZeroShotDistiller(TeacherModelBasedDistiller):
    """Trains the bound model to match a frozen teacher, without labels, alone or fused with a pruner or quantizer.

    With an empty ``config_list`` the loss of a step is ``T^2 * KL(teacher || student)`` between the softened logits
    of the teacher and of the student on that step's batch. With a config list the loss is the sum over its targets,
    as in NNI's ``DynamicLayerwiseDistiller``: each student target against the nearest of its linked teacher targets.

    Args:
        model: the student.
        config_list: NNI's distillation config. ``lambda`` (1), ``link`` (``auto``: the teacher's module of the same
            name) and ``apply_method`` (``mse``) are NNI's, ``lambda`` may be an int; ``temperature`` belongs to
            ``kl`` targets and defaults to the distiller's.
        evaluator: any NNI evaluator; :class:`~zskd_nni.compression.evaluator.DataFreeEvaluator` brings the images.
        teacher_model: a module, of which a frozen copy is taken, or a :class:`~zskd_nni.models.teacher.Teacher`.
        teacher_predict: ``teacher_predict(batch, teacher)`` gives the teacher's output. By default the images
            are the batch itself, the first entry of a sequence, or ``images``, ``x``, ``input`` or ``pixel_values``
            of a mapping.
        origin_loss_lambda: weight of the evaluator's own loss. At 0 that loss is ignored, even if it is not finite.
        existed_wrappers: NNI's, from :meth:`from_compressor`.
        temperature: T > 0 of both softmaxes; by default that of a ``DataFreeEvaluator``'s settings, and that of
            ``DistillationSettings`` for any other evaluator.

    Raises:
        UserError: the teacher is the student, another number of classes, no evaluator, a temperature that is not
            positive, or a config list with an unknown key.

    Example:
        >>> from zskd_nni import NoiseSource, load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> evaluator = DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 8), quiet=True)
        >>> distiller = ZeroShotDistiller(teacher.student(), [], evaluator, teacher)
        >>> _ = distiller.compress(max_steps=2, max_epochs=None)
        >>> len(evaluator.histories)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        teacher_model: nn.Module | Teacher,
        teacher_predict: TeacherPredict | None = None,
        origin_loss_lambda: float = 0.0,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        temperature: float | None = None,
    ) -> None:
        if evaluator is None:
            raise UserError("ZeroShotDistiller needs an evaluator: it has the images and the optimiser.")
        settings = evaluator.settings if isinstance(evaluator, DataFreeEvaluator) else DistillationSettings()
        self.temperature = _checked_temperature(settings.temperature if temperature is None else temperature)
        given = teacher_model.model if isinstance(teacher_model, Teacher) else teacher_model
        if given is model:
            raise UserError("The teacher is the student itself; give the distiller a copy of the model from before.")
        _check_answers(model, teacher_model, evaluator)
        self._teacher_output = teacher_model.output if isinstance(teacher_model, Teacher) else first_tensor
        if config_list or not isinstance(teacher_model, Teacher):
            # NNI wraps the teacher's linked layers; it gets a copy, so that the given teacher stays as it is.
            given = copy.deepcopy(given).float().eval().requires_grad_(False)
        self._answers: list[Any] = []
        self.config_list: list[dict]
        predict = teacher_predict or default_teacher_predict
        super().__init__(model, config_list, evaluator, given, predict, float(origin_loss_lambda), existed_wrappers)

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[dict],
        teacher_model: nn.Module | Teacher,
        teacher_predict: TeacherPredict | None = None,
        origin_loss_lambda: float = 0.0,
        evaluator: Evaluator | None = None,
        *,
        temperature: float | None = None,
    ) -> ZeroShotDistiller:
        """A distiller on top of ``compressor``; its ``compress`` runs both. Arguments as in the constructor."""
        given = {"teacher_model": teacher_model, "teacher_predict": teacher_predict, "temperature": temperature}
        return super(TeacherModelBasedDistiller, cls).from_compressor(
            compressor, new_config_list, evaluator=evaluator, origin_loss_lambda=origin_loss_lambda, **given
        )

    def wrap_model(self) -> None:
        """As NNI's, but also rewraps a convolution with a bias that is folded with its BatchNorm.

        NNI moves the bias into the wrapper only if the wrapper has none, and so fails on a wrapper that was unwrapped.
        Unwrapping has copied the bias back into the module.
        """
        for wrapper in self._module_wrappers.values():
            own = {*wrapper.pruning_target_spaces, *wrapper.quantization_target_spaces}
            if wrapper.fused_modules and "bias" in wrapper._parameters and "bias" not in own:
                del wrapper.bias
        super().wrap_model()

    def compute_distill_loss(self) -> Tensor:
        """The weighted sum over the configured targets of the last batch, a scalar.

        Raises:
            UserError: no target saw a batch, or a target differs in shape from its link.
        """
        losses = []
        for path, spaces in self._target_spaces.items():
            for name, space in spaces.items():
                terms = []
                for link in space.link:
                    student, teacher = space.hidden_state, self._teacher_target_spaces[link][name].hidden_state
                    if student is not None and teacher is not None:
                        loss = self._target_loss(space, student, teacher.to(student.device), f"{path} ~ {link}")
                        terms.append(space.lambda_ * loss)
                if terms:
                    losses.append(torch.stack(terms).min())
        for spaces in (*self._target_spaces.values(), *self._teacher_target_spaces.values()):
            for space in spaces.values():
                space.clean()
        if not losses:
            raise UserError("No distillation target was reached by the batch; check op_names and link in config_list.")
        return torch.stack(losses).sum()

    def _target_loss(self, space: Any, student: Tensor, teacher: Tensor, where: str) -> Tensor:
        if student.shape != teacher.shape:
            raise UserError(
                f"The distillation targets {where} (student ~ teacher) give {list(student.shape)} and "
                f"{list(teacher.shape)}; they must have the same shape."
            )
        if space.apply_method == "mse":
            return functional.mse_loss(student, teacher)
        temperature = space.setting.get("temperature") or self.temperature
        log_student = functional.log_softmax(student / temperature, -1)
        log_teacher = functional.log_softmax(teacher / temperature, -1)
        return temperature**2 * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

    def compute_logits_loss(self, answer: Any) -> Tensor:
        """``T^2 * KL`` between the teacher's output ``answer`` and the bound model's last output, a scalar.

        Raises:
            UserError: the bound model was not called on the batch, or has another number of classes.
        """
        if not self._answers:
            raise UserError("The training step did not call the model, so that there are no logits to distil.")
        student = first_tensor(self._answers.pop())
        self._answers.clear()
        teacher = self._teacher_output(answer).to(student.device)
        if student.shape != teacher.shape:
            raise UserError(
                f"The student's logits of a batch are of shape {list(student.shape)}, the teacher's of "
                f"{list(teacher.shape)}; they must have the same number of classes."
            )
        return distillation_loss(student, teacher, self.temperature)

    def _register_loss_patch(self, evaluator: Evaluator) -> None:
        if self.origin_loss_lambda == 0 and isinstance(evaluator, TorchEvaluator):
            step = evaluator._training_step

            def unlabelled_step(*args: Any, **kwargs: Any) -> Tensor:
                step(*args, **kwargs)
                return torch.zeros(())

            # NNI patches tensors, sequences and mappings; a training step without a loss of its own returns None.
            evaluator._training_step = unlabelled_step

        def loss_patch(original_loss: Tensor, batch: Any) -> Tensor:
            with torch.no_grad():
                answer = self.teacher_predict(batch, self.teacher_model)
            loss = self.compute_distill_loss() if self._target_spaces else self.compute_logits_loss(answer)
            if self.origin_loss_lambda == 0:
                return loss  # 0 * NaN is NaN: the original loss is left out, not weighted
            return self.origin_loss_lambda * original_loss + loss

        evaluator.patch_loss(loss_patch)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        for compressor in self.fused_compressors:
            if _waits_for_masks(compressor):
                _logger.warning(
                    "%s has made no masks, and makes none in a fused run: call its compress() before from_compressor, "
                    "or put it under AGPPruner or LinearPruner.",
                    type(compressor).__name__,
                )
        if not self._target_spaces:
            self._answers = []
            evaluator.register_hooks([ForwardHook(self.bound_model, "logits", lambda _buffer: self._keep_answer)])
        super()._fuse_preprocess(evaluator)

    def _keep_answer(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._answers = [output]

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        self._answers = []

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if max_steps is None and max_epochs is None:
            raise UserError("ZeroShotDistiller.compress needs max_steps or max_epochs.")
        try:
            super()._fusion_compress(max_steps, max_epochs)
        except BaseException:
            # NNI unbinds after a finished run alone; hooks and patches must not outlive an interrupted one.
            if getattr(self.evaluator, "model", None) is not None:
                self.evaluator.unbind_model()
            raise

    def _validate_config(self) -> None:
        for number, config in enumerate(self.config_list):
            _check_keys(config, _CONFIG_KEYS, f"config_list[{number}]")
            for name, setting in config.get("target_settings", {}).items():
                _check_keys(setting, _SETTING_KEYS, f"config_list[{number}].target_settings.{name}")
        complete = [_with_nested_temperature(config) for config in with_float_lambdas(self.config_list)]
        # NNI's schema does not know the temperature.
        self.config_list = copy.deepcopy(complete)
        for config in self.config_list:
            for setting in config.get("target_settings", {}).values():
                setting.pop("temperature", None)
        try:
            super()._validate_config()
        except SchemaError as error:
            raise UserError(f"The distiller's config_list is not valid: {str(error).splitlines()[-1]}.") from error
        self.config_list = complete


def with_float_lambdas(config_list: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy with every ``lambda`` as a float: NNI's schema accepts an int, its setter does not."""
    result = copy.deepcopy(config_list)
    for config in result:
        for setting in (config, *config.get("target_settings", {}).values()):
            if isinstance(setting.get("lambda"), int):
                setting["lambda"] = float(setting["lambda"])
    return result


def default_teacher_predict(batch: Any, teacher: nn.Module) -> Any:
    """The teacher's output for the images of a batch; see :func:`images_of`."""
    images = images_of(batch)
    device = next((parameter.device for parameter in teacher.parameters()), images.device)
    return teacher(images.to(device))


def images_of(batch: Any) -> Tensor:
    """The images ``(N, C, H, W)`` in a batch: itself, a sequence's first entry, or a mapping's usual keys.

    Raises:
        UserError: there is no tensor in any of these places.
    """
    found: Any = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and batch:
        found = batch[0]
    if isinstance(found, Tensor):
        return found
    raise UserError(
        f"No images were found in a batch of type {type(batch).__name__}; pass teacher_predict(batch, teacher), "
        "a function that gives the teacher's logits."
    )


def _waits_for_masks(compressor: Compressor) -> bool:
    if not isinstance(compressor, _NormPruner) or compressor.interval_steps >= 0:
        return False
    masks = [mask for targets in compressor.get_masks().values() for mask in targets.values() if mask is not None]
    return all(bool(mask.all()) for mask in masks)


def _check_answers(model: nn.Module, teacher: nn.Module | Teacher, evaluator: Evaluator) -> None:
    if isinstance(teacher, Teacher):
        check_student(model, teacher)
        return
    dummy = evaluator.get_dummy_input() if hasattr(evaluator, "dummy_input") else None
    if not isinstance(dummy, Tensor):
        return  # the first batch shows the shapes
    with torch.no_grad():
        shapes = [list(first_tensor(copy.deepcopy(network).eval()(dummy)).shape) for network in (model, teacher)]
    if shapes[0] != shapes[1]:
        classes = f"{shapes[0][-1]} classes, the teacher {shapes[1][-1]}"
        raise UserError(f"The student has {classes}; they must be the same.")


def _checked_temperature(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise UserError(f"A temperature must be a positive number, not {value!r}.")
    return float(value)


def _check_keys(config: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(config, Mapping):
        raise UserError(f"{where} must be a dict, not {type(config).__name__}.")
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise UserError(f"{where} has no key {key!r}; the nearest is {near!r}. Known: {', '.join(known)}.")


def _with_nested_temperature(config: dict) -> dict:
    # NNI copies only the keys it knows from the config itself into a target's setting, but all of target_settings.
    settings = {name: dict(setting) for name, setting in config.get("target_settings", {}).items()}
    if "temperature" in config:
        settings.setdefault("_output_", {})
    for setting in settings.values():
        temperature = setting.get("temperature", config.get("temperature"))
        if temperature is not None:
            setting["temperature"] = _checked_temperature(temperature)
    result = {key: value for key, value in config.items() if key != "temperature"}
    return {**result, "target_settings": settings} if settings else result
