"""One pure meta-update: tasks in groups -> meta-gradient -> pmean -> optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from metaopt.checks import check_factory, check_meta_params
from metaopt.errors import UserError
from metaopt.optimizers.outer import OuterOpt
from metaopt.optimizers.schedule_free import gradient_point
from metaopt.types import (
    Array,
    Episode,
    Hparams,
    Key,
    Learner,
    MetaGradFn,
    MetaState,
    Metrics,
    Params,
    PyTree,
    WindowGradFn,
)

MetaStep = Callable[[MetaState, Episode], tuple[MetaState, Metrics]]
RATES = ("outer_learning_rate", "inner_learning_rate", "rates_learning_rate", "weight_decay")
"""The scalars of a state that a search may move by factors, where an update reads them: first that
which matters most.

All others are set by whoever trains: limits such as ``clip_norm``, schedules such as
``query_annealing``, and those of a step of one's own unless it names them.
"""


def init_state(
    key: Key, params: Params, learner: Learner, outer_opt: OuterOpt, hparams: Hparams
) -> MetaState:
    """The state before the first meta-step.

    Args:
      key: typed key from which the data and the noise of every step come.
      params: initial parameters of the model.
      learner: what is meta-learned.
      outer_opt: from `outer_optimizer`.
      hparams: all scalars that the step reads, ``inner_learning_rate`` among them.

    Raises:
      UserError: the learner refuses the parameters, or learns other entries than it says; or
        ``outer_opt`` is an optimiser and not a function that makes one.
    """
    check_factory(outer_opt, "outer")
    meta_params = learner.init(params)
    check_meta_params(learner, meta_params)
    hparams = {name: jnp.asarray(value, jnp.float32) for name, value in hparams.items()}
    opt_state = outer_opt(hparams).init(meta_params)
    # A copy: the step donates its state, and the caller may start other runs from `params`.
    state = MetaState(jnp.zeros((), jnp.int32), meta_params, opt_state, hparams, key)
    return jax.tree.map(jnp.copy, state)


def carry_of(estimate: WindowGradFn, state: MetaState, num_tasks: int) -> PyTree:
    """What is carried into the first window of each of some documents, ``[num_tasks, ...]``."""
    carry = estimate.begin(state.meta_params, state.hparams)
    return jax.tree.map(lambda x: jnp.repeat(x[None], num_tasks, axis=0), carry)


def make_meta_step(
    estimate: MetaGradFn,
    outer_opt: OuterOpt,
    *,
    tasks_at_a_time: int = 0,
    axis_name: str | None = None,
    annealing_steps: int = 0,
    windows: int = 1,
) -> MetaStep:
    """One meta-update as a pure function of one device.

    Args:
      estimate: an estimator bound to a learner and a loss.
      outer_opt: from `outer_optimizer`.
      tasks_at_a_time: G, see `mean_over_tasks`.
      axis_name: the pmap axis over which gradients and metrics are averaged.
      annealing_steps: meta-steps over which the estimator's ``hparams['query_annealing']`` goes
        from 0 to 1, for ``query_loss='annealed'``; 0 leaves the hparams as they are.
      windows: W, updates that the documents of a task last; more than one takes a `WindowGradFn`,
        and a state whose ``carry`` is that of `carry_of` for all tasks of all devices.

    Returns:
      ``(state, episodes [T, ...]) -> (state, metrics)``. Metrics are float32 means over
      all tasks: ``loss``, ``inner_losses`` ``[K]``, and the norms ``grad_norm`` and
      ``update_norm``; beside them ``task_losses``, the losses of all tasks in their order.
      Gradients and losses are at `gradient_point`: ``state.meta_params``, unless the optimiser
      is schedule_free.
    """
    check_factory(outer_opt, "outer")

    def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Metrics]:
        indices = _indices(episodes, axis_name)
        keys = _task_keys(state, indices)
        hparams = dict(state.hparams)
        if annealing_steps:
            # Of the step alone and not in the state, where a search would take it for a rate.
            hparams["query_annealing"] = jnp.minimum(1.0, state.step / annealing_steps)

        point = gradient_point(state.opt_state, state.meta_params)
        carry = ()
        if windows > 1:
            assert isinstance(estimate, WindowGradFn)
            is_first = state.step % windows == 0
            carry = jax.tree.map(
                lambda new, old: jnp.where(is_first, new, old[indices]),
                estimate.begin(point, hparams),
                state.carry,
            )

        def of_task(episode: Episode, key: Key, carry: PyTree):
            if windows > 1:
                grads, metrics, carry = estimate.go_on(point, hparams, episode, carry)  # type: ignore[attr-defined]
            else:
                grads, metrics = estimate(point, hparams, episode, key)
            return (grads, metrics), (metrics["loss"], carry)

        (grads, metrics), each = _over_tasks(of_task, (episodes, keys, carry), tasks_at_a_time)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
            each = jax.lax.all_gather(each, axis_name, tiled=True)
        losses, carry = each
        metrics |= {"task_losses": losses}
        optimizer = outer_opt(state.hparams)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.meta_params)
        metrics |= {
            "grad_norm": optax.global_norm(grads),
            "update_norm": optax.global_norm(updates),
        }
        meta_params = optax.apply_updates(state.meta_params, updates)
        return state._replace(
            step=state.step + 1, meta_params=meta_params, opt_state=opt_state, carry=carry
        ), metrics

    return step


def _indices(episodes: Episode, axis_name: str | None) -> Array:
    """The indices of a device's tasks among those of all devices, ``[T]``."""
    num_tasks = episodes.task.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * num_tasks
    return first + jnp.arange(num_tasks)


