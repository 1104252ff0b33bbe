"""What cannot be a teacher or a student, told by name: scripted, exported, quantized, lazy and empty networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves

from zskd_nni.runtime.errors import UserError

_PLAIN = "pass the nn.Module of Python code that it was made from, with its weights loaded"
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "bitsandbytes.nn")
_PREPARED = ("torch.ao.quantization", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat", "torch.ao.nn.quantizable")


def check_kind(network: Any, what: str = "The teacher") -> None:
    """Refuse what no gradient, copy or compressor can work on.

    Args:
        network: anything.
        what: the subject of the sentence.

    Raises:
        UserError: says what it is and what would be right.

    Example:
        >>> check_kind(torch.jit.script(nn.Linear(2, 2)))
        Traceback (most recent call last):
        zskd_nni.runtime.errors.UserError: The teacher is TorchScript (RecursiveScriptModule), whose layers are
            compiled; pass the nn.Module of Python code that it was made from, with its weights loaded.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"{what} {_no_module(network)}.")
    for path, module in network.named_modules():
        where = f" at {path!r}" if path else ""
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            raise UserError(f"{what} is TorchScript{where} ({kind.__name__}), whose layers are compiled; {_PLAIN}.")
        if any(parent.__module__.startswith("torch.export") for parent in kind.__mro__):
            raise UserError(
                f"{what} is an exported program{where}, which has operators in the place of layers; {_PLAIN}."
            )
        if hasattr(module, "_nni_wrapper"):
            raise UserError(f"{what} is still wrapped by NNI{where}; call unwrap_model() of its compressor first.")
        _check_quantized(module, kind.__module__, where, what)
        _check_tensors(module, where, what)


def check_copyable(network: nn.Module, what: str = "The teacher") -> None:
    """Refuse tensors of a forward pass that a hook or ``forward`` itself keeps: they cannot be copied.

    Raises:
        UserError: names the module and its attribute.
    """
    for path, module in network.named_modules():
        computed = {"weight", "bias"} & {name.rpartition("_")[0] for name in module._parameters}  # of weight_norm
        for name, value in vars(module).items():
            if name.startswith("_") or name in computed:
                continue
            kept = [each for each in tree_leaves(value) if isinstance(each, Tensor)]
            if any(tensor.grad_fn is not None for tensor in kept):
                owner = f"module {path!r}" if path else "network itself"
                raise UserError(
                    f"{what} cannot be copied: its {owner} keeps a tensor of a forward pass in the attribute {name!r}, "
                    f"as a hook does; remove the hook, or keep value.detach()."
                )


def _no_module(value: Any) -> str:
    """What something that is no network is, and what would be right."""
    kind = type(value).__name__
    if isinstance(value, type):
        made = "make one first" if issubclass(value, nn.Module) else "pass a network"
        return f"is the class {value.__name__}, not a network; {made}: {value.__name__}(...)"
    if kind == "ExportedProgram":
        return f"is an exported program, which has operators in the place of layers; {_PLAIN}"
    if isinstance(value, torch.jit.ScriptFunction):
        return f"is TorchScript ({kind}), whose layers are compiled; {_PLAIN}"
    if isinstance(value, Mapping):
        return "is a dict, such as of weights; make the network and load them: network.load_state_dict(...)"
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return f"is the text {str(value)!r}, not a network; load_teacher({str(value)!r}) reads one by its name"
    if kind in ("ModelProto", "InferenceSession"):
        return f"is an ONNX {kind}; save it as a file.onnx and name that file as the model"
    if callable(value):
        return f"is a {kind}, not an nn.Module; put it into the forward of one, with its weights as parameters"
    return f"is a {kind}, not an nn.Module"


def _check_quantized(module: nn.Module, origin: str, where: str, what: str) -> None:
    name = type(module).__name__
    if origin.startswith(_QUANTIZED):
        raise UserError(
            f"{what} is quantized already{where} ({name}), and its integers have no gradients; pass the network in "
            f"floating point that it was made from, and quantize the student."
        )
    if origin.startswith(_PREPARED) and not isinstance(
        module, torch.ao.quantization.QuantStub | torch.ao.quantization.DeQuantStub
    ):
        raise UserError(
            f"{what} is prepared for quantization{where} ({name}); pass the network as it was before that, and "
            f"quantize the student."
        )


