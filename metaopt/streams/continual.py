"""Learners of a stream: one batch after another, from domains that come, go, and come back.

Plain training forgets what it was trained on before. Here are the usual answers to that, and the
one of meta-learning, in one form: `StreamLearner`. A learner is pure, sees each batch once, and has
a memory of constant size. Its rates are scalars that it is given: tuning them compiles nothing.

B counts the sequences of a batch, C those of a replay memory.

References:
  McCloskey and Cohen, 1989, "Catastrophic Interference in Connectionist Networks".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.learners.training_run import adamw_from_values
from metaopt.streams.dynamic_evaluation import mean_squared_gradients
from metaopt.streams.online_hyperparameters import Online, OnlineConfig, OnlineState, online
from metaopt.types import Array, Batch, Hparams, Key, LossFn, Params, PyTree


class StreamState(NamedTuple):
    """A model on its way along a stream.

    Attributes:
      params: parameters.
      opt_state: state of the optimiser.
      memory: what the learner remembers beside them.
    """

    params: Params
    opt_state: optax.OptState
    memory: PyTree


class StreamLearner(NamedTuple):
    """How a stream is learned from.

    Attributes:
      init: ``params -> StreamState``.
      step: ``(state, batch, key, hparams) -> (state, loss)``: one batch ``[B, L]``, with the loss
        on it before anything was learned from it. ``hparams['learning_rate']`` is the rate of Adam;
        what else is read is said by each learner.
      domain_ends: ``(state, batch) -> state``: told that another domain comes, with the last
        sequences ``[n, L]`` of this one. Most learners take no notice.
      start: ``state -> params``: what is judged, and adapted.
      hparams: names of the scalars that the step reads beside the rate.
    """

    init: Callable[[Params], StreamState]
    step: Callable[[StreamState, Batch, Key, Hparams], tuple[StreamState, Array]]
    domain_ends: Callable[[StreamState, Batch], StreamState] = lambda state, batch: state
    start: Callable[[StreamState], Params] = lambda state: state.params
    hparams: tuple[str, ...] = ()


def follow(
    learner: StreamLearner, state: StreamState, batches: Batch, key: Key, hparams: Hparams
) -> tuple[StreamState, Array]:
    """Follows a stream: a step for each batch, in their order.

    Args:
      learner: how.
      state: where it starts.
      batches: leaves ``[n, B, ...]``.
      key: of all that is drawn.
      hparams: the scalars of the learner.

    Returns:
      The state after it, and the loss of each batch from before its step, ``[n]``.
    """

    def step(state, entry):
        batch, i = entry
        return learner.step(state, batch, jax.random.fold_in(key, i), hparams)

    count = jax.tree.leaves(batches)[0].shape[0]
    return jax.lax.scan(step, state, (batches, jnp.arange(count)))


def fine_tuning(loss_fn: LossFn) -> StreamLearner:
    """Adam on each batch, and nothing else: what the others are compared with."""
    return _penalised(loss_fn, lambda params: (), lambda params, memory: jnp.float32(0))


def towards_start(loss_fn: LossFn) -> StreamLearner:
    """Adam on ``L(θ) + λ/2 |θ − θ_0|²``: nothing moves far from where the stream began.

    λ is ``hparams['strength']``.
    """

    def penalty(params, start):
        return _half_square(params, start, jax.tree.map(jnp.ones_like, start))

    learner = _penalised(loss_fn, lambda params: params, penalty)
    return learner._replace(hparams=("strength",))


class Importance(NamedTuple):
    """What elastic weight consolidation remembers.

    Attributes:
      anchor: θ*, the parameters when the last domain ended.
      fisher: F, how much each of them mattered for all domains so far.
    """

    anchor: Params
    fisher: Params


def elastic(loss_fn: LossFn, decay: float = 0.9) -> StreamLearner:
    """Elastic weight consolidation: what mattered for earlier domains moves less.

    Mathematics: Adam on ``L(θ) + λ/2 Σ_i F_i (θ_i − θ*_i)²``. When a domain ends,
    ``F ← γ F + E[g²]`` of single sequences and ``θ* ← θ``: one penalty for all domains, of constant
    size (the online form). It must be told where domains end.

    Args:
      loss_fn: a mean over sequences.
      decay: γ.

    λ is ``hparams['strength']``.

    References:
      Kirkpatrick et al., 2017, "Overcoming Catastrophic Forgetting in Neural Networks", eq. (3);
      Schwarz et al., 2018, "Progress & Compress", section 3.2.
    """

    def begin(params):
        return Importance(params, jax.tree.map(jnp.zeros_like, params))

    def penalty(params, memory):
        return _half_square(params, memory.anchor, memory.fisher)

    def domain_ends(state, batch):
        found = mean_squared_gradients(loss_fn, state.params, batch)
        fisher = jax.tree.map(lambda f, x: decay * f + x, state.memory.fisher, found)
        return state._replace(memory=Importance(state.params, fisher))

    learner = _penalised(loss_fn, begin, penalty)
    return learner._replace(domain_ends=domain_ends, hparams=("strength",))


class Slow(NamedTuple):
    """The slow weights."""

    params: Params


def fast_and_slow(loss_fn: LossFn) -> StreamLearner:
    """Fast weights learn each batch, slow ones are their average, and hold them.

    Mathematics: after Adam's step ``θ ← θ + λ (s − θ)`` and ``s ← s + β (θ − s)``, with
    ``hparams['strength']`` λ and ``hparams['slow_rate']`` β. The slow weights are judged.

    References:
      Hinton and Plaut, 1987, "Using Fast Weights to Deblur Old Memories"; Arani et al., 2022,
      "Learning Fast, Learning Slow" (the average of the weights as a slow memory).
    """
    plain = fine_tuning(loss_fn)

    def step(state, batch, key, hparams):
        moved, loss = plain.step(state, batch, key, hparams)
        pull, slow_rate = hparams["strength"], hparams["slow_rate"]
        slow = state.memory.params
        fast = jax.tree.map(lambda f, s: f + pull * (s - f), moved.params, slow)
        slow = jax.tree.map(lambda f, s: s + slow_rate * (f - s), fast, slow)
        return StreamState(fast, moved.opt_state, Slow(slow)), loss

    return StreamLearner(
        init=lambda params: plain.init(params)._replace(memory=Slow(params)),
        step=step,
        start=lambda state: state.memory.params,
        hparams=("strength", "slow_rate"),
    )


class Reservoir(NamedTuple):
    """A uniform sample of all sequences of a stream so far.

    Attributes:
      sequences: those that are kept, leaves ``[C, ...]``; the first ``min(seen, C)`` of them.
      seen: number of sequences that came by, int32.
    """

    sequences: Batch
    seen: Array

    @classmethod
    def empty(cls, capacity: int, example: Batch) -> "Reservoir":
        """Room for so many sequences like those of a batch."""
        room = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), example)
        return cls(room, jnp.int32(0))

    def add(self, batch: Batch, key: Key) -> "Reservoir":
        """The sample after the sequences of a batch came by (Vitter, 1985, algorithm R)."""
        capacity = jax.tree.leaves(self.sequences)[0].shape[0]
        count = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(key, count)

        def one(held, entry):
            sequence, one_key = entry
            place = jax.random.randint(one_key, (), 0, held.seen + 1)
            place = jnp.where(held.seen < capacity, held.seen, place)  # C and beyond are dropped

            def put(all_of, x):
                return all_of.at[place].set(x, mode="drop")

            kept = jax.tree.map(put, held.sequences, sequence)
            return Reservoir(kept, held.seen + 1), None

        found, _ = jax.lax.scan(one, self, (batch, keys))
        return found

    def draw(self, number: int, key: Key, otherwise: Batch) -> Batch:
        """Sequences of the sample, with replacement; those of a batch while it is empty."""
        capacity = jax.tree.leaves(self.sequences)[0].shape[0]
        most = jnp.clip(self.seen, 1, capacity)
        rows = jax.random.randint(key, (number,), 0, most)

        def choose(held, given):
            return jnp.where(self.seen > 0, held[rows], given[:number])

        return jax.tree.map(choose, self.sequences, otherwise)


def replay(loss_fn: LossFn, capacity: int, example: Batch) -> StreamLearner:
    """Adam on each batch together with as many sequences of a sample of the past.

    Args:
      loss_fn: a mean over sequences.
      capacity: C.
      example: a batch, for its shapes.

    A step costs two of `fine_tuning`.

    References:
      Chaudhry et al., 2019, "On Tiny Episodic Memories in Continual Learning" (ER-Reservoir).
    """
    size = jax.tree.leaves(example)[0].shape[0]

    def step(state, batch, key, hparams):
        draw_key, add_key = jax.random.split(key)
        past = state.memory.draw(size, draw_key, batch)

        def loss(params):
            now = loss_fn(params, batch)
            return (now + loss_fn(params, past)) / 2, now

        state, now = _adam_step(state, loss, hparams)
        return state._replace(memory=state.memory.add(batch, add_key)), now

    def init(params):
        return _begin(params, Reservoir.empty(capacity, example))

    return StreamLearner(init=init, step=step)


class Averaged(NamedTuple):
    """What `averaged` remembers.

    Attributes:
      memory: what the learner remembers of which it is the average.
      params: the average.
    """

    memory: PyTree
    params: Params


def averaged(learner: StreamLearner) -> StreamLearner:
    """Another learner, of which a running average is judged.

    Mathematics: ``s ← s + β (θ − s)`` after each step, ``hparams['slow_rate']`` being β. What
    learns is not held back.

    Raises:
      UserError: the learner reads ``slow_rate`` itself.

    References:
      Arani et al., 2022, "Learning Fast, Learning Slow", the average beside experience replay.
    """

    if "slow_rate" in learner.hparams:
        raise UserError("the learner has an average of its own, with a slow_rate: take another")

    def init(params):
        state = learner.init(params)
        return state._replace(memory=Averaged(state.memory, jax.tree.map(jnp.copy, params)))

    def inner(state):
        return state._replace(memory=state.memory.memory)

    def outer(moved, average):
        return moved._replace(memory=Averaged(moved.memory, average))

    def step(state, batch, key, hparams):
        moved, loss = learner.step(inner(state), batch, key, hparams)
        average = jax.tree.map(
            lambda s, p: s + hparams["slow_rate"] * (p - s),
            state.memory.params,
            learner.start(moved),
        )
        return outer(moved, average), loss

    return StreamLearner(
        init=init,
        step=step,
        domain_ends=lambda state, batch: outer(
            learner.domain_ends(inner(state), batch), state.memory.params
        ),
        start=lambda state: state.memory.params,
        hparams=(*learner.hparams, "slow_rate"),
    )


def online_maml(
    loss_fn: LossFn, capacity: int, example: Batch, num_steps: int = 1
) -> StreamLearner:
    """Online meta-learning: the start of an inner loop is what learns along the stream.

    Mathematics: Adam on ``L_Q(θ_K)``, ``θ_{k+1} = θ_k − α ∇L_S(θ_k)``, where S is half of the batch
    and Q its other half with as many sequences of a sample of the past: after steps on what is new
    the model must know what is new and what is old.
    ``hparams['inner_learning_rate']`` is α. The start θ is judged.

    Args:
      loss_fn: a mean over sequences.
      capacity: C.
      example: a batch of an even number of sequences, for its shapes.
      num_steps: K.

    References:
      Finn et al., 2019, "Online Meta-Learning"; Gupta et al., 2020, "Look-ahead Meta Learning for
      Continual Learning", eq. (3).
    """
    half = jax.tree.leaves(example)[0].shape[0] // 2
    inner = InnerLoop(num_steps=num_steps)

    def step(state, batch, key, hparams):
        draw_key, add_key = jax.random.split(key)
        past = state.memory.draw(half, draw_key, batch)
        support = jax.tree.map(lambda x: x[:half], batch)
        query = jax.tree.map(lambda x, y: jnp.concatenate([x[half:], y]), batch, past)
        before = loss_fn(state.params, batch)

        def loss(params):
            optimizer = optax.sgd(hparams["inner_learning_rate"])
            adapted = adapt(loss_fn, optimizer, params, support, inner)
            return loss_fn(adapted.params, query), before

        state, now = _adam_step(state, loss, hparams)
        return state._replace(memory=state.memory.add(batch, add_key)), now

    def init(params):
        return _begin(params, Reservoir.empty(capacity, example))

    return StreamLearner(init=init, step=step, hparams=("inner_learning_rate",))


class Trained(NamedTuple):
    """What a learner whose rate is learned remembers.

    Attributes:
      online: parameters, optimiser and the factor on the rate.
      batch: the batch before, which is not yet learned from.
      seen: number of batches that came by, int32.
    """

    online: OnlineState
    batch: Batch
    seen: Array


def rate_learned_online(loss_fn: LossFn, example: Batch) -> StreamLearner:
    """Adam whose rate descends the loss of the next batch, all along the stream.

    Mathematics: when batch t comes, Adam steps on batch t − 1 at the rate ``η f``, and ``log f``
    descends ``∂L_t(θ_t(f)) / ∂ log f`` by an Adam of its own: one window of
    `metaopt.streams.online_hyperparameters.online`. ``hparams['learning_rate']`` is η, where the
    rate starts. The last batch of a stream is not learned from.

    Args:
      loss_fn: of a batch.
      example: a batch, for its shapes.

    References:
      Baydin et al., 2018, "Online Learning Rate Adaptation with Hypergradient Descent".
    """
    window = InnerLoop(num_steps=1, batching="split")

    def training(rate: Any) -> Online:
        def optimizer(values):
            return adamw_from_values(
                {"learning_rate": jax.tree.map(lambda f: rate * f, values["learning_rate"])}
            )

        return online(optimizer, {"learning_rate": 1.0}, loss_fn, OnlineConfig(window=window))

    def init(params):
        empty = jax.tree.map(jnp.zeros_like, example)
        return StreamState((), (), Trained(training(1.0).init(params), empty, jnp.int32(0)))

    def step(state, batch, key, hparams):
        del key

        def first(held):
            return held.online, loss_fn(held.online.run.params, batch)

        def later(held):
            before = jax.tree.map(lambda x: x[None], held.batch)
            moved, metrics = training(hparams["learning_rate"]).step(held.online, before, batch)
            return moved, metrics["loss"]

        held = state.memory
        moved, loss = jax.lax.cond(held.seen > 0, later, first, held)
        return state._replace(memory=Trained(moved, batch, held.seen + 1)), loss

    return StreamLearner(init=init, step=step, start=lambda state: state.memory.online.run.params)


def _penalised(
    loss_fn: LossFn,
    begin: Callable[[Params], PyTree],
    penalty: Callable[[Params, Any], Array],
) -> StreamLearner:
    """Adam on a loss and ``hparams['strength']`` times a penalty that reads the memory."""

    def step(state, batch, key, hparams):
        del key

        def loss(params):
            now = loss_fn(params, batch)
            return now + hparams.get("strength", 0.0) * penalty(params, state.memory), now

        return _adam_step(state, loss, hparams)

    return StreamLearner(init=lambda params: _begin(params, begin(params)), step=step)


def _begin(params: Params, memory: PyTree) -> StreamState:
    return StreamState(params, optax.adam(0.0).init(params), memory)


def _adam_step(
    state: StreamState, loss: Callable[[Params], tuple[Array, Array]], hparams: Hparams
) -> tuple[StreamState, Array]:
    grads, now = jax.grad(loss, has_aux=True)(state.params)
    optimizer = optax.adam(hparams["learning_rate"])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return state._replace(
        params=optax.apply_updates(state.params, updates), opt_state=opt_state
    ), now


def _half_square(params: Params, anchor: Params, scale: Params) -> Array:
    parts = jax.tree.map(lambda p, a, s: jnp.sum(s * (p - a) ** 2), params, anchor, scale)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts))) / 2
