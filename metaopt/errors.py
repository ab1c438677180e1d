"""The exceptions that end a command in one line."""

from metaopt.console import printable


class UserError(Exception):
    """Bad input, caught at the start: one line that says what was wrong and what to do.

    Command lines print the message alone and leave with exit code 2. It is no
    `ValueError`, so that no library on the way takes it for one of its own. Control
    characters, which names of files may hold, are escaped.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class Diverged(RuntimeError):
    """The loss exploded or became NaN or inf; the message says when, where, what to try."""
