"""What is meta-learned: one file a learner, each a `metaopt.types.Learner`."""

from metaopt.learners.anil import anil
from metaopt.learners.learned_rates import meta_sgd, per_layer_per_step
from metaopt.learners.maml import maml
from metaopt.learners.per_step import per_step_parameters

__all__ = ["anil", "maml", "meta_sgd", "per_layer_per_step", "per_step_parameters"]
