"""When the loop does what, and what a run under it gives."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from metaopt.errors import UserError
from metaopt.self_improvement.alarms import Alarm
from metaopt.self_improvement.assess import Assessment
from metaopt.self_improvement.budget import TrialConfig
from metaopt.self_improvement.journal import Ledger
from metaopt.self_improvement.symptoms import MonitorConfig
from metaopt.self_improvement.trials import Decision
from metaopt.self_improvement.workload import Snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
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

    phases: tuple[float, ...] = (0.0, 0.35)
    shares: tuple[float, ...] = (0.2, 0.03)
    margins: tuple[float, ...] = (0.002, 0.1)
    trials: TrialConfig = dataclasses.field(default_factory=TrialConfig)
    ways_seconds: float = 60.0
    memory_budget: float = 0.8
    assess_every: float = 0.1
    keep_every: int = 20
    max_roll_backs: int = 5
    count_flops: bool = True
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)

    def __post_init__(self):
        if len(self.margins) < len(self.phases) or len(self.shares) != len(self.phases):
            raise UserError(
                f"phases {self.phases} need a share each, not {self.shares}, and a margin each, "
                f"not {self.margins}"
            )
        if list(self.phases) != sorted(self.phases):
            raise UserError(f"phases {self.phases} must ascend")
        if not all(0 <= phase < 1 for phase in self.phases) or not 0 < self.assess_every <= 1:
            raise UserError("phases must be from 0 on and below 1, and assess_every in (0, 1]")
        if not all(share >= 0 for share in self.shares):
            raise UserError(f"shares {self.shares} must not be negative")
        if self.ways_seconds < 0 or self.memory_budget <= 0:
            raise UserError("ways_seconds must not be negative, and memory_budget must be above 0")
        if self.keep_every < 1 or self.max_roll_backs < 0:
            raise UserError("keep_every must be at least 1 and max_roll_backs at least 0")


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
