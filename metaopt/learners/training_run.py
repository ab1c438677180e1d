"""Training as a learner: how it steps is what is meta-learned, and how it weighs its data."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.losses import per_example
from metaopt.optimizers.self_tuned import Scope, float_dtype, initial_values, spread
from metaopt.types import Array, Learner, LossFn, Params, PyTree, unchanged_loss

DOMAINS = "domain_logits"
"""The name of the weights on the domains among what is learned."""

FRACTIONS = ("momentum", "b1", "b2")
"""Values between 0 and 1, learned as log-odds: factors of about ``1 / (1 − m)`` where near 1."""

Optimizer = Callable[[Mapping[str, PyTree]], optax.GradientTransformation]
"""``values -> optax.GradientTransformation``; its rate is a tree like the parameters."""


class DomainBatch(NamedTuple):
    """Examples that say which domain they are from.

    Attributes:
      inputs: ``[S, ...]``.
      targets: ``[S, ...]``.
      domains: int32 ``[S]``, from 0 on.
    """

    inputs: Array
    targets: Array
    domains: Array


def tuned_learner(
    optimizer: Optimizer,
    start: Mapping[str, float],
    *,
    learned: tuple[str, ...],
    scope: Scope = "scalar",
    num_domains: int = 0,
) -> Learner:
    """A training run as a learner: what is learned is how it steps, beside where it starts.

    Args:
      optimizer: ``values -> optimiser``, such as `sgd_from_values` and `adamw_from_values`. Its
        ``values['learning_rate']`` is a tree like the parameters.
      start: the values at the start, by name.
      learned: which of them are meta-parameters.
      scope: scope of the learning rate if it is learned; every other value is a scalar.
      num_domains: number of weights on domains (see `weighted_by_domain`); 0 for none.

    Returns:
      A learner whose meta-parameters are ``params`` and, by name, the logarithms of the learned
      values (log-odds for `FRACTIONS`) and ``domain_logits``, ``[num_domains]``.

    Raises:
      UserError: a learned value is not in ``start``, or out of its range.
    """
    _check_start(start, learned)
    rate_scope: Scope = scope if "learning_rate" in learned else "scalar"

    def init(params):
        logs = {}
        for name in learned:
            scope_of_value = rate_scope if name == "learning_rate" else "scalar"
            odds = start[name] / (1 - start[name]) if name in FRACTIONS else start[name]
            logs[name] = initial_values(scope_of_value, params, math.log(odds))
        if num_domains:
            logs[DOMAINS] = jnp.zeros((num_domains,), float_dtype(params))
        return {"params": params, **logs}

    def inner_loss(meta_params, loss_fn):
        return weighted_by_domain(loss_fn, meta_params[DOMAINS])

    def inner_opt(meta_params, hparams):
        del hparams
        values = current_values(start, meta_params)
        rates = spread(rate_scope, values["learning_rate"], meta_params["params"])
        return optimizer({**values, "learning_rate": rates})

    return Learner(
        init=init,
        start=lambda meta_params: meta_params["params"],
        inner_opt=inner_opt,
        learned=(*learned, *([DOMAINS] if num_domains else [])),
        inner_loss=inner_loss if num_domains else unchanged_loss,
    )


def current_values(start: Mapping[str, float], logs: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The values by name, learned or not, and ``domain_weights``, which sum to one, if any."""
    values: dict[str, PyTree] = dict(start)
    for name in set(start) & set(logs):
        inverse = jax.nn.sigmoid if name in FRACTIONS else jnp.exp
        values[name] = jax.tree.map(inverse, logs[name])
    if DOMAINS in logs:
        values["domain_weights"] = jax.nn.softmax(logs[DOMAINS])
    return values


def weighted_by_domain(loss_fn: LossFn, domain_logits: Array) -> LossFn:
    """The mean of the losses of examples by weights on their domains.

    Mathematics: ``Σ_i w_i l_i`` with ``w = softmax_i(z[d_i])`` over the batch: the plain mean
    if all logits z are equal.

    Args:
      loss_fn: a mean over examples, of a batch with a field ``domains`` (`DomainBatch`).
      domain_logits: z, ``[num_domains]``.

    References:
      Calian et al., 2025, "DataRater: Meta-Learned Dataset Curation", arXiv:2505.17895.
    """

    def loss(params: Params, batch: Any) -> Array:
        chex.assert_rank((domain_logits, batch.domains), 1)  # more axes would broadcast
        weights = jax.nn.softmax(domain_logits[batch.domains])
        return weights @ per_example(loss_fn)(params, batch)

    return loss


def sgd_from_values(values: Mapping[str, PyTree]) -> optax.GradientTransformation:
    """Gradient descent with ``momentum`` and decoupled ``weight_decay``, both 0 if not given."""
    return optax.chain(
        optax.trace(values.get("momentum", 0.0)),
        optax.add_decayed_weights(values.get("weight_decay", 0.0)),
        _scale_each(values["learning_rate"]),
    )


def adamw_from_values(values: Mapping[str, PyTree]) -> optax.GradientTransformation:
    """AdamW with ``b1``, ``b2`` and ``weight_decay``, 0.9, 0.999 and 0 if not given.

    Its ``eps_root`` keeps the derivative finite (see `metaopt.optimizers.inner`).
    """
    return optax.chain(
        optax.scale_by_adam(values.get("b1", 0.9), values.get("b2", 0.999), eps_root=1e-8),
        optax.add_decayed_weights(values.get("weight_decay", 0.0)),
        _scale_each(values["learning_rate"]),
    )


def _scale_each(rates: PyTree) -> optax.GradientTransformation:
    return optax.stateless(lambda u, _: jax.tree.map(lambda u, rate: -rate * u, u, rates))


def _check_start(start: Mapping[str, float], learned: tuple[str, ...]) -> None:
    if missing := {"learning_rate", *learned} - set(start):
        raise UserError(f"start gives no value for {', '.join(sorted(missing))}")
    for name in learned:
        largest = 1 if name in FRACTIONS else math.inf
        if not 0 < start[name] < largest:
            raise UserError(
                f"{name} starts at {start[name]}: what is learned by factors starts "
                f"between 0 and {largest}, both excluded"
            )
