"""Inner optimisers by name: optax's, with settings whose own derivative is finite and useful.

Each is ``learning_rate -> optax.GradientTransformation``, for any learner. The settings
beside the rate are the published ones, but for those that a derivative needs:

- Adam and LAMB take ``eps_root``. Without it, the first step of Adam is the sign of the gradient,
  whose derivative is zero, save near zero, where it is huge.
- Adagrad starts from a small accumulator, on the scale of squared inner gradients; optax's 0.1
  would make its first steps those of gradient descent.
- None has weight decay, so that what a support does not touch stays where it is.
"""

import functools
from collections.abc import Callable
from typing import Literal

import optax

OptimizerName = Literal[
    "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "lars", "lamb", "lion"
]


def lars(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Momentum on steps that are a given fraction of the norm of each array of parameters.

    Mathematics: ``m ← 0.9 m + α |θ^l| / (|g^l| + ε) g^l`` and ``θ^l ← θ^l − m`` for each
    array l, with ε = 1e-6. Where the gradient or the array is zero the fraction is 1.

    References:
      You et al., 2017, "Large Batch Training of Convolutional Networks", section 4. Its
      trust coefficient is part of the rate here.
    """
    return optax.lars(learning_rate, trust_coefficient=1.0, momentum=0.9, eps=1e-6)


def lamb(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam's direction, in steps that are a given fraction of the norm of each array.

    Mathematics: ``θ^l ← θ^l − α |θ^l| / (|r^l| + ε) r^l`` with r from Adam and ε = 1e-6.

    References:
      You et al., 2020, "Large Batch Optimization for Deep Learning", algorithm 2.
    """
    return optax.chain(
        optax.scale_by_adam(eps=1e-6, eps_root=1e-8),
        optax.scale_by_trust_ratio(eps=1e-6),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Steps of one size, along the sign of a momentum.

    The derivative of a sign is zero: MAML's meta-gradient through Lion is FOMAML's.

    References:
      Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
    """
    return optax.lion(learning_rate, weight_decay=0.0)


INNER_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "nesterov": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adagrad": functools.partial(optax.adagrad, initial_accumulator_value=1e-4),
    "rmsprop": optax.rmsprop,
    "adam": functools.partial(optax.adam, eps_root=1e-8),
    "lars": lars,
    "lamb": lamb,
    "lion": lion,
}
