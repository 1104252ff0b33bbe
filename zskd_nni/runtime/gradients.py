"""Gradients where the caller has switched them off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zskd_nni.runtime.errors import UserError


@contextmanager
def with_gradients() -> Iterator[None]:
    """Within the block, or the function that this decorates, gradients are recorded, under ``torch.no_grad`` too.

    Raises:
        UserError: under ``torch.inference_mode``, whose tensors can never have gradients.

    Example:
        >>> with torch.no_grad(), with_gradients():
        ...     torch.is_grad_enabled()
        True
    """
    if torch.is_inference_mode_enabled():
        raise UserError(
            "This needs gradients, and torch.inference_mode() makes tensors that can never have any; call it outside "
            "of that block (torch.no_grad() is no obstacle)."
        )
    with torch.enable_grad():
        yield
