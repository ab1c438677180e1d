"""An optimiser that tunes its own learning rate, and weight decay, by the gradients it gets.

Hypergradient descent and MetaOptimize are one rule with a short and a long memory: a trace
of how the parameters depend on a hyperparameter, and its product with the next gradient.

Hyperparameters are learned as logarithms, so that one meta-rate serves values of any size, and
every change is a factor: no factor is larger than a cap, in one update and in all. Their scopes
and caps at the end of this file serve whoever else learns them while a model trains.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.pytrees import all_finite, choose
from metaopt.ranges import Range, Rate, Several, Share, check_value
from metaopt.types import Array, Params, PyTree

Scope = Literal["scalar", "per_layer", "per_parameter"]
"""One value for all parameters, one a layer (`layer_name`), or one a parameter."""

Rule = Literal["additive", "multiplicative", "adam", "lion"]
Tuned = Literal["learning_rate", "weight_decay"]
Factor = Annotated[float, Range(1 + 1e-9, 1e12)]
"""A cap on a factor, above 1."""


class SelfTunedState(NamedTuple):
    """The state of `self_tuned`; the dicts are by the name of the hyperparameter.

    Attributes:
      base: state of the optimiser that gives the directions.
      log_factors: ρ, what is learned: the logarithm of the factor on the given value.
      values: values in force in the last update, given value times factor.
      traces: h, the derivative of the parameters with respect to ρ, like the parameters.
      meta: state of the optimiser of ρ.
    """

    base: optax.OptState
    log_factors: dict[str, PyTree]
    values: dict[str, PyTree]
    traces: dict[str, Params]
    meta: optax.OptState


def self_tuned(
    base: optax.GradientTransformation,
    *,
    learning_rate: float | Array,
    weight_decay: float | Array = 0.0,
    tuned: tuple[Tuned, ...] = ("learning_rate",),
    scope: Scope = "scalar",
    rule: Rule = "adam",
    meta_rate: float = 0.05,
    trace_decay: float = 0.999,
    max_step_factor: float = 1.1,
    max_factor: float = 1e3,
) -> optax.GradientTransformation:
    """Steps of a learned rate along the directions of another optimiser.

    Mathematics: with ``u_t`` the direction, ``α = α_0 exp(ρ)`` the rate and λ the decoupled weight
    decay, ``θ_{t+1} = θ_t − α (u_t + λ θ_t)``. The trace ``h_t ≈ dθ_t / dρ`` follows
    ``h_{t+1} = γ (1 − α λ) h_t − α (u_t + λ θ_t)``, and the gradient of the loss with respect
    to ρ is ``g_t · h_t``, which moves ρ before the step of t is taken. With γ = 1 the trace
    is exact but for ``∂u_t / ∂θ_t``, the curvature, which is left out: it would cost
    a product with the Hessian a step. γ < 1 forgets what the curvature would have undone;
    γ = 0 is the effect of the last step alone, hypergradient descent. The weight decay has
    a trace of its own, ``h_{t+1} = γ (1 − α λ) h_t − α λ θ_t``.

    Rules, with κ the meta-rate: ``additive`` is gradient descent on the value itself,
    ``α ← α − κ dL/dα``, and depends on the scale of the loss; ``multiplicative``
    is ``ρ ← ρ − κ g·h / (|g| |h|)``, the published ``α (1 + κ cos)`` to first order in κ;
    ``adam`` and ``lion`` are those optimisers on ρ. The first two are meant for γ = 0.

    Guards: no factor larger than ``max_step_factor`` a step and ``max_factor`` in all, each way;
    where the meta-gradient or the direction is not finite, nothing is learned from the step.
    (The parameters do take it: `optax.apply_if_finite` around this is the remedy.) A start so
    far too large that units die at once (a ReLU network under Adam, 30 times) leaves no gradient
    to learn from: that takes going back to an earlier state.

    Everything learned is in the state. Given values may be traced and may change between
    steps: the learned factors go on from there. Under pmap, gradients are to be averaged before.

    Args:
      base: gives directions of ascent without a rate, such as `optax.scale_by_adam()`.
      learning_rate: α_0, the rate at the start.
      weight_decay: λ at the start, on all parameters.
      tuned: which of the two is learned.
      scope: scope of the rate; the weight decay is one scalar.
      rule: see above.
      meta_rate: κ.
      trace_decay: γ, in [0, 1].
      max_step_factor: the largest factor a step.
      max_factor: the largest factor in all.

    Returns:
      A transformation whose ``update`` needs the parameters. `current_rate` reads its state.

    Raises:
      UserError: an option is out of its range.

    Example:
      >>> optimizer = self_tuned(optax.scale_by_adam(), learning_rate=1e-3)
      >>> updates, opt_state = optimizer.update(grads, opt_state, params)
      >>> current_rate(opt_state)

    References:
      Baydin et al., 2018, "Online Learning Rate Adaptation with Hypergradient Descent";
      Sharifnassab et al., 2024, "MetaOptimize: A Framework for Optimizing Step Sizes and Other
      Meta-parameters", arXiv:2402.02342 (its Hessian-free form).
    """
    factors = max_step_factor, max_factor
    _check_options(tuned, scope, rule, meta_rate, trace_decay, weight_decay, factors)
    scopes: dict[str, Scope] = {"learning_rate": scope, "weight_decay": "scalar"}
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    meta_optimizer = _meta_rule(rule, meta_rate)

    def values_of(log_factors: dict[str, PyTree], params: Params) -> dict[str, PyTree]:
        values = {name: initial_values(scopes[name], params, given[name]) for name in given}
        for name in tuned:
            values[name] = jax.tree.map(
                lambda v, r: v * jnp.exp(r), values[name], log_factors[name]
            )
        return values

    def init(params):
        log_factors = {name: initial_values(scopes[name], params, 0.0) for name in tuned}
        zeros = {name: initial_values("per_parameter", params, 0.0) for name in tuned}
        values = values_of(log_factors, params)
        return SelfTunedState(
            base.init(params), log_factors, values, zeros, meta_optimizer.init(log_factors)
        )

    def meta_update(grads, state):
        """The log-factors after this gradient, and the state of their optimiser."""
        meta_grads = {
            name: _scaled_product(rule, scopes[name], grads, state.traces[name]) for name in tuned
        }
        return descend_logs(
            meta_optimizer,
            meta_grads,
            state.meta,
            state.log_factors,
            start=jax.tree.map(jnp.zeros_like, state.log_factors),
            max_step_factor=max_step_factor,
            max_factor=max_factor,
            values={name: state.values[name] for name in tuned},
        )

    def update(updates, state, params=None):
        grads = updates
        if params is None:
            raise UserError("self_tuned needs the parameters: update(grads, opt_state, params)")
        log_factors, meta = meta_update(grads, state)
        directions, base_state = base.update(grads, state.base, params)
        values = values_of(log_factors, params)
        rates = spread(scope, values["learning_rate"], params)
        decay = values["weight_decay"]

        def step(rate, direction, param):
            return -rate * (direction + decay * param)

        def followed(trace, rate, source):
            return trace_decay * (1 - rate * decay) * trace + source

        steps = jax.tree.map(step, rates, directions, params)
        sources = {
            "learning_rate": steps,
            "weight_decay": jax.tree.map(lambda rate, p: -rate * decay * p, rates, params),
        }
        traces = {
            name: jax.tree.map(followed, state.traces[name], rates, sources[name]) for name in tuned
        }
        traces = choose(all_finite(traces), traces, state.traces)
        in_dtype = jax.tree.map(lambda s, g: s.astype(g.dtype), steps, grads)
        return in_dtype, SelfTunedState(base_state, log_factors, values, traces, meta)

    return optax.GradientTransformation(init, update)


def current_rate(opt_state: optax.OptState) -> PyTree:
    """The learning rates in force, read from an optimiser state that has a `SelfTunedState`.

    Returns:
      A scalar, ``{layer: scalar}`` or a tree like the parameters, by the scope.

    Raises:
      UserError: there is none in the state, or more than one.
    """
    return current_values(opt_state)["learning_rate"]


def current_values(opt_state: optax.OptState) -> dict[str, PyTree]:
    """``learning_rate`` and ``weight_decay`` in force, as `current_rate`."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SelfTunedState))
    found = [leaf for leaf in leaves if isinstance(leaf, SelfTunedState)]
    if len(found) != 1:
        raise UserError(
            f"the optimiser state has {len(found)} parts made by self_tuned instead of one: "
            "give the state of that part"
        )
    return found[0].values


