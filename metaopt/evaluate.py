"""Evaluation: the loss after 0..K inner steps on held-out tasks, with intervals over tasks.

`evaluate` is the one call for a trained learner. `make_curves` and `tuned_curves` are its parts.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import eager
from metaopt.checks import check_call, check_parts
from metaopt.frozen import prepared, unbound
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.parallel import Device, default_devices, parallel_map
from metaopt.ranges import Count, check_value
from metaopt.statistics import Interval, interval, task_means
from metaopt.types import Array, Episode, Hparams, Learner, LossFn, MetaParams, Params

if TYPE_CHECKING:
    from metaopt.fit import Problem

MAX_RATES_TRIED = 24
LEAST_PER_CALL = 4
"""Episodes that a device takes in a call, if fewer are computed together."""

CurveFn = Callable[[MetaParams, Hparams, Episode], np.ndarray]
"""``(meta_params, hparams, episodes [E, ...]) -> float64 [E, steps + 1]``."""

MeasureFn = Callable[[Params, Episode], Array]
"""``(params, episode) -> float32 scalar, or array``: how good adapted parameters are."""


class Evaluation(NamedTuple):
    """Losses of held-out episodes while they are adapted to.

    Attributes:
      losses: float64 ``[E, K + 1]``, the loss of each episode after 0..K inner steps.
      intervals: mean and 95 % interval over tasks after 0..K steps, ``K + 1`` of them.
    """

    losses: np.ndarray
    intervals: tuple[Interval, ...]


def evaluate(
    problem: "Problem",
    learner: Learner,
    meta_params: MetaParams,
    hparams: Hparams,
    *,
    inner: InnerLoop | None = None,
    num_steps: int | None = None,
    split: Literal["valid", "test"] = "test",
    num_episodes: int = 256,
    seed: int = 0,
    measure: MeasureFn | None = None,
    num_devices: int = 0,
    tasks_at_a_time: int = 0,
) -> Evaluation:
    """The loss of a trained learner on held-out tasks, after 0..K inner steps on each.

    Args:
      problem: tasks and losses; the outer loss judges if there is one.
      learner: what was meta-learned.
      meta_params: its meta-parameters.
      hparams: scalars of the learner, ``inner_learning_rate`` among them: ``fitted.hparams``.
      inner: the inner loop of training; ``InnerLoop()`` if not given.
      num_steps: K; that of the inner loop if not given, which it may exceed.
      split: which tasks.
      num_episodes: E.
      seed: seed of the episodes: the same for all learners that are compared.
      measure: what takes the place of the loss, such as an accuracy.
      num_devices: number of devices; 0 for all.
      tasks_at_a_time: episodes computed together on one device; 0 for 64.

    Returns:
      `Evaluation`.

    Raises:
      UserError: an argument is not what it should be.

    Example:
      >>> fitted = fit(problem, learner)
      >>> evaluate(problem, learner, fitted.meta_params, fitted.hparams).intervals[-1]
    """
    inner = InnerLoop() if inner is None else inner
    check_value("num_episodes", num_episodes, Count)
    check_value("split", split, Literal["valid", "test"])
    length = inner.num_steps if num_steps is None else num_steps
    devices = default_devices(num_devices)
    loss_fn, outer_loss, family = problem.loss_fn, problem.outer_loss, problem.family
    curves = make_curves(
        learner, loss_fn, inner, length, devices, tasks_at_a_time, measure, outer_loss
    )
    chosen = family.test if split == "test" else family.valid
    episodes = chosen.sample(jax.random.key(seed), num_episodes)
    losses = curves(meta_params, hparams, episodes)
    tasks = np.asarray(episodes.task)
    return Evaluation(losses, tuple(interval(column, tasks) for column in losses.T))


def make_curves(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    num_steps: int,
    devices: Sequence[Device],
    tasks_at_a_time: int = 0,
    measure: MeasureFn | None = None,
    outer_loss: LossFn | None = None,
) -> CurveFn:
    """The query losses of episodes after 0..num_steps inner steps on the whole support.

    Compiled once, over all devices, for all learners and losses that are equal functions (see
    `metaopt.eager`). Hyperparameters are arguments, and many episodes take several calls: curves
    at another inner rate do not compile again, nor do those of another large number of episodes.

    Args:
      learner: what was meta-learned.
      loss_fn: what the inner loop descends, as the learner changes it, and what judges.
      inner: the inner loop of training.
      num_steps: length of the curve; it may exceed the trained number.
      devices: where it runs.
      tasks_at_a_time: episodes that a device computes at a time; 64 for 0: unlike the tasks of a
        meta-batch, all episodes at once would not fit.
      measure: what takes the place of the query loss, such as an accuracy. It may give
        several numbers at once, ``[M]``.
      outer_loss: what judges in place of ``loss_fn`` if there is no measure.

    Returns:
      ``(meta_params, hparams, episodes [E, ...]) -> float64 [E, num_steps + 1]`` (or
      ``[E, num_steps + 1, M]``), in the unit of the loss or the measure. Every step takes all of
      the support, also where training splits it.
    """
    check_parts(learner, loss_fn, inner)
    scanned = InnerLoop(num_steps=inner.num_steps, batching="same", unroll=False)
    (bind, frozen), (bind_outer, frozen_outer) = unbound(loss_fn), unbound(outer_loss)

    def curve(shared: tuple, episode: Episode):
        meta_params, hparams, frozen, frozen_outer = shared
        check_call(learner, meta_params, hparams, episode)
        loss_fn = bind(frozen)
        query_loss = bind_outer(frozen_outer) or loss_fn
        query = prepared(query_loss, episode.query)

        def judge(params, _=None):
            return measure(params, episode) if measure else query_loss(params, query)

        adapted = adapt(
            learner.inner_loss(meta_params, loss_fn),
            learner.inner_opt(meta_params, hparams),
            learner.start(meta_params),
            prepared(loss_fn, episode.support),
            scanned,
            num_steps=num_steps,
            probe=judge,
        )
        return jnp.concatenate([adapted.probes, judge(adapted.params)[None]])

    def on_device(shared, episodes):
        # None is a plain loop: `lax.map` would otherwise vmap over groups of one.
        size = None if together == 1 else together
        return jax.lax.map(lambda e: curve(shared, e), episodes, batch_size=size)

    together = tasks_at_a_time or 64
    most = together * -(-LEAST_PER_CALL // together)
    mapped = eager.shared(
        on_device, lambda f: parallel_map(f, devices, most), "curves", *devices, most
    )

    def curves(meta_params, hparams, episodes):
        shared = (meta_params, dict(hparams), frozen, frozen_outer)
        return mapped(shared, episodes).astype(np.float64)

    return curves


class TunedCurves(NamedTuple):
    """Adaptation curves at inner rates tuned apart for every number of steps.

    Attributes:
      losses: ``[E, steps + 1]`` on the test episodes.
      rates: ``[steps + 1]``, the rate chosen for each number of steps; the first, for
        no step, is that of the last.
    """

    losses: np.ndarray
    rates: np.ndarray


OnTried = Callable[[int, int], None]
"""``(done, total)``: told how many rates have been tried, and of how many."""


def tuned_rates(
    curves: CurveFn,
    meta_params: MetaParams,
    hparams: Hparams,
    rates: Sequence[float],
    valid: Episode,
    on_tried: OnTried = lambda done, total: None,
) -> np.ndarray:
    """The inner rate that is best on the validation tasks, for each number of steps apart.

    Args:
      curves: result of `make_curves`.
      meta_params: the learner's meta-parameters.
      hparams: the other hyperparameters.
      rates: the inner learning rates to try. If the best of several is an outermost
        one, further ones are tried beyond it in the same ratio, up to
        `MAX_RATES_TRIED`: what is reported is no artefact of the grid.
      valid: episodes to choose on, ``[E_v, ...]``.
      on_tried: called after each rate.

    Returns:
      ``[steps + 1]``; the first, for no step, is that of the last. A rate under which a
      validation loss is not finite is chosen only where it is so under all of them.
    """
    groups, tried = np.asarray(valid.task), {}

    def best_of_all(more: Sequence[float]) -> np.ndarray:
        total = len(tried) + len(more)
        for rate in more:
            found = _at(curves, meta_params, hparams, rate, valid)
            tried[rate] = task_means(found, groups).mean(axis=0)
            on_tried(len(tried), total)
        return _best_rates(tried)

    best = best_of_all(sorted(rates))
    while more := rates_beyond(sorted(tried), best.tolist()):
        best = best_of_all(more)
    return best


def tuned_curves(
    curves: CurveFn,
    meta_params: MetaParams,
    hparams: Hparams,
    rates: Sequence[float],
    valid: Episode,
    test: Episode,
    on_tried: OnTried = lambda done, total: None,
) -> TunedCurves:
    """Test curves with the inner rate that is best on the validation tasks, see `tuned_rates`.

    The rate is chosen for each number of steps apart, which is the most generous to a
    learner that has one rate for all steps: every point of its curve is its best. A single
    rate is not tried.

    Args:
      curves: result of `make_curves`.
      meta_params: the learner's meta-parameters.
      hparams: the other hyperparameters.
      rates: the inner learning rates to try.
      valid: episodes to choose on, ``[E_v, ...]``.
      test: episodes to report, ``[E, ...]``.
      on_tried: called after each rate that is tried.
    """
    if len(rates) == 1:
        losses = _at(curves, meta_params, hparams, rates[0], test)
        return TunedCurves(losses, np.full(losses.shape[1], rates[0]))
    best = tuned_rates(curves, meta_params, hparams, rates, valid, on_tried)
    on_test = {rate: _at(curves, meta_params, hparams, rate, test) for rate in np.unique(best)}
    losses = np.stack([on_test[rate][:, step] for step, rate in enumerate(best)], axis=1)
    return TunedCurves(losses, best)


def _at(
    curves: CurveFn, meta_params: MetaParams, hparams: Hparams, rate: float, episodes: Episode
) -> np.ndarray:
    return curves(meta_params, {**hparams, "inner_learning_rate": np.float32(rate)}, episodes)


def _best_rates(tried: dict[float, np.ndarray]) -> np.ndarray:
    """The best rate for each number of steps."""
    rates, losses = np.array(list(tried)), np.stack(list(tried.values()))
    best = rates[np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=0)]
    best[0] = best[-1]  # before the first step all are equal: none is computed for it alone
    return best


def rates_beyond(
    tried: Sequence[float], best: Collection[float], most: int = MAX_RATES_TRIED
) -> list[float]:
    """Rates outside those tried, on each side where an outermost one is among the best.

    Args:
      tried: ascending rates; nothing is beyond a single one.
      best: the best rates of several streams or numbers of steps.
      most: the number of rates from which on there are no more.
    """
    if not 1 < len(tried) < most:
        return []
    outside = ((tried[0], tried[0] ** 2 / tried[1]), (tried[-1], tried[-1] ** 2 / tried[-2]))
    return [rate for edge, rate in outside if edge in best]
