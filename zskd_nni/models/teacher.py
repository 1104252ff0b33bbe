"""The teacher: a frozen copy of the user's classifier together with its input spec."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zskd_nni.models.build import (
    build_network,
    code_fingerprint,
    load_named_weights,
    starts_at_random,
    update_with_weights,
)
from zskd_nni.models.foreign import ONNX_SUFFIX
from zskd_nni.models.hooks import hooked
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.network_kinds import check_answers, check_copyable, check_kind
from zskd_nni.models.shared_modules import check_not_wrapped
from zskd_nni.models.zoo.trained import training_record
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.gradients import with_gradients
from zskd_nni.runtime.validation import build_settings

OutputAdapter = Callable[[Any], Tensor]


def first_tensor(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor itself, the ``logits`` of a mapping, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    mapping = isinstance(output, Mapping)
    named = output.get("logits") if mapping else getattr(output, "logits", None)
    entries = output.values() if mapping else output if isinstance(output, Sequence) else ()
    for entry in (named, *entries):
        if isinstance(entry, Tensor):
            return entry
    raise UserError(
        f"The model returns {type(output).__name__}, in which no tensor of logits was found; pass output=, a "
        "function from the model's output to the logits (N, classes)."
    )


class Teacher:
    """A frozen float32 copy of a classifier in ``eval()`` mode. The given module is left exactly as it was.

    A teacher is called with images in the value range, and normalises them, as exported ONNX files do. Its ``model``,
    as any network that is built or loaded, takes images that are normalised already (``spec.normalise``).

    Args:
        model: any classifier ``(N, C, H, W) -> (N, classes)``; other outputs go through ``output``.
        spec: shape, value range and normalisation of its input; ``(channels, height, width)`` alone for images in
            [0, 1] that are not normalised.
        classifier: path of the layer that computes the logits (``nn.Linear`` or a 1x1 convolution). By default it is
            found in a forward pass.
        output: a function from what the model returns to the logits; by default :func:`first_tensor`.
        code: a digest of the model's code, where that may change; part of the fingerprint.

    Attributes:
        model: the copy.
        classifier_path: path of the classifier layer.
        num_classes: number of logits.
        fingerprint: SHA-256 over weights, modules and their plain attributes, classifier path, input spec, the name of
            a given ``output``, and ``code``. The code of ``forward`` is not in it.

    Raises:
        UserError: the model is of a kind that cannot teach (scripted, exported, quantized, lazy, without weights),
            cannot be copied or cannot take the input, gives probabilities and not logits, its weights are not finite,
            a BatchNorm has no running statistics, or the classifier cannot be found.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> teacher = Teacher(model, (1, 8, 8))
        >>> teacher.classifier_path, teacher(torch.zeros(2, 1, 8, 8)).shape
        ('1', torch.Size([2, 10]))
    """

    @with_gradients()
    def __init__(
        self,
        model: nn.Module,
        spec: InputSpec | tuple[int, int, int],
        classifier: str | None = None,
        output: OutputAdapter | None = None,
        code: str | None = None,
    ) -> None:
        if isinstance(model, nn.Module):
            check_not_wrapped(model)
        check_kind(model)
        check_copyable(model)
        check_finite(model.state_dict())
        _check_answers_do_not_depend_on_the_batch(model)
        self.spec = spec = spec if isinstance(spec, InputSpec) else InputSpec(spec)
        self.output = output or first_tensor
        try:
            frozen = copy.deepcopy(model).float().eval().requires_grad_(False)
        except Exception as error:  # such as of torch.nn.utils.weight_norm
            raise UserError(
                f"The teacher cannot be copied ({error}); remove reparametrisations of its weights, such as by "
                "torch.nn.utils.remove_weight_norm."
            ) from error
        self.model = frozen
        use_channels_last(frozen, self.example_input())
        self._has_response_norms = any(isinstance(m, nn.LocalResponseNorm) for m in frozen.modules())
        self.classifier_path, self.num_classes = self._find_classifier(classifier)
        self.fingerprint = self._fingerprint(code)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def classifier(self) -> nn.Linear | nn.Conv2d:
        """The layer that computes the logits."""
        layer = self.model.get_submodule(self.classifier_path)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    def class_weights(self) -> Tensor:
        """``(classes, features)`` weights of the classifier, bias left out (ZSKD section 3.1)."""
        return self.classifier.weight.detach().flatten(1).float()

    def to(self, device: torch.device | str) -> Teacher:
        """Move the copy; returns itself."""
        self.model.to(device)
        return self

    def student(self) -> nn.Module:
        """A trainable copy of the network with the teacher's weights, in ``eval()`` mode on the teacher's device."""
        return copy.deepcopy(self.model).requires_grad_(True)

    def example_input(self, count: int = 2) -> Tensor:
        """``(count, C, H, W)`` normalised mid-grey images on the teacher's device; to trace a network with."""
        return self.spec.example_input(count).to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)`` in the spec's value range; differentiable in them."""
        with fast_response_norms(self.model) if self._has_response_norms else nullcontext():
            return self.output(self.model(self.spec.normalise(images)))

    def predict(self, images: Tensor, batch: int | None = None) -> Tensor:
        """Logits ``(N, classes)`` on the CPU, without gradients, in batches; of images in half precision too."""
        with torch.no_grad():
            parts = images.split(batch or self.spec.inference_batch_on(self.device))
            return torch.cat([self(_whole(part).to(self.device)).cpu() for part in parts])

    def _find_classifier(self, given: str | None) -> tuple[str, int]:
        """Path of the classifier and number of classes, from a forward pass on noise.

        On noise no two layers have the same outputs by chance.
        """
        candidates = dict(classifier_candidates(self.model))
        if given is not None and given not in candidates:
            known = ", ".join(list(candidates)[-5:]) or "none"
            raise UserError(
                f"The teacher has no linear layer or 1x1 convolution at {given!r} (classifier); its last ones: {known}."
            )
        calls: list[tuple[str, Tensor]] = []
        ends: list[tuple[str, Any]] = []  # what layers without weights gave, of the size of answers
        activations = [path for path, module in self.model.named_modules() if path and not list(module.parameters())]

        def note_end(path: str, out: Any) -> None:
            if isinstance(out, Tensor) and out.dim() == 2:
                ends.append((path, out))

        try:
            with (
                torch.no_grad(),
                hooked(self.model, candidates, after=lambda *call: calls.append(call)),
                hooked(self.model, activations, after=note_end),
            ):
                logits = self(self.spec.uniform_noise(2).to(self.device))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The teacher cannot take an input of shape {list(self.spec.shape)} ({error}); "
                "set teacher.input.shape to what it was trained on."
            ) from error
        widths = [out for path, out in calls if isinstance(out, Tensor) and out.numel() == logits.numel()]
        last = next((path for path, out in ends if out is logits), None)
        check_answers(logits, 2, widths[-1].flatten(1) if widths else None, last)
        classes = logits.shape[1]
        if not torch.isfinite(logits).all():
            raise UserError("The teacher's logits are not finite on a random image; its weights overflow.")
        if given is not None:
            width = candidates[given].weight.shape[0]
            if width != classes:
                raise UserError(f"The layer {given!r} (classifier) has {width} outputs, the teacher {classes} classes.")
            return given, classes
        for path, out in reversed(calls):
            if isinstance(out, Tensor) and out.numel() == logits.numel() and torch.equal(out.flatten(1), logits):
                return path, classes
        for path, _ in reversed(calls):  # something (a scale, a log-softmax) follows the layer
            if candidates[path].weight.shape[0] == classes:
                return path, classes
        raise UserError(
            f"No linear layer or 1x1 convolution with {classes} outputs was found to be the classifier; "
            "name it (recipe: teacher.classifier, Python: classifier=)."
        )

    def _fingerprint(self, code: str | None) -> str:
        adapter = None if self.output is first_tensor else getattr(self.output, "__qualname__", type(self.output))
        digest = hashlib.sha256(repr((self.spec, self.classifier_path, adapter, code)).encode())
        for path, module in self.model.named_modules():
            settings = {name: value for name, value in vars(module).items() if not name.startswith("_")}
            settings = {name: settings[name] for name in sorted(settings) if _is_plain(settings[name])}
            settings.pop("training", None)
            digest.update(repr((path, type(module).__qualname__, settings)).encode())
        update_with_weights(digest, self.model)
        return digest.hexdigest()


