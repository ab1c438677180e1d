"""Proposers: which changes of settings are worth a trial, as functions of what was decided.

They keep no state of their own: where a search stands is read off the decisions, which are on
disk, so a run that is resumed goes on with the very next change.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax

from metaopt.self_improvement.trials import Change, Decision, Proposer
from metaopt.self_improvement.workload import Choice, Scale, Setting, Snapshot, Space, Workload

LEAST_FACTOR = 1.3
"""A search along a setting ends when its factor has come down to this."""
LATER_FACTOR = 2.0
"""Of the first attempts of all phases after the first."""

Directions = Callable[[Snapshot], Mapping[str, float]]
"""The slope of the loss in the logarithm of a setting; nothing for no opinion."""


def pattern_search(space: Space, directions: Directions | None = None) -> Proposer:
    """Changes each setting by a factor, up and down, and refines the factor where neither helps.

    A setting that was changed with success is tried further in that direction alone; where
    neither direction is better the factor becomes its square root, until it is
    `LEAST_FACTOR`; where both differences are within the noise at once, the setting is
    left alone until the next phase (Hooke and Jeeves, 1961, on a logarithmic scale, all
    settings side by side). A choice has each of its values tried once a phase. What is judged by
    its efficiency is only lowered when nothing that is judged by the loss is left to try.

    Args:
      space: what may be changed.
      directions: an oracle, such as `descent`, that spares the attempts against it while the
        factor is coarse.
    """

    def propose(snapshot: Snapshot, decisions: Sequence[Decision], phase: int) -> list[Change]:
        past = [decision for decision in decisions if decision.phase == phase]
        signs = directions(snapshot) if directions else {}
        changes = []
        for name, axis in space.items():
            value = snapshot.settings[name]
            if isinstance(axis, Choice):
                changes += _choices(name, axis, value, past)
            else:
                where = _where(name, axis, past, phase, signs.get(name, 0.0))
                changes += _factors(name, axis, snapshot, where, space)
        if any(change.score == "loss" for change in changes):
            changes = [change for change in changes if not _slows(change, snapshot)]
        return changes

    return propose


def _slows(change: Change, snapshot: Snapshot) -> bool:
    """Whether it makes less of what efficiency is about, such as a smaller batch."""
    if change.score != "efficiency" or isinstance(change.settings[change.setting], str):
        return False
    return float(change.settings[change.setting]) < float(snapshot.settings[change.setting])


def _choices(name: str, axis: Choice, value: Setting, past: Sequence[Decision]) -> list[Change]:
    entries = [e for d in past for e in d.evidence if e["setting"] == name]
    # What was better, but not the best of its race, is worth another one.
    tried = {e["settings"][name] for e in entries if e["accepted"] or e["verdict"] != "better"}
    left = {decision.changes[name][0] for decision in past if name in decision.changes}
    rest = [v for v in axis.values if v != value and v not in tried | left]
    return [Change({name: v}, name, axis.score, f"{name} {value} to {v}") for v in rest]


def _factors(
    name: str,
    axis: Scale,
    snapshot: Snapshot,
    where: tuple[float, list[int]],
    space: Space,
) -> list[Change]:
    factor, ways = where
    if factor < LEAST_FACTOR:
        return []
    changes = (_scaled(name, axis, snapshot.settings, factor**way, space) for way in ways)
    return [change for change in changes if change is not None]


def _where(
    name: str, axis: Scale, past: Sequence[Decision], phase: int, sign: float
) -> tuple[float, list[int]]:
    """The factor and the directions that the search along a setting has come to."""
    factor = axis.factor if phase == 0 else min(axis.factor, LATER_FACTOR)
    ways = [1, -1] if not sign else [-1 if sign > 0 else 1]
    for decision in past:
        tried = [e for e in decision.evidence if e["setting"] == name]
        if not tried:
            continue
        if any(e["accepted"] for e in tried):
            old, new = map(float, decision.changes[name])
            ways = [1 if new > old else -1]
        elif all(e["verdict"] == "noise" for e in tried):
            return 1.0, ways
        elif not any(e["verdict"] == "better" for e in tried):
            factor, ways = math.sqrt(factor), [1, -1]
    return factor, ways


def _scaled(
    name: str, axis: Scale, settings: Mapping[str, Setting], factor: float, space: Space
) -> Change | None:
    """The change by a factor, with what is coupled to it; None where the bounds forbid it."""
    old = float(settings[name])
    new = axis.scaled(old, factor)
    if math.isclose(new, old, rel_tol=1e-3):
        return None
    values: dict[str, Setting] = {name: new}
    for other, power in axis.coupled.items():
        scaled = float(settings[other]) * (new / old) ** power
        bounds = space.get(other)
        values[other] = bounds.scaled(scaled, 1.0) if isinstance(bounds, Scale) else scaled
    return Change(values, name, axis.score, f"{name} {old:.4g} to {new:.4g}")


def descent(workload: Workload, num_steps: int = 4, least: float = 0.01) -> Directions:
    """The signs of the meta-gradient of a few steps, ``d L(θ_{t+W}) / d log h`` for each scalar h.

    The run is cut into windows of W steps; the gradient is exact within the one that is
    about to begin, and the state before it is held constant (truncated back-propagation).

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
