"""What all command lines share: flags by tyro, and an end in one line and an exit code."""

import contextlib
import dataclasses
import errno
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro

from metaopt.cli import stopping
from metaopt.console import printable, set_up_output
from metaopt.errors import Diverged, UserError
from metaopt.ranges import OutOfRange

Config = TypeVar("Config")
BARE = "--improve"
"""A flag that may stand alone, for ``on``."""
SIGPIPE = 13  # which Windows does not have
DENIALS = {getattr(errno, name, -1) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO")}
DENIALS |= {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}


def parse(
    config_type: type[Config],
    args: Sequence[str],
    prog: str,
    description: str | None,
    default: Config | None = None,
) -> Config:
    """The config of a command line, by tyro, whose boxes round its errors become one line.

    Raises:
      UserError: a flag is unknown, or its value is none of its type.
    """
    defaults: Any = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_type, args=args, prog=prog, description=description, **defaults)
    except SystemExit as stop:
        if not stop.code:
            raise
        rows = [row.strip("│ ") for row in box.getvalue().splitlines() if row[:1] not in "╭╰"]
        parts = " ".join(rows).split("───")  # the error, what is near to it, and the help
        near = next((part for part in parts if "Perhaps you meant" in part), "")
        said = [" ".join(parts[0].split()).rstrip("."), " ".join(near.strip("─ ").split()[:4])]
        raise UserError("; ".join(part for part in (*said, f"see {prog} --help") if part)) from None


def changed_flags(config: Any, default: Any) -> list[str]:
    """The arguments of a command that make this config of a default one, those without flag first.

    ``--improve on`` is written as ``--improve`` at the end, where it may stand alone.
    """
    flags = list(_changed_flags(config, default))
    return sorted(flags, key=lambda flag: (flag.startswith("--"), flag == BARE))


def _changed_flags(config: Any, default: Any, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = field.name.replace("_", "-")
        if tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            yield from () if value == usual else (as_argument(value),)
        elif dataclasses.is_dataclass(value):
            yield from _changed_flags(value, usual, f"{prefix}{name}.")
        elif isinstance(value, bool) and value != usual:
            yield f"--{prefix}{'' if value else 'no-'}{name}"
        elif f"--{prefix}{name}" == BARE and value == "on":
            yield BARE
        elif value != usual:
            yield f"--{prefix}{name} {as_argument(value)}"


def as_argument(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(as_argument, value))
    return shlex.quote(str(value))


@contextlib.contextmanager
def one_line_exits(args: Sequence[str], *, resumes: bool = False) -> Iterator[None]:
    """The whole of a command: what ends it too early is one line and an exit code.

    That is 2 where the input is wrong, or a file or device denies its service; 1 where a run
    diverged or memory is short; 128 and the signal after Ctrl-C and SIGTERM. A bug has
    its traceback.

    Args:
      args: Command line.
      resumes: Whether the same command resumes what it has begun.
    """
    set_up_output()
    stopping.stop_in_order()
    try:
        yield
        sys.stdout.flush()
    except OutOfRange as error:
        _leave(2, f"error: {_flag_of(args, error.field)} {error.problem}")
    except UserError as error:
        _leave(2, f"error: {error}")
    except Diverged as error:
        _leave(1, f"error: {error}")
    except KeyboardInterrupt as interrupt:
        signum = stopping.signal_of(interrupt)
        more = "; run the same command again to resume" if resumes else ""
        _leave(128 + signum, f"stopped by {signum.name}{more}")
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python fails again at its end
        _leave(128 + SIGPIPE, "error: the output was closed before its end")
    except OSError as error:
        if error.errno not in DENIALS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _leave(2, f"error: {place}{error.strerror}: put that right and run the command again")
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        _leave(1, "error: out of memory: lower the sizes, or how many tasks are at once")
    finally:
        stopping.stop_at_once()


def _leave(code: int, line: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed too
        print(printable(line), file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _is_out_of_memory(error: Exception) -> bool:
    from_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    return from_device or isinstance(error, MemoryError)


def _flag_of(args: Sequence[str], field: str) -> str:
    """The flags that can have set a field of a nested config, or else its name."""
    names = [arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")]
    found = [name for name in names if name[2:].split(".")[-1] == field.replace("_", "-")]
    return " or ".join(dict.fromkeys(found)) or field
