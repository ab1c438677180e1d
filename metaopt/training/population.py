"""Population-based training: members train side by side, copies of the best replace the worst.

A member is a state; a population is one stacked state, leaves ``[P, ...]``. Since the
hyperparameters are scalars in the state, members differ in them under one compiled step.
At intervals `exploit` copies the best over the worst, and `explore` changes the
hyperparameters of the copies, so that a schedule is found as well as values.

References:
  Jaderberg et al., 2017, "Population based training of neural networks".
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.parallel import Device, default_devices, parallel_members
from metaopt.ranges import Range, Steps, check_value
from metaopt.training.loop import StepFn
from metaopt.training.recorder import Diverged
from metaopt.types import Array, Episode, Key, MetaState, PyTree

Bounds = Mapping[str, tuple[float, float]]
"""``{name: (low, high)}``, ``0 < low <= high``: the hyperparameters that vary, and their ranges."""

FACTORS = (0.8, 1.25)


def initial_population(state: MetaState, size: int, bounds: Bounds, key: Key) -> MetaState:
    """P copies of a state, their hyperparameters drawn log-uniformly within the bounds.

    The first member keeps the hyperparameters that it has. All keep its key, so they see
    the same noise, and differences between them are paired.

    Raises:
      UserError: the bounds are not positive, or name a hyperparameter that is not in the state.
    """
    _check_bounds(bounds, state.hparams)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), state)
    drawn = _draw(key, bounds, size)
    hparams = {
        name: values.at[1:].set(drawn[name][1:]) if name in bounds else values
        for name, values in states.hparams.items()
    }
    return states._replace(hparams=hparams)


def select(scores: Array, key: Key, fraction: float = 0.25) -> Array:
    """Truncation selection: the parent of each member.

    The parent of the worst ``fraction`` of members (at least one), and of every one whose score
    is not finite, is one of the best ``fraction`` at random; the others are their own.

    Args:
      scores: ``[P]``, lower is better.
      key: key of the draw.
      fraction: share that is replaced, up to 0.5.

    Returns:
      int32 ``[P]`` indices of members.
    """
    size = scores.shape[0]
    count = min(size // 2, max(1, int(fraction * size)))
    finite = jnp.isfinite(scores)
    order = jnp.argsort(jnp.where(finite, scores, jnp.inf))
    rank = jnp.argsort(order)
    pool = jnp.clip(jnp.sum(finite), 1, max(count, 1))
    source = order[jax.random.randint(key, (size,), 0, pool)]
    leaves = ((rank >= size - count) | ~finite) & finite.any()
    return jnp.where(leaves, source, jnp.arange(size)).astype(jnp.int32)


def exploit(states: PyTree, scores: Array, key: Key, fraction: float = 0.25):
    """Replaces the worst members by exact copies of the best, see `select`.

    Args:
      states: leaves ``[P, ...]``.
      scores: ``[P]``, lower is better.
      key: key of the draw.
      fraction: share that is replaced.

    Returns:
      ``(states, parents)``, int32 ``[P]``.
    """
    parents = select(scores, key, fraction)
    return jax.tree.map(lambda x: x[parents], states), parents


def explore(
    hparams: Mapping[str, Array],
    key: Key,
    bounds: Bounds,
    *,
    who: Array | None = None,
    resample: float = 0.1,
) -> dict[str, Array]:
    """Multiplies hyperparameters by 0.8 or 1.25, or draws new ones, within their bounds.

    Args:
      hparams: ``{name: float32 [P]}``.
      key: key of the draws, which are independent for each member and name.
      bounds: ranges of those that vary; the others stay.
      who: bool ``[P]``, the members that change; None for all.
      resample: probability of a log-uniform draw instead of a factor.
    """
    draw_key, factor_key, choice_key = jax.random.split(key, 3)
    size = next(iter(hparams.values())).shape[0]
    who = jnp.ones(size, bool) if who is None else who
    drawn = _draw(draw_key, bounds, size)
    found = dict(hparams)
    for i, (name, (low, high)) in enumerate(sorted(bounds.items())):
        factors = jax.random.choice(
            jax.random.fold_in(factor_key, i), jnp.float32(FACTORS), (size,)
        )
        is_new = jax.random.bernoulli(jax.random.fold_in(choice_key, i), resample, (size,))
        moved = jnp.clip(hparams[name] * factors, low, high)
        found[name] = jnp.where(who, jnp.where(is_new, drawn[name], moved), hparams[name])
    return found


class Generation(NamedTuple):
    """A population when it was evaluated; arrays are on the host.

    Attributes:
      step: training steps done.
      scores: float32 ``[P]``, lower is better.
      hparams: ``{name: float32 [P]}``, hyperparameters that led to these scores.
      parents: int32 ``[P]``, member that each one continues from.
    """

    step: int
    scores: np.ndarray
    hparams: dict[str, np.ndarray]
    parents: np.ndarray


def train_population(
    states: MetaState,
    step: StepFn,
    sample: Callable[[int], Episode],
    evaluate: Callable[[MetaState], Array],
    *,
    bounds: Bounds,
    steps: int,
    ready_every: int,
    key: Key,
    devices: Sequence[Device] | None = None,
    fraction: float = 0.25,
    resample: float = 0.1,
) -> tuple[MetaState, list[Generation]]:
    """Trains a population, and returns its best member.

    Args:
      states: states of P members, see `initial_population`; they stay as they are.
      step: step of one member on one device, not compiled (`make_meta_step` with no axis name).
      sample: ``step -> episodes``, which all members train on.
      evaluate: ``state -> scalar`` of one member, pure; lower is better.
      bounds: ranges of the hyperparameters that vary.
      steps: training steps of each member.
      ready_every: steps after which members are evaluated, copied and changed. After the last
        step they are evaluated once more.
      key: key of all selection and exploration.
      devices: devices over which the members are spread; by default the first alone.
      fraction: share of members replaced at a time.
      resample: probability that a copy draws a new hyperparameter.

    Returns:
      The best state, without the member axis, and the generations in order, the last of
      which copies no member.

    Raises:
      UserError: P does not divide by the devices, or numbers or bounds are out of range.
      Diverged: no member's score is finite.
    """
    _check_bounds(bounds, states.hparams)
    devices = default_devices(1) if devices is None else devices
    _check_sizes(states.step.shape[0], len(devices), steps, ready_every, fraction)
    mapped_step = parallel_members(step, devices, donate=True)
    evaluated = parallel_members(lambda state, _: evaluate(state), devices)
    breed = jax.jit(functools.partial(_breed, bounds=bounds, fraction=fraction, resample=resample))
    members = _over_devices(states, len(devices))
    history: list[Generation] = []
    for number in range(1, steps + 1):
        members, _ = mapped_step(members, sample(number - 1))
        if number % ready_every and number < steps:
            continue
        scores, hparams = evaluated(members, None), members.hparams
        parents = jnp.arange(scores.size, dtype=jnp.int32)
        if number < steps:
            bred, parents = breed(members, scores, jax.random.fold_in(key, number))
            # With the sharding of before, or the mapped step would not take typed keys.
            members = jax.device_put(bred, jax.tree.map(lambda x: x.sharding, members))
        flat = {name: np.asarray(values).reshape(-1) for name, values in hparams.items()}
        scores, parents = np.asarray(scores).reshape(-1), np.asarray(parents)
        history.append(Generation(number, scores, flat, parents))
    best = _best(history[-1])
    return jax.tree.map(lambda x: x[best], _flat(members)), history


def lineage(history: Sequence[Generation], member: int | None = None) -> list[tuple[int, int]]:
    """The ancestors of a member of the last generation, by default of the best.

    Returns:
      ``(step, member)`` for each generation in order: the ancestor at that step, so that
      ``history[i].hparams[name][member]`` is the schedule that it was trained with.
    """
    member = _best(history[-1]) if member is None else member
    path = []
    for generation in reversed(history):
        member = int(generation.parents[member])
        path.append((generation.step, member))
    return path[::-1]


def _breed(
    members: MetaState, scores: Array, key: Key, *, bounds: Bounds, fraction: float, resample: float
) -> tuple[MetaState, Array]:
    """Exploit and explore for members ``[N, M, ...]``."""
    select_key, explore_key = jax.random.split(key)
    states, parents = exploit(_flat(members), scores.reshape(-1), select_key, fraction)
    copied = parents != jnp.arange(parents.size)
    hparams = explore(states.hparams, explore_key, bounds, who=copied, resample=resample)
    return _over_devices(states._replace(hparams=hparams), scores.shape[0]), parents


def _over_devices(states: PyTree, num_devices: int) -> PyTree:
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), states)


def _flat(members: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), members)


def _best(generation: Generation) -> int:
    finite = np.isfinite(generation.scores)
    if not finite.any():
        raise Diverged(
            f"after step {generation.step} no member of the population has a finite score: "
            "lower the bounds of its rates"
        )
    return int(np.argmin(np.where(finite, generation.scores, np.inf)))


def _draw(key: Key, bounds: Bounds, size: int) -> dict[str, Array]:
    """Log-uniform draws ``[size]``."""
    drawn = {}
    for i, (name, (low, high)) in enumerate(sorted(bounds.items())):
        uniform = jax.random.uniform(jax.random.fold_in(key, i), (size,))
        # The logarithm and back may round past the bounds.
        drawn[name] = jnp.clip(low * (high / low) ** uniform, low, high)
    return drawn


def _check_bounds(bounds: Bounds, hparams: Mapping[str, Array]) -> None:
    for name, (low, high) in bounds.items():
        if name not in hparams:
            raise UserError(f"{name!r} has bounds but is not in the state: {', '.join(hparams)}")
        if not 0 < low <= high < np.inf:
            raise UserError(f"the bounds of {name} are {low} and {high}: give 0 < low <= high")


def _check_sizes(
    size: int, num_devices: int, steps: int, ready_every: int, fraction: float
) -> None:
    if size % num_devices:
        raise UserError(f"a population of {size} does not divide by {num_devices} devices")
    check_value("steps", steps, Steps)
    check_value("ready_every", ready_every, Steps)
    check_value("fraction", fraction, Annotated[float, Range(1e-9, 0.5)])
