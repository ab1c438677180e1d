"""Ctrl-C and SIGTERM at any moment of a command: the first stops it in order, a second at once.

Python handles a signal when the main thread is next in Python code, which in a long compilation
may be in a minute. A thread is told at once, through `signal.set_wakeup_fd`: it says that the
signal was heard, and ends the process where a second one comes. What the handler raises may be
lost, in a bare ``except`` of a library or a callback of the garbage collector: then it is raised
again.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from metaopt.signals import SAME_SIGNAL

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 1.0  # seconds before it is said that stopping takes a while
_in_order, _raised = threading.Event(), threading.Event()


def listen() -> None:
    """From now on a signal ends the process at once, in one line, as nothing is done yet."""
    heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]  # as nohup sets it
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_attend, args=(reader, writer), name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for signum in heard:
        signal.signal(signum, _interrupt)
    sys.unraisablehook = _ignore_interrupts
    hold(False)


def hold(on: bool = True) -> None:
    """Signals wait, also while another program takes this one's place, until it calls `listen`."""
    if hasattr(signal, "pthread_sigmask") and signal.getsignal(signal.SIGTERM) is _interrupt:
        signal.pthread_sigmask(signal.SIG_BLOCK if on else signal.SIG_UNBLOCK, SIGNALS)


def stop_in_order() -> None:
    """From now on the first signal is a `KeyboardInterrupt`, wherever the main thread is."""
    _in_order.set()


def stop_at_once() -> None:
    """From now on a signal ends the process as if it had no handler: all that can be is saved."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is _interrupt:
            signal.signal(signum, signal.SIG_DFL)


def signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """The signal behind an interrupt; Ctrl-C if it does not say."""
    given = interrupt.args[0] if interrupt.args else signal.SIGINT
    return given if isinstance(given, signal.Signals) else signal.SIGINT


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    if not _in_order.is_set():
        name = signal.Signals(signum).name
        _end(signum, f"stopped by {name} at the start; run the same command again")
    if not _is_on_its_way():
        _raised.set()
        raise KeyboardInterrupt(signal.Signals(signum))


def _ignore_interrupts(lost: Any) -> None:
    """Says nothing of an interrupt that Python cannot raise where it came: it comes again."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)


def _is_on_its_way() -> bool:
    """Whether the main thread is cleaning up after an interrupt: closing files, saving."""
    handled = sys.exception()
    while handled is not None and not isinstance(handled, KeyboardInterrupt):
        handled = handled.__context__
    return handled is not None


def _attend(reader: socket.socket, writer: socket.socket) -> None:
    """Waits for signals, whose numbers arrive as bytes. ``writer`` is kept from being closed."""
    del writer
    first, since = _next_signal(reader), time.monotonic()
    reader.settimeout(PATIENCE)
    main = threading.main_thread().ident or 0
    notice = f"{first.name}: stopping after what is being computed; once more stops at once"
    sent = False  # by this thread, and not heard yet: on a busy machine that takes a while
    while True:
        try:
            second = _next_signal(reader)
            if sent and second == first:
                sent = False
                continue
            if time.monotonic() - since < SAME_SIGNAL:
                continue
            _end(second, f"stopped at once by a second signal, {second.name}")
        except TimeoutError:
            if notice:
                _say(notice)
            notice = ""
        # It has arrived, or was lost.
        if _raised.is_set() and not sent and hasattr(signal, "pthread_kill"):
            sent = True
            signal.pthread_kill(main, first)


def _next_signal(reader: socket.socket) -> signal.Signals:
    while True:
        number = reader.recv(1)[0]
        if number in SIGNALS:
            return signal.Signals(number)


def _end(signum: int, line: str) -> None:
    _say(line)
    os._exit(128 + signum)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")  # at once, as another thread may be writing
        sys.stderr.flush()
