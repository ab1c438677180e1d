"""How long trials are, and which of them a search has the budget for."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from metaopt.ranges import Checked, Range, Share, Steps
from metaopt.self_improvement.attempts import Change
from metaopt.self_improvement.workload import Settings, Snapshot, Workload

Margin = Annotated[float, Range(0, 0.999)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig(Checked):
    """How changes are tried.

    Attributes:
      examples: a trial's, as a fraction of the run.
      longer: a change that refines (`Change.level`) has so many times the examples of one a
        level above it.
      anneal: after those, so many more, as a fraction of them, with rates that go to zero:
        a trial is judged by what the run would be if it ended there, since without that
        short trials prefer small rates (Wu et al., 2018, the short-horizon bias).
      margin: a difference in the held-out loss smaller than this fraction of it is none.
      least_steps: a trial has at least so many steps of the batch that the run has, and a batch
        of which it would have fewer is not tried.
    """

    examples: Annotated[float, Range(1e-9, 0.999)] = 0.01
    longer: Annotated[float, Range(1, 1000)] = 4.0
    anneal: Share = 0.33
    margin: Margin = 0.002
    least_steps: Steps = 4

    def size(self, workload: Workload, settings: Settings, level: int = 0) -> int:
        """Examples of a trial, without those to anneal."""
        least = self.least_steps * workload.examples_per_step(settings)
        return round(self.longer**level * max(least, round(self.examples * workload.num_examples)))

    def possible(self, workload: Workload, settings: Settings, change: Change) -> bool:
        """Whether a trial as long as it should be is enough to judge the change by."""
        size = self.size(workload, settings, change.level)
        return self.judges(workload, settings, change, size)

    def judges(self, workload: Workload, settings: Settings, change: Change, size: int) -> bool:
        """Whether a trial of so many examples is long enough to judge the change by."""
        batch = workload.examples_per_step({**settings, **change.settings})
        return size >= self.least_steps * batch


def affordable(
    workload: Workload,
    snapshot: Snapshot,
    changes: Sequence[Change],
    config: TrialConfig,
    budget: float,
    *,
    size: int = 0,
) -> tuple[list[Change], int]:
    """Of the changes those that can be tried now, and the examples of their trials.

    Nothing of a higher rank is tried while something of a lower one is possible, and nothing is
    refined while something coarse is to be tried. What refines has trials as long as
    it should; the last one that the budget is good for may have half of it. Where there is only
    budget for trials of the size before, they are believed against their bias alone: only what
    makes a setting smaller is tried, for at the start of a run short trials prefer rates that
    are too large.

    Args:
      workload: the training.
      snapshot: where it stands.
      changes: in the order of their worth.
      config: how they are tried.
      budget: in examples that are not gone on with.
      size: of the trials of the race before, in this search; they do not become shorter.
    """
    settings = snapshot.settings
    possible = [c for c in changes if config.possible(workload, settings, c)]
    first = min((change.rank for change in possible), default=0)
    possible = [change for change in possible if change.rank == first]
    level = min((change.level for change in possible), default=0)
    found = [change for change in possible if change.level == level]
    wanted = max(size, config.size(workload, settings, level))
    each, room = 1 + config.anneal, _room(workload, snapshot, possible, config)

    def affords(number: int) -> float:
        """The size of so many trials beside one without a change, the best gone on with."""
        trials = number + 1 + _is_merged(found[:number])
        left = budget - (trials + 1) * workload.evaluation_examples  # one is of where all start
        return min(wanted, room, left / (each * trials - 1))

    if size != wanted:
        for number in range(len(found), 0, -1):
            least = wanted / 2 if level and number == 1 else wanted
            if affords(number) >= max(size + 1, least):
                found, size = found[:number], int(affords(number))
                return [c for c in found if config.judges(workload, settings, c, size)], size
        found = [change for change in possible if change.way < 0] if level else found
    if not 0 < size <= room:
        return [], size
    found = [c for c in found if config.judges(workload, settings, c, size)]
    one = each * size + workload.evaluation_examples
    while found and one * (len(found) + _is_merged(found)) > budget:
        found = found[:-1]
    return found, size


def _room(
    workload: Workload, snapshot: Snapshot, changes: Sequence[Change], config: TrialConfig
) -> float:
    """The size of a trial that ends with the run, whatever batch it is of."""
    batches = [
        workload.examples_per_step({**snapshot.settings, **settings})
        for settings in ({}, *(change.settings for change in changes))
    ]
    left = workload.num_examples - snapshot.examples - 2 * max(batches)
    return left / (1 + config.anneal)


def _is_merged(changes: Sequence[Change]) -> bool:
    """Whether there may be one more trial, of several settings together."""
    return len({change.setting for change in changes if change.score == "loss"}) > 1
