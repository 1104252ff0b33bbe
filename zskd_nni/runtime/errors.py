"""The one exception whose message is meant for users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can correct: a sentence that says what was wrong, where, and what would be right.

    The command line prints the sentence without a traceback and exits with code 2.
    """


@contextmanager
def error_context(key: str) -> Iterator[None]:
    """Within the block a :class:`UserError` names the recipe's key: ``KEY.PATH: sentence``.

    Example:
        >>> with error_context("transfer.size"):
        ...     raise UserError("too small")
        Traceback (most recent call last):
        zskd_nni.runtime.errors.UserError: transfer.size: too small
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith(key):
            raise
        raise UserError(f"{key}: {error}") from error
