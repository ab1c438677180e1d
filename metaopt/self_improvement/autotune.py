"""The fastest execution options, found by timing: microbatch, rematerialisation, precision ...

Memory is what the compiler plans, so nothing is found out by crashing. Functions are timed in
turns, round by round, and one replaces the current one only if it was faster in so many rounds
that chance does not explain it. Half of the others leave whenever the number of rounds has
doubled (successive halving; Jamieson, Talwalkar, 2016, "Non-stochastic best arm identification
and hyperparameter optimization").
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from scipy import stats

from metaopt.errors import UserError
from metaopt.measure import (
    Timing,
    compile_for,
    device_bytes,
    human_bytes,
    interleaved,
    program_bytes,
    timing_of,
)
from metaopt.self_improvement.records import Decision, TimedOptions, differences
from metaopt.self_improvement.workload import Setting, Settings, Snapshot, Workload, changed

CHANCE = 0.05
"""Probability of a win by luck between equals: of 16 rounds, a winner may lose 4."""
LEAST_ROUNDS = 5
"""Number of rounds below which not even winning all of them is beyond `CHANCE`."""
SAMPLE_SECONDS = 0.01
"""Time below which a function is called several times a round, until the current one takes it."""

Build = Callable[[Settings], tuple[Callable, Sequence[Any]]]
"""``settings -> (function, args)``, whose time a call is what counts."""


class TimingResult(NamedTuple):
    """Which of some functions is the fastest.

    Attributes:
      winner: Name of the fastest.
      timings: Seconds an item by name; nothing for what was not timed.
      verdicts: By name, ``kept`` (the current one won), ``replaced`` (it did not), ``adopted``
        (this challenger won), ``slower`` than the winner, ``noise`` (its median is better, but
        not beyond noise), ``not timed``.
    """

    winner: str
    timings: dict[str, Timing]
    verdicts: dict[str, str]


def fastest(
    functions: Mapping[str, Callable[[], Any]],
    current: str,
    *,
    seconds_budget: float = math.inf,
    rounds: int = 16,
    items: Mapping[str, float] | None = None,
    least_gain: float = 0.02,
) -> TimingResult:
    """Times functions in turns; one wins if it is faster than the current one beyond noise.

    Args:
      functions: by name, of no arguments; their results are waited for.
      current: the name of the one in use; without evidence it stays.
      seconds_budget: no round is begun that would end later, but for the first.
      rounds: the most that are timed, at least `LEAST_ROUNDS`; one more, of one call each,
        comes before them and is not counted.
      items: done by one call, by name; 1 each by default.
      least_gain: a challenger wins a round if it is faster by this fraction.

    Raises:
      UserError: there are too few rounds, or the current one is not among the functions.
    """
    if rounds < LEAST_ROUNDS:
        raise UserError(f"rounds={rounds}: fewer than {LEAST_ROUNDS} tell nothing beyond noise")
    if current not in functions:
        raise UserError(f"the current {current!r} is not among {', '.join(functions)}")
    deadline = time.perf_counter() + seconds_budget
    samples: dict[str, list[float]] = {name: [] for name in functions}
    left, calls = list(functions), 1
    for number in range(1 + rounds):
        repeated = {name: functools.partial(_repeat, functions[name], calls) for name in left}
        found = interleaved(repeated, 1, warmup=0)
        seconds = {name: found[name].median / calls for name in left}
        if number == 0:
            calls = max(1, math.ceil(SAMPLE_SECONDS / max(seconds[current], 1e-6)))
        else:
            for name in left:
                samples[name].append(seconds[name] / (items[name] if items else 1))
        left = _still_timed(left, samples, current)
        next_round = calls * sum(seconds[name] for name in left)
        if len(left) == 1 or time.perf_counter() + next_round > deadline:
            break
    return _result(samples, left, current, least_gain)


def _repeat(function: Callable[[], Any], calls: int) -> Any:
    for _ in range(calls - 1):
        function()
    return function()


def beyond_noise(
    challenger: Sequence[float], current: Sequence[float], least_gain: float = 0.0
) -> bool:
    """Whether so many rounds were won that equals would do it with a chance below `CHANCE`.

    A sign test on pairs of times, so that a busy moment costs one round at most.

    Args:
      challenger: seconds in rounds 0, 1, ...
      current: seconds in the same rounds, and perhaps in later ones.
      least_gain: a round is won by this fraction.
    """
    pairs = list(zip(challenger, current, strict=False))
    won = sum(c * (1 + least_gain) < i for c, i in pairs)
    if not pairs:
        return False
    return float(stats.binomtest(won, len(pairs), alternative="greater").pvalue) < CHANCE


def _still_timed(left: list[str], samples: dict[str, list[float]], current: str) -> list[str]:
    """When the rounds have doubled: the faster half, without those that were always slower."""
    rounds = len(samples[current])
    if rounds < 2 or rounds & (rounds - 1):
        return left
    # The least time, since what disturbs a measurement only ever adds to it.
    best = {name: min(samples[name]) for name in left if name != current}
    half = sorted(best, key=best.__getitem__)[: math.ceil(len(best) / 2)]
    faster = [name for name in half if best[name] <= max(samples[current])]
    return [name for name in left if name == current or name in faster]


def _result(
    samples: dict[str, list[float]], left: list[str], current: str, least_gain: float
) -> TimingResult:
    timings = {name: timing_of(found) for name, found in samples.items() if found}
    finalists = [name for name in left if name != current and name in timings]
    leader = min(finalists, key=lambda name: timings[name].median, default=current)
    won = leader != current and beyond_noise(samples[leader], samples[current], least_gain)
    winner = leader if won else current

    def verdict(name: str) -> str:
        if name == current:
            return "replaced" if won else "kept"
        if name not in timings:
            return "not timed"
        if name == winner:
            return "adopted"
        return "noise" if timings[name].median < timings[winner].median else "slower"

    return TimingResult(winner, timings, {name: verdict(name) for name in samples})


class TuningResult(NamedTuple):
    """The fastest settings that fit into memory, and a record of each candidate."""

    settings: dict[str, Setting]
    timings: list[TimedOptions]


def tune_options(
    build: Build,
    space: Mapping[str, Sequence[Setting]],
    start: Settings,
    *,
    memory_budget: float,
    seconds_budget: float,
    items: Callable[[Settings], float] = lambda settings: 1.0,
    rounds: int = 16,
    least_gain: float = 0.02,
) -> TuningResult:
    """Varies one setting at a time, again and again, while that makes items a second more.

    If none alone does, two are varied together: a larger microbatch may need rematerialisation,
    which alone is slower. A setting changes only beyond noise, and in the end the result is
    timed against the start once more: if the start is faster beyond noise, it stays. Every
    candidate is compiled once, and what does not fit the memory is never run.

    Args:
      build: ``settings -> (function, args)``; a `UserError` of its own refuses the candidate.
        What the function donates is copied before every call.
      space: the values of each setting that may change.
      start: of all settings that ``build`` reads. If it does not fit or run, the search starts
        from what does and differs in the fewest settings.
      memory_budget: bytes a device (`program_bytes`); up to 1, a fraction of what it has.
      seconds_budget: for all, compiling included; what has begun is finished.
      items: done by one call.
      rounds: the most in a comparison.
      least_gain: of a round that is won, as a fraction.

    Raises:
      UserError: a setting has no start, or nothing in the space fits and runs.
    """
    if missing := [name for name in space if name not in start]:
        raise UserError(f"{', '.join(missing)}: may be varied, but has no value to start from")
    budget = memory_budget * device_bytes() if memory_budget <= 1 else memory_budget
    ends = time.perf_counter() + seconds_budget
    bench = _Bench(build, budget, items, rounds, least_gain)
    origin = best = bench.first_that_runs(_nearest_first(space, start))
    searched = ends - 0.1 * seconds_budget  # the rest is for the last comparison
    while True:
        found = best
        for number_together in (1, 2):
            moves = list(itertools.combinations(space, number_together))
            for place, names in enumerate(moves):
                now = time.perf_counter()
                turn_ends = now + (searched - now) / (len(moves) - place)
                values = itertools.product(*(space[name] for name in names))
                rivals = [{**found, **dict(zip(names, v, strict=True))} for v in values]
                found = bench.best_of(", ".join(names), found, rivals, turn_ends)
            if found != best:
                break
        if found == best:
            break
        best = found
    if best != origin:
        best = bench.timed("start", best, [origin], ends)
    return TuningResult(best, bench.records)


def _nearest_first(
    space: Mapping[str, Sequence[Setting]], start: Settings
) -> Iterator[dict[str, Setting]]:
    """The start, and all other combinations by the number of settings that differ from it."""
    grid = itertools.product(*space.values())
    return iter(
        sorted(
            [dict(start), *({**start, **dict(zip(space, v, strict=True))} for v in grid)],
            key=lambda settings: sum(settings[name] != start[name] for name in space),
        )
    )


class _Program(NamedTuple):
    """A candidate, compiled and called once; if ``run`` is None, why it is not run."""

    run: Callable[[], Any] | None = None
    bytes: int | None = None
    compile_seconds: float | None = None
    verdict: str = ""
    reason: str = ""


@dataclasses.dataclass
class _Bench:
    """Compiled candidates, and the record of what was found out about them."""

    build: Build
    budget: float
    items: Callable[[Settings], float]
    rounds: int
    least_gain: float
    programs: dict[str, _Program] = dataclasses.field(default_factory=dict)
    records: list[TimedOptions] = dataclasses.field(default_factory=list)

    def program(self, settings: Settings) -> _Program:
        name = _label(settings)
        if name not in self.programs:
            self.programs[name] = self._prepared(settings)
        return self.programs[name]

    def _prepared(self, settings: Settings) -> _Program:
        began = time.perf_counter()
        try:
            function, args = self.build(settings)
            compiled = compile_program(function, *args)
            seconds, taken = time.perf_counter() - began, program_bytes(compiled)
            if taken > self.budget:
                reason = f"it takes {human_bytes(taken)} of a budget of {human_bytes(self.budget)}"
                return _Program(None, taken, seconds, "over memory", reason)
            run = _caller(compiled, args)
            jax.block_until_ready(run())
        except (UserError, jax.errors.JaxRuntimeError) as error:
            return _Program(verdict="refused", reason=str(error).partition("\n")[0])
        return _Program(run, taken, seconds)

    def first_that_runs(self, candidates: Iterator[dict[str, Setting]]) -> dict[str, Setting]:
        for settings in candidates:
            if self.program(settings).run:
                return settings
            self.record("start", settings, self.program(settings).verdict)
        reason = self.records[0].reason
        raise UserError(f"no settings of the space can be run; for the start, {reason}")

    def best_of(
        self, setting: str, best: dict[str, Setting], rivals: list[dict[str, Setting]], ends: float
    ) -> dict[str, Setting]:
        """The best, or a rival that is new, fits and is faster; compiled while there is time."""
        admitted = []
        for rival in rivals:
            if _label(rival) in self.programs:
                continue
            longest = max(p.compile_seconds or 0.0 for p in self.programs.values())
            if time.perf_counter() + longest > ends:
                self.record(setting, rival, "no time")
            elif self.program(rival).run:
                admitted.append(rival)
            else:
                self.record(setting, rival, self.program(rival).verdict)
        return self.timed(setting, best, admitted, ends) if admitted else best

    def timed(
        self, setting: str, best: dict[str, Setting], rivals: list[dict[str, Setting]], ends: float
    ) -> dict[str, Setting]:
        """The best, or a rival that is faster beyond noise."""
        entrants = {_label(settings): settings for settings in (best, *rivals)}
        found = fastest(
            {name: run for name in entrants if (run := self.programs[name].run)},
            _label(best),
            seconds_budget=ends - time.perf_counter(),
            rounds=self.rounds,
            items={name: self.items(settings) for name, settings in entrants.items()},
            least_gain=self.least_gain,
        )
        for name, settings in entrants.items():
            self.record(setting, settings, found.verdicts[name], found.timings.get(name))
        return entrants[found.winner]

    def record(
        self, setting: str, settings: Settings, verdict: str, timing: Timing | None = None
    ) -> None:
        program = self.programs.get(_label(settings), _Program())
        record = TimedOptions(
            setting, dict(settings), verdict, program.reason, program.bytes, program.compile_seconds
        )
        if timing:
            items = self.items(settings)
            record = record._replace(
                items_per_second=1 / timing.median,
                seconds=items * timing.median,
                lower=items * timing.lower,
                upper=items * timing.upper,
                rounds=len(timing.samples),
            )
        self.records.append(record)


def _label(settings: Settings) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))


def compile_program(function: Callable, *args: Any) -> jax.stages.Compiled:
    """`compile_for`, but a function that is under jit or pmap already is compiled as it is."""
    lower = getattr(function, "lower", None)
    return lower(*args).compile() if lower else compile_for(function, *args)


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
    began = time.perf_counter()

    def build(values: Settings):
        settings = {**snapshot.settings, **values}
        batch = workload.sample(settings, snapshot.examples)
        return workload.step(settings), (snapshot.state, batch)

    found = tune_options(
        build,
        workload.execution_options,
        {name: snapshot.settings[name] for name in workload.execution_options},
        memory_budget=memory_budget,
        seconds_budget=seconds_budget,
    )
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
        timings=tuple(found.timings),
        seconds=time.perf_counter() - began,
    )