def _task_keys(state: MetaState, indices: Array) -> Key:
    """A key a task, by its index over all devices: N devices draw what one would."""
    step_key = jax.random.fold_in(state.key, state.step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(indices)


def mean_over_tasks(function: Callable, tasks, tasks_at_a_time: int = 0):
    """The mean of ``function(*task)`` over tasks, G of them at a time.

    One number chooses the form: G = 0 (or all) is one `jax.vmap`; G = 1 is a scan
    with no batching at all, the least memory and often the quickest on CPU; between
    them a scan over groups under vmap accumulates microbatches. The sum is kept
    in the scan's carry, so memory does not grow with the number of groups.

    Args:
      function: one task to a pytree of arrays.
      tasks: a tuple of pytrees with leading axis ``[T]``.
      tasks_at_a_time: G, which must divide T.

    Raises:
      UserError: G does not divide T.
    """
    return _over_tasks(lambda *task: (function(*task), ()), tasks, tasks_at_a_time)[0]


def _over_tasks(function: Callable, tasks, tasks_at_a_time: int):
    """What ``function(*task) -> (one, other)`` gives of T tasks: means of one, each other."""
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    group = tasks_at_a_time or num_tasks
    check_groups(num_tasks, group)

    def of_group(tasks):
        if group == 1:
            mean, each = function(*jax.tree.map(lambda x: x[0], tasks))
            return mean, jax.tree.map(lambda x: x[None], each)
        found, each = jax.vmap(function)(*tasks)
        return _mean0(found), each

    if group == num_tasks > 1:
        return of_group(tasks)
    groups = jax.tree.map(lambda x: x.reshape(num_tasks // group, group, *x.shape[1:]), tasks)
    shapes, _ = jax.eval_shape(of_group, jax.tree.map(lambda x: x[0], groups))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, tasks):
        mean, each = of_group(tasks)
        return jax.tree.map(jnp.add, total, mean), each

    total, each = jax.lax.scan(add, zeros, groups)
    each = jax.tree.map(lambda x: x.reshape(num_tasks, *x.shape[2:]), each)
    return jax.tree.map(lambda x: x / (num_tasks // group), total), each


def check_groups(num_tasks: int, tasks_at_a_time: int) -> None:
    """Raises UserError where G does not divide T."""
    if tasks_at_a_time < 0 or (tasks_at_a_time and num_tasks % tasks_at_a_time):
        raise UserError(
            f"{num_tasks} tasks a device cannot be taken {tasks_at_a_time} at a time; "
            "make tasks_at_a_time a divisor of them (0 takes all at once)"
        )


def _mean0(tree):
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
