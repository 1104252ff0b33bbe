"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a sentence that says what was wrong, where, and what would be right.

    The command line prints the sentence without a traceback and leaves with exit code 2.
    """