def _scaled_product(rule: Rule, scope: Scope, grads: Params, traces: Params) -> PyTree:
    """``g · h`` over all that shares a value, or for ``multiplicative`` its cosine."""

    def product(a, b):
        return total(scope, jax.tree.map(lambda x, y: x.astype(y.dtype) * y, a, b))

    products = product(grads, traces)
    if rule != "multiplicative":
        return products
    grads = jax.tree.map(lambda g, h: g.astype(h.dtype), grads, traces)
    norms = jax.tree.map(
        lambda gg, hh: jnp.sqrt(gg) * jnp.sqrt(hh), product(grads, grads), product(traces, traces)
    )
    return jax.tree.map(lambda p, n: p / jnp.where(n > 0, n, 1), products, norms)


def _meta_rule(rule: Rule, meta_rate: float) -> optax.GradientTransformation:
    """The optimiser of ρ, which gets the values in force beside the meta-gradients."""

    def log_step(g, value):
        # d/dα = 1/α d/dρ; a step to zero or below is left to the cap on the factor.
        return jnp.log(jnp.maximum(1 - meta_rate * g / value**2, 1e-30))

    def additive(updates, state, params=None, **extra):
        return jax.tree.map(log_step, updates, extra["values"]), state

    return {
        "additive": optax.GradientTransformationExtraArgs(optax.identity().init, additive),
        "multiplicative": optax.sgd(meta_rate),
        "adam": optax.adam(meta_rate),
        "lion": optax.lion(meta_rate, weight_decay=0.0),
    }[rule]


