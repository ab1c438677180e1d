"""The closed loop: a training run that monitors, assesses, optimises and remembers itself.

Each part is a module of its own, usable alone; what a notebook wants of them is here.
"""

from metaopt.self_improvement.assess import Assessment, CostConfig
from metaopt.self_improvement.builders import (
    default_settings,
    meta_training,
    plain_training,
)
from metaopt.self_improvement.improving import Searched, improving_train
from metaopt.self_improvement.loop import Ledger, LoopConfig, Outcome, run
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.proposers import pattern_search
from metaopt.self_improvement.trials import Change, Decision, TrialConfig
from metaopt.self_improvement.workload import Choice, Scale, Snapshot, Workload
from metaopt.training.monitor import Alarm, Monitor, MonitorConfig

__all__ = [
    "Alarm",
    "Assessment",
    "Change",
    "Choice",
    "CostConfig",
    "Decision",
    "Ledger",
    "LoopConfig",
    "Memory",
    "Monitor",
    "MonitorConfig",
    "Outcome",
    "Scale",
    "Searched",
    "Snapshot",
    "TrialConfig",
    "Workload",
    "default_settings",
    "improving_train",
    "meta_training",
    "pattern_search",
    "plain_training",
    "run",
]
