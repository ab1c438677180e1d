"""Where NaN or infinity first comes up in an inner loop and in its derivative."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.checks import hparam
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt, query_weights, split_batches
from metaopt.pytrees import all_finite, partition
from metaopt.types import (
    Array,
    Batch,
    Episode,
    Hparams,
    Key,
    Learner,
    LossFn,
    MetaGradFn,
    MetaParams,
)

Place = Literal["inner loss", "parameters", "query loss", "query gradient", "backward", "estimator"]
WORDS: dict[Place, str] = {
    "inner loss": "the support loss before inner {} is not finite",
    "parameters": "the loss before inner {} is finite, the parameters after it are not",
    "query loss": "the query loss after inner {} is not finite",
    "query gradient": "the query loss after inner {} is finite, its gradient is not",
    "backward": "the forward pass is finite, the backward pass of inner {} is not",
    "estimator": "the reference's gradient is finite, the estimator's is not: first at inner {}",
}


class Failure(NamedTuple):
    """Where NaN or infinity comes up; inner steps are counted from 1.

    Attributes:
      place: in the order in which they are looked for, of the forward pass: ``inner loss``
        before a step, ``parameters`` after it, ``query loss`` after it (the last, or of
        every step where the objective is over all of them); and where all of these are finite,
        ``query gradient`` after a step, or ``backward``, the derivative of the step.
        ``estimator``: its gradient alone is not finite, and the reference's is.
      steps: the steps that it happens at: of the forward pass the first; for ``backward``
        all that make something that is not finite of a finite cotangent. Empty where
        no step does so by itself.
    """

    place: Place
    steps: tuple[int, ...]

    def describe(self) -> str:
        """In words."""
        names = {0: "steps together (of none by itself)", 1: "step {}"}.get(
            len(self.steps), "steps {}"
        )
        return WORDS[self.place].format(names.format(", ".join(map(str, self.steps))))


class Trajectory(NamedTuple):
    """What an inner run passes through, each ``[K]``.

    Attributes:
      inner_losses: support loss before each step.
      finite: whether the parameters after each step are.
      query_losses: query loss after each step.
    """

    inner_losses: Array
    finite: Array
    query_losses: Array

    def objective(self, inner: InnerLoop, hparams: Hparams) -> Array:
        """What the outer loop descends: the last query loss, the mean, or the annealed sum."""
        if inner.query_loss == "last":
            return self.query_losses[-1]
        if inner.query_loss == "mean":
            return self.query_losses.mean()
        weights = query_weights(inner.num_steps, hparam(hparams, "query_annealing"))
        return weights @ self.query_losses


def run_inner_loop(
    learner: Learner, loss_fn: LossFn, inner: InnerLoop, outer_loss: LossFn | None = None
) -> Callable[[MetaParams, Hparams, Episode], Trajectory]:
    """The inner loop in plain optax: ``(meta_params, hparams, episode) -> Trajectory``.

    Not by `metaopt.inner_loop.adapt`, so that finite differences of it judge `adapt` too.
    """

    judge = loss_fn if outer_loss is None else outer_loss

    def run(meta_params: MetaParams, hparams: Hparams, episode: Episode) -> Trajectory:
        inner_loss = learner.inner_loss(meta_params, loss_fn)
        optimizer = optax.with_extra_args_support(learner.inner_opt(meta_params, hparams))

        def step(carry, batch):
            params, opt_state = carry
            batch = episode.support if batch is None else batch
            loss, grads = jax.value_and_grad(inner_loss)(params, batch)
            updates, opt_state = optimizer.update(
                grads,
                opt_state,
                params,
                value=loss,
                grad=grads,
                value_fn=lambda params: inner_loss(params, batch),
            )
            params = optax.apply_updates(params, updates)
            found = Trajectory(loss, all_finite(params), judge(params, episode.query))
            return (params, opt_state), found

        start = learner.start(meta_params)
        split = inner.batching == "split"
        batches = split_batches(episode.support, inner.num_steps) if split else None
        first = (start, optimizer.init(start))
        return jax.lax.scan(step, first, batches, length=inner.num_steps)[1]

    return run


def find_failure(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    meta_params: MetaParams,
    hparams: Hparams,
    episode: Episode,
    outer_loss: LossFn | None = None,
) -> Failure:
    """Where an inner run whose meta-gradient is not finite goes wrong.

    The steps of the backward pass are taken one by one, from the last, so that each is
    judged by a finite cotangent.
    """
    run = jax.jit(run_inner_loop(learner, loss_fn, inner, outer_loss))
    found = in_forward(run(meta_params, hparams, episode), inner)
    judge = loss_fn if outer_loss is None else outer_loss
    return found or _in_backward(learner, loss_fn, judge, inner, meta_params, hparams, episode)


def in_forward(trajectory: Trajectory, inner: InnerLoop) -> Failure | None:
    """The first place of a run that is not finite, or None."""
    inner_losses, finite, query_losses = jax.device_get(trajectory)
    for i in range(inner.num_steps):
        counts = inner.query_loss != "last" or i == inner.num_steps - 1
        if not jnp.isfinite(inner_losses[i]):
            return Failure("inner loss", (i + 1,))
        if not finite[i]:
            return Failure("parameters", (i + 1,))
        if counts and not jnp.isfinite(query_losses[i]):
            return Failure("query loss", (i + 1,))
    return None


def _in_backward(learner, loss_fn, judge, inner, meta_params, hparams, episode) -> Failure:
    """Walks back from the last step, the forward pass being finite."""
    step = _one_step(learner, loss_fn, hparams)

    @jax.jit
    def pull_back(state, batch, cotangents):
        """Cotangents of the state before a step; whether they and the rates' are finite."""
        _, pull = jax.vjp(lambda meta, s: partition(step(meta, s, batch))[0], meta_params, state)
        rates, before = pull(cotangents)
        before, _ = partition(before)
        return before, all_finite((rates, before))

    @jax.jit
    def add_query_gradient(state, cotangents):
        """The cotangents with those of the query loss after a step; whether these are finite."""
        params, opt_state = state
        grads = jax.grad(judge)(params, episode.query)
        own, _ = partition((grads, jax.tree.map(jnp.zeros_like, opt_state)))
        return jax.tree.map(jnp.add, cotangents, own), all_finite(own)

    batches = [episode.support] * inner.num_steps
    if inner.batching == "split":
        split = split_batches(episode.support, inner.num_steps)
        batches = [jax.tree.map(lambda x, i=i: x[i], split) for i in range(inner.num_steps)]
    start = learner.start(meta_params)
    states, forward = [(start, learner.inner_opt(meta_params, hparams).init(start))], jax.jit(step)
    for batch in batches:
        states.append(forward(meta_params, states[-1], batch))
    cotangents, failed = [jnp.zeros_like(leaf) for leaf in partition(states[0])[0]], []
    for k in range(inner.num_steps, 0, -1):
        if k == inner.num_steps or inner.query_loss != "last":
            cotangents, finite = add_query_gradient(states[k], cotangents)
            if not finite:
                return Failure("query gradient", (k,))
        pulled, finite = pull_back(states[k - 1], batches[k - 1], cotangents)
        if not finite:
            failed.insert(0, k)
        cotangents = pulled if finite else _rescaled(cotangents)
    return Failure("backward", tuple(failed))


