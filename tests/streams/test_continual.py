import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.errors import UserError
from metaopt.streams import continual
from metaopt.streams.continual import Reservoir, follow
from metaopt.streams.dynamic_evaluation import mean_squared_gradients
from metaopt.types import Batch

RATE = {"learning_rate": jnp.float32(0.05)}
START = {"w": jnp.array([0.5, -1.0, 2.0])}


def loss_fn(params, batch):
    return jnp.mean((batch.inputs @ params["w"] - batch.targets) ** 2)


def stream(number=12, size=4, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(number, size, 3)).astype(np.float32)
    return Batch(jnp.asarray(inputs), jnp.asarray(inputs.sum(-1) + 1))


EXAMPLE = jax.tree.map(lambda x: x[0], stream())


def run(learner, hparams=RATE, batches=None, seed=0):
    batches = stream() if batches is None else batches
    go = jax.jit(lambda state: follow(learner, state, batches, jax.random.key(seed), hparams))
    return go(learner.init(START))


def by_hand(grads_of, number=12, rate=0.05):
    """Adam on gradients ``(params, batch) -> gradient``, in a plain loop."""
    optimizer, params = optax.adam(rate), START
    state, batches = optimizer.init(params), stream(number)
    for i in range(number):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        updates, state = optimizer.update(grads_of(params, batch), state)
        params = optax.apply_updates(params, updates)
    return params


def close(found, wanted, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), found, wanted)


def test_fine_tuning_is_adam_and_the_losses_are_from_before_each_step():
    state, losses = run(continual.fine_tuning(loss_fn))
    close(state.params, by_hand(jax.grad(loss_fn)))
    first = jax.tree.map(lambda x: x[0], stream())
    np.testing.assert_allclose(losses[0], loss_fn(START, first), rtol=1e-6)


def test_the_penalty_on_the_distance_is_that_of_the_start():
    def penalised(params, batch):
        return loss_fn(params, batch) + 0.7 / 2 * jnp.sum((params["w"] - START["w"]) ** 2)

    state, losses = run(continual.towards_start(loss_fn), RATE | {"strength": jnp.float32(0.7)})
    close(state.params, by_hand(jax.grad(penalised)))
    plain = run(continual.fine_tuning(loss_fn))[1]
    assert losses[0] == plain[0]  # the penalty is no part of the loss that is reported


def test_elastic_weights_are_held_by_what_mattered_before():
    learner = continual.elastic(loss_fn, decay=0.5)
    hparams = RATE | {"strength": jnp.float32(3.0)}
    state, _ = run(learner, hparams)
    close(state.params, by_hand(jax.grad(loss_fn)))  # nothing mattered yet
    last = jax.tree.map(lambda x: x[-1], stream())
    state = learner.domain_ends(state, last)
    first_fisher = mean_squared_gradients(loss_fn, state.params, last)
    close(state.memory.fisher, first_fisher)
    close(state.memory.anchor, state.params)

    moved = {"w": state.params["w"] + 0.3}
    batch = jax.tree.map(lambda x: x[0], stream(seed=1))

    def penalised(params):
        gap = params["w"] - state.params["w"]
        return loss_fn(params, batch) + 3 / 2 * jnp.sum(first_fisher["w"] * gap**2)

    found, _ = learner.step(state._replace(params=moved), batch, jax.random.key(0), hparams)
    updates, _ = optax.adam(0.05).update(jax.grad(penalised)(moved), state.opt_state)
    close(found.params, optax.apply_updates(moved, updates))
    again = learner.domain_ends(found, last)
    second = mean_squared_gradients(loss_fn, found.params, last)
    close(again.memory.fisher["w"], 0.5 * first_fisher["w"] + second["w"])


def test_slow_weights_are_an_average_of_fast_ones():
    learner = continual.fast_and_slow(loss_fn)
    no_pull = RATE | {"strength": jnp.float32(0), "slow_rate": jnp.float32(0.25)}
    state, _ = run(learner, no_pull)
    fast = [by_hand(jax.grad(loss_fn), number=n) for n in range(1, 13)]
    slow = START["w"]
    for each in fast:
        slow = slow + 0.25 * (each["w"] - slow)
    close(learner.start(state)["w"], slow)
    close(state.params, fast[-1])
    held, _ = run(learner, no_pull | {"strength": jnp.float32(1)})
    close(held.params, START)  # all the way back to slow weights that never moved


