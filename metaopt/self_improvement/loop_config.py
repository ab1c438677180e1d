"""When the loop does what, and what a run under it gives."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from metaopt.errors import UserError
from metaopt.ranges import Checked, Range, Seconds, Steps, StepsOr0
from metaopt.self_improvement.assess import Assessment
from metaopt.self_improvement.budget import Margin, TrialConfig
from metaopt.self_improvement.journal import Ledger
from metaopt.self_improvement.monitor import Alarm, MonitorConfig
from metaopt.self_improvement.trials import Decision
from metaopt.self_improvement.workload import Snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(Checked):
    """When the loop does what; fractions are of the examples of the run.

    Attributes:
      phases: when a search begins anew; none for a run that changes nothing.
      shares: how much each phase may spend on trials that are not gone on with, and on judging
        all of them where that counts (`Workload.evaluation_examples`).
      margins: in each phase, what `TrialConfig.margin` is: short trials prefer small rates all
        the more the later it is, annealed or not (halving it seemed to gain 1 % of the loss of a
        language model and 16 % of a classifier's, and cost some in the end), so what is changed
        late is what is plainly wrong.
      trials: how changes are tried.
      ways_seconds: for the search through a workload's ``ways`` to compute a step, compiling
        included: at the start, and after a search that changed the batch, if there are phases.
      memory_budget: bytes a device that a step may take; up to 1, a fraction of what it has.
      assess_every: a held-out evaluation, and a checkpoint.
      keep_every: steps from one snapshot to go back to to the next.
      max_roll_backs: in a row without a decision or an assessment between them; then the
        run has `Diverged`.
      count_flops: of a step, by tracing it once more, for its FLOP/s and their share of the peak
        of the devices, which is measured once a process; for nothing if they cannot be counted.
        Those of an example are taken for the same whatever is changed later.
      monitor: thresholds of the alarms.
    """

    phases: tuple[Annotated[float, Range(0, 0.999)], ...] = (0.0, 0.35)
    shares: tuple[Annotated[float, Range(0, 1000)], ...] = (0.2, 0.03)
    margins: tuple[Margin, ...] = (0.002, 0.1)
    trials: TrialConfig = dataclasses.field(default_factory=TrialConfig)
    ways_seconds: Seconds = 60.0
    memory_budget: Annotated[float, Range(1e-6, 1e15)] = 0.8
    assess_every: Annotated[float, Range(1e-6, 1)] = 0.1
    keep_every: Steps = 20
    max_roll_backs: StepsOr0 = 5
    count_flops: bool = True
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)

    def __post_init__(self):
        super().__post_init__()
        if len(self.margins) < len(self.phases) or len(self.shares) != len(self.phases):
            raise UserError(
                f"phases {self.phases} need a share each, not {self.shares}, and a margin each, "
                f"not {self.margins}"
            )
        if list(self.phases) != sorted(self.phases):
            raise UserError(f"phases {self.phases} must ascend")


class Outcome(NamedTuple):
    """What a run gives.

    Attributes:
      snapshot: where it ended: the state and the settings.
      decisions: in order.
      curve: one assessment each `LoopConfig.assess_every`.
      ledger: what it cost.
      alarms: those raised.
      earlier: decisions of past runs of the same task, with whose search it went on.
    """

    snapshot: Snapshot
    decisions: list[Decision]
    curve: list[Assessment]
    ledger: Ledger
    alarms: list[Alarm]
    earlier: Sequence[Decision] = ()
