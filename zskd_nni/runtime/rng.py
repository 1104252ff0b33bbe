"""Random streams that depend on their purpose, not on what ran before.

Every draw in this package comes from a generator seeded by names and numbers: the run's seed, the shard, the step.
There is no random state to save, and a second run draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in ``[0, 2**63)`` that is a fixed function of ``parts``; different parts give independent streams.

    Example:
        >>> derive_seed(0, "step", 3) == derive_seed(0, "step", 3) != derive_seed(0, "step", "3")
        True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``derive_seed(*parts)``, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(derive_seed(*parts))