def test_a_reservoir_is_a_uniform_sample_of_all_that_came():
    batches = Batch(jnp.arange(40).reshape(10, 4), jnp.arange(40).reshape(10, 4))

    @jax.jit
    @jax.vmap
    def fill(key):
        held = Reservoir.empty(6, Batch(jnp.zeros(4, int), jnp.zeros(4, int)))
        for i in range(10):
            held = held.add(jax.tree.map(lambda x, i=i: x[i], batches), jax.random.fold_in(key, i))
        return held

    held = fill(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_array_equal(held.sequences.inputs, held.sequences.targets)
    assert (held.seen == 40).all()
    assert all(len({*row}) == 6 for row in np.asarray(held.sequences.inputs).tolist())
    shares = np.bincount(np.asarray(held.sequences.inputs).ravel(), minlength=40) / 2000
    np.testing.assert_allclose(shares, 6 / 40, atol=5 * np.sqrt(0.15 * 0.85 / 2000))


def test_an_empty_reservoir_gives_the_batch_and_a_young_one_only_what_it_has():
    batch = Batch(jnp.arange(1, 5), jnp.arange(1, 5))
    held = Reservoir.empty(100, batch)
    np.testing.assert_array_equal(held.draw(4, jax.random.key(0), batch).inputs, batch.inputs)
    held = held.add(batch, jax.random.key(1))
    drawn = held.draw(200, jax.random.key(2), jax.tree.map(lambda x: jnp.tile(x, 50), batch))
    assert {*np.asarray(drawn.inputs).tolist()} == {1, 2, 3, 4}


def test_replay_steps_on_the_batch_and_on_as_much_of_the_past():
    learner = continual.replay(loss_fn, 8, EXAMPLE)
    state, _ = run(learner, batches=stream(3))
    batch, key = jax.tree.map(lambda x: x[0], stream(seed=1)), jax.random.key(7)
    past = state.memory.draw(4, jax.random.split(key)[0], batch)
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch, past)
    updates, _ = optax.adam(0.05).update(jax.grad(loss_fn)(state.params, both), state.opt_state)
    found, loss = learner.step(state, batch, key, RATE)
    close(found.params, optax.apply_updates(state.params, updates))
    np.testing.assert_allclose(loss, loss_fn(state.params, batch), rtol=1e-6)
    assert int(found.memory.seen) == 16


def test_the_average_follows_what_learns_and_does_not_hold_it():
    plain, batches = continual.replay(loss_fn, 8, EXAMPLE), stream(4)
    learner = continual.averaged(plain)
    hparams = RATE | {"slow_rate": jnp.float32(0.2)}
    state, wanted = learner.init(START), START
    other = plain.init(START)
    for i in range(4):
        batch, key = jax.tree.map(lambda x, i=i: x[i], batches), jax.random.key(i)
        state, loss = learner.step(state, batch, key, hparams)
        other, same = plain.step(other, batch, key, hparams)
        wanted = jax.tree.map(lambda s, p: s + 0.2 * (p - s), wanted, other.params)
        np.testing.assert_allclose(loss, same, rtol=1e-6)
    state = learner.domain_ends(state, batch)
    close(state.params, other.params)
    close(learner.start(state), wanted)
    assert int(state.memory.memory.seen) == 16
    held = continual.averaged(continual.elastic(loss_fn))
    began = held.init(START)
    ended = held.domain_ends(began, batch)
    assert not all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (began.memory, ended.memory)), strict=True)
    )
    with pytest.raises(UserError, match="average of its own"):
        continual.averaged(continual.fast_and_slow(loss_fn))


@pytest.mark.parametrize("steps", [1, 2])
def test_the_start_descends_the_loss_after_steps_on_what_is_new(steps):
    learner = continual.online_maml(loss_fn, 8, EXAMPLE, steps)
    hparams = RATE | {"inner_learning_rate": jnp.float32(0.1)}
    state, _ = run(learner, hparams, stream(3))
    batch, key = jax.tree.map(lambda x: x[0], stream(seed=1)), jax.random.key(7)
    past = state.memory.draw(2, jax.random.split(key)[0], batch)
    support, rest = (jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(2), slice(2, 4)))
    query = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), rest, past)

    def objective(params):
        for _ in range(steps):
            grads = jax.grad(loss_fn)(params, support)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return loss_fn(params, query)

    updates, _ = optax.adam(0.05).update(jax.grad(objective)(state.params), state.opt_state)
    found, _ = learner.step(state, batch, key, hparams)
    close(found.params, optax.apply_updates(state.params, updates), rtol=1e-4)


def test_a_rate_that_is_learned_descends_the_loss_of_the_next_batch():
    optimizer = optax.scale_by_adam(eps_root=1e-8)
    of_rate, log_factor = optax.adam(0.05), jnp.float32(0)
    params, state, rate_state = START, optimizer.init(START), of_rate.init(log_factor)
    batches = [jax.tree.map(lambda x, i=i: x[i], stream()) for i in range(12)]
    losses = [loss_fn(params, batches[0])]
    for before, batch in itertools.pairwise(batches):
        direction, state = optimizer.update(jax.grad(loss_fn)(params, before), state)

        def after(log_factor, params=params, direction=direction):
            steps = jax.tree.map(lambda d: -0.05 * jnp.exp(log_factor) * d, direction)
            return optax.apply_updates(params, steps)

        slope = jax.grad(lambda f, batch=batch, after=after: loss_fn(after(f), batch))(log_factor)
        params = after(log_factor)
        losses.append(loss_fn(params, batch))
        update, rate_state = of_rate.update(slope, rate_state)
        log_factor = log_factor + update
    learner = continual.rate_learned_online(loss_fn, EXAMPLE)
    found, followed = run(learner)
    np.testing.assert_allclose(followed, losses, rtol=1e-4)
    close(learner.start(found), params, rtol=1e-4)
    np.testing.assert_allclose(
        found.memory.online.logs["learning_rate"], log_factor, rtol=1e-3, atol=1e-6
    )
    assert abs(float(log_factor)) > 0.1
