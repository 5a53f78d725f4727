"""Mistakes of the user's, told without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend; the message says what came, what was expected and what to do.

    The command line and ``train.py`` print the message alone and end with a non-zero code.
    """
