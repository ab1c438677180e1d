"""Rows of faults that make a training slow, wait, too large or stall: what comes back.

`recovered` is the share of what the fault costs that is back within `WITHIN` steps of the alarm:
of the tokens a second, by medians of step times, or for a plateau of the loss, by the difference
from the same run without the fault on the same batches. It is at most 100 %: what is better than
before is so by luck, or by options that the run did not begin with (the record has the times).
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from experiments.table_self_improvement.study import Cell, Study, single
from experiments.table_self_improvement.workloads import Problem, bigram_table
from metaopt.files import as_record, read_json_lines
from metaopt.measure import compile_for, program_bytes
from metaopt.resources import MemoryUse
from metaopt.self_improvement.loop import LoopConfig, Outcome, run
from metaopt.self_improvement.workload import Setting, Settings, Workload
from metaopt.training.monitor import MonitorConfig

WITHIN = 50
"""Number of steps after the alarm in which something must be back."""
EVERY_STEP = MonitorConfig(seconds_between_lines=0.0, idle_utilisation=1e-9)
"""A line a step, and devices that are never idle: the worst options would ring that first."""
DELAY = 3.0
"""Times of a step that a batch is waited for, or that it takes to swap."""
IDLE = 0.5
"""Limit of the alarm for idle devices, as a share of what the fastest options reach."""
TOO_LOW = 5000.0
"""Factor by which the rate of the run that stalls is too low."""
STALLED_AFTER = 5
"""Steps after which it is."""
OPTIONS: dict[str, tuple[Setting, ...]] = {"microbatch": (0, 8, 1), "tasks_at_a_time": (0, 1)}


class Reference(NamedTuple):
    """A training as it is at its fastest.

    Attributes:
      problem: with execution options.
      fastest, worst: their values, by the search at the start.
      seconds: median time of a step.
      utilisation: median share of the peak FLOP/s.
    """

    problem: Problem
    fastest: dict[str, Setting]
    worst: dict[str, Setting]
    seconds: float
    utilisation: float


class Fault(NamedTuple):
    """A disturbed run.

    Attributes:
      kind: of the alarm.
      workload, settings: as for `run`.
      options: of `run`.
      monitor: thresholds.
      before: seconds a step without the fault; None if the run itself shows it.
    """

    kind: str
    workload: Workload
    settings: Settings
    options: Mapping[str, Any] = {}
    monitor: MonitorConfig = EVERY_STEP
    before: float | None = None


def calm(study: Study, monitor: MonitorConfig = EVERY_STEP) -> LoopConfig:
    """The loop of a disturbed run: no search, but responses."""
    seconds = study.config.resources_seconds
    return dataclasses.replace(
        study.config.loop, phases=(), shares=(), options_seconds=seconds, monitor=monitor
    )


def begun(study: Study, name: str) -> Path:
    """An empty directory for a run: its times must all be its own."""
    place = study.directory / name.replace(":", "")
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    return place


def per_step(place: Path, value: str) -> dict[int, float]:
    """A value of the monitor by step; after a rollback or search the last one holds."""
    lines = read_json_lines(place / "monitor.jsonl")
    return {x["step"]: x[value] for x in lines if x["kind"] == "step" and x.get(value) is not None}


def reference(study: Study) -> Reference:
    """A run that chooses its execution options at the start, and has no fault."""
    faults = study.config.faults
    problem = bigram_table(study.config, faults.batch_size, faults.length, faults.num_steps)
    workload = problem.workload._replace(execution_options=OPTIONS)
    settings = problem.settings | {name: values[0] for name, values in OPTIONS.items()}
    problem = problem._replace(workload=workload, settings=settings)
    place, short = (
        begun(study, "reference of faults"),
        max(faults.batch_size, workload.num_examples // 3),
    )
    config = dataclasses.replace(calm(study), phases=(0.0,), shares=(0.0,), max_responses=0)
    outcome = run(workload._replace(num_examples=short), settings, directory=place, config=config)
    timed = [t for t in outcome.decisions[0].timings if t.seconds is not None]
    worst = max(timed, key=lambda timing: timing.seconds or 0.0).settings
    fastest = {name: outcome.snapshot.settings[name] for name in OPTIONS}
    seconds, shares = (per_step(place, x) for x in ("step_seconds", "utilisation"))
    return Reference(
        problem,
        fastest,
        dict(worst),
        float(np.median([*seconds.values()])),
        float(np.median([*shares.values()])) if shares else 0.02,
    )


def slow(found: Reference, at: int) -> Fault:
    """Someone sets the execution options to the worst."""
    workload, settings = found.problem.workload, found.problem.settings | found.fastest
    return Fault("slow", workload, settings, {"interventions": [(at, found.worst)]})


def idle(found: Reference, at: int) -> Fault:
    """The run starts with the worst execution options; the limit is half of what is possible."""
    del at
    monitor = dataclasses.replace(EVERY_STEP, idle_utilisation=IDLE * found.utilisation)
    settings = found.problem.settings | found.worst
    return Fault("idle", found.problem.workload, settings, {}, monitor, found.seconds)


def starved(found: Reference, at: int) -> Fault:
    """The loader takes three times a step for each batch."""
    workload, delay = found.problem.workload, DELAY * found.seconds

    def sample(settings: Settings, position: int):
        time.sleep(delay if position >= at else 0.0)
        return workload.sample(settings, position)

    settings = found.problem.settings | found.fastest
    return Fault("starved", workload._replace(sample=sample), settings)


def memory(found: Reference, at: int) -> Fault:
    """There is less memory than a step takes: until it takes less, it swaps."""
    workload, settings = found.problem.workload, found.problem.settings
    planned: dict[tuple, int] = {}
    now = {"bytes": 0, "limit": 0, "steps": 0, "first": at // int(settings["batch_size"])}

    def bytes_of(settings: Settings) -> int:
        key = tuple(settings[name] for name in OPTIONS)
        if key not in planned:
            args = workload.start(settings), workload.sample(settings, 0)
            planned[key] = program_bytes(compile_for(workload.step(settings), *args))
        return planned[key]

    def step_of(settings: Settings):
        step, taken = workload.step(settings), bytes_of(settings)
        return _Swapping(step, lambda: _swap(now, taken, DELAY * found.seconds))

    most = bytes_of(settings)
    now |= {"bytes": most, "limit": 2 * most, "less": int(0.9 * most)}
    return Fault(
        "memory",
        workload._replace(step=step_of),
        settings,
        {"read_memory": lambda: MemoryUse(0, 1, now["bytes"], now["limit"])},
    )


class _Swapping:
    """A compiled step before which something is done; it is compiled as it is."""

    def __init__(self, step: Any, before: Callable[[], None]):
        self._step, self._before, self.lower = step, before, step.lower

    def __call__(self, state: Any, batch: Any) -> Any:
        if not isinstance(state.step, Tracer):
            self._before()
        return self._step(state, batch)


def _swap(now: dict[str, int], taken: int, seconds: float) -> None:
    now["steps"], now["bytes"] = now["steps"] + 1, taken
    if now["steps"] > now["first"]:
        now["limit"] = now["less"]
    if taken > now["limit"]:
        time.sleep(seconds)


FAULTS: dict[str, Callable[[Reference, int], Fault]] = {
    "fault: slow": slow,
    "fault: idle": idle,
    "fault: starved": starved,
    "fault: memory": memory,
}


def row(
    study: Study,
    name: str,
    found: Callable[[], Reference],
    inject: Callable[[Reference, int], Fault],
) -> Iterator[Cell]:
    """A run with a fault that costs throughput; a dash if there was no alarm or no response."""
    faults, place = study.config.faults, begun(study, name)
    first = 0 if inject is idle else faults.num_steps // 4
    fault = inject(found(), first * faults.batch_size)
    config = calm(study, fault.monitor)
    outcome = run(fault.workload, fault.settings, directory=place, config=config, **fault.options)
    seconds, more = per_step(place, "step_seconds"), described(outcome)
    answers = [d for d in outcome.decisions if d.alarm and d.alarm.kind == fault.kind]
    answers = [d for d in answers if d.verdict == "accepted"]
    answers = [d for d in answers if d.step < answers[0].step + WITHIN]
    value, late = float("nan"), float("nan")
    if answers:
        alarm = answers[0].alarm
        assert alarm is not None
        late = float(alarm.step - first)
        before = fault.before or median(seconds, 0, first)
        lost = median(seconds, first, answers[0].step)
        after = median(seconds, answers[-1].step, alarm.step + WITHIN)
        value = min(100.0, 100 * (1 / after - 1 / lost) / (1 / before - 1 / lost))
        more |= {"step_seconds": {"before": before, "lost": lost, "after": after}}
    yield Cell("recovered", single(value), more | {"better": "higher"})
    yield Cell("steps to the alarm", single(late), {"unit": "steps"})


def median(values: Mapping[int, float], after: int, until: int) -> float:
    """Of the values after a step, until another one."""
    return float(np.median([x for step, x in values.items() if after < step <= until] or [np.nan]))


def described(outcome: Outcome) -> dict[str, Any]:
    """The alarms and decisions of a disturbed run."""
    decisions = as_record(outcome.decisions)
    return {"alarms": [alarm._asdict() for alarm in outcome.alarms], "decisions": decisions}


def plateau_row(study: Study) -> Iterator[Cell]:
    """Someone sets the rate far too low: what of the loss is back."""
    faults = study.config.faults
    problem = bigram_table(
        study.config, faults.stalled_batch, study.config.lm.length, faults.stalled_steps
    )
    at, rate = STALLED_AFTER * faults.stalled_batch, problem.settings["outer_learning_rate"]
    interventions = [(at, {"outer_learning_rate": float(rate) / TOO_LOW})]
    calm_config, places = calm(study), [begun(study, x) for x in ("undisturbed bigram", "plateau")]
    silent = dataclasses.replace(calm_config, max_responses=0)
    run(problem.workload, problem.settings, directory=places[0], config=silent)
    outcome = run(
        problem.workload,
        problem.settings,
        directory=places[1],
        config=calm_config,
        interventions=interventions,
    )
    alarms = [alarm.step for alarm in outcome.alarms if alarm.kind == "plateau"]
    undisturbed, disturbed = (per_step(place, "loss") for place in places)
    gaps = {step: loss - undisturbed[step] for step, loss in disturbed.items()}
    value, more = float("nan"), described(outcome)
    if alarms:
        lost = mean_of_last(gaps, alarms[0])
        left = mean_of_last(gaps, alarms[0] + WITHIN)
        value, more = (
            min(100.0, 100 * (1 - left / lost)),
            more | {"gap": {"lost": lost, "left": left}},
        )
    yield Cell("recovered", single(value), more | {"better": "higher"})
    late = float(alarms[0] - STALLED_AFTER) if alarms else float("nan")
    yield Cell("steps to the alarm", single(late), {"unit": "steps"})


def mean_of_last(values: Mapping[int, float], until: int, number: int = 10) -> float:
    """The mean of the last values until a step; NaN if there are none."""
    last = range(until - number + 1, until + 1)
    return float(np.mean([values[step] for step in last if step in values] or [np.nan]))
