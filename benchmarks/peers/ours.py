"""The meta-step of metaopt, and the data that all peers are given. What makes it fast is here."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.peers.problems import (
    NUM_CLASSES,
    VOCAB_SIZE,
    Candidates,
    Data,
    Name,
    Peer,
    Sizes,
    flatten,
    unflatten,
)
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import MetaStep, init_state, make_meta_step
from metaopt.tasks.sinusoid import SinusoidConfig, sinusoid
from metaopt.types import (
    Batch,
    Episode,
    Estimator,
    Key,
    MetaState,
    Metrics,
    TaskFamily,
    TaskSplit,
)

PACKAGES = ("jax", "jaxlib", "optax", "flax")


class Setting(NamedTuple):
    """How metaopt computes a problem.

    Attributes:
      estimator: exact estimator.
      tasks_at_a_time: tasks computed together on a device, or the largest common divisor with
        the number of tasks there; 0 all by `jax.vmap`, 1 one by one.
      unroll: whether the inner steps are unrolled rather than scanned.
      steps_per_call: meta-steps of one compiled call, as `metaopt.fit.FitConfig.steps_per_call`
        gives them to a training. The peers are eager or take one step a call, and so the time
        of a step is without the time of a call here: the name of the form says it.
    """

    estimator: Estimator
    tasks_at_a_time: int
    unroll: bool
    steps_per_call: int = 1


REVERSE, MIXED = meta_gradients.reverse, meta_gradients.mixed_mode
SETTINGS: dict[Name, tuple[Setting, ...]] = {
    "sinusoid": (
        Setting(REVERSE, tasks_at_a_time=0, unroll=True, steps_per_call=10),
        Setting(REVERSE, tasks_at_a_time=0, unroll=True, steps_per_call=50),
        Setting(MIXED, tasks_at_a_time=0, unroll=True, steps_per_call=50),
    ),
    "lm": (
        Setting(REVERSE, tasks_at_a_time=1, unroll=True),
        Setting(MIXED, tasks_at_a_time=1, unroll=True),
    ),
    "omniglot": (
        Setting(REVERSE, tasks_at_a_time=1, unroll=True),
        Setting(MIXED, tasks_at_a_time=1, unroll=True),
    ),
}


def candidates(data: Data, threads: int) -> Candidates:
    """The forms of `SETTINGS`, with a device for every thread.

    If the tasks do not divide by the threads, there are fewer devices, of more threads.
    """
    num_devices = max(n for n in range(1, threads + 1) if data.sizes.num_tasks % n == 0)
    tasks, forms = data.sizes.num_tasks // num_devices, {}
    for setting in SETTINGS[data.sizes.name]:
        group = math.gcd(setting.tasks_at_a_time, tasks) % tasks
        parts = [
            setting.estimator.__name__,
            f"{group or 'all'} at a time",
            f"{num_devices} device{'s' * (num_devices > 1)}",
            *["scanned"] * (not setting.unroll),
            *[f"{setting.steps_per_call} steps a call"] * (setting.steps_per_call > 1),
        ]
        forms[", ".join(parts)] = functools.partial(
            _build, data, setting._replace(tasks_at_a_time=group), num_devices
        )
    return forms


def _build(data: Data, setting: Setting, num_devices: int) -> Peer:
    sizes, learner = data.sizes, learners.maml()
    devices = parallel.default_devices(num_devices)
    inner = InnerLoop(num_steps=sizes.num_inner_steps, unroll=setting.unroll)
    outer = OuterConfig(learning_rate=sizes.outer_learning_rate, clip_norm=float("inf"))
    step = make_meta_step(
        setting.estimator(learner, make_problem(sizes).loss_fn, inner),
        outer_optimizer(outer),
        tasks_at_a_time=setting.tasks_at_a_time,
        axis_name=parallel.AXIS if num_devices > 1 else None,
    )
    one_call = _several(step, setting.steps_per_call)
    if num_devices > 1:
        compiled = parallel.parallel_step(one_call, devices)
    else:
        compiled = parallel.single_step(one_call)
    hparams = outer.hparams() | {"inner_learning_rate": jnp.float32(sizes.inner_learning_rate)}
    params = jax.tree.map(jnp.asarray, unflatten(data.params))
    state = init_state(jax.random.key(0), params, learner, outer_optimizer(outer), hparams)
    place: list[Any] = [parallel.replicate(state, devices)]
    episodes = _placed(data, devices, setting.steps_per_call)
    program = compiled, (place[0], episodes)

    def take_step() -> dict:
        place[0], metrics = compiled(place[0], episodes)
        return jax.block_until_ready((place[0], metrics))[1]

    def first() -> tuple[float, float]:
        metrics = take_step()
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return Peer(first, take_step, setting.steps_per_call, program)


def _several(step: MetaStep, number: int) -> MetaStep:
    """A number of steps, each on episodes of its own, with the metrics of the first."""
    if number == 1:
        return step

    def call(state: MetaState, episodes: Episode) -> tuple[MetaState, Metrics]:
        state, metrics = jax.lax.scan(step, state, episodes)
        return state, jax.tree.map(lambda x: x[0], metrics)

    return call


def _placed(data: Data, devices, steps_per_call: int) -> Episode:
    """The episodes where a call wants them, as the tensors of the peers are.

    A call of several steps is given them several times, ``[N, m, T, ...]``: were they constant in
    the loop, the compiler could compute some of a step once for all.
    """
    support, query = (Batch(*map(jnp.asarray, batch)) for batch in (data.support, data.query))
    tasks = jnp.arange(data.sizes.num_tasks)
    split = parallel.split_over_devices(Episode(support, query, tasks), len(devices))
    if steps_per_call > 1:
        split = jax.tree.map(lambda x: jnp.stack([x] * steps_per_call, axis=1), split)
    return jax.pmap(lambda episodes: episodes, devices=devices)(split)


def make_problem(sizes: Sizes) -> Problem:
    """Tasks, model and loss of a problem.

    Sinusoids are those of Finn et al. (2017). Tokens are uniform, and images one pattern a
    class with noise on it: a step takes as long on any others.
    """
    if sizes.name == "sinusoid":
        model = models.mlp(1, 1, (sizes.width, sizes.width))
        points = SinusoidConfig(num_support=sizes.num_support, num_query=sizes.num_query)
        return Problem(sinusoid(points), model, losses.regression(model))
    if sizes.name == "lm":
        model = models.transformer(
            models.TransformerConfig(
                vocab_size=VOCAB_SIZE,
                width=sizes.width,
                num_layers=sizes.num_layers,
                num_heads=sizes.num_heads,
            )
        )
        return Problem(_family(sizes, _draw_tokens), model, losses.next_token(model))
    model = models.conv((sizes.image_size, sizes.image_size, 1), NUM_CLASSES, sizes.width)
    return Problem(_family(sizes, _draw_images), model, losses.classification(model))


def make_data(sizes: Sizes, seed: int = 0) -> Data:
    """Parameters as metaopt starts them, and episodes."""
    problem = make_problem(sizes)
    params_key, data_key = jax.random.split(jax.random.key(seed))
    params = jax.device_get(jax.jit(problem.model.init)(params_key))
    sample = jax.jit(problem.family.train.sample, static_argnums=1)
    episodes = jax.device_get(sample(data_key, sizes.num_tasks))
    return Data(sizes, flatten(params), tuple(episodes.support), tuple(episodes.query))


def _family(sizes: Sizes, draw: Callable[[Sizes, int, int, Key, Key], Batch]) -> TaskFamily:
    """Tasks whose support and query share what a key decides."""

    def sample(key: Key, num_tasks: int) -> Episode:
        support_key, query_key, shared_key = jax.random.split(key, 3)
        support = draw(sizes, num_tasks, sizes.num_support, support_key, shared_key)
        query = draw(sizes, num_tasks, sizes.num_query, query_key, shared_key)
        return Episode(support, query, jnp.arange(num_tasks))

    return TaskFamily(sizes.name, *3 * [TaskSplit(sample)])


def _draw_tokens(sizes: Sizes, num_tasks: int, number: int, key: Key, _: Key) -> Batch:
    tokens = jax.random.randint(key, (num_tasks, number, sizes.length + 1), 0, VOCAB_SIZE)
    return Batch(tokens[..., :-1], tokens[..., 1:])


def _draw_images(sizes: Sizes, num_tasks: int, number: int, key: Key, patterns_key: Key) -> Batch:
    image = (sizes.image_size, sizes.image_size, 1)
    patterns = jax.random.normal(patterns_key, (num_tasks, NUM_CLASSES, *image))
    labels = jnp.arange(number) % NUM_CLASSES
    noise = jax.random.normal(key, (num_tasks, number, *image))
    targets = jnp.broadcast_to(labels, (num_tasks, number))
    return Batch(patterns[:, labels] + noise, targets)
