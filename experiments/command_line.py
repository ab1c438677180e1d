"""What the command lines of all experiments share."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from metaopt.errors import UserError
from metaopt.recorder import Diverged
from metaopt.runs import as_json

Config = TypeVar("Config")


def main(
    module: str,
    run: Callable[[Config], Any],
    config_type: type[Config],
    preset: Callable[[Mapping[str, str]], Config],
    chosen_by: Sequence[str],
    description: str,
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

    Exits with code 2 and one line where the input is wrong, with 1 where the run diverged.
    """
    if args is None:
        restart_with_huge_pages()
    args = sys.argv[1:] if args is None else list(args)
    try:
        flags = {name: _flag(args, name) for name in chosen_by}
        default = preset({name: value for name, value in flags.items() if value is not None})
        config = tyro.cli(
            config_type,
            args=args,
            default=default,
            prog=f"python -m experiments.{module}",
            description=description,
        )
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def restart_with_huge_pages() -> None:
    """Starts this process again, on Linux, with an allocator that asks for huge pages.

    A meta-gradient on CPU takes fresh memory of hundreds of MiB in every step, and with pages
    of 4 KiB a quarter of its time is page faults. The allocator reads its settings
    when a process starts; where the user has set some, they are left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
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
