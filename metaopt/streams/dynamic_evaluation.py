"""Dynamic evaluation: a model adapts to the stream that it is being tested on.

The stream is cut into segments. Each is scored first and stepped on afterwards, so every
token is predicted by a model that has never seen it (Krause et al., 2018, arXiv:1709.07432).
That is the inner loop with one segment a step, whose losses are the score; here are the cut,
the walk and the two update rules of the paper. The meta-gradient of the score is the estimator
`metaopt.meta_gradients.streaming`.

N counts segments here, C the tokens of context before each, L the tokens of each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import losses
from metaopt.errors import UserError
from metaopt.frozen import is_prepared, of_what_adapts
from metaopt.indices import NO_INDEX, as_tokens, check_range
from metaopt.inner_loop import Adapted, InnerLoop, adapt
from metaopt.ranges import CountOr0, Length, check_value
from metaopt.types import Array, Batch, InnerGradFn, LossFn, Model, Params, PyTree


def cut_segments(tokens: np.ndarray, length: int, context: int = 0) -> Batch:
    """Cuts a stream into segments, each with the tokens before it as context.

    The first ``context + 1`` tokens are only ever read, all after them are predicted once,
    but for what is left over at the end and makes no whole segment.

    Args:
      tokens: integers ``[n]`` of any dtype, none negative: every token of a stream is read.
      length: L, tokens to predict in a segment.
      context: C, tokens that the model reads before the first that counts.

    Returns:
      int32 inputs ``[N, C + L]`` and targets ``[N, L]``.

    Raises:
      UserError: the stream is shorter than one segment or no list of tokens, or a number is
        too small.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"a stream is a list of integers, not {tokens.dtype} of the shape {tokens.shape}"
        )
    check_range("the tokens of a stream", tokens, NO_INDEX)
    check_value("length", length, Length)
    check_value("context", context, CountOr0)
    count = (len(tokens) - 1 - context) // length
    if count < 1:
        raise UserError(
            f"a stream of {len(tokens)} tokens holds no segment of {length} after {context} tokens "
            "of context; give a longer stream or shorter segments"
        )
    stream: Any = np.asarray(tokens, np.int32)
    starts = length * np.arange(count)[:, None]
    inputs = stream[starts + np.arange(context + length)]
    return Batch(inputs, stream[starts + context + 1 + np.arange(length)])


def segment_loss(model: Model, ignore_index: int | None = losses.IGNORED) -> LossFn:
    """Mean cross-entropy of the last tokens, in nats a token.

    Args:
      model: integers ``[S, L]`` to logits ``[S, L, V]``.
      ignore_index: the target that is not counted; see `metaopt.losses`.

    Returns:
      A loss of integers ``inputs [S, C + L]`` and ``targets [S, L]``: the context is read
      and not scored. With ``C = 0`` it is `metaopt.losses.next_token`.
    """

    apply, trunk = model.apply, model.trunk

    def loss(params: Params, batch: Batch) -> Array:
        length = batch.targets.shape[-1]
        scored = Model(model.init, lambda p, x: apply(p, x)[:, -length:])
        if trunk is None or not is_prepared(batch.inputs):
            batch = batch._replace(inputs=as_tokens("inputs", batch.inputs))
        return losses.classification(scored, ignore_index)(params, batch)

    return of_what_adapts(loss, model)


def walk(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    segments: Batch,
    *,
    opt_state: optax.OptState | None = None,
    context: PyTree = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
    probe: Callable[..., Any] | None = None,
) -> Adapted:
    """Walks along a stream: scores each segment, then takes one step on it.

    ``losses[i] = L_i(θ_i)`` and ``θ_{i+1} = θ_i + u(∇L_i(θ_i))``. Pure, compiled and
    differentiated by whoever calls it; memory does not grow with N.

    Args:
      loss_fn: loss of a batch of one segment, or a `metaopt.losses.ReadingLoss`.
      optimizer: how it steps, learning rate and sign included.
      params: θ_0.
      segments: leaves ``[N, ...]``, in the order of the stream.
      opt_state: state of the optimiser of an earlier walk that is resumed; None starts one.
      context: what the model kept in an earlier walk that is resumed; None starts one.
      grad_fn: turns the loss into ``(params, batch) -> (loss, gradient)``.
      probe: what else to measure before each step, as in `metaopt.inner_loop.adapt`.

    Returns:
      `metaopt.inner_loop.Adapted`: ``losses`` is float32 ``[N]``, each from before its step;
      ``params``, ``opt_state`` and ``context`` are those to resume with.

    References:
      Krause et al., 2018, "Dynamic Evaluation of Neural Sequence Models", section 3.
    """
    count = jax.tree.leaves(segments)[0].shape[0]
    config = InnerLoop(num_steps=count, batching="split", unroll=False)
    more = {"opt_state": opt_state, "context": context, "grad_fn": grad_fn, "probe": probe}
    return adapt(loss_fn, optimizer, params, segments, config, **more)


