"""Resources found by short measured trials: microbatch, rematerialisation, precision, devices.

Memory is what the compiler plans, so nothing is found out by crashing; seconds are compared
by `metaopt.self_improvement.autotune`.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from scipy import stats

from metaopt.errors import UserError
from metaopt.measure import (
    Timing,
    compile_for,
    compiled_memory,
    device_bytes,
    human_bytes,
    interleaved,
    timing_of,
)
from metaopt.self_improvement.records import Decision, differences
from metaopt.self_improvement.workload import Setting, Settings, Snapshot, Workload, changed

CHANCE = 0.05
"""Of a win by luck between equals: with 16 rounds, a winner may lose 4 of them."""
LEAST_ROUNDS = 5
"""With fewer, not even winning every round is beyond `CHANCE`."""
SAMPLE_SECONDS = 0.01
"""Functions that take less are called several times a round, the incumbent for so long."""


class Race(NamedTuple):
    """Who was the quickest.

    Attributes:
      winner: a name.
      timings: seconds an item by name; nothing for what was not timed.
      verdicts: by name: ``kept`` (the incumbent won), ``replaced`` (it did not), ``adopted``
        (this challenger won), ``slower`` than the winner, ``noise`` (its median is better, but
        not beyond noise), ``not timed``.
    """

    winner: str
    timings: dict[str, Timing]
    verdicts: dict[str, str]


def quickest(
    functions: Mapping[str, Callable[[], Any]],
    incumbent: str,
    *,
    seconds_budget: float = math.inf,
    rounds: int = 16,
    items: Mapping[str, float] | None = None,
    least_gain: float = 0.02,
) -> Race:
    """Times functions in turns; one wins where it is quicker than the incumbent beyond noise.

    Args:
      functions: by name, of no arguments; their results are waited for.
      incumbent: the name of the one that is in use; without evidence it stays.
      seconds_budget: no round is begun that would end later, but for the first.
      rounds: the most that are timed, at least `LEAST_ROUNDS`; one more, of one call each,
        comes before them and is not counted.
      items: done by one call, by name; 1 each by default.
      least_gain: a challenger wins a round where it is quicker by this fraction.

    Raises:
      UserError: there are too few rounds, or the incumbent is not among the functions.
    """
    if rounds < LEAST_ROUNDS:
        raise UserError(f"rounds={rounds}: fewer than {LEAST_ROUNDS} tell nothing beyond noise")
    if incumbent not in functions:
        raise UserError(f"the incumbent {incumbent!r} is not among {', '.join(functions)}")
    deadline = time.perf_counter() + seconds_budget
    samples: dict[str, list[float]] = {name: [] for name in functions}
    racing, calls = list(functions), 1
    for number in range(1 + rounds):
        repeated = {name: functools.partial(_repeat, functions[name], calls) for name in racing}
        found = interleaved(repeated, 1, warmup=0)
        seconds = {name: found[name].median / calls for name in racing}
        if number == 0:
            calls = max(1, math.ceil(SAMPLE_SECONDS / max(seconds[incumbent], 1e-6)))
        else:
            for name in racing:
                samples[name].append(seconds[name] / (items[name] if items else 1))
        racing = _still_racing(racing, samples, incumbent)
        next_round = calls * sum(seconds[name] for name in racing)
        if len(racing) == 1 or time.perf_counter() + next_round > deadline:
            break
    return _result(samples, racing, incumbent, least_gain)


def _repeat(function: Callable[[], Any], calls: int) -> Any:
    for _ in range(calls - 1):
        function()
    return function()


def beyond_noise(
    challenger: Sequence[float], incumbent: Sequence[float], least_gain: float = 0.0
) -> bool:
    """Whether so many rounds were won that equals would do it with a chance below `CHANCE`.

    A sign test on pairs of times, so that a busy moment costs one round at most.

    Args:
      challenger: seconds in rounds 0, 1, ...
      incumbent: seconds in the same rounds, and perhaps in later ones.
      least_gain: a round is won by this fraction.
    """
    pairs = list(zip(challenger, incumbent, strict=False))
    won = sum(c * (1 + least_gain) < i for c, i in pairs)
    if not pairs:
        return False
    return float(stats.binomtest(won, len(pairs), alternative="greater").pvalue) < CHANCE


def _still_racing(racing: list[str], samples: dict[str, list[float]], incumbent: str) -> list[str]:
    """When the rounds have doubled: the quicker half, without those that were always slower."""
    rounds = len(samples[incumbent])
    if rounds < 2 or rounds & (rounds - 1):
        return racing
    # The least time, since what disturbs a measurement only ever adds to it.
    best = {name: min(samples[name]) for name in racing if name != incumbent}
    half = sorted(best, key=best.__getitem__)[: math.ceil(len(best) / 2)]
    quicker = [name for name in half if best[name] <= max(samples[incumbent])]
    return [name for name in racing if name == incumbent or name in quicker]


def _result(
    samples: dict[str, list[float]], racing: list[str], incumbent: str, least_gain: float
) -> Race:
    timings = {name: timing_of(found) for name, found in samples.items() if found}
    finalists = [name for name in racing if name != incumbent and name in timings]
    leader = min(finalists, key=lambda name: timings[name].median, default=incumbent)
    won = leader != incumbent and beyond_noise(samples[leader], samples[incumbent], least_gain)
    winner = leader if won else incumbent

    def verdict(name: str) -> str:
        if name == incumbent:
            return "replaced" if won else "kept"
        if name not in timings:
            return "not timed"
        if name == winner:
            return "adopted"
        return "noise" if timings[name].median < timings[winner].median else "slower"

    return Race(winner, timings, {name: verdict(name) for name in samples})


Build = Callable[[Settings], tuple[Callable, Sequence[Any]]]
"""``settings -> (function, args)``, whose time a call is what counts."""


def compile_program(function: Callable, *args: Any) -> jax.stages.Compiled:
    """`compile_for`, but for a function that is under jit or pmap already: as it is there."""
    lower = getattr(function, "lower", None)
    return lower(*args).compile() if lower else compile_for(function, *args)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Working memory, arguments and results together, in bytes a device.

    Memory that results share with donated arguments counts twice: rather too much.
    """
    return sum(compiled_memory(compiled))


