"""Faults that are put into a training: each a context of ``(workload, options of run, alarm)``."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from metaopt.resources import MemoryUse, memory_use
from metaopt.self_improvement.workload import Settings, Workload

Injected = tuple[Workload, dict[str, Any], str]

STALL_SECONDS = 1.0
BALLAST = 1 << 29
"""Bytes that the process takes all of a sudden."""


@contextlib.contextmanager
def nan_batch(workload: Workload, settings: Settings, at: int) -> Iterator[Injected]:
    """The step that takes the batch at this position makes loss and parameters NaN."""
    del settings

    def sample(settings: Settings, position: int):
        batch = workload.sample(settings, position)
        if position != at:
            return batch
        # No token is so large: the embedding of it is NaN.
        return jax.tree.map(lambda x: np.full_like(x, 2**30), batch._replace(task=batch.task))

    yield workload._replace(sample=sample), {}, "nan"


@contextlib.contextmanager
def rate_times_1000(workload: Workload, settings: Settings, at: int) -> Iterator[Injected]:
    """Someone sets the learning rate a thousand times too high."""
    rate = 1000 * float(settings["outer_learning_rate"])
    yield workload, {"interventions": [(at, {"outer_learning_rate": rate})]}, "divergence"


@contextlib.contextmanager
def stalled_loader(workload: Workload, settings: Settings, at: int) -> Iterator[Injected]:
    """The loader takes a second for one batch."""
    del settings

    def sample(settings: Settings, position: int):
        if position == at:
            time.sleep(STALL_SECONDS)
        return workload.sample(settings, position)

    yield workload._replace(sample=sample), {}, "starved"


@contextlib.contextmanager
def memory_pressure(workload: Workload, settings: Settings, at: int) -> Iterator[Injected]:
    """The process takes half a GiB, of the little more than that which it is allowed."""
    del settings
    ballast: list[np.ndarray] = []
    limit = (memory_use().host + BALLAST) / 0.95

    def sample(settings: Settings, position: int):
        if position == at:
            ballast.append(np.ones(BALLAST // 8))
        return workload.sample(settings, position)

    def read() -> MemoryUse:
        return memory_use()._replace(host_limit=int(limit))

    yield workload._replace(sample=sample), {"read_memory": read}, "memory"
    ballast.clear()


FAULTS: dict[str, Callable[[Workload, Settings, int], Any]] = {
    "fault: NaN batch": nan_batch,
    "fault: rate times 1000": rate_times_1000,
    "fault: stalled loader": stalled_loader,
    "fault: memory pressure": memory_pressure,
}
