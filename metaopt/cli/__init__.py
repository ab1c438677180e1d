"""The command ``metaopt``, and the same as ``python -m metaopt``.

A command is a function of one config: tyro makes its flags from the type of that config, and
the docstring of its module is its help. `COMMANDS` names it, so that nothing of a command, JAX
least of all, is imported before it is asked for.
"""

import difflib
import importlib
import sys
import typing
from collections.abc import Sequence
from typing import NamedTuple

import metaopt
from metaopt.cli import huge_pages, stopping


class Command(NamedTuple):
    """One command.

    Attributes:
      function: ``module:function``, which takes the argument ``config``.
      summary: its line in ``metaopt --help``.
      computes: whether it runs models: the process then starts again with huge pages.
      resumes: whether the same command resumes what it has begun.
    """

    function: str
    summary: str
    computes: bool = False
    resumes: bool = False


COMMANDS = {
    "evolve": Command(
        "metaopt.cli.evolve:run",
        "a model that lives with a folder: trains, judges itself, and goes on",
        computes=True,
        resumes=True,
    ),
    "watch": Command("metaopt.cli.watch:run", "show trainings while they run"),
    "report": Command("metaopt.cli.report:run", "a run as one page of HTML"),
    "adapt": Command("metaopt.cli.adapt:run", "adapt a trained row to a file", computes=True),
    "score": Command(
        "metaopt.cli.score:run", "score a file, with and without adaptation", computes=True
    ),
    "generate": Command(
        "metaopt.cli.generate:run", "generate text, with and without adaptation", computes=True
    ),
    "read": Command(
        "metaopt.cli.read:run", "read a file with a pretrained model that adapts", computes=True
    ),
    "model": Command("metaopt.cli.model:run", "fetch a pretrained model, without a download site"),
    "doctor": Command(
        "metaopt.cli.doctor:run",
        "examine a meta-gradient: is it right, what does it cost, where does it break?",
        computes=True,
    ),
    "tables": Command("metaopt.cli.tables:run", "print, check, keep and write tables of results"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command line; that of the process by default."""
    if is_process := args is None:
        stopping.listen()
        args = sys.argv[1:]
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"metaopt {metaopt.__version__}")
    elif name in COMMANDS:
        _run(name, rest, is_process)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {name!a}: {hint}", file=sys.stderr)
        raise SystemExit(2)


def _run(name: str, args: Sequence[str], is_process: bool) -> None:
    command = COMMANDS[name]
    if is_process and command.computes:
        huge_pages.restart_with_huge_pages()
    command_line = importlib.import_module("metaopt.cli.command_line")
    module_name, _, function_name = command.function.partition(":")
    module = importlib.import_module(module_name)
    run = getattr(module, function_name)
    config_type = typing.get_type_hints(run)["config"]
    with command_line.one_line_exits(args, resumes=command.resumes):
        run(command_line.parse(config_type, args, f"metaopt {name}", module.__doc__))


def _help() -> str:
    return "\n".join(
        [
            "usage: metaopt COMMAND [FLAGS]",
            "",
            "Meta-learning sequence models in JAX.",
            "",
            *(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "  metaopt COMMAND --help    the flags of a command",
            "  metaopt --version",
        ]
    )
