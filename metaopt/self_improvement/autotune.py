"""The fastest execution options, found by timing: microbatch, rematerialisation, precision ...

Memory is what the compiler plans, so nothing is found out by crashing; seconds are compared by
`metaopt.timing.fastest`.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.measure import compile_for, device_bytes, human_bytes, program_bytes
from metaopt.self_improvement.records import Decision, TimedOptions, differences
from metaopt.self_improvement.workload import Setting, Settings, Snapshot, Workload, changed
from metaopt.timing import SAMPLE_SECONDS, fastest

CALLS_TO_COMPARE = 6
"""Number of calls of each function in a comparison, about: half of them leave after 2 rounds."""

Build = Callable[[Settings], tuple[Callable, Sequence[Any]]]
"""``settings -> (function, args)``, whose time a call is what counts."""


class TuningResult(NamedTuple):
    """The fastest settings that fit into memory, and the record of each candidate."""

    settings: dict[str, Setting]
    timings: tuple[TimedOptions, ...]


def tune_options(
    build: Build,
    space: Mapping[str, Sequence[Setting]],
    start: Settings,
    *,
    memory_budget: float,
    seconds_budget: float,
) -> TuningResult:
    """Compiles the combinations of options, the nearest to the start first, and times them.

    Another combination than the start is taken only if it is faster beyond noise (`fastest`).
    Every candidate is compiled once, while enough time is left to time all of them, and what
    does not fit the memory is never run.

    Args:
      build: ``settings -> (function, args)``; a `UserError` of its own refuses the candidate.
        What the function donates is copied before every call.
      space: the values of each setting that may change.
      start: of all settings that ``build`` reads. If it does not fit or run, what does and
        differs in the fewest settings takes its place.
      memory_budget: bytes a device (`program_bytes`); up to 1, a fraction of what it has.
      seconds_budget: for all, compiling included; what has begun is finished.

    Raises:
      UserError: a setting has no start, or nothing in the space fits and runs.
    """
    if missing := [name for name in space if name not in start]:
        raise UserError(f"{', '.join(missing)}: may be varied, but has no value to start from")
    budget = memory_budget * device_bytes() if memory_budget <= 1 else memory_budget
    ends, longest, comparing = time.perf_counter() + seconds_budget, 0.0, 0.0
    records: dict[str, TimedOptions] = {}
    programs: dict[str, Callable[[], Any]] = {}
    for settings in _nearest_first(space, start):
        began, name = time.perf_counter(), _label(settings)
        if programs and began + longest + comparing > ends:
            records[name] = TimedOptions(settings, "no time")
            continue
        records[name], program, seconds = _prepared(build, settings, budget)
        longest = max(longest, time.perf_counter() - began)
        if program is not None:
            programs[name], comparing = program, comparing + CALLS_TO_COMPARE * seconds
    if not programs:
        reason = next(iter(records.values())).reason
        raise UserError(f"no settings of the space can be run; for the start, {reason}")
    left = ends - time.perf_counter()
    found = fastest(programs, next(iter(programs)), seconds_budget=left)
    for name, verdict in found.verdicts.items():
        records[name] = records[name]._replace(verdict=verdict)
    for name, timing in found.timings.items():
        records[name] = records[name]._replace(
            seconds=timing.median,
            lower=timing.lower,
            upper=timing.upper,
            rounds=len(timing.samples),
        )
    return TuningResult(records[found.winner].settings, tuple(records.values()))


def _nearest_first(
    space: Mapping[str, Sequence[Setting]], start: Settings
) -> list[dict[str, Setting]]:
    """The start, and all other combinations by the number of settings that differ from it."""
    grid = [
        {**start, **dict(zip(space, v, strict=True))} for v in itertools.product(*space.values())
    ]
    unique = {_label(settings): settings for settings in [dict(start), *grid]}
    return sorted(unique.values(), key=lambda x: sum(x[name] != start[name] for name in space))


def _prepared(
    build: Build, settings: dict[str, Setting], budget: float
) -> tuple[TimedOptions, Callable[[], Any] | None, float]:
    """The record, the program if it can be run, and the seconds of its first call."""
    began, record = time.perf_counter(), TimedOptions(settings, "refused")
    try:
        function, args = build(settings)
        compiled = compile_for(function, *args)
        called, taken = time.perf_counter(), program_bytes(compiled)
        record = record._replace(bytes=taken, compile_seconds=called - began)
        if taken > budget:
            reason = f"it takes {human_bytes(taken)} of a budget of {human_bytes(budget)}"
            return record._replace(verdict="over memory", reason=reason), None, 0.0
        program = _caller(compiled, args)
        jax.block_until_ready(program())
    except (UserError, jax.errors.JaxRuntimeError) as error:
        return record._replace(reason=str(error).partition("\n")[0]), None, 0.0
    return record, program, max(time.perf_counter() - called, SAMPLE_SECONDS)


def _label(settings: Settings) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))


def _caller(compiled: jax.stages.Compiled, args: Sequence[Any]) -> Callable[[], Any]:
    """A call with the same arguments again and again; with copies, if any are donated.

    Of a pytree that is donated under pmap, ``args_info`` names the first leaf alone.
    """
    donates = any(info.donated for info in jax.tree.leaves(compiled.args_info))

    def call():
        copied = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tuple(args))
        return compiled(*(copied if donates else args))

    return call


def fastest_settings(
    workload: Workload, snapshot: Snapshot, *, seconds_budget: float, memory_budget: float
) -> tuple[Snapshot, Decision]:
    """The snapshot with the fastest of the workload's execution options, and the decision.

    Steps are timed on one batch again and again (`tune_options`), and their results are
    discarded, so this costs seconds and no examples.

    Args:
      workload: with ``execution_options``.
      snapshot: of the training; its arrays stay as they are.
      seconds_budget, memory_budget: as for `tune_options`.

    Raises:
      UserError: not even the start can be run within the memory, nor anything else.
    """
    began, options = time.perf_counter(), workload.execution_options

    def build(values: Settings):
        settings = {**snapshot.settings, **values}
        batch = workload.sample(settings, snapshot.examples)
        return workload.step(settings), (snapshot.state, batch)

    budgets = {"memory_budget": memory_budget, "seconds_budget": seconds_budget}
    start = {name: snapshot.settings[name] for name in options}
    found = tune_options(build, options, start, **budgets)
    after = changed(workload, snapshot, found.settings)
    changes = differences(snapshot.settings, after.settings)
    chosen = ", ".join(f"{name} {old} to {new}" for name, (old, new) in changes.items())
    return after, Decision(
        kind="execution options",
        step=int(snapshot.state.step),
        examples=snapshot.examples,
        verdict="accepted" if changes else "kept",
        changes=changes,
        reason=f"steps are faster: {chosen}" if changes else "no execution options are faster",
        timings=found.timings,
        seconds=time.perf_counter() - began,
    )
