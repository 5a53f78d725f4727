"""Mistakes of the user's, told without a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Mistakes that other packages find, by name: their import is heavy.
_FOREIGN = frozenset({"OmegaConfBaseException", "MisconfigurationException", "CompactHydraException"})


class UserError(ValueError):
    """A mistake that the user can mend; the message says what came, what was expected and what to do.

    The command line and ``train.py`` print the message alone and end with a non-zero code.
    """


def check_size(name: str, value: Any, least: int = 1) -> None:
    """Raise a UserError unless a setting is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise UserError(f"{name} is {value!r}; expected {expected}")


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a user's mistake, or what the system refuses, without a traceback and end with code 1; HYDRA_FULL_ERROR=1
    lets it through."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, (UserError, OSError)) or any(x.__name__ in _FOREIGN for x in type(error).__mro__)
        if not told or os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        more = "" if isinstance(error, UserError) else "\n(HYDRA_FULL_ERROR=1 shows where it comes from)"
        print(f"error: {error}{more}", file=sys.stderr)
        with suppress(OSError):  # which may be what is told
            sys.stdout.flush()
        sys.exit(1)
