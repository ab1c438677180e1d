"""The command ``metaopt``."""

import os
import signal
import subprocess
import sys
import time

import pytest

import metaopt
from metaopt import cli


def run(*args):
    command = [sys.executable, "-X", "importtime", "-m", "metaopt", *args]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def exit_of(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_names_every_command(args, capsys):
    cli.main(args)
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in shown and command.summary in shown


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_next_to_nothing(flag):
    done = run(flag)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "metaopt.cli" in imported
    assert not imported & {"jax", "numpy", "tyro", "rich", "optax"}
    if flag == "--version":
        assert done.stdout == f"metaopt {metaopt.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert f"usage: metaopt {name}" in shown and "--help" in shown


def test_what_is_no_command_is_one_line_and_exit_code_2(capsys):
    assert exit_of(capsys, "doctro") == (2, "error: no command 'doctro': did you mean doctor?\n")
    code, error = exit_of(capsys, "\x1b[2J")
    assert code == 2 and all(name in error for name in cli.COMMANDS) and "\x1b" not in error


def test_what_is_no_flag_of_a_command_is_one_line(capsys):
    code, error = exit_of(capsys, "tables", "--from", "latex")
    assert code == 2 and "--from" in error and "metaopt tables --help" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_while_a_command_is_imported_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-m", "metaopt", "doctor"], stderr=subprocess.PIPE, encoding="utf-8"
    )
    time.sleep(0.5)  # of the seconds that JAX takes
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 143
    assert error == "stopped by SIGTERM at the start; run the same command again\n"
