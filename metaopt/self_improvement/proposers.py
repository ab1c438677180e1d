"""Proposers: which changes of settings are worth a trial, as functions of earlier decisions.

They keep no state of their own: the state of a search is read off the decisions, which are on
disk, so a run that is resumed continues with the very next change.
"""

import math
from collections.abc import Sequence, Set
from typing import NamedTuple

from metaopt.self_improvement.assess import Assessment
from metaopt.self_improvement.records import Decision, TriedChange
from metaopt.self_improvement.trials import Change, Proposer
from metaopt.self_improvement.workload import (
    SCHEDULED,
    SHARE,
    Choice,
    Scale,
    Setting,
    Settings,
    Snapshot,
    Space,
    is_share,
    share_of,
)

LEAST_FACTOR = 2.0
"""Factor below which the search along a setting ends."""
EXPLODED = 1.5
"""Ratio of losses beyond which a trial has exploded."""
LATER_FACTOR = 2.0
"""First factor in all phases after the first."""


def pattern_search(space: Space) -> Proposer:
    """Changes each setting of a space by a factor, up or down; refines it if neither helps.

    After a success a setting is tried further in that direction alone; if neither direction is
    better, the factor becomes its square root, down to `LEAST_FACTOR`, and the smaller value
    comes first. If all is within the noise, the setting is left alone until the next phase
    (Hooke and Jeeves, 1961, on a logarithmic scale, all settings side by side). If nothing at all
    is better in the first round, the start is good, and no scale is tried further; but one whose
    larger value exploded may itself be far too large. A scheduled rate for which that seems so, or
    which the first round lowers, has a trial of the smaller value from the start of the run: what
    a large one did to the state outlasts it. If another setting was changed in the same round,
    what was not better is judged again, in the smaller direction (see
    `metaopt.self_improvement.trials` on the bias of short trials).

    What is judged by its efficiency is only lowered when nothing judged by the loss is left to
    try, and what is judged by a clock is not refined. A choice has each of its values tried once
    a phase. One that is judged by the loss comes last, in trials as long as those that refine:
    what an optimiser is worth cannot be told at a rate that does not suit it (Choi et al.,
    2019). Once one is accepted, scales are refined again.
    """
    late = {k for k, axis in space.items() if isinstance(axis, Choice) and axis.score == "loss"}

    def propose(snapshot: Snapshot, decisions: Sequence[Decision], phase: int) -> list[Change]:
        past = [d for d in decisions if d.phase == phase and d.verdict != "rolled back"]
        changes, choices = [], []
        for name, axis in space.items():
            if isinstance(axis, Scale) and snapshot.examples and phase == 0:
                changes += _from_start(name, axis, snapshot.settings, past)
            if isinstance(axis, Choice):
                choices += _choices(name, axis, snapshot.settings[name], past, int(name in late))
            else:
                probe = _next_probe(name, axis, past, phase, late)
                changes += _scalings(name, axis, snapshot.settings, probe, space)
        if any(change.score == "loss" for change in changes):
            changes = [c for c in changes if c.score != "efficiency" or c.direction >= 0]
        return [*changes, *choices]

    return propose


def _choices(
    name: str, axis: Choice, value: Setting, past: Sequence[Decision], level: int
) -> list[Change]:
    trials = [trial for d in past for trial in d.trials if trial.setting == name]
    # What was better, but not the best of its round, is worth another trial.
    tried = {t.settings[name] for t in trials if t.accepted or t.verdict != "better"}
    left = {decision.changes[name][0] for decision in past if name in decision.changes}
    return [
        Change({name: new}, name, axis.score, f"{name} {value} to {new}", level=level, rank=level)
        for new in axis.values
        if new not in {value, *tried, *left}
    ]


class _Probe(NamedTuple):
    """The next step of a search along a setting: what to try is ``factor ** direction``."""

    factor: float
    directions: tuple[int, ...]
    level: int

    def refined(self) -> "_Probe":
        return _Probe(math.sqrt(self.factor), (-1, 1), self.level + 1)