def largest_that_fits(
    sizes: Sequence[int], memory_of: Callable[[int], float], budget_bytes: float
) -> int:
    """The largest size whose memory is within a budget, by bisection.

    Args:
      sizes: ascending, such as the divisors of a batch.
      memory_of: ``size -> bytes``, not decreasing, such as `program_bytes` of the program
        of that size. It is asked for about ``log2(len(sizes)) + 1`` sizes, once each.
      budget_bytes: what there is.

    Raises:
      UserError: there is no size, they are not ascending, or not even the smallest fits.
    """
    if not sizes or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise UserError(f"the sizes to choose from must be ascending, not {list(sizes)}")
    memory_of = functools.cache(memory_of)
    fitting = bisect.bisect_right(sizes, budget_bytes, key=memory_of)
    if not fitting:
        raise UserError(
            f"not even a size of {sizes[0]} fits: it takes {human_bytes(memory_of(sizes[0]))} "
            f"of a budget of {human_bytes(budget_bytes)}"
        )
    return sizes[fitting - 1]


class ResourceResult(NamedTuple):
    """What was found.

    Attributes:
      settings: the quickest that fit.
      evidence: one entry a candidate and race, for ``decisions.jsonl``: ``setting`` (which was
        varied), ``settings``, ``verdict`` (as in `Race`; or ``refused``, ``over memory``,
        ``no time``), ``reason``, ``bytes``, ``compile_seconds``; and where it was timed,
        ``items_per_second``, ``seconds`` a call with the quartiles ``lower`` and ``upper``,
        ``rounds``.
    """

    settings: dict[str, Setting]
    evidence: list[dict[str, Any]]


