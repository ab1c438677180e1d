"""How far a loop has come: a bar on a terminal, now and then a plain line elsewhere."""

import time
from typing import Self

from rich import progress as rich_progress
from rich.console import Console

from metaopt.console import is_first_process, log, printable

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows ``done / total`` with a few numbers beside it and the time that is left.

    A context manager. On a terminal it is a live bar; where the output goes to a file
    or a notebook it is a line at the end and one every 10 seconds before that.

    Example::

        with Progress("evaluate", total=len(batches)) as progress:
            for i, batch in enumerate(batches):
                progress.update(i + 1, loss=loss)
    """

    def __init__(self, description: str, *, total: int, start: int = 0, first: str = ""):
        """Show work of ``total`` units, ``start`` of which were done before.

        ``first`` says what comes before the first of them, such as compiling: it is shown at once.
        """
        self._description, self._total = printable(description), total
        self._start = self._done = start
        self._numbers = first
        self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # compiling comes before it
        console = Console(stderr=True)
        self._bar = _bar(console) if console.is_terminal and is_first_process() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._description, total=self._total, completed=self._start, numbers=self._numbers
            )
        elif self._numbers:
            self._print_line()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done > self._start:
            self._print_line()

    def update(self, done: int, total: int | None = None, /, **numbers: float) -> None:
        """Say that ``done`` units are done, of another total if it is given.

        ``numbers`` stay shown until they are replaced.
        """
        self._done, self._total = done, self._total if total is None else total
        if self._first is None:
            self._first, self._numbers = (time.monotonic(), done), ""
        if numbers:
            texts = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            self._numbers = texts.replace("_per_second", "/s").replace("_", " ")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, numbers=self._numbers)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES and done < self._total:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        began, first = self._first or (self._last_line, self._done)
        pace = (self._last_line - began) / max(1, self._done - first)
        left = pace * (self._total - self._done)
        ending = f"  {left:.0f} s left" if left > 0 and self._done > first else ""
        numbers = f"  {self._numbers}" if self._numbers else ""
        log(f"{self._description}: {self._done}/{self._total}{numbers}{ending}")


def _bar(console: Console) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=12),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[numbers]}"),
        rich_progress.TimeRemainingColumn(),
        console=console,
    )