def _next_probe(
    name: str, axis: Scale, past: Sequence[Decision], phase: int, late: Set[str]
) -> _Probe:
    """The next step along a setting, after the decisions since the last change of a choice."""
    chosen = [i for i, decision in enumerate(past) if late & decision.changes.keys()]
    factor = axis.factor if phase == 0 else min(axis.factor, LATER_FACTOR)
    probe = _Probe(factor, (1, -1), 0)
    if chosen and axis.score == "loss":  # it is about right, as the settings were
        past, probe = past[chosen[-1] + 1 :], _Probe(LATER_FACTOR, (-1, 1), 1)
    found = False  # something better along this setting
    for number, decision in enumerate(past):
        tried = [trial for trial in decision.trials if trial.setting == name]
        if any(trial.from_start for trial in tried):
            good = decision.verdict != "kept"
            probe = probe._replace(factor=factor, directions=(-1,)) if good else probe
            found = found or good
            continue
        if number == 0 and not chosen and decision.verdict == "kept":
            probe = probe._replace(factor=1.0)
            continue
        better = [t for t in tried if t.accepted] or [t for t in tried if t.verdict == "better"]
        found = found or bool(better)
        if better:
            probe = probe._replace(directions=tuple(trial.direction for trial in better))
        elif tried and decision.verdict != "kept":  # another changed, so this may now differ
            probe = probe._replace(directions=(-1,) if axis.score == "loss" else probe.directions)
        elif tried and not found and all(trial.verdict == "noise" for trial in tried):
            return probe._replace(factor=1.0)
        elif tried:
            probe = probe.refined()
    return probe


def _from_start(
    name: str, axis: Scale, settings: Settings, past: Sequence[Decision]
) -> list[Change]:
    """A trial of a smaller rate from the start, if the first round says that it is too large."""
    if name not in SCHEDULED or len(past) != 1:
        return []
    (first,), old = past, float(settings[name])
    value = math.nan
    if name in first.changes and float(first.changes[name][1]) < float(first.changes[name][0]):
        value = old
    elif first.verdict == "kept" and any(_exploded(t) for t in first.trials if t.setting == name):
        value = axis.scaled(old, 1 / axis.factor)
    if not value <= old:
        return []
    reason = f"{name} {value:.4g} from the start"
    return [Change({name: value}, name, axis.score, reason, -1, from_start=True)]


def _exploded(trial: TriedChange) -> bool:
    """Whether more of a setting gave several times the loss of no change, or none at all."""
    if trial.direction <= 0 or trial.score != "loss" or trial.error:
        return False
    if trial.loss is None or trial.difference is None:
        return True
    return trial.loss > EXPLODED * (trial.loss - trial.difference)


def _scalings(
    name: str, axis: Scale, settings: Settings, probe: _Probe, space: Space
) -> list[Change]:
    """Changes of a setting and of what is coupled to it, where the bounds leave room for them."""
    levels, old, found = math.inf if axis.score == "loss" else 1, float(settings[name]), []
    while probe.factor >= LEAST_FACTOR and probe.level < levels and not found:
        for direction in probe.directions:
            new = axis.scaled(old, probe.factor**direction)
            if abs(math.log(new / old)) < 0.5 * math.log(probe.factor):
                continue
            values: dict[str, Setting] = {name: new}
            for other, power in axis.coupled.items():
                its, value = space.get(other), float(settings[other]) * (new / old) ** power
                values[other] = its.scaled(value, 1.0) if isinstance(its, Scale) else value
            reason = f"{name} {old:.4g} to {new:.4g}"
            found.append(Change(values, name, axis.score, reason, direction, probe.level))
        probe = probe.refined()
    return found


def data_shares(
    domains: Sequence[str],
    assessment: Assessment,
    settings: Settings,
    decisions: Sequence[Decision],
    phase: int,
) -> list[Change]:
    """More data of the domains that an assessment found weak, at most a quarter of them all.

    Their shares are multiplied by 4: once more if that was better, by 2 if it was not, and then
    they are left alone until the next phase. Nothing is proposed by an assessment before the first
    step. The trials are as long as those that refine: in a short one what is rare gains at once,
    and what is crowded out is forgotten later.

    Args:
      domains: whose shares are settings.
      assessment: the latest; its weaknesses come worst first.
      settings: of the next step.
      decisions: all of the run.
      phase: number of the search.
    """
    past = [d for d in decisions if d.phase == phase and d.verdict != "rolled back"]
    tried = [trial for d in past for trial in d.trials if is_share(trial.setting)]
    weak = [name for name in assessment.weaknesses if name in domains]
    weak = weak[: max(1, len(domains) // 4)]
    if not weak or not assessment.step or len(tried) > 1:
        return []
    factor = SHARE.factor if not tried or tried[0].accepted else math.sqrt(SHARE.factor)
    values = {name: float(settings[name]) for name in map(share_of, weak)}
    new: dict[str, Setting] = {k: SHARE.scaled(value, factor) for k, value in values.items()}
    few = ", ".join(weak[:3]) + (", ..." if len(weak) > 3 else "")
    reason = f"share of {len(weak)} weak domain{'s' * (len(weak) > 1)} ({few}) times {factor:.3g}"
    return [Change(new, share_of(weak[0]), "loss", reason, 1, level=1)]
