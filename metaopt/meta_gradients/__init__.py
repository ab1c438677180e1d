"""How the meta-gradient is found: one file an estimator, all behind one signature.

An estimator is ``(learner, loss_fn, inner_loop) -> MetaGradFn``, and the result
takes ``(meta_params, hparams, episode, key)`` to ``(meta-gradient, metrics)`` of
one episode. Tasks, devices and the outer optimiser are no concern of it.
"""

from metaopt.meta_gradients.first_order import first_order
from metaopt.meta_gradients.joint import joint
from metaopt.meta_gradients.mixed_mode import mixed_mode
from metaopt.meta_gradients.reptile import reptile
from metaopt.meta_gradients.reverse import reverse

__all__ = ["first_order", "joint", "mixed_mode", "reptile", "reverse"]
