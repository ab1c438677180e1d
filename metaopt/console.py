"""What is printed: text made safe for a terminal, and lines from the first process only."""

import sys


def printable(text: str) -> str:
    """The text on one line, with what a terminal would act on escaped as in Python's literals.

    That is line breaks, ANSI codes and other control characters, marks that turn the
    direction of writing, and the half characters that stand for undecodable bytes.
    """
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def set_up_output() -> None:
    """Make standard output and error take any text: ``?`` for what their encoding lacks.

    For the start of a command, since Python would raise where a terminal or a file is
    ASCII or cp1252.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none, and takes any text
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def is_first_process() -> bool:
    """Whether this is the process that writes and talks, of those that train together."""
    import jax  # late, because results are read and watched without it

    return jax.process_index() == 0


def log(line: str) -> None:
    """Print one line to standard error, from the first process only."""
    if is_first_process():
        print(printable(line), file=sys.stderr, flush=True)
