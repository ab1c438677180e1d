"""What is meta-learned: one file a learner, each a `metaopt.types.Learner`.

`maml`, `meta_sgd`, `per_layer_per_step` and `anil` make learners; `per_step_parameters`,
`learned_loss` and `fixed_start` make another of a learner.
"""

from metaopt.learners.anil import anil
from metaopt.learners.bilevel import fixed_start, learned_loss
from metaopt.learners.learned_rates import meta_sgd, per_layer_per_step
from metaopt.learners.maml import maml
from metaopt.learners.per_step import per_step_parameters

__all__ = [
    "anil",
    "fixed_start",
    "learned_loss",
    "maml",
    "meta_sgd",
    "per_layer_per_step",
    "per_step_parameters",
]
