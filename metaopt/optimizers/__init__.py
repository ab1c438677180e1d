"""Optimisers: the inner ones by name, the outer one, and rates that tune themselves."""

from metaopt.optimizers.inner import INNER_OPTIMIZERS, lamb, lars, lion
from metaopt.optimizers.muon import scale_by_muon
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.optimizers.schedule_free import at_average, gradient_point, schedule_free
from metaopt.optimizers.self_tuned import current_rate, current_values, self_tuned

__all__ = [
    "INNER_OPTIMIZERS",
    "OuterConfig",
    "at_average",
    "current_rate",
    "current_values",
    "gradient_point",
    "lamb",
    "lars",
    "lion",
    "outer_optimizer",
    "scale_by_muon",
    "schedule_free",
    "self_tuned",
]