def _check_tensors(module: nn.Module, where: str, what: str) -> None:
    name = type(module).__name__
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise UserError(
                f"{what} has a lazy layer{where} ({name}), whose size is only known after a forward pass; call the "
                f"network once on an input of its size before its weights are loaded."
            )
        if tensor.is_meta:
            raise UserError(
                f"{what} has no weights: {key!r}{where} lies on the meta device, which keeps shapes only; make the "
                f"network on the CPU and load its weights."
            )
        integers = isinstance(module._parameters.get(key), Tensor) and not (
            tensor.is_floating_point() or tensor.is_complex()
        )
        if tensor.is_quantized or integers or type(tensor).__module__.startswith("torchao"):
            raise UserError(
                f"{what} is quantized already: {key!r}{where} holds {type(tensor).__name__} of {tensor.dtype}, which "
                f"has no gradients; pass the network in floating point that it was made from, and quantize the student."
            )


def check_answers(
    answers: Tensor, count: int, before: Tensor | None = None, last: str | None = None, what: str = "The teacher"
) -> None:
    """Refuse a network whose answers are no logits of at least two classes.

    A log-softmax is no matter: it adds one number to all logits of an image, which a softmax takes off again.

    Args:
        answers: what the network gave.
        count: how many images it saw.
        before: what its classifier gave, ``(N, classes)``; None where that is unknown.
        last: path of the module that gave the answers; None where ``forward`` itself computed them.
        what: the subject of the sentence.

    Raises:
        UserError: says what the answers are and what would be right.
    """
    shape = list(answers.shape)
    if not answers.is_floating_point():
        raise UserError(
            f"{what} answers in whole numbers ({answers.dtype}), such as the chosen classes after argmax; return the "
            f"logits that it chooses from."
        )
    if shape in ([count], [count, 1]):
        _refuse_one_output(answers, what)
    if len(shape) > 2 and shape[0] == count and answers.numel() == count * shape[1]:
        raise UserError(
            f"{what} answers {count} images with a tensor of shape {shape}; a classifier returns (N, classes). Let "
            f"forward end in .flatten(1), or put nn.Flatten(1) behind the network."
        )
    if len(shape) != 2 or shape[0] != count:
        raise UserError(
            f"{what} returns a tensor of shape {shape} for {count} images; a classifier returns "
            f"({count}, classes) with at least 2 classes. Pass output= to pick the logits."
        )
    if answers.dtype != torch.float32:
        raise UserError(
            f"{what} answers in {answers.dtype} though its weights are float32; return logits.float() from forward."
        )
    if bool((answers >= 0).all()):
        _refuse_probabilities(answers, before, last, what)


def _refuse_one_output(answers: Tensor, what: str) -> None:
    after = ", between 0 and 1 as after a sigmoid" if bool(((answers >= 0) & (answers <= 1)).all()) else ""
    raise UserError(
        f"{what} answers {len(answers)} images with a tensor of shape {list(answers.shape)}, one number an "
        f"image{after}: a binary classifier of one output, and at least 2 classes with a logit each are needed. "
        f"Give its last layer two outputs, with the weights and bias of the one behind a row of zeros, and return "
        f"them without a sigmoid."
    )


def _refuse_probabilities(answers: Tensor, before: Tensor | None, last: str | None, what: str) -> None:
    """Of answers that are not negative: a softmax's, a sigmoid's, or zeros and a one."""
    sums = {dim: bool((answers.sum(dim) - 1).abs().max() < 1e-3) for dim in (0, 1)}
    if sums[1] and bool(((answers == 0) | (answers == 1)).all()):
        raise UserError(
            f"{what} answers with 1 for one class and 0 for the others, which has no gradient; return the logits that "
            f"it chooses from."
        )
    if sums[0] and not sums[1]:
        raise UserError(
            f"{what} ends in a softmax over the images of a batch (dim=0): its answers of each class sum to 1. Return "
            f"the logits in front of it; the loss computes the softmax itself, over the classes."
        )
    if sums[1]:
        ending, told = "softmax", "probabilities that sum to 1"
    elif before is not None and before.shape == answers.shape and torch.allclose(before.sigmoid(), answers, atol=1e-6):
        ending, told = "sigmoid", "one probability a class"
    else:
        return
    named, place = ("", "") if last is None else (f" ({last!r})", ", or put nn.Identity() in its place")
    raise UserError(
        f"{what} ends in a {ending}{named}: its answers are {told}, and the logits in front of it are needed. "
        f"Return those from forward{place}; the loss computes the {ending} itself."
    )
