"""The one exception a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: a sentence that says what was wrong, where, and what would be right.

    The command line prints the sentence without a traceback and leaves with exit code 2.
    """


@contextmanager
def error_context(key: str) -> Iterator[None]:
    """Within the block a :class:`UserError` says which key of the recipe it is about: ``KEY.PATH: sentence``."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(key):
            raise
        raise UserError(f"{key}: {error}") from error
