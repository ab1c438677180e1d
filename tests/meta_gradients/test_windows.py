"""Long documents in windows, whose carry is a part of the state of a training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import learners, losses, meta_gradients
from metaopt.errors import UserError
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients.streaming import streaming
from metaopt.models import TransformerConfig, transformer, with_window
from metaopt.optimizers.outer import OuterConfig
from metaopt.self_improvement.improving import improving_train
from metaopt.streams.dynamic_evaluation import decay_towards, walk
from metaopt.training.loop import train
from metaopt.types import Batch, Episode, TaskFamily, TaskSplit

CONFIG = TransformerConfig(vocab_size=11, width=8, num_heads=2, num_layers=1, window=5)
INNER = InnerLoop(batching="split", unroll=False)
HPARAMS = {"inner_learning_rate": 0.1}
WINDOWS, CHUNKS, SIZE = 3, 4, 4
MODEL = with_window(CONFIG)
LOSS = losses.ReadingLoss(MODEL)


def momentum_with_decay():
    """A learner whose rule keeps a state, and goes back to the start."""
    plain = learners.maml(lambda rate: optax.sgd(rate, momentum=0.5))

    def inner_opt(meta_params, hparams):
        back = decay_towards(plain.start(meta_params), 0.1)
        return optax.chain(plain.inner_opt(meta_params, hparams), back)

    return plain._replace(inner_opt=inner_opt)


LEARNER = momentum_with_decay()


def documents(key, number):
    """Documents that repeat themselves, ``[number, 6, 4]`` of support and of query."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    total = WINDOWS * CHUNKS * SIZE
    words = rng.integers(0, 11, (number, 9)).astype(np.int32)
    tokens = np.tile(words, 1 + total // 9)[:, : total + 1]
    inputs, targets = (
        x.reshape(number, WINDOWS * CHUNKS, SIZE) for x in (tokens[:, :-1], tokens[:, 1:])
    )
    half = WINDOWS * CHUNKS // 2
    parts = (Batch(inputs[:, p], targets[:, p]) for p in (slice(half), slice(half, None)))
    return Episode(*parts, np.zeros(number, np.int32))


PROBLEM = Problem(TaskFamily("documents", *3 * [TaskSplit(documents)]), transformer(CONFIG), LOSS)


def train_on(
    directory=None,
    steps=5,
    rate=0.01,
    estimator=streaming,
    train_fn=train,
    state=None,
    key=None,
    **changes,
):
    config = dataclasses.replace(FitConfig(tasks_per_step=4, windows=WINDOWS), **changes)
    return fit(
        PROBLEM,
        LEARNER,
        estimator,
        inner=INNER,
        outer=OuterConfig(learning_rate=rate),
        config=dataclasses.replace(config, num_steps=steps, checkpoint_every=1),
        directory=directory,
        state=state,
        key=key,
        hparams=HPARAMS,
        train_fn=train_fn,
    )


def reported(fitted_by):
    """The losses of the chunks that each step reported, ``[steps, N]``."""
    found = []

    def spy(training, config, directory):
        def step_fn(state, batch):
            state, metrics = training.step_fn(state, batch)
            found.append(np.asarray(metrics["inner_losses"]))
            return state, metrics

        return train(training._replace(step_fn=step_fn), config, directory)

    fitted_by(spy)
    return np.stack(found)


def test_windows_one_after_the_other_read_the_whole_document():
    found = reported(lambda spy: train_on(rate=0.0, steps=6, train_fn=spy))
    _, data_key = jax.random.split(jax.random.key(0))
    params = PROBLEM.model.init(jax.random.split(jax.random.key(0))[0])
    rule = LEARNER.inner_opt({"params": params}, HPARAMS)
    read = jax.jit(jax.vmap(lambda chunks: walk(LOSS, rule, params, chunks).losses))
    for which in range(2):  # the carry starts again with each document
        drawn = documents(jax.random.fold_in(data_key, which), 4)
        chunks = jax.tree.map(
            lambda a, b: np.concatenate([a, b], axis=1), drawn.support, drawn.query
        )
        mean = read(chunks).mean(axis=0).reshape(WINDOWS, CHUNKS)
        np.testing.assert_allclose(found[3 * which : 3 * which + 3], mean, rtol=2e-5)


def test_the_gradient_of_a_window_is_that_of_a_loop_from_the_moved_start():
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda x: x.astype(jnp.float64), PROBLEM.model.init(jax.random.key(1))
        )
        estimate = streaming(LEARNER, LOSS, INNER)
        drawn = jax.tree.map(lambda x: x[0], documents(jax.random.key(2), 1))
        first, second = (
            Episode(*(jax.tree.map(lambda x, a=a: x[a : a + 2], drawn.support) for a in begins))
            for begins in ((0, 2), (2, 4))
        )
        meta_params = {"params": params}
        _, _, carry = estimate.go_on(
            meta_params, HPARAMS, first, estimate.begin(meta_params, HPARAMS)
        )
        moved = jax.tree.map(lambda x: x + 0.01, meta_params)  # by an outer step in between
        grads, metrics, _ = estimate.go_on(moved, HPARAMS, second, carry)

        def by_hand(moved):
            now = jax.tree.map(jnp.add, moved["params"], carry.displacement)
            state, context, found = carry.opt_state, carry.context, []
            rule = LEARNER.inner_opt(moved, HPARAMS)
            for part in (second.support, second.query):
                for i in range(2):
                    chunk = jax.tree.map(lambda x, i=i: x[i : i + 1], part)
                    (loss, context), gradient = jax.value_and_grad(LOSS.step, has_aux=True)(
                        now, chunk, context
                    )
                    updates, state = rule.update(gradient, state, now)
                    now = optax.apply_updates(now, updates)
                    found.append(loss)
            return jnp.stack(found).mean()

        loss, wanted = jax.jit(jax.value_and_grad(by_hand))(moved)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-10), grads, wanted
        )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train_on(tmp_path_factory.mktemp("straight"))


