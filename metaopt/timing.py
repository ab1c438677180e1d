"""The fastest of some functions, in noise and in little time.

Functions are timed in turns, round by round, and one replaces the current one only if it was
faster in more rounds than chance explains. Half of the others leave each time the number of rounds
has doubled (successive halving; Jamieson, Talwalkar, 2016, "Non-stochastic best
arm identification and hyperparameter optimization").
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import special

from metaopt.errors import UserError
from metaopt.measure import Timing, interleaved, timing_of

CHANCE = 0.05
"""Probability of a win by luck between equals: of 16 rounds, a winner may lose 4."""
LEAST_ROUNDS = 5
"""Number of rounds below which not even winning all of them is beyond `CHANCE`."""
SAMPLE_SECONDS = 0.01
"""Time below which a function is called several times a round, until the current one takes it."""


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
    """Whether more rounds were won than equals would win with a chance of `CHANCE`.

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
    return float(special.bdtrc(won - 1, len(pairs), 0.5)) < CHANCE


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