def tune_resources(
    build: Build,
    space: Mapping[str, Sequence[Setting]],
    start: Settings,
    *,
    memory_budget: float,
    seconds_budget: float,
    items: Callable[[Settings], float] = lambda settings: 1.0,
    rounds: int = 16,
    least_gain: float = 0.02,
) -> ResourceResult:
    """Varies one setting at a time, again and again, while that makes items a second more.

    Where none alone does, two are varied together: a larger microbatch may need
    rematerialisation, which alone is slower, and the tasks one by one may only pay without it.
    A setting changes only beyond noise, and in the end the result meets the start once more:
    where the start is quicker beyond noise, it stays. Every candidate is compiled once, and
    what does not fit the memory is never run.

    Args:
      build: ``settings -> (function, args)``; a `UserError` of its own refuses the candidate.
        What the function donates is copied before every call.
      space: the values of each setting that may change.
      start: of all settings that ``build`` reads. Where it does not fit or run, the search
        starts from what does and differs in the fewest settings.
      memory_budget: bytes a device (`program_bytes`); up to 1, a fraction of what it has.
      seconds_budget: for all, compiling included; what has begun is finished.
      items: done by one call.
      rounds: the most in a race.
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
    # A tenth of the time is left for the last race.
    searched = ends - 0.1 * seconds_budget
    singles = [(name,) for name in space]
    while True:
        found = _sweep(bench, space, best, singles, searched)
        if found == best:
            found = _sweep(bench, space, best, list(itertools.combinations(space, 2)), searched)
        if found == best:
            break
        best = found
    if best != origin:
        best = bench.race("start", best, [origin], ends)
    return ResourceResult(best, bench.evidence)


def _sweep(
    bench: "_Bench",
    space: Mapping[str, Sequence[Setting]],
    best: dict[str, Setting],
    moves: Sequence[tuple[str, ...]],
    ends: float,
) -> dict[str, Setting]:
    """The best after a race for each move: all values of one setting, or of two together."""
    for place, names in enumerate(moves):
        now = time.perf_counter()
        turn_ends = now + (ends - now) / (len(moves) - place)
        values = itertools.product(*(space[name] for name in names))
        rivals = [{**best, **dict(zip(names, v, strict=True))} for v in values]
        setting = ", ".join(names)
        best = bench.race(setting, best, bench.admitted(setting, rivals, turn_ends), turn_ends)
    return best


def _nearest_first(
    space: Mapping[str, Sequence[Setting]], start: Settings
) -> list[dict[str, Setting]]:
    """The start, and all other combinations by the number of settings that differ from it."""
    grid = itertools.product(*space.values())
    return sorted(
        [dict(start), *({**start, **dict(zip(space, values, strict=True))} for values in grid)],
        key=lambda settings: sum(settings[name] != start[name] for name in space),
    )


class _Program(NamedTuple):
    """A candidate, compiled and called once; or, where ``run`` is None, why it is not run."""

    run: Callable[[], Any] | None = None
    bytes: int | None = None
    compile_seconds: float | None = None
    verdict: str = ""
    reason: str = ""


def _prepared(build: Build, settings: Settings, budget: float) -> _Program:
    began = time.perf_counter()
    try:
        function, args = build(settings)
        compiled = compile_program(function, *args)
        seconds, taken = time.perf_counter() - began, program_bytes(compiled)
        if taken > budget:
            reason = f"it takes {human_bytes(taken)} of a budget of {human_bytes(budget)}"
            return _Program(None, taken, seconds, "over memory", reason)
        run = _caller(compiled, args)
        jax.block_until_ready(run())
    except (UserError, jax.errors.JaxRuntimeError) as error:
        return _Program(verdict="refused", reason=str(error).partition("\n")[0])
    return _Program(run, taken, seconds)


def _caller(compiled: jax.stages.Compiled, args: Sequence[Any]) -> Callable[[], Any]:
    """A call with the same arguments again and again; copies, where any are donated.

    Of a pytree that is donated under pmap, ``args_info`` names the first leaf alone.
    """
    donates = any(info.donated for info in jax.tree.leaves(compiled.args_info))

    def call():
        copied = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tuple(args))
        return compiled(*(copied if donates else args))

    return call


@dataclasses.dataclass
class _Bench:
    """Compiled candidates and what was found out about them."""

    build: Build
    budget: float
    items: Callable[[Settings], float]
    rounds: int
    least_gain: float
    programs: dict[str, _Program] = dataclasses.field(default_factory=dict)
    evidence: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def program(self, settings: Settings) -> _Program:
        name = _label(settings)
        if name not in self.programs:
            self.programs[name] = _prepared(self.build, settings, self.budget)
        return self.programs[name]

    def first_that_runs(self, candidates: Sequence[dict[str, Setting]]) -> dict[str, Setting]:
        for settings in candidates:
            if self.program(settings).run:
                return settings
            self.record("start", settings, self.program(settings).verdict)
        reason = self.evidence[0]["reason"]
        raise UserError(f"no settings of the space can be run; for the start, {reason}")

    def admitted(
        self, setting: str, rivals: Sequence[dict[str, Setting]], ends: float
    ) -> list[dict[str, Setting]]:
        """Those that are new, fit and run; compiled here, while there is time for it."""
        found = []
        for rival in rivals:
            if _label(rival) in self.programs:
                continue
            longest = max(p.compile_seconds or 0.0 for p in self.programs.values())
            if time.perf_counter() + longest > ends:
                self.record(setting, rival, "no time")
            elif self.program(rival).run:
                found.append(rival)
            else:
                self.record(setting, rival, self.program(rival).verdict)
        return found

    def race(
        self,
        setting: str,
        best: dict[str, Setting],
        rivals: Sequence[dict[str, Setting]],
        ends: float,
    ) -> dict[str, Setting]:
        """The best, or a rival that is quicker beyond noise."""
        if not rivals:
            return best
        entrants = {_label(settings): settings for settings in (best, *rivals)}
        found = quickest(
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
        times = {}
        if timing:
            items = self.items(settings)
            times = {
                "items_per_second": 1 / timing.median,
                "seconds": items * timing.median,
                "lower": items * timing.lower,
                "upper": items * timing.upper,
                "rounds": len(timing.samples),
            }
        self.evidence.append(
            {
                "setting": setting,
                "settings": dict(settings),
                "verdict": verdict,
                "reason": program.reason,
                "bytes": program.bytes,
                "compile_seconds": program.compile_seconds,
                **times,
            }
        )


def _label(settings: Settings) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))


def quickest_way(
    workload: Workload, snapshot: Snapshot, *, seconds_budget: float, memory_budget: float
) -> tuple[Snapshot, Decision]:
    """The snapshot with the quickest of the workload's ``ways``, and the decision.

    Steps are timed on one batch again and again (`tune_resources`), and what they give is
    thrown away, so this costs seconds and no examples.

    Args:
      workload: with ``ways``.
      snapshot: where it stands; its arrays stay as they are.
      seconds_budget, memory_budget: as for `tune_resources`.

    Raises:
      UserError: not even the start can be run within the memory, nor anything else.
    """
    began = time.perf_counter()

    def build(values: Settings):
        settings = {**snapshot.settings, **values}
        batch = workload.sample(settings, snapshot.examples)
        return workload.step(settings), (snapshot.state, batch)

    found = tune_resources(
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
        step=int(snapshot.state.step),
        examples=snapshot.examples,
        phase=-1,
        verdict="accepted" if changes else "kept",
        changes=changes,
        reason=f"steps are quicker: {chosen}" if changes else "no way to compute a step is quicker",
        evidence=found.evidence,
        trial_examples=0,
        seconds=time.perf_counter() - began,
    )