def _one_step(learner: Learner, loss_fn: LossFn, hparams: Hparams):
    """``(meta_params, (params, opt_state), batch) -> (params, opt_state)``."""

    def step(meta_params: MetaParams, state, batch: Batch):
        params, opt_state = state
        inner_loss = learner.inner_loss(meta_params, loss_fn)
        optimizer = learner.inner_opt(meta_params, hparams)
        once = InnerLoop(num_steps=1)
        adapted = adapt(inner_loss, optimizer, params, batch, once, opt_state=opt_state)
        return adapted.params, adapted.opt_state

    return step


@jax.jit
def _rescaled(cotangents: list[Array]) -> list[Array]:
    """Divided by their largest, so that what has grown step by step does not go on growing."""
    largest = jnp.max(jnp.array([jnp.abs(c).max() for c in cotangents]))
    return [c / jnp.where(largest > 0, largest, 1) for c in cotangents]


def first_failing_length(
    estimator: Callable[[Learner, LossFn, InnerLoop], MetaGradFn],
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    arguments: tuple[MetaParams, Hparams, Episode, Key],
) -> Failure:
    """The smallest number of inner steps for which an estimator's gradient is not finite.

    Lengths that the estimator refuses are passed over. A compilation a length.
    """
    meta_params, hparams, episode, key = arguments
    size = jax.tree.leaves(episode.support)[0].shape[0]
    for k in range(1, inner.num_steps + 1):
        seen = size if inner.batching == "same" else size // inner.num_steps * k
        shorter = episode._replace(support=jax.tree.map(lambda x, n=seen: x[:n], episode.support))
        try:
            estimate = estimator(learner, loss_fn, dataclasses.replace(inner, num_steps=k))
            grads, _ = jax.jit(estimate)(meta_params, hparams, shorter, key)
        except UserError:
            continue
        if not all_finite(grads):
            return Failure("estimator", (k,))
    return Failure("estimator", ())
