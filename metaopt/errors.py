"""The one exception for what a user can put right."""


class UserError(ValueError):
    """Bad input, caught at the start: one line that says what was wrong and what to do.

    Command lines print the message alone and leave with exit code 2.
    """
