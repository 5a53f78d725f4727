"""Mistakes of the user's, told without a traceback."""

from typing import Any


class UserError(ValueError):
    """A mistake that the user can mend; the message says what came, what was expected and what to do.

    The command line and ``train.py`` print the message alone and end with a non-zero code.
    """


def check_size(name: str, value: Any) -> None:
    """Raise a UserError unless a setting is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; expected a positive integer")
