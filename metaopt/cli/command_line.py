"""What the command lines of all experiments share."""

import contextlib
import dataclasses
import errno
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from metaopt.cli import stopping
from metaopt.console import printable, set_up_output
from metaopt.errors import Diverged, UserError
from metaopt.ranges import OutOfRange
from metaopt.training.runs import as_json, check_root

Config = TypeVar("Config")
SIGPIPE = 13  # which Windows does not have
DENIALS = {getattr(errno, name, -1) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO")}
DENIALS |= {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}


def main(
    module: str,
    run: Callable[[Config], Any],
    config_type: type[Config],
    preset: Callable[[Mapping[str, str]], Config],
    chosen_by: Sequence[str],
    description: str | None,
    args: Sequence[str] | None = None,
) -> None:
    """Reads a config from the command line, starting from a preset, and runs it.

    Args:
      module: its name below ``experiments``.
      run: the experiment.
      config_type: its frozen dataclass.
      preset: the defaults, given the text of the flags named in ``chosen_by``.
      chosen_by: flags that choose the defaults of the others, such as ``preset``.
      description: shown by ``--help``.
      args: the command line; that of the process by default.

    Exits as `one_line_exits` says. Where a run would be written is checked before it begins.
    """
    if args is None:
        restart_with_huge_pages()
    args = sys.argv[1:] if args is None else list(args)
    has_root = hasattr(config_type, "root")  # its default
    with one_line_exits(args, resumes=has_root):
        flags = {name: _flag(args, name) for name in chosen_by}
        default = preset({name: value for name, value in flags.items() if value is not None})
        config: Any = parse(
            config_type, args, f"python -m experiments.{module}", description, default
        )
        if has_root:
            check_root(config.root, config.run_dir)
        run(config)


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


def restart_with_huge_pages() -> None:
    """Starts this process again, on Linux, with an allocator that asks for huge pages.

    A meta-gradient on CPU takes fresh memory of hundreds of MiB in every step, and with pages
    of 4 KiB a quarter of its time is page faults. The allocator reads its settings
    when a process starts; where the user has set some, they are left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        stopping.hold()
        os.execv(sys.executable, sys.orig_argv)


def command(
    module: str,
    config: Any,
    preset: Callable[[Mapping[str, str]], Any],
    chosen_by: Sequence[str],
) -> str:
    """The shortest command that gives this config: only what differs from the defaults."""
    chosen, default = {}, preset({})
    for name in chosen_by:  # each may change the default of the next
        if getattr(config, name) != getattr(default, name):
            chosen[name] = getattr(config, name)
            default = preset(chosen)
    flags = [f"--{name} {_as_argument(value)}" for name, value in chosen.items()]
    return " ".join([f"python -m experiments.{module}", *flags, *_changed_flags(config, default)])


def as_saved(config: Any) -> dict[str, Any]:
    """What decides the results: all but where the run is written."""
    return {k: v for k, v in as_json(config).items() if k not in ("root", "run_dir")}


def _changed_flags(config: Any, default: Any, prefix: str = "") -> list[str]:
    flags = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            flags += _changed_flags(value, usual, f"{name}.")
        elif isinstance(value, bool) and value != usual:
            flags.append(f"--{prefix}{'' if value else 'no-'}{name.removeprefix(prefix)}")
        elif value != usual:
            flags.append(f"--{name} {_as_argument(value)}")
    return flags


def _as_argument(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_as_argument, value))
    return shlex.quote(str(value))


def _flag(args: Sequence[str], name: str) -> str | None:
    """The last value of ``--name value`` or ``--name=value``, before the rest is understood."""
    value = None
    for i, arg in enumerate(args):
        if arg == f"--{name}" and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"--{name}="):
            value = arg.split("=", 1)[1]
    return value
