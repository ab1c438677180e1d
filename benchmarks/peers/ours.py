"""The meta-step of metaopt, and the data that all peers are given. What makes it fast is here."""

import functools
import math
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
    Problem,
    flatten,
    unflatten,
)
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.tasks.sinusoid import SinusoidConfig, sinusoid
from metaopt.types import Batch, Episode, Estimator, Key, LossFn, Model

PACKAGES = ("jax", "jaxlib", "optax", "flax")


class Setting(NamedTuple):
    """How metaopt computes a problem.

    Attributes:
      estimator: an exact one.
      tasks_at_a_time: on each device, or its largest common divisor with the tasks
        there; 0 all by `jax.vmap`, 1 one by one.
      unroll: the inner steps, rather than scan them.
    """

    estimator: Estimator
    tasks_at_a_time: int
    unroll: bool


REVERSE, MIXED = meta_gradients.reverse, meta_gradients.mixed_mode
SETTINGS: dict[Name, tuple[Setting, ...]] = {
    "sinusoid": (Setting(REVERSE, tasks_at_a_time=0, unroll=True),),
    "lm": (
        Setting(REVERSE, tasks_at_a_time=1, unroll=True),
        Setting(MIXED, tasks_at_a_time=1, unroll=True),
    ),
    "omniglot": (
        Setting(MIXED, tasks_at_a_time=2, unroll=True),
        Setting(MIXED, tasks_at_a_time=4, unroll=True),
    ),
}


def candidates(data: Data, threads: int) -> Candidates:
    """The forms of `SETTINGS`, with a device for every thread.

    Where the tasks do not divide by the threads there are fewer devices, of more threads.
    """
    num_devices = max(n for n in range(1, threads + 1) if data.problem.num_tasks % n == 0)
    tasks, forms = data.problem.num_tasks // num_devices, {}
    for setting in SETTINGS[data.problem.name]:
        group = math.gcd(setting.tasks_at_a_time, tasks) % tasks
        name = (
            f"{setting.estimator.__name__}, {group or 'all'} at a time, "
            f"{num_devices} device{'s' * (num_devices > 1)}"
        )
        forms[name] = functools.partial(
            _build, data, setting._replace(tasks_at_a_time=group), num_devices
        )
    return forms


def _build(data: Data, setting: Setting, num_devices: int) -> Peer:
    problem, learner = data.problem, learners.maml()
    devices = parallel.default_devices(num_devices)
    inner = InnerLoop(num_steps=problem.num_inner_steps, unroll=setting.unroll)
    outer = OuterConfig(learning_rate=problem.outer_learning_rate, clip_norm=float("inf"))
    step = make_meta_step(
        setting.estimator(learner, make_loss(problem, make_model(problem)), inner),
        outer_optimizer(outer),
        tasks_at_a_time=setting.tasks_at_a_time,
        axis_name=parallel.AXIS,
    )
    compiled = parallel.parallel_step(step, devices)
    hparams = outer.hparams() | {"inner_learning_rate": jnp.float32(problem.inner_learning_rate)}
    params = jax.tree.map(jnp.asarray, unflatten(data.params))
    state = init_state(jax.random.key(0), params, learner, outer_optimizer(outer), hparams)
    place: list[Any] = [parallel.replicate(state, devices)]
    episodes = _placed(data, devices)

    def take_step() -> dict:
        place[0], metrics = compiled(place[0], episodes)
        return jax.block_until_ready((place[0], metrics))[1]

    def first() -> tuple[float, float]:
        metrics = take_step()
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return Peer(first, take_step)


def _placed(data: Data, devices) -> Episode:
    """The episodes where the step wants them, as the tensors of the peers are."""
    support, query = (Batch(*map(jnp.asarray, batch)) for batch in (data.support, data.query))
    tasks = jnp.arange(data.problem.num_tasks)
    split = parallel.split_over_devices(Episode(support, query, tasks), len(devices))
    return jax.pmap(lambda episodes: episodes, devices=devices)(split)


def make_model(problem: Problem) -> Model:
    """The model of a problem."""
    if problem.name == "sinusoid":
        return models.mlp(1, 1, (problem.width, problem.width))
    if problem.name == "lm":
        return models.transformer(
            models.TransformerConfig(
                vocab_size=VOCAB_SIZE,
                width=problem.width,
                num_layers=problem.num_layers,
                num_heads=problem.num_heads,
            )
        )
    shape = (problem.image_size, problem.image_size, 1)
    return models.conv(shape, NUM_CLASSES, problem.width)


def make_loss(problem: Problem, model: Model) -> LossFn:
    """Mean squared error, or cross-entropy in nats."""
    makers = {
        "sinusoid": losses.regression,
        "lm": losses.next_token,
        "omniglot": losses.classification,
    }
    return makers[problem.name](model)


def make_data(problem: Problem, seed: int = 0) -> Data:
    """Parameters as metaopt starts them, and episodes.

    Sinusoids are those of Finn et al. (2017). Tokens are uniform, and images one pattern a
    class with noise on it: a step takes as long on any others.
    """
    params_key, data_key = jax.random.split(jax.random.key(seed))
    params = jax.device_get(jax.jit(make_model(problem).init)(params_key))
    episodes = jax.device_get(jax.jit(functools.partial(_draw, problem))(data_key))
    return Data(problem, flatten(params), tuple(episodes.support), tuple(episodes.query))


def _draw(problem: Problem, key: Key) -> Episode:
    if problem.name == "sinusoid":
        sizes = SinusoidConfig(num_support=problem.num_support, num_query=problem.num_query)
        return sinusoid(sizes).train.sample(key, problem.num_tasks)
    draw = _draw_tokens if problem.name == "lm" else _draw_images
    support_key, query_key, shared_key = jax.random.split(key, 3)
    support = draw(problem, problem.num_support, support_key, shared_key)
    query = draw(problem, problem.num_query, query_key, shared_key)
    return Episode(support, query, jnp.arange(problem.num_tasks))


def _draw_tokens(problem: Problem, size: int, key: Key, _: Key) -> Batch:
    shape = (problem.num_tasks, size, problem.length + 1)
    tokens = jax.random.randint(key, shape, 0, VOCAB_SIZE)
    return Batch(tokens[..., :-1], tokens[..., 1:])


def _draw_images(problem: Problem, size: int, key: Key, patterns_key: Key) -> Batch:
    image = (problem.image_size, problem.image_size, 1)
    patterns = jax.random.normal(patterns_key, (problem.num_tasks, NUM_CLASSES, *image))
    labels = jnp.arange(size) % NUM_CLASSES
    noise = jax.random.normal(key, (problem.num_tasks, size, *image))
    targets = jnp.broadcast_to(labels, (problem.num_tasks, size))
    return Batch(patterns[:, labels] + noise, targets)