def decay_towards(
    anchor: Params, rate: Array | float, scale: Params | None = None
) -> optax.GradientTransformation:
    """Adds ``min(λ s, 1) ⊙ (θ_g − θ)`` to the updates: what was learned long ago fades.

    Args:
      anchor: θ_g, as a rule the parameters before the stream.
      rate: λ, from 0 (none) on; at 1 with no scale every step begins at θ_g again.
      scale: s, as the parameters; ones if not given.

    Returns:
      An optax transformation that needs the parameters; put it after the learning rate.

    References:
      Krause et al., 2018, section 4 (the global prior).
    """

    def add(update, param, goal, s):
        return update + jnp.minimum(rate * s, 1.0) * (goal - param)

    def update(updates, params):
        scales = jax.tree.map(jnp.ones_like, anchor) if scale is None else scale
        return jax.tree.map(add, updates, params, anchor, scales)

    return optax.stateless(update)


def rule_with_prior(
    name: str, learning_rate: float, anchor: Params | None, decay: float
) -> optax.GradientTransformation:
    """Adam by its name, else gradient descent, with `decay_towards` an anchor if there is one."""
    rule = (optax.adam if name == "adam" else optax.sgd)(learning_rate)
    return optax.chain(rule, optax.identity() if anchor is None else decay_towards(anchor, decay))


def sgd_with_prior(
    anchor: Params, learning_rate: Array | float, decay: Array | float = 0.0
) -> optax.GradientTransformation:
    """Gradient descent with a global prior: ``θ ← θ − η g + λ (θ_g − θ)``.

    With a rate and a decay of 0 it is static evaluation.

    Args:
      anchor: θ_g.
      learning_rate: η.
      decay: λ.
    """
    return optax.chain(optax.sgd(learning_rate), decay_towards(anchor, decay))


def rms_with_prior(
    anchor: Params,
    learning_rate: Array | float,
    decay: Array | float,
    mean_squares: Params,
    epsilon: float = 0.1,
) -> optax.GradientTransformation:
    """RMS dynamic evaluation with an RMS global prior.

    ``θ ← θ − η g / (r + ε r̄) + min(λ r / r̄, 1) ⊙ (θ_g − θ)``, where ``r = √MS`` is the root
    of the mean squared gradients of the training text and r̄ its mean over all parameters.
    Unlike RMSProp's it does not change along the stream. ε is a share of r̄ here and a
    number of its own in the paper, so that it means the same for every model.

    Args:
      anchor: θ_g.
      learning_rate: η.
      decay: λ.
      mean_squares: MS, as the parameters; see `mean_squared_gradients`.
      epsilon: ε, above 0: it bounds the steps of parameters that training seldom moved.

    References:
      Krause et al., 2018, section 4 (the update rule, and the clip of the decay at 1).
    """
    roots = jax.tree.map(jnp.sqrt, mean_squares)
    leaves = jax.tree.leaves(roots)
    mean = sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)

    def scaled(updates, _):
        return jax.tree.map(lambda g, r: -learning_rate * g / (r + epsilon * mean), updates, roots)

    relative = jax.tree.map(lambda r: r / mean, roots)
    return optax.chain(optax.stateless(scaled), decay_towards(anchor, decay, relative))


def mean_squared_gradients(loss_fn: LossFn, params: Params, segments: Batch) -> Params:
    """``MS = 1/N Σ_i g_i²``, of the gradients of single segments at fixed parameters.

    Args:
      loss_fn: loss of a batch of one segment.
      params: where the gradients are taken.
      segments: segments of the training text, leaves ``[N, ...]``.

    Returns:
      Float32 numbers as the parameters.
    """

    def add(total, segment):
        batch = jax.tree.map(lambda x: x[None], segment)
        grads = jax.grad(loss_fn)(params, batch)
        return jax.tree.map(lambda t, g: t + g**2, total, grads), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), segments)
    count = jax.tree.leaves(segments)[0].shape[0]
    return jax.tree.map(lambda t: t / count, total)