def _check_options(tuned, scope, rule, meta_rate, trace_decay, weight_decay, factors) -> None:
    check_value("tuned", tuned, Annotated[tuple[Tuned, ...], Several()])
    check_value("scope", scope, Scope)
    check_value("rule", rule, Rule)
    check_value("meta_rate", meta_rate, Rate)
    check_value("trace_decay", trace_decay, Share)
    check_value("max_step_factor", factors[0], Factor)
    check_value("max_factor", factors[1], Factor)
    known = isinstance(weight_decay, (int, float))
    if "weight_decay" in tuned and known and not weight_decay > 0:
        raise UserError(
            "weight_decay is learned by factors, so that it cannot start at 0: give a small one"
        )


def layer_name(path: tuple) -> str:
    """The layer of a leaf: the first key of its path, and the second too below ``params``.

    So the layers of a model's parameters are their top-level entries, and of meta-parameters
    ``params/embed``, ``params/head`` ..., ``log_rates``.
    """
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "/".join(names[:2] if names[:1] == ["params"] else names[:1])


def float_dtype(params: Params) -> jnp.dtype:
    """Dtype of what is learned beside parameters: float32, or theirs if it is wider."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def initial_values(scope: Scope, params: Params, value: float | Array) -> PyTree:
    """One value for each that the scope has: ``[]``, ``{layer: []}`` or like the parameters."""
    value = jnp.asarray(value, float_dtype(params))
    if scope == "scalar":
        return jnp.array(value)
    if scope == "per_parameter":
        return jax.tree.map(lambda p: jnp.full(jnp.shape(p), value), params)
    return {layer_name(path): jnp.array(value) for path, _ in jax.tree.leaves_with_path(params)}


def total(scope: Scope, tree: PyTree) -> PyTree:
    """The sums of a tree of arrays over all that shares a value: the transpose of `spread`."""
    if scope == "per_parameter":
        return tree
    sums: dict[str, Array] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = layer_name(path) if scope == "per_layer" else ""
        sums[name] = sums.get(name, jnp.zeros((), leaf.dtype)) + leaf.sum()
    return sums if scope == "per_layer" else sums[""]


def spread(scope: Scope, values: PyTree, tree: PyTree) -> PyTree:
    """The value that is in force for each leaf of a tree: scalars, or arrays of its shape."""
    if scope == "per_parameter":
        return values
    if scope == "scalar":
        return jax.tree.map(lambda _: values, tree)
    return jax.tree.map_with_path(lambda path, _: values[layer_name(path)], tree)


def descend_logs(
    optimizer: optax.GradientTransformation,
    grads: PyTree,
    state: optax.OptState,
    logs: PyTree,
    *,
    start: PyTree,
    max_step_factor: float,
    max_factor: float,
    **extra: Any,
) -> tuple[PyTree, optax.OptState]:
    """One step of an optimiser on logarithms: ``(logs, state)``, both unchanged at NaN or inf.

    No factor is larger than ``max_step_factor`` in this step and ``max_factor`` since the start,
    each way. ``extra`` is what the optimiser takes beside the gradients.
    """
    step_cap, cap = math.log(max_step_factor), math.log(max_factor)

    def move(log, step, start):
        new = log + jnp.clip(step, -step_cap, step_cap).astype(log.dtype)
        return jnp.clip(new, start - cap, start + cap)

    steps, new_state = optax.with_extra_args_support(optimizer).update(grads, state, logs, **extra)
    found = jax.tree.map(move, logs, steps, start), new_state
    return choose(all_finite(grads), found, (logs, state))
