"""A rater of data: a small model learns by meta-gradients which sequences are worth training on.

While a model trains, each batch is weighted by the rater's scores, and the rater descends the
held-out loss that the model has after a window of such steps: a sequence is rated high if training
on it makes the model better on clean text. Nobody says which sequences are noise.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from metaopt import models
from metaopt.inner_loop import InnerLoop
from metaopt.learners.bilevel import learned_loss
from metaopt.learners.training_run import Optimizer, tuned_learner
from metaopt.losses import per_example
from metaopt.meta_gradients.windows import InnerRun, start_run, unroll_window
from metaopt.ranges import Checked, Heads, InnerSteps, Layers, Rate, Width
from metaopt.types import Array, Batch, Episode, InnerGradFn, Key, LossFn, Metrics, Params

RATER = "rater"
"""The name of the rater's parameters among what is learned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaterConfig(Checked):
    """A rater and how it learns.

    Attributes:
      width: width of the rater, a transformer that sees all of a sequence.
      num_layers: number of its layers.
      num_heads: number of its heads.
      window: W, training steps between a score and the held-out loss that judges it.
      meta_rate: rate of Adam on the rater's parameters.
    """

    width: Width = 32
    num_layers: Layers = 1
    num_heads: Heads = 2
    window: InnerSteps = 2
    meta_rate: Rate = 1e-3


class Rater(NamedTuple):
    """What scores sequences.

    Attributes:
      init: ``key -> parameters``.
      score: ``(parameters, inputs [S, L]) -> scores [S]``; the weights are their softmax.
    """

    init: Callable[[Key], Params]
    score: Callable[[Params, Array], Array]


class RatedState(NamedTuple):
    """A training and its rater.

    Attributes:
      run: parameters, optimiser state and steps of the training.
      rater: parameters of the rater.
      opt_state: state of its optimiser.
    """

    run: InnerRun
    rater: Params
    opt_state: optax.OptState


class RatedTraining(NamedTuple):
    """A training that learns which of its data are worth it, as pure functions.

    Attributes:
      init: ``(params, rater parameters) -> RatedState``.
      step: ``(state, batches, held_out) -> (state, metrics)``: W steps on batches ``[W, S, ...]``,
        and one of the rater. The metrics are ``loss``, the held-out loss after them, and
        ``inner_losses`` ``[W]``, weighted.
    """

    init: Callable[[Params, Params], RatedState]
    step: Callable[[RatedState, Batch, Batch], tuple[RatedState, Metrics]]


def transformer_rater(vocab_size: int, config: RaterConfig) -> Rater:
    """A transformer that sees the whole sequence; a score is the mean over its tokens.

    It begins with scores near zero: all sequences are alike.
    """
    model = models.transformer(
        models.TransformerConfig(
            vocab_size=vocab_size,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            causal=False,
        )
    )

    def score(params: Params, inputs: Array) -> Array:
        return model.apply(params, inputs)[..., 0].mean(axis=-1)

    return Rater(model.init, score)


def rated_loss(loss_fn: LossFn, rater: Rater, rater_params: Params) -> LossFn:
    """The mean of the losses of sequences by the softmax of their scores over the batch.

    Mathematics: ``Σ_i w_i l_i`` with ``w = softmax_i(r(x_i))``: the plain mean if all scores are
    equal.

    Args:
      loss_fn: a mean over sequences.
      rater: what scores.
      rater_params: its parameters.
    """

    def loss(params: Params, batch: Batch) -> Array:
        weights = jax.nn.softmax(rater.score(rater_params, batch.inputs))
        return weights @ per_example(loss_fn)(params, batch)

    return loss


def rated_training(
    optimizer: Optimizer,
    values: Mapping[str, float],
    loss_fn: LossFn,
    rater: Rater,
    config: RaterConfig,
    *,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> RatedTraining:
    """A training whose data are weighted by a rater that learns beside it.

    Mathematics: with s the state of the training where a window starts, held constant, and
    ``L(s, φ)`` the held-out loss after W steps on the rated loss (`rated_loss`), Adam descends
    ``∂L(s, φ) / ∂φ``. The training goes on from the state after the window.

    Args:
      optimizer: ``values -> optimiser``, such as
        `metaopt.learners.training_run.adamw_from_values`.
      values: its values, by name.
      loss_fn: a mean over sequences; it judges the held-out ones too.
      rater: what scores.
      config: the window and the rate.
      grad_fn: the inner-gradient function.

    Returns:
      `RatedTraining`; its ``step`` is to be compiled.

    References:
      Calian et al., 2025, "DataRater: Meta-Learned Dataset Curation", arXiv:2505.17895, eqs. (1) to
      (4).
    """

    def inner_loss(meta_params: Any, given: LossFn) -> LossFn:
        return rated_loss(given, rater, meta_params[RATER])

    meta_optimizer = optax.adam(config.meta_rate)
    steps = InnerLoop(num_steps=config.window, batching="split")
    plain = tuned_learner(optimizer, values, learned=())

    def learner_of(rater_params: Params):
        return learned_loss(plain, inner_loss, {RATER: rater_params})

    def init(params: Params, rater_params: Params) -> RatedState:
        params = jax.tree.map(jnp.array, params)
        learner = learner_of(rater_params)
        run = start_run(learner, learner.init(params), {})
        return RatedState(run, rater_params, meta_optimizer.init(rater_params))

    def step(state: RatedState, batches: Batch, held_out: Batch):
        learner = learner_of(state.rater)
        window = unroll_window(learner, loss_fn, steps, config.window, grad_fn=grad_fn)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
        episode = Episode(flat, held_out, jnp.zeros((), jnp.int32))

        def loss_of_window(rater_params: Params):
            meta_params = {"params": state.run.params, RATER: rater_params}
            return window(meta_params, {}, episode, state.run)

        grads, (metrics, run) = jax.grad(loss_of_window, has_aux=True)(state.rater)
        updates, opt_state = meta_optimizer.update(grads, state.opt_state)
        moved = optax.apply_updates(state.rater, updates)
        return RatedState(run, moved, opt_state), metrics

    return RatedTraining(init, step)


def auc(scores: np.ndarray, is_good: np.ndarray) -> float:
    """The chance that a good sequence has a higher score than a bad one, ties by half.

    Args:
      scores: ``[n]``.
      is_good: bool ``[n]``, with both kinds among them.

    References:
      Mann and Whitney, 1947.
    """
    ranks = stats.rankdata(scores)
    good, bad = int(np.sum(is_good)), int(np.sum(~is_good))
    return float((ranks[is_good].sum() - good * (good + 1) / 2) / (good * bad))
