"""Data-parallel training whose result is that of one process, also after a resume: each takes its part of every batch.

PyTorch's ``DistributedDataParallel`` with ``SyncBatchNorm`` is not used because (torch 2.14, gloo):

- ``SyncBatchNorm`` refuses CPUs, and replaces modules that NNI may have wrapped. Without it every process normalises by
  its own part of the batch: after 12 steps of a small network, weights differ by 4e-3 from those of one process.
- With four processes a training that was stopped after 6 steps and resumed ends after 12 with other bits than one that
  never stopped: gradients are laid out anew after the first step, and then summed in another order.
- A loss on hidden layers, as NNI's distillers have it, leaves the gradients of later layers out, and the second step
  fails.

Here each process weights its loss by its share of the images, and all gradients are summed in one piece after the
backward pass.
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
    """How the processes of a team share a training.

    Args:
        team: the processes. One process alone trains as usual.
        divided: whether each takes a part of every batch. Otherwise all train on whole batches, and do the same.
    """

    def __init__(self, team: Team | None = None, divided: bool = True) -> None:
        self.team = team or Team()
        self.divided = divided and not self.team.alone

    def part(self, images: Tensor) -> Tensor:
        """This process's images ``(n, C, H, W)`` of a batch ``(N, C, H, W)`` that is the same for all.

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
        """A mean loss over ``part`` images, weighted so that all processes' sum is the mean over ``whole`` images."""
        return loss * (part / whole) if self.divided else loss

    def forward(self) -> AbstractContextManager[Any]:
        """Within the block batch normalisation sees the whole batch, and dropout differs between processes.

        Outside of it, as where the batch is made, all processes draw the same numbers.
        """
        if not self.divided:
            return nullcontext()
        if self.team.rank:
            torch.manual_seed(derive_seed(torch.initial_seed(), "rank", self.team.rank))
        return _WholeBatchNorm(self.team)

    def same(self, values: Tensor) -> Tensor:
        """The first process's values, such as its images: generators of several processes may differ in last bits."""
        if not self.divided:
            return values
        values = values.detach().contiguous()
        self.team.broadcast(values)
        return values

    def variance(self, values: Tensor) -> Tensor | None:
        """Variance over all processes' images of ``values`` ``(n, ...)``, averaged to a scalar; None if not divided."""
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
        """Give all processes the first one's weights, buffers and masks.

        Raises:
            UserError: the networks differ in shape.
        """
        if not self.divided:
            return
        state = model.state_dict()
        shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        if any(one != shapes for one in self.team.collect(shapes)):
            raise UserError("The processes of this launch hold different networks; all must run the same recipe.")
        with torch.no_grad():
            for value in _distinct(state.values()):
                value.copy_(self.same(value))

    def add_gradients(self, model: nn.Module, optimizer: Optimizer, loss: Tensor) -> Tensor:
        """Replace the gradients by those of the whole batch; returns the loss of the whole batch."""
        if not self.divided:
            return loss
        known = (weight for group in optimizer.param_groups for weight in group["params"])
        gradients = [weight.grad for weight in _distinct((*model.parameters(), *known)) if weight.grad is not None]
        together = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().reshape(1)])
        self.team.add(together)
        parts = together[:-1].split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, parts, strict=True):
            gradient.copy_(total.view(gradient.shape))
        return together[-1].clone()  # a view would keep all gradients alive


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


class _Sum(torch.autograd.Function):
    """Sum over a team; its gradient is the sum of the team's gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor, team: Team) -> Tensor:
        context.team = team
        total = value.clone(memory_format=torch.contiguous_format)
        team.add(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradients[0], context.team), None


class _WholeBatchNorm(TorchFunctionMode):
    """Batch normalisation by the statistics of all processes, wherever a network calls it, also in NNI's wrappers."""

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
        if own < 2 and int(count) < 2:  # waits for the device only where there may be too few
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
