"""Proposers: which changes of settings are worth a trial, as functions of what was decided.

They keep no state of their own: where a search stands is read off the decisions, which are on
disk, so a run that is resumed goes on with the very next change.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

import jax

from metaopt.self_improvement.trials import Change, Decision, Proposer
from metaopt.self_improvement.workload import Choice, Scale, Setting, Snapshot, Space, Workload

LEAST_FACTOR = 2.0
"""A search along a setting ends when its factor has come down below this."""
LATER_FACTOR = 2.0
"""Of the first attempts of all phases after the first."""

Directions = Callable[[Snapshot], Mapping[str, float]]
"""The slope of the loss in the logarithm of a setting; nothing for no opinion."""


def pattern_search(space: Space, directions: Directions | None = None) -> Proposer:
    """Changes each setting by a factor, up and down, and refines the factor where neither helps.

    A setting that was changed with success is tried further in that direction alone; where
    neither direction is better the factor becomes its square root, down to `LEAST_FACTOR`, and
    the smaller value comes first, which also wins a tie. Where all is within the noise the
    setting is left alone until the next phase (Hooke and Jeeves, 1961, on a logarithmic scale,
    all settings side by side). Where another setting was changed in the same race, what was not
    better is judged anew, in the smaller direction: short trials prefer rates that are too large.
    What is judged by its efficiency is only lowered when nothing that is judged by the loss is
    left to try, and what is judged by a clock is not refined. A choice has each of its values
    tried once a phase; one that is judged by the loss comes last of all and in trials as long as
    those that refine: what an optimiser is worth cannot be told at a rate that does not suit it
    (Choi et al., 2019). Once one is accepted, scales are refined anew.

    Args:
      space: what may be changed.
      directions: an oracle, such as `descent`, that spares the attempts against it while the
        factor is coarse.
    """

    def propose(snapshot: Snapshot, decisions: Sequence[Decision], phase: int) -> list[Change]:
        past = [d for d in decisions if d.phase == phase and d.verdict != "rolled back"]
        signs = directions(snapshot) if directions else {}
        chosen = {name for name, axis in space.items() if _is_late(axis)}
        changes, choices = [], []
        for name, axis in space.items():
            if isinstance(axis, Choice):
                choices += _choices(name, axis, snapshot.settings, past, space)
            else:
                where = _where(name, axis, past, phase, signs.get(name, 0.0), chosen)
                changes += _factors(name, axis, snapshot.settings, where, space)
        if any(change.score == "loss" for change in changes):
            changes = [change for change in changes if not _slows(change)]
        return [*changes, *choices]

    return propose


def _slows(change: Change) -> bool:
    """Whether it makes less of what efficiency is about, such as a smaller batch."""
    return change.score == "efficiency" and change.way < 0


def _choices(
    name: str,
    axis: Choice,
    settings: Mapping[str, Setting],
    past: Sequence[Decision],
    space: Space,
) -> list[Change]:
    value = settings[name]
    entries = [e for d in past for e in d.evidence if e["setting"] == name]
    # What was better, but not the best of its race, is worth another one.
    tried = {e["settings"][name] for e in entries if e["accepted"] or e["verdict"] != "better"}
    left = {decision.changes[name][0] for decision in past if name in decision.changes}
    changes = []
    for new in axis.values:
        if new == value or new in tried | left:
            continue
        factors = axis.factors(value, new)
        values = {name: new} | {k: _times(k, settings, x, space) for k, x in factors.items()}
        late = int(_is_late(axis))
        reason = f"{name} {value} to {new}"
        changes.append(Change(values, name, axis.score, reason, level=late, rank=late))
    return changes


def _times(name: str, settings: Mapping[str, Setting], factor: float, space: Space) -> float:
    """A setting so many times as large, within its bounds if it has any."""
    axis, value = space.get(name), float(settings[name])
    return axis.scaled(value, factor) if isinstance(axis, Scale) else value * factor


class _Where(NamedTuple):
    """Where the search along a setting stands: what to try is ``factor ** way``."""

    factor: float
    ways: tuple[int, ...]
    level: int


def _factors(
    name: str, axis: Scale, settings: Mapping[str, Setting], where: _Where, space: Space
) -> list[Change]:
    levels = math.inf if axis.score == "loss" else 1
    while where.factor >= LEAST_FACTOR and where.level < levels:
        changes = [_scaled(name, axis, settings, where, way, space) for way in where.ways]
        if found := [change for change in changes if change is not None]:
            return found
        where = _refined(where)  # the bounds leave no room for more
    return []


def _refined(where: _Where) -> _Where:
    return _Where(math.sqrt(where.factor), (-1, 1), where.level + 1)


def _is_late(axis: Scale | Choice) -> bool:
    """Whether it is a choice that is judged by the loss."""
    return isinstance(axis, Choice) and axis.score == "loss"


def _where(
    name: str,
    axis: Scale,
    past: Sequence[Decision],
    phase: int,
    slope: float,
    chosen: Set[str],
) -> _Where:
    """What the search along a setting has come to since a choice was made, of those ``chosen``."""
    made = [i for i, decision in enumerate(past) if chosen & decision.changes.keys()]
    factor = axis.factor if phase == 0 else min(axis.factor, LATER_FACTOR)
    ways: tuple[int, ...] = (1, -1) if not slope else (-1 if slope > 0 else 1,)
    where = _Where(factor, ways, 0)
    if made and axis.score == "loss":  # it is about right, as the settings were
        past, where = past[made[-1] + 1 :], _Where(LATER_FACTOR, (-1, 1), 1)
    for decision in past:
        tried = [e for e in decision.evidence if e["setting"] == name]
        if not tried:
            continue
        better = [e for e in tried if e["accepted"]]
        better = better or [e for e in tried if e["verdict"] == "better"]
        if better:
            where = where._replace(ways=tuple(e["way"] for e in better))
        elif decision.verdict == "accepted":  # of another setting, so this one may now differ
            where = where._replace(ways=(-1,) if axis.score == "loss" else where.ways)
        elif all(e["verdict"] == "noise" for e in tried):
            return where._replace(factor=1.0)
        else:
            where = _refined(where)
    return where


def _scaled(
    name: str,
    axis: Scale,
    settings: Mapping[str, Setting],
    where: _Where,
    way: int,
    space: Space,
) -> Change | None:
    """The change of a setting, with what is coupled to it; None where the bounds leave no room."""
    old = float(settings[name])
    new = axis.scaled(old, where.factor**way)
    if abs(math.log(new / old)) < 0.5 * math.log(where.factor):
        return None
    values: dict[str, Setting] = {name: new}
    for other, power in axis.coupled.items():
        values[other] = _times(other, settings, (new / old) ** power, space)
    return Change(values, name, axis.score, f"{name} {old:.4g} to {new:.4g}", way, where.level)


def descent(workload: Workload, num_steps: int = 4, least: float = 0.01) -> Directions:
    """The signs of the meta-gradient of a few steps, ``d L(θ_{t+W}) / d log h`` for each scalar h.

    The run is cut into windows of W steps; the gradient is exact within the one that is
    about to begin, and the state before it is held constant (truncated back-propagation). What
    that costs counts in seconds alone, and not in the budget of a search.

    Args:
      workload: with a ``window_loss``.
      num_steps: W.
      least: a derivative smaller than this fraction of the loss gives no direction.

    References:
      Shaban et al., 2019, "Truncated Back-propagation for Bilevel Optimization"; Baydin et
      al., 2018, "Online Learning Rate Adaptation with Hypergradient Descent" (W = 1).
    """
    window_loss = workload.window_loss
    assert window_loss is not None, "this workload has no differentiable window"

    def directions(snapshot: Snapshot) -> dict[str, float]:
        state = snapshot.state

        def loss(hparams):
            moved = state._replace(hparams=hparams)
            return window_loss(moved, snapshot.settings, snapshot.examples, num_steps)

        value, grads = jax.device_get(jax.value_and_grad(loss)(state.hparams))
        slopes = {name: float(g * state.hparams[name]) for name, g in grads.items()}
        return {
            name: slope
            for name, slope in slopes.items()
            if name in workload.space and math.isfinite(slope) and abs(slope) > least * abs(value)
        }

    return directions
