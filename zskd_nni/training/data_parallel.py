"""One training by several processes: each takes its part of every batch, and all take the same step.

The gradient is that of the whole batch: each process weighs its loss by its share of the images, and the gradients
are added up in one piece after the backward pass. PyTorch's ``DistributedDataParallel`` adds them up in pieces while
the backward pass still runs, and lays the pieces out anew after its first step, so that a training which is taken up
again would go on with other bits; and it waits for the gradient of every weight that led to the output, which a loss
on hidden layers, as NNI's distillers have it, does not bring.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from zskd_nni.runtime.distributed import Team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import derive_seed


class DataParallel:
    """How a training is shared by a team.

    Args:
        team: the processes; one alone changes nothing.
        divided: whether each takes a part of a batch. Otherwise each takes all of it, and all do the same.
    """

    def __init__(self, team: Team | None = None, divided: bool = True) -> None:
        self.team = team or Team()
        self.divided = divided and not self.team.alone

    def part(self, images: Tensor) -> Tensor:
        """This process's images ``(n, C, H, W)`` of a whole batch, the same ``(N, C, H, W)`` for all.

        Raises:
            UserError: there are fewer images than processes.
        """
        if not self.divided:
            return images
        if len(images) < self.team.size:
            raise UserError(
                f"A batch of {len(images)} images cannot be divided among {self.team.size} processes; use larger "
                "batches (distillation.batch), or fewer processes."
            )
        return images.tensor_split(self.team.size)[self.team.rank]

    def weighted(self, loss: Tensor, part: int, whole: int) -> Tensor:
        """A mean over ``part`` images, so that everybody's add up to the mean over ``whole``."""
        return loss * (part / whole) if self.divided else loss

    def forward(self) -> AbstractContextManager[Any]:
        """Within the block a network's batch normalisation sees the whole batch, and dropout draws its own numbers.

        What comes before, such as making the batch, draws the same numbers in all processes.
        """
        if not self.divided:
            return nullcontext()
        if self.team.rank:
            torch.manual_seed(derive_seed(torch.initial_seed(), "rank", self.team.rank))
        return _NormOfWholeBatches(self.team)

    def same(self, images: Tensor) -> Tensor:
        """The first process's images; a generator that each process trains may drift apart in its last bits."""
        if not self.divided:
            return images
        held = images.detach().contiguous()
        self.team.broadcast(held)
        return held

    def variance(self, values: Tensor) -> Tensor | None:
        """Of everybody's ``values`` ``(n, ...)`` over all images, averaged: a scalar; None without a division."""
        if not self.divided:
            return None
        count = self._sum(values.new_tensor([len(values)]))
        mean = self._sum(values.sum(0)) / count
        return (self._sum((values - mean).square().sum(0)) / count).mean()

    def _sum(self, values: Tensor) -> Tensor:
        total = values.detach().contiguous()
        self.team.add(total)
        return total

    def begin(self, model: nn.Module) -> None:
        """All start from the first process's weights, buffers and masks.

        Raises:
            UserError: the networks are not of one shape.
        """
        if not self.divided:
            return
        state = model.state_dict()
        shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        if any(one != shapes for one in self.team.collect(shapes)):
            raise UserError("The processes of this launch hold different networks; all must run the same recipe.")
        with torch.no_grad():
            for value in _distinct(state.values()):
                held = value.detach().contiguous()
                self.team.broadcast(held)
                value.copy_(held)

    def add_gradients(self, model: nn.Module, optimizer: Optimizer, loss: Tensor) -> Tensor:
        """Put the gradient of the whole batch in the place of its parts; returns the loss of the whole batch."""
        if not self.divided:
            return loss
        known = (weight for group in optimizer.param_groups for weight in group["params"])
        gradients = [weight.grad for weight in _distinct((*model.parameters(), *known)) if weight.grad is not None]
        together = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().reshape(1)])
        self.team.add(together)
        parts = together[:-1].split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, parts, strict=True):
            gradient.copy_(total.view(gradient.shape))
        return together[-1].clone()  # a view of it would keep all gradients alive


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


class _Sum(torch.autograd.Function):
    """The sum over a team; what it leads to is a sum over the team as well."""

    @staticmethod
    def forward(context: Any, value: Tensor, team: Team) -> Tensor:
        context.team = team
        total = value.clone()
        team.add(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        context.team.add(total)
        return total, None


class _NormOfWholeBatches(TorchFunctionMode):
    """Batch normalisation with everybody's statistics, wherever a network calls it, also from within NNI's wrappers.

    PyTorch's ``SyncBatchNorm`` takes GPUs only, and the place of modules that may be wrapped.
    """

    def __init__(self, team: Team) -> None:
        super().__init__()
        self.team = team

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        values: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return functional.batch_norm(values, running_mean, running_var, weight, bias, False, momentum, eps)
        dims = [dim for dim in range(values.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(values.ndim)]
        own = values.numel() // values.shape[1]
        counted = torch.cat([values.sum(dims), values.new_full((1,), own)])
        *sums, count = _Sum.apply(counted, self.team).split([values.shape[1], 1])
        if own < 2 and int(count) < 2:  # the device is waited for only where there may be too few
            raise ValueError("Expected more than 1 value per channel when training")
        mean = sums[0] / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims), self.team) / count
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
        normal = centred * (variance + eps).rsqrt().view(shape)
        if weight is not None:
            normal = normal * weight.view(shape)
        return normal if bias is None else normal + bias.view(shape)
