"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input, caught at the start: one line that says what was wrong and what to do.

    Command lines print the message alone and leave with exit code 2. It is no
    `ValueError`, so that no library on the way takes it for one of its own.
    """
