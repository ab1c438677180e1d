"""Learners of the initialisation and of inner learning rates: Meta-SGD and MAML++'s rates.

The learned quantity is the logarithm ρ of a factor on the base rate, ``α·exp(ρ)``,
zero at the start: rates stay positive and the outer optimiser moves them by
ratios, so that one outer rate serves rates of 0.01 and of 30 alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt.checks import check_factory, check_parameters, hparam
from metaopt.learners.maml import InnerOptimizer
from metaopt.pytrees import entries, entry
from metaopt.ranges import Steps, check_value
from metaopt.types import Array, Learner, Params, PyTree


def meta_sgd(
    inner_optimizer: InnerOptimizer = optax.sgd, *, num_steps: int | None = None
) -> Learner:
    """The initialisation and one learning rate a parameter.

    Mathematics: ``θ_{k+1} = θ_k − α exp(ρ) ⊙ ∇L(θ_k)``, with θ_0 and ρ
    meta-learned (the published rule learns ``α exp(ρ)`` itself, of either sign).

    Args:
      inner_optimizer: as for `maml`; its updates are multiplied by ``exp(ρ)``.
      num_steps: None shares the rates over the inner steps (the published rule
        takes a single step); K learns rates for each of K steps, ``[K, ...]`` a
        parameter. Steps past K use the last one's.

    Returns:
      A learner whose meta-parameters are ``{'params': ..., 'log_rates': ...}``.

    References:
      Li et al., 2017, "Meta-SGD: Learning to Learn Quickly", eq. (2).
    """
    if num_steps is not None:
        check_value("num_steps", num_steps, Steps)
    leading = () if num_steps is None else (num_steps,)
    return _learned_rates(
        inner_optimizer,
        init_rates=lambda params: jax.tree.map(lambda p: jnp.zeros(leading + jnp.shape(p)), params),
        expand=_one_a_parameter,
        per_step=num_steps is not None,
    )


def per_layer_per_step(inner_optimizer: InnerOptimizer = optax.sgd, *, num_steps: int) -> Learner:
    """The initialisation and one learning rate a layer and inner step.

    Mathematics: ``θ^l_{k+1} = θ^l_k − α exp(ρ^l_k) ∇_l L(θ_k)``; a layer is a
    top-level entry of the parameters (``layer_0``, ``embed``, ``head`` ...; a field of a module,
    an item of a list).

    Args:
      inner_optimizer: as for `maml`.
      num_steps: K, the steps that have rates of their own; steps past K use the last one's.

    Returns:
      A learner whose meta-parameters are ``{'params': ..., 'log_rates': {layer: [K]}}``.

    References:
      Antoniou et al., 2019, "How to train your MAML", section 4 (LSLR).
    """
    check_value("num_steps", num_steps, Steps)
    return _learned_rates(
        inner_optimizer,
        init_rates=lambda params: {name: jnp.zeros((num_steps,)) for name in entries(params)},
        expand=_one_a_layer,
        per_step=True,
    )


# Rates of another rank (of a learner with another number of steps) would broadcast.
def _one_a_parameter(rates: PyTree, updates: Params) -> Params:
    chex.assert_trees_all_equal_shapes(rates, updates)
    return rates


def _one_a_layer(rates: PyTree, updates: Params) -> Params:
    chex.assert_rank(list(rates.values()), 0)
    return jax.tree.map_with_path(lambda path, _: rates[entry(path)], updates)


def _learned_rates(
    inner_optimizer: InnerOptimizer,
    init_rates: Callable[[Params], PyTree],
    expand: Callable[[PyTree, Params], Params],
    per_step: bool,
) -> Learner:
    check_factory(inner_optimizer)

    def inner_opt(meta_params, hparams):
        return optax.chain(
            inner_optimizer(hparam(hparams, "inner_learning_rate")),
            scale_by_log_rates(meta_params["log_rates"], expand, per_step),
        )

    return Learner(
        init=lambda params: {
            "params": check_parameters(params),
            "log_rates": init_rates(params),
        },
        start=lambda meta_params: meta_params["params"],
        inner_opt=inner_opt,
        learned=("log_rates",),
    )


class ScaleByLogRatesState(NamedTuple):
    """The number of inner steps taken, int32."""

    count: Array


def scale_by_log_rates(
    log_rates: PyTree, expand: Callable[[PyTree, Params], Params], per_step: bool
) -> optax.GradientTransformation:
    """Multiplies updates by ``exp(ρ)``, of the current step where rates are per step."""

    def init(params):
        del params
        return ScaleByLogRatesState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        rates = log_rates
        if per_step:
            # Indexing clamps: a step past the last learned one uses the last one's rates.
            rates = jax.tree.map(lambda r: r.at[state.count].get(mode="clip"), log_rates)
        updates = jax.tree.map(lambda u, r: u * jnp.exp(r), updates, expand(rates, updates))
        return updates, ScaleByLogRatesState(state.count + 1)

    return optax.GradientTransformation(init, update)
