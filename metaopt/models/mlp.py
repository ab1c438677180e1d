"""The multilayer perceptron of sinusoid regression."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.models.linen import from_linen
from metaopt.ranges import Width, check_value
from metaopt.types import Array, Model


class MLP(nn.Module):
    """Dense layers ``layer_0, layer_1, ...`` with activations, then a dense ``head``."""

    hidden: tuple[int, ...]
    out_dim: int
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[S, D_in]`` to ``[S, D_out]``."""
        for i, width in enumerate(self.hidden):
            x = self.activation(nn.Dense(width, name=f"layer_{i}")(x))
        return nn.Dense(self.out_dim, name="head")(x)


def mlp(
    in_dim: int,
    out_dim: int,
    hidden: Sequence[int] = (40, 40),
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> Model:
    """A multilayer perceptron; the default is the regression model of Finn et al. (2017).

    Args:
      in_dim: features of an input.
      out_dim: features of an output.
      hidden: widths of the hidden layers; empty for a linear model.
      activation: elementwise nonlinearity after each hidden layer.

    Returns:
      A model from float32 ``[S, in_dim]`` to ``[S, out_dim]``.

    Raises:
      UserError: if a width is less than 1.

    References:
      Finn, Abbeel, Levine, 2017. Model-Agnostic Meta-Learning for Fast
      Adaptation of Deep Networks. arXiv:1703.03400, section 5.1.
    """
    check_value("the mlp's width", (in_dim, *hidden, out_dim), tuple[Width, ...])
    return from_linen(MLP(tuple(hidden), out_dim, activation), jnp.zeros((1, in_dim)))
