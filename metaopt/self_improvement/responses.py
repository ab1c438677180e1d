"""What is done about an alarm that the state is not damaged: pure decisions.

Damage (``nan``, ``divergence``) is rolled back (`metaopt.self_improvement.loop`). For every other
alarm `choose` says what to do, from the alarm, the workload, the settings and what was decided
before, or why nothing can be done. The loop does it, and notes it as a decision.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from metaopt.autotune import TimedOptions
from metaopt.measure import human_bytes
from metaopt.self_improvement.records import Decision
from metaopt.self_improvement.trials import Change, Proposer
from metaopt.self_improvement.workload import (
    SCHEDULED,
    Scale,
    Setting,
    Settings,
    Snapshot,
    Space,
    Workload,
)
from metaopt.training.monitor import Alarm

MARGIN = 0.01
"""Relative difference in the held-out loss below which it does not count, in such a search."""
FACTORS = (64.0, 512.0, 8.0, 4096.0, 0.125)
"""Factors on a rate in such a search, those that are tried first coming first. What stalls for
hundreds of steps is far off, if the rate is the reason."""
SHORTER = 0.25
"""Factor on the length of its trials: many short ones, since so far off a few steps tell."""
MOST_WORKERS = 8
"""The most threads that draw data."""
LEARNING_RATES = (*SCHEDULED, "inner_learning_rate")
"""Settings that a search in response to a plateau changes."""
WON = ("kept", "adopted")
"""Verdicts of the execution options that a search ended with."""


class Response(NamedTuple):
    """What to do about an alarm.

    Attributes:
      action: ``time options``: choose the fastest execution options; ``save memory``: choose those
        that take the least memory; ``add workers``: draw data by more threads; ``search``: search
        the learning rates; ``stop``: end the run; ``nothing``.
      reason: What is done, or why nothing is, in words.
      workers: Number of threads from now on, of ``add workers``.
    """

    action: Literal["time options", "save memory", "add workers", "search", "stop", "nothing"]
    reason: str
    workers: int = 0


def choose(
    alarm: Alarm,
    workload: Workload,
    settings: Settings,
    past: Sequence[Decision],
    *,
    max_responses: int,
    stop_on_plateau: bool = False,
    active: Sequence[str] = (),
    num_processes: int = 1,
) -> Response:
    """The response to an alarm that was raised.

    Args:
      alarm: of a kind other than ``nan`` and ``divergence``.
      workload: the training.
      settings: of the next step.
      past: all decisions of the run.
      max_responses: number of responses a kind of alarm, but to ``starved``, which has a bound of
        its own, `MOST_WORKERS`.
      stop_on_plateau: whether a plateau ends the run.
      active: kinds of the alarms that are raised.
      num_processes: processes of the run. Several see different times, and decide nothing by them.
    """
    kind, earlier = alarm.kind, [d for d in past if is_answer(d, alarm.kind)]
    if kind == "plateau" and stop_on_plateau:
        return Response("stop", "the run stops here")
    if kind != "plateau" and num_processes > 1:
        return _nothing("each of several processes would decide by its own clock and memory")
    if kind == "starved":
        return _more_workers(workers_of(past))
    if len(earlier) >= max_responses:
        return _nothing(f"there were {len(earlier)} responses to this alarm already")
    if kind == "plateau":
        if rates := ", ".join(rates_of(workload.space)):
            return Response("search", f"a search of {rates} begins")
        return _nothing("no learning rate may be changed")
    if not workload.execution_options:
        return _nothing("the workload has no execution options")
    if kind == "memory":
        return Response("save memory", "the execution options that take the least memory")
    return _faster(alarm, workload, settings, past, active)


def _faster(
    alarm: Alarm,
    workload: Workload,
    settings: Settings,
    past: Sequence[Decision],
    active: Sequence[str],
) -> Response:
    """The response to ``slow`` or ``idle`` of a workload with execution options."""
    now = {name: settings[name] for name in workload.execution_options}
    chosen = next((d for d in reversed(past) if d.timings), None)
    if chosen and chosen.alarm and chosen.alarm.step == alarm.step:
        return _nothing("the execution options were chosen just now")
    if "starved" in active:
        return _nothing("the steps wait for data")
    if any(d.changes for d in past if is_answer(d, "memory")):
        return _nothing("the execution options are those that take the least memory")
    winners = [t.settings for t in chosen.timings if t.verdict in WON] if chosen else []
    if alarm.kind == "idle" and now in winners:
        return _nothing("the execution options are the fastest of those that were timed")
    return Response("time options", "the fastest execution options")


def _more_workers(workers: int) -> Response:
    if workers >= MOST_WORKERS:
        return _nothing(f"{workers} threads draw data already, the most that may")
    more = min(2 * workers, MOST_WORKERS)
    return Response("add workers", f"{more} threads draw data, {2 * more} batches ahead", more)


def _nothing(reason: str) -> Response:
    return Response("nothing", f"no response: {reason}")


def is_answer(decision: Decision, kind: str) -> bool:
    """Whether a decision is a response to such an alarm in which something was done or tried."""
    if decision.kind != "response" or decision.alarm is None or decision.alarm.kind != kind:
        return False
    return decision.verdict != "kept" or bool(decision.timings)


def workers_of(past: Sequence[Decision]) -> int:
    """Number of threads that draw data after these decisions."""
    changes = [
        d.changes["workers"] for d in past if d.kind == "response" and "workers" in d.changes
    ]
    return int(changes[-1][1]) if changes else 1


def searches_of(past: Sequence[Decision]) -> list[Decision]:
    """The responses by which a search of the learning rates began."""
    return [d for d in past if is_answer(d, "plateau") and d.verdict == "accepted"]


def said_of_options(
    changes: Mapping[str, tuple[Setting, Setting]], compiled: Sequence[TimedOptions] = ()
) -> str:
    """What the choice of execution options came to, in words.

    Args:
      changes: of the options, ``{name: (old, new)}``.
      compiled: those that were compared by their memory; none if it was by their time.
    """
    chosen = ", ".join(f"{name} {old} to {new}" for name, (old, new) in changes.items())
    if not compiled:
        return f"steps are faster: {chosen}" if changes else "no execution options are faster"
    now = human_bytes(compiled[0].bytes or 0)
    if not changes:
        return f"no execution options take less memory than {now}"
    (least,) = (human_bytes(one.bytes or 0) for one in compiled if one.verdict == "adopted")
    return f"a step takes {least} and not {now}: {chosen}"


def rate_search(space: Space) -> Proposer:
    """One round that multiplies each rate of a space by each of `FACTORS`.

    What makes a run stall is far off; what is not is left to the phases of the run.
    """

    def propose(snapshot: Snapshot, decisions: Sequence[Decision], phase: int) -> list[Change]:
        changes: dict[tuple[str, float], Change] = {}
        if any(decision.phase == phase for decision in decisions):
            return []
        for factor, (name, axis) in itertools.product(FACTORS, rates_of(space).items()):
            old = float(snapshot.settings[name])
            if (new := axis.scaled(old, factor)) != old:
                reason, direction = f"{name} {old:.4g} to {new:.4g}", 1 if new > old else -1
                changes[name, new] = Change({name: new}, name, axis.score, reason, direction)
        return list(changes.values())

    return propose


def rates_of(space: Space) -> dict[str, Scale]:
    """The part of a space that a search in response to a plateau changes."""
    return {k: axis for k, axis in space.items() if k in LEARNING_RATES and isinstance(axis, Scale)}