def test_a_training_stopped_within_a_document_goes_on_bitwise(straight, tmp_path):
    train_on(tmp_path, steps=2)
    resumed = train_on(tmp_path)
    assert jax.tree.leaves(resumed.state.carry)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.carry, straight.state.carry)
    jax.tree.map(
        np.testing.assert_array_equal, resumed.state.meta_params, straight.state.meta_params
    )


def test_a_training_goes_on_from_a_state_within_a_document(straight):
    state = train_on(steps=2).state
    found = train_on(state=state).state
    jax.tree.map(np.testing.assert_array_equal, found.carry, straight.state.carry)


@pytest.mark.parametrize("changes", [{"num_devices": 1}, {"num_devices": 2, "tasks_at_a_time": 1}])
def test_devices_and_groups_carry_the_same(straight, changes):
    found = train_on(**changes).state
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        (found.meta_params, found.carry),
        (straight.state.meta_params, straight.state.carry),
    )


def test_what_cannot_be_taken_in_windows_is_refused(tmp_path):
    with pytest.raises(UserError, match="windows=3 takes an estimator that carries"):
        train_on(estimator=meta_gradients.joint)
    with pytest.raises(UserError, match="12 chunks cannot be cut into 4 windows"):
        train_on(windows=4)
    with pytest.raises(UserError, match="steps_per_call is 2"):
        FitConfig(windows=2, steps_per_call=2)
    with pytest.raises(UserError, match="give evaluate, or eval_every=0"):
        train_on(eval_every=1)
    with pytest.raises(UserError, match="the closed loop compares"):
        train_on(train_fn=improving_train)
    state = train_on(tmp_path, steps=2).state
    for changes in ({"state": state._replace(carry=())}, {"state": state, "key": state.key}):
        with pytest.raises(UserError, match="of step 2, within a document of 3 windows"):
            train_on(steps=4, **changes)
    with pytest.raises(UserError, match="windows"):
        train_on(tmp_path, steps=2, windows=2)