def load_teacher(
    name: str,
    spec: InputSpec | tuple[int, int, int] | None = None,
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    classifier: str | None = None,
    base: Path | None = None,
    allow_pt: bool = False,
) -> Teacher:
    """A trained teacher by its name.

    Args:
        name: of a shipped teacher, which needs nothing else, or of a network as in
            :func:`~zskd_nni.models.build.build_network`.
        spec: input spec of a network.
        weights: of a network: a file, or ``zoo:NAME`` for those of a shipped teacher.
        arguments: keyword arguments of the network's factory.
        classifier: path of the layer that computes the logits, where it is not found.
        base: the folder that relative files are in.
        allow_pt: also read weights in PyTorch's own format.

    Raises:
        UserError: there is no such teacher, network or file, or they do not fit together.

    Example:
        >>> teacher = load_teacher("lenet5-digits")
        >>> teacher.spec.shape, teacher.num_classes
        ((1, 32, 32), 10)
    """
    if ":" not in name and not name.lower().endswith(ONNX_SUFFIX):
        if (spec, weights, arguments) != (None, None, None):
            raise UserError(f"The teacher {name!r} brings its own spec, weights and arguments; leave them out.")
        about = training_record(name)
        name, weights, arguments = about["network"], f"zoo:{name}", about["arguments"]
        spec = build_settings(InputSpec, about["input"], "input")
    elif spec is None:
        raise UserError(f"What is the input of {name!r}? Pass spec=(channels, height, width), or an InputSpec.")
    if weights is None and starts_at_random(name, base):
        raise UserError(
            f"weights= is missing: {name} starts at random, and an untrained network is no teacher. Name a "
            ".safetensors file, or zoo:NAME for a shipped teacher."
        )
    network = build_network(name, arguments, base)
    if weights is not None:
        load_named_weights(network, weights, base, allow_pt)
    return Teacher(network, spec, classifier, code=code_fingerprint(name, base))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def classifier_candidates(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Paths and modules of all linear layers and 1x1 convolutions, in definition order."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
            yield path, module


def check_finite(weights: dict[str, Tensor]) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        UserError: names the tensor.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "infinity"
            raise UserError(f"The weights hold {kind} in {name!r}; a network with such weights cannot be a teacher.")


def _check_answers_do_not_depend_on_the_batch(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UserError(
                f"The teacher's {path!r} is a BatchNorm without running statistics (track_running_stats=False): its "
                "output for an image depends on the other images of the batch. A teacher's output must not; give the "
                "layer running statistics."
            )


def _whole(images: Tensor) -> Tensor:
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
