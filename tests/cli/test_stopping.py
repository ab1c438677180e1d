import errno
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from experiments import adapt_languages, harness
from metaopt.cli import command_line
from metaopt.comparison import Comparison

RESUME = "run the same command again to resume"


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


def exit_of(capsys, call):
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.splitlines()
    return stop.value.code, lines[-1], len(lines)


PHASES = [
    (adapt_languages, "make_family"),
    (harness, "open_run"),
    (Comparison, "pretrain"),
    (Comparison, "run"),
    (adapt_languages, "add_row"),
    (harness.TableRun, "finish"),
]


@pytest.mark.parametrize("phase", range(len(PHASES)), ids=[name for _, name in PHASES])
def test_ctrl_c_in_any_phase_is_one_line(phase, tmp_path, monkeypatch, capsys):
    others = [(adapt_languages, name) for name in ("draw", "samples", "add_references")]
    for owner, name in [*PHASES[2:phase], *others]:
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: "")
    monkeypatch.setattr(harness, "log", lambda line: None)  # which tells of finished rows
    monkeypatch.setattr(*PHASES[phase], raises(KeyboardInterrupt))
    flags = ["--preset", "smoke", "--rows", "MAML", "--root", str(tmp_path)]
    args = ("adapt_languages", adapt_languages.run, adapt_languages.presets, "", flags)
    found = exit_of(capsys, lambda: harness.main(*args))
    assert found == (130, f"stopped by SIGINT; {RESUME}", 1)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, "closed before its end"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "runs/x: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "a\x1b"), 2, "a\\x1b: Permission"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_what_ends_a_command_from_outside_is_one_line(error, code, words, capsys):
    def call():
        with command_line.one_line_exits([]):
            raise error

    found, line, count = exit_of(capsys, call)
    assert found == code and words in line and count == 1


def test_a_file_that_a_bug_misses_keeps_its_traceback():
    with pytest.raises(FileNotFoundError), command_line.one_line_exits([]):
        raise FileNotFoundError(errno.ENOENT, "No such file", "bug")


def test_sigterm_while_a_command_is_imported_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "experiments.table_sinusoid"],
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    for line in process.stderr:
        if line.split("|")[-1].strip() == "experiments":  # whose import is done
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()  # lines of the imports go on until the end
    assert process.wait(timeout=20) == 143
    assert "stopped by SIGTERM at the start; run the same command again\n" in rest
    assert "Traceback" not in rest


BODY = """
    import os, signal, sys, time
    from metaopt.cli import stopping
    from metaopt.cli.command_line import one_line_exits
    stopping.PATIENCE = 0.1
    stopping.listen()
    with one_line_exits([], resumes=True):
        {body}
"""
LOSES_IT = """
        try:
            try:
                print("ready", flush=True)
                time.sleep(20)
            except:
                pass
            time.sleep(20)
        finally:
            time.sleep(0.5)  # of cleaning up, in which it is not raised again
            print("saved", flush=True)
"""
TRAINS = """
        from metaopt.signals import StopSignals
        with StopSignals() as stop:
            print("ready", flush=True)
            while stop.received is None:
                time.sleep(0.001)
            time.sleep(0.5)  # of saving
            print("saved", flush=True)
            sys.exit(128 + stop.received)
"""
LOSES_IT_IN_A_CALLBACK = """
        class Freed:
            def __del__(self):
                print("ready", flush=True)
                time.sleep(20)
        Freed()
        time.sleep(20)
"""
COMPUTES = """
        import hashlib, threading
        threading.Timer(0.2, print, ["ready"], {"flush": True}).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # for minutes, outside Python
"""


def start(body):
    script = textwrap.dedent(BODY).format(
        body=textwrap.indent(textwrap.dedent(body), "    ").strip()
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_an_interrupt_that_is_lost_comes_again():
    process = start(LOSES_IT)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, "saved\n"), error
    assert error.splitlines()[-1] == f"stopped by SIGINT; {RESUME}"


def test_a_second_signal_ends_it_at_once_in_the_midst_of_a_computation():
    process = start(COMPUTES)
    process.send_signal(signal.SIGINT)
    assert "once more stops at once" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 143
    assert error == "stopped at once by a second signal, SIGTERM\n"


def test_a_signal_that_is_delivered_twice_is_one():  # as by `timeout`, and `uv run`
    process = start(TRAINS)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)  # or the kernel makes them one
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "saved\n"), error


def test_an_interrupt_that_a_callback_loses_shows_no_traceback():
    process = start(LOSES_IT_IN_A_CALLBACK)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in error
