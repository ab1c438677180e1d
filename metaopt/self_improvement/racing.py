"""Which of some functions is the quickest, in noise and in little time.

Functions are timed in turns, round by round, and one replaces what is in use only where it
was quicker in so many rounds that chance does not explain it. Half of the others leave the
race every time that the rounds double (successive halving; Jamieson, Talwalkar,
2016, "Non-stochastic best arm identification and hyperparameter optimization").
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from metaopt.errors import UserError
from metaopt.measure import Timing, interleaved, timing_of

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
