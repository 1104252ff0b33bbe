"""NNI's errors as one sentence, and its log messages suppressed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from schema import SchemaError

from zskd_nni.runtime.errors import UserError

# What NNI raises in the middle of a run where it refuses a config. A full memory is no refusal.
REFUSALS = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, SchemaError, TypeError, ValueError
)  # fmt: skip


@contextlib.contextmanager
def refusals_as_sentences(whose: str, kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """Raise NNI's errors as a :class:`UserError` that names the compressor.

    Args:
        whose: the compressor, and the recipe's key in front of it.
        kinds: the errors that are refusals.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{whose} refuses the config ({text}).") from error


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Within the block these loggers report only what is critical."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
