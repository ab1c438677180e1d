"""Text from outside, such as names of files and rows, on its way to a terminal or a file."""


def printable(text: str) -> str:
    """The text on one line, with what a terminal would act on escaped as in Python's literals.

    That is line breaks, ANSI codes and other control characters, marks that turn the
    direction of writing, and the half characters that stand for undecodable bytes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
