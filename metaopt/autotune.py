"""The fastest execution options, found by timing: microbatch, rematerialisation, precision ...

Memory is what the compiler plans, so nothing is found out by crashing; seconds are compared by
`metaopt.timing.fastest`.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.measure import device_bytes, human_bytes, lower_for, program_bytes
from metaopt.timing import SAMPLE_SECONDS, fastest
from metaopt.types import Setting, Settings

CALLS_TO_COMPARE = 6
"""Number of calls of each function in a comparison, about: half of them leave after 2 rounds."""

Build = Callable[[Settings], tuple[Callable, Sequence[Any]]]
"""``settings -> (function, args)``, whose time a call is what counts."""


class TimedOptions(NamedTuple):
    """One candidate of a search for the fastest execution options.

    Attributes:
      settings: Values of all options.
      verdict: ``kept`` or ``replaced`` (the current options), ``adopted``, ``slower``, ``noise``,
        ``not timed``, ``refused``, ``same program`` (as an earlier one), ``over memory``, ``more
        memory`` (than those adopted for how little they take) or ``no time``.
      reason: Why it was not run; empty if it was.
      bytes: Memory a device, as planned by the compiler; None if it was not compiled.
      compile_seconds: Time to compile; None if it was not compiled.
      seconds: Median time of a call.
      lower, upper: Quartiles of that time.
      rounds: Number of timed rounds.
    """

    settings: dict[str, Setting]
    verdict: str
    reason: str = ""
    bytes: int | None = None
    compile_seconds: float | None = None
    seconds: float | None = None
    lower: float | None = None
    upper: float | None = None
    rounds: int = 0


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
    longest, comparing = 0.0, 0.0
    ends = time.perf_counter() + seconds_budget
    records: dict[str, TimedOptions] = {}
    programs: dict[str, Callable[[], Any]] = {}
    seen: set[str] = set()
    for number, settings in enumerate(_candidates(space, start)):
        began, name = time.perf_counter(), str(number)
        if programs and began + longest + comparing > ends:
            records[name] = TimedOptions(settings, "no time")
            continue
        records[name], program, seconds = _prepared(build, settings, budget, seen)
        longest = max(longest, time.perf_counter() - began)
        if program is not None:
            programs[name], comparing = program, comparing + CALLS_TO_COMPARE * seconds
    if not programs:
        reason = records["0"].reason
        raise UserError(f"no settings of the space can be run; for the start, {reason}")
    found = fastest(programs, next(iter(programs)), seconds_budget=ends - time.perf_counter())
    for name, verdict in found.verdicts.items():
        records[name] = records[name]._replace(verdict=verdict)
    for name, timing in found.timings.items():
        median, lower, upper, samples = timing
        times = {"seconds": median, "lower": lower, "upper": upper, "rounds": len(samples)}
        records[name] = records[name]._replace(**times)
    return TuningResult(records[found.winner].settings, tuple(records.values()))


def leanest_options(
    build: Build, space: Mapping[str, Sequence[Setting]], start: Settings, *, seconds_budget: float
) -> TuningResult:
    """Compiles combinations of options, the nearest to the start first; the least memory wins.

    Nothing is run. Of several that take as little, the nearest to the start wins.

    Args:
      build, space, start: as for `tune_options`.
      seconds_budget: for all; what has begun is finished.

    Raises:
      UserError: what the start takes is not known.
    """
    ends, longest = time.perf_counter() + seconds_budget, 0.0
    records: list[TimedOptions] = []
    seen: set[str] = set()
    for settings in _candidates(space, start):
        began = time.perf_counter()
        if records and began + longest > ends:
            records.append(TimedOptions(settings, "no time"))
            continue
        records.append(_compiled(build, settings, seen)[0])
        longest = max(longest, time.perf_counter() - began)
    if records[0].bytes is None:
        raise UserError(f"it is not known what the step takes: {records[0].reason}")
    least = min((r for r in records if r.bytes is not None), key=lambda r: r.bytes or 0)
    for i, record in enumerate(records):
        if record is least:
            records[i] = record._replace(verdict="adopted" if i else "kept")
        elif record.bytes is not None:
            records[i] = record._replace(verdict="more memory" if i else "replaced")
    return TuningResult(least.settings, tuple(records))


def _candidates(
    space: Mapping[str, Sequence[Setting]], start: Settings
) -> list[dict[str, Setting]]:
    """The start and all combinations of options, the nearest to it first."""
    start = dict(start)
    grid = (start | dict(zip(space, x, strict=True)) for x in itertools.product(*space.values()))
    others = [settings for settings in grid if settings != start]
    others.sort(key=lambda settings: sum(settings[name] != start[name] for name in space))
    return [start, *others]


def _compiled(
    build: Build, settings: dict[str, Setting], seen: set[str]
) -> tuple[TimedOptions, tuple[jax.stages.Compiled, Sequence[Any]] | None]:
    """The record, with the bytes that are planned, and the program with its arguments.

    One that is the same as an earlier one, whose digests are ``seen``, is not compiled.
    """
    began, record = time.perf_counter(), TimedOptions(settings, "refused")
    try:
        function, args = build(settings)
        lowered = lower_for(function, *args)
        text = lowered.as_text()
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen and "callback" not in text:  # which may call anything
            return record._replace(verdict="same program"), None
        seen.add(digest)
        compiled = lowered.compile()
        seconds, taken = time.perf_counter() - began, program_bytes(compiled)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        return record._replace(reason=str(error).partition("\n")[0]), None
    return record._replace(bytes=taken, compile_seconds=seconds), (compiled, args)


def _prepared(
    build: Build, settings: dict[str, Setting], budget: float, seen: set[str]
) -> tuple[TimedOptions, Callable[[], Any] | None, float]:
    """The record, the program if it can be run, and the seconds of its first call."""
    record, found = _compiled(build, settings, seen)
    if found is None:
        return record, None, 0.0
    if (taken := record.bytes or 0) > budget:
        reason = f"it takes {human_bytes(taken)} of a budget of {human_bytes(budget)}"
        return record._replace(verdict="over memory", reason=reason), None, 0.0
    called, program = time.perf_counter(), _caller(*found)
    try:
        jax.block_until_ready(program())
    except (UserError, jax.errors.JaxRuntimeError) as error:
        return record._replace(reason=str(error).partition("\n")[0]), None, 0.0
    return record, program, max(time.perf_counter() - called, SAMPLE_SECONDS)


def _caller(compiled: jax.stages.Compiled, args: Sequence[Any]) -> Callable[[], Any]:
    """A call with the same arguments again and again; with copies, if any are donated.

    Of a pytree that is donated under pmap, ``args_info`` names the first leaf alone.
    """
    donates = any(info.donated for info in jax.tree.leaves(compiled.args_info))

    def call():
        copied = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tuple(args))
        return compiled(*(copied if donates else args))

    return call
