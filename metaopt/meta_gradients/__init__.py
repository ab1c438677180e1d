"""How the meta-gradient is found: one file an estimator, all behind one signature.

An estimator is ``(learner, loss_fn, inner_loop, *, outer_loss=None, options) -> MetaGradFn``, and
the result takes ``(meta_params, hparams, episode, key)`` to ``(meta-gradient, metrics)`` of
one episode. It knows nothing of other tasks, devices and the outer optimiser.
"""

from metaopt.meta_gradients.evolution import evolution, evolution_windows
from metaopt.meta_gradients.first_order import first_order
from metaopt.meta_gradients.implicit import implicit, proximal
from metaopt.meta_gradients.joint import joint
from metaopt.meta_gradients.mixed_mode import mixed_mode
from metaopt.meta_gradients.reptile import reptile
from metaopt.meta_gradients.reverse import reverse
from metaopt.meta_gradients.streaming import streaming
from metaopt.meta_gradients.truncated import truncated, truncated_windows
from metaopt.meta_gradients.windows import Windows

__all__ = [
    "Windows",
    "evolution",
    "evolution_windows",
    "first_order",
    "implicit",
    "joint",
    "mixed_mode",
    "proximal",
    "reptile",
    "reverse",
    "streaming",
    "truncated",
    "truncated_windows",
]
