"""The side of the parent: worker processes that are started, asked for steps, and ended."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from metaopt.errors import UserError

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-3
"""Largest relative difference of first meta-loss and gradient norm, between float32 programs."""


class WorkerFailed(Exception):
    """A worker ended, or was not ready in time; the message says why."""


class Worker:
    """A library in a process of its own; a context manager that ends the process.

    It has a compilation cache of its own, which is empty.

    Attributes:
      report: what it said when it was ready: loss, grad_norm and versions; without a form the
        seconds of a step by form.
      cold_start: seconds from its start until it was ready. With a form that is the end of the
        first call.
    """

    def __init__(
        self,
        peer: str,
        problem: str,
        data: Path,
        threads: int,
        limit: float,
        form: str | None = None,
    ):
        """Starts the process and waits until it is ready, for ``limit`` seconds at most.

        Raises:
          WorkerFailed: it ended before, or took longer.
        """
        self.report: dict[str, Any] = {}
        self._limit, began = limit, time.monotonic()
        self._cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed by `close`
        arguments = {"peer": peer, "problem": problem, "data": data, "threads": threads}
        arguments |= {} if form is None else {"form": form}
        flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        caches = {"JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
        caches = dict.fromkeys(caches, self._cache.name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            cwd=ROOT,
            env={n: v for n, v in os.environ.items() if n != "XLA_FLAGS"} | caches,
        )
        try:
            self.report = json.loads(self._read("ready"))
            self.cold_start = time.monotonic() - began
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._cache.cleanup()

    def steps(self, seconds: float) -> list[float]:
        """The times of the meta-steps that fit into ``seconds``, at least one.

        One more comes before them. It is slower than those of a training, which follow one
        another: after another process the caches are cold, and freed memory is gone.

        Raises:
          WorkerFailed: the process ended.
        """
        self._step()
        times, began = [], time.monotonic()
        while not times or time.monotonic() - began < seconds:
            times.append(self._step())
        return times

    def _step(self) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._reason()) from None
        return float(self._read())

    def _read(self, word: str = "") -> str:
        """The next line that begins with ``word``, without it; the process is killed if late."""
        assert self._process.stdout is not None
        timer = threading.Timer(self._limit, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith(word):
                    return line.removeprefix(word)
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if late:
            raise WorkerFailed(f"no answer within {self._limit:g} s")
        raise WorkerFailed(self._reason())

    def _reason(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return (
            lines[-1].removeprefix("error: ")
            if lines
            else f"it ended with exit code {self._process.returncode}"
        )


class Form(NamedTuple):
    """How a library computes: its form by name, on a number of threads."""

    name: str
    threads: int

    def __str__(self) -> str:
        return f"{self.name}, {self.threads} thread{'s' * (self.threads > 1)}"


def fastest_form(peer: str, problem: str, data: Path, threads: int, limit: float) -> Form:
    """The fastest form of a library, on one thread or on all: small operations are slower on many.

    Raises:
      WorkerFailed: a process ended, or took longer than ``limit`` seconds.
    """
    seconds: dict[Form, float] = {}
    for count in dict.fromkeys((1, threads)):
        with Worker(peer, problem, data, count, limit) as worker:
            seconds |= {Form(name, count): found for name, found in worker.report.items()}
    return min(seconds, key=lambda form: seconds[form])


def check_agreement(problem: str, reports: Mapping[str, dict[str, Any]]) -> None:
    """Holds the first meta-loss and gradient norm of each peer against ours.

    Raises:
      UserError: they differ by more than `TOLERANCE`.
    """
    ours = reports["ours"]
    for peer, report in reports.items():
        for name in ("loss", "grad_norm"):
            if not math.isclose(report[name], ours[name], rel_tol=TOLERANCE):
                raise UserError(
                    f"{peer} computes another function on {problem}: {name} {report[name]:.6g}, "
                    f"ours {ours[name]:.6g}; compare torch_models.py and jax_models.py of "
                    "benchmarks/peers with metaopt/models"
                )


def take_turns(
    workers: Mapping[str, Worker], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """The median seconds of a step of each worker in each round, one worker at a time."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(statistics.median(worker.steps(seconds)))
    return times
