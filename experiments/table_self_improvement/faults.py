"""Faults that damage a training: each a context of ``(workload, options of run, alarm)``."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from metaopt.self_improvement.workload import Settings, Workload

Injected = tuple[Workload, dict[str, Any], str]


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


FAULTS: dict[str, Callable[[Workload, Settings, int], Any]] = {
    "fault: NaN batch": nan_batch,
    "fault: rate times 1000": rate_times_1000,
}
