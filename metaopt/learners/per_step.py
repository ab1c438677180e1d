"""Parameters of their own for every inner step, such as MAML++'s scales of batch norm."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.checks import check_learner
from metaopt.errors import UserError
from metaopt.pytrees import entries
from metaopt.ranges import Steps, check_value
from metaopt.types import Array, Learner, MetaParams, Params, PyTree


def per_step_parameters(
    learner: Learner, which: Callable[[Params], PyTree], *, num_steps: int
) -> Learner:
    """The learner with some parameters learned apart for every inner step, and not adapted.

    Mathematics: of ``θ = (φ, γ)`` the learner adapts φ alone, ``φ_{k+1} = φ_k + u_k``, and
    after k steps the model is ``(φ_k, γ_k)``, with ``γ_0 ... γ_K`` meta-learned. All of them
    begin as the initial γ. The loss before a step, on the support, and after the step
    before it, on the query, are of the same γ_k. Steps past K use γ_K.

    Args:
      learner: any that starts from its ``params``.
      which: ``params -> bools``, True for what belongs to γ (batch norm's scale and bias, by
        `metaopt.models.conv.is_normalisation`).
      num_steps: K.

    Returns:
      A learner with one more meta-parameter, ``'later'``: γ_1 ... γ_K as a dict of float32
      ``[K, ...]`` by the path of the parameter. γ_0 stays in ``'params'``.

    Raises:
      UserError: an argument is not what it should be; or, from ``learner.init``: ``which`` chooses
        nothing, or gives another tree.

    References:
      Antoniou et al., 2019, "How to train your MAML", section 4 (BNWB).
    """

    check_learner(learner)
    check_value("num_steps", num_steps, Steps)
    if not callable(which):
        raise UserError(
            "per_step_parameters takes a function of the parameters, which gives a tree like them "
            f"of bools, not an object of type {type(which).__name__}"
        )

    def init(params: Params) -> MetaParams:
        flat, chosen = _by_path(params), _by_path(which(params))
        if set(flat) != set(chosen) or not any(chosen.values()):
            raise UserError(
                "per_step_parameters takes parameters -> a tree like them of bools, True for at "
                "least one, and this one chooses nothing or has another structure; the entries "
                f"of the parameters are {', '.join(entries(params))}"
            )
        later = {n: jnp.repeat(x[None], num_steps, axis=0) for n, x in flat.items() if chosen[n]}
        return learner.init(params) | {"later": later}

    def inner_opt(meta_params, hparams):
        optimizer = learner.inner_opt(meta_params, hparams)
        return replace_by_step(optimizer, meta_params["later"])

    return learner._replace(init=init, inner_opt=inner_opt, learned=(*learner.learned, "later"))


class ReplaceByStepState(NamedTuple):
    """The state of the other parameters' optimiser and the number of steps taken, int32."""

    inner: optax.OptState
    count: Array


def replace_by_step(
    optimizer: optax.GradientTransformation, values: dict[str, Array]
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, but for parameters that become ``values[path][k]`` in step k."""
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        return ReplaceByStepState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        updates, inner = optimizer.update(updates, state.inner, params, **extra)

        def replace(path, update, param):
            if (name := _name(path)) not in values:
                return update
            return values[name].at[state.count].get(mode="clip") - param

        updates = jax.tree.map_with_path(replace, updates, params)
        return updates, ReplaceByStepState(inner, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_path(tree: PyTree) -> dict[str, PyTree]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
