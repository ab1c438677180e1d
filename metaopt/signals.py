"""Ctrl-C and SIGTERM in a loop: the first finishes the step, a second one acts at once."""

import signal
import threading
import time
from typing import Any, NoReturn, Self

from metaopt.console import log

SAME_SIGNAL = 0.2
"""Seconds within which a second signal counts as the first: `timeout` and `uv run`, for two,
deliver a signal twice within microseconds."""


class Interrupted(SystemExit):
    """The run was asked to stop, and saved; its code is 128 plus the signal: 130 or 143."""


def exit_on_signal(name: str, step: int, num_steps: int, signum: int) -> NoReturn:
    """Says that a training was stopped by a signal, and exits; all must be saved by then."""
    log(
        f"{name}: stopped by {signal.Signals(signum).name} after step {step} of {num_steps}, "
        "saved; run the same command again to resume"
    )
    raise Interrupted(128 + signum)


class StopSignals:
    """Notes the first SIGINT or SIGTERM; a second one goes to the previous handlers.

    A context manager. Outside the main thread, where Python allows no handlers, it notes nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, signum: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signum, now
        elif now - self._received_at > SAME_SIGNAL:
            self.__exit__()
            signal.raise_signal(signum)
