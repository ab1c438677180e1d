"""Exact meta-gradients of hyperparameters while a model trains, in truncated windows.

The training itself is the inner run: it never starts again, and what is meta-learned is how it
steps and how it weighs the domains of its data.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners.training_run import Optimizer, current_values, tuned_learner
from metaopt.meta_gradients.windows import InnerRun, start_run, unroll_window
from metaopt.optimizers.self_tuned import Factor, Scope, descend_logs
from metaopt.ranges import Checked, CountOr0, Rate, Steps
from metaopt.types import Episode, InnerGradFn, Learner, LossFn, Metrics, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig(Checked):
    """What is learned online, and how.

    Attributes:
      learned: the names of the values that are learned; the others stay as given.
      scope: scope of the learning rate; every other value is a scalar.
      num_domains: number of domains of the data that weights are learned on; 0 for none.
      window: its ``num_steps`` is W; ``batching`` must be ``split``: one batch a step.
      every: interval between differentiated windows, in windows; 1 for all.
      meta_rate: rate of Adam, on the logarithms of values and weights.
      max_step_factor: the largest factor by which an update changes any of them.
      max_factor: the largest factor in all, from where they started, each way.
    """

    learned: tuple[str, ...] = ("learning_rate",)
    scope: Scope = "scalar"
    num_domains: CountOr0 = 0
    window: InnerLoop = dataclasses.field(
        default_factory=lambda: InnerLoop(num_steps=10, batching="split")
    )
    every: Steps = 1
    meta_rate: Rate = 0.05
    max_step_factor: Factor = 1.5
    max_factor: Factor = 1e3

    def __post_init__(self):
        super().__post_init__()
        if self.num_domains == 1:
            raise UserError("a single domain has no weight to learn: give num_domains 2 or more")
        if not self.learned and not self.num_domains:
            raise UserError("nothing is learned: name values in learned, or set num_domains")
        if self.window.batching != "split" or self.window.query_loss == "annealed":
            raise UserError(
                "a window of training needs InnerLoop(batching='split'), one batch a step, "
                "and query_loss 'last' or 'mean'"
            )


class OnlineState(NamedTuple):
    """A training run and what it has learned about itself.

    Attributes:
      run: parameters, optimiser state and training steps done.
      logs: what is learned, by name: logarithms of the values, log-odds for fractions, and
        the domains' logits ``[num_domains]``.
      meta_opt_state: state of the optimiser of ``logs``.
    """

    run: InnerRun
    logs: dict[str, PyTree]
    meta_opt_state: optax.OptState


class Online(NamedTuple):
    """A training run that learns its hyperparameters, as pure functions.

    Attributes:
      init: ``params -> OnlineState``.
      step: ``(state, batches, held_out) -> (state, metrics)``: W steps on batches ``[W, S, ...]``.
        The metrics are ``loss``, the held-out loss after them, ``inner_losses`` ``[W]``, and
        ``meta_grad_norm``, 0 where the window was not differentiated.
      values: ``state -> {name: value in force}``, those that are not learned too, and with
        domains ``domain_weights``, ``[num_domains]``, which sum to one.
      learner: the run as a `metaopt.types.Learner`, for the estimators of metaopt.
    """

    init: Callable[[Params], OnlineState]
    step: Callable[[OnlineState, Any, Any], tuple[OnlineState, Metrics]]
    values: Callable[[OnlineState], dict[str, PyTree]]
    learner: Learner


def online(
    optimizer: Optimizer,
    start: Mapping[str, float],
    loss_fn: LossFn,
    config: OnlineConfig,
    *,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> Online:
    """Training whose hyperparameters descend the held-out loss at the end of each window.

    Mathematics: with s the parameters and the optimiser's state where a window starts, held
    constant, and ``L(s, η)`` the held-out loss after W training steps from there with the
    hyperparameters η, Adam descends ``∂L(s, η) / ∂ log η``. Training continues from the
    state after the window. As in `metaopt.meta_gradients.truncated`, what pays off after more
    than W steps is not seen; with noisy gradients that favours a small rate.

    With weights on domains a step descends ``Σ_i w_i l_i``, ``w = softmax_i(z[d_i])``
    over the batch, with l_i the loss of example i, d_i its domain, and z learned.

    A differentiated window costs two to three plain ones, and the memory of W steps
    (``remat`` and `forward_over_reverse` reduce it). For one device; vmap for several runs.

    Args:
      optimizer: ``values -> optimiser``, such as
        `metaopt.learners.training_run.sgd_from_values` and ``adamw_from_values``.
      start: the values at the start, by name.
      loss_fn: ``(params, batch) -> scalar``, of the training and held-out batches. For weights on
        domains it is a mean over examples, and the training batches have a field ``domains``
        (`metaopt.learners.training_run.DomainBatch`).
      config: what is learned.
      grad_fn: the inner-gradient function; `metaopt.meta_gradients.mixed_mode`'s serves too.

    Returns:
      `Online`; its ``step`` is to be compiled, and may donate the state.

    Raises:
      UserError: a learned value is not in ``start`` or out of its range.

    Example:
      >>> start = {"learning_rate": 0.1, "momentum": 0.9}
      >>> training = online(sgd_from_values, start, loss_fn, OnlineConfig())
      >>> state, metrics = jax.jit(training.step)(training.init(params), batches, held_out)

    References:
      Shaban et al., 2019, "Truncated Back-propagation for Bilevel Optimization"; Calian et al.,
      2025, "DataRater: Meta-Learned Dataset Curation", arXiv:2505.17895 (weights by softmax
      over the batch, there from a network that rates each example).
    """
    learner = tuned_learner(
        optimizer,
        start,
        learned=config.learned,
        scope=config.scope,
        num_domains=config.num_domains,
    )
    window = unroll_window(
        learner, loss_fn, config.window, config.window.num_steps, grad_fn=grad_fn
    )
    meta_optimizer = optax.adam(config.meta_rate)

    def init(params: Params) -> OnlineState:
        meta_params = learner.init(jax.tree.map(jnp.array, params))  # a copy, to be donated
        run = start_run(learner, meta_params, {})
        logs = {name: meta_params[name] for name in learner.learned}
        return OnlineState(run, logs, meta_optimizer.init(logs))

    def loss_of_window(logs, state, episode):
        return window({"params": state.run.params, **logs}, {}, episode, state.run)

    def plain(state, episode):
        _, (metrics, run) = loss_of_window(state.logs, state, episode)
        return state._replace(run=run), metrics | {
            "meta_grad_norm": jnp.zeros_like(metrics["loss"])
        }

    def differentiated(state, episode):
        grads, (metrics, run) = jax.grad(loss_of_window, has_aux=True)(state.logs, state, episode)
        logs, meta_opt_state = descend_logs(
            meta_optimizer,
            grads,
            state.meta_opt_state,
            state.logs,
            start={name: learner.init(state.run.params)[name] for name in learner.learned},
            max_step_factor=config.max_step_factor,
            max_factor=config.max_factor,
        )
        norm = optax.global_norm(grads).astype(metrics["loss"].dtype)
        return OnlineState(run, logs, meta_opt_state), metrics | {"meta_grad_norm": norm}

    def step(state, batches, held_out):
        episode = Episode(_flat(batches, config), held_out, jnp.zeros((), jnp.int32))
        if config.every == 1:
            return differentiated(state, episode)
        due = (state.run.step // config.window.num_steps + 1) % config.every == 0
        return jax.lax.cond(due, differentiated, plain, state, episode)

    return Online(init, step, lambda state: current_values(start, state.logs), learner)


def _flat(batches: Any, config: OnlineConfig) -> Any:
    """``[W, S, ...]`` to ``[W S, ...]``, as the inner loop takes it."""
    found = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(batches)}
    if found != {config.window.num_steps}:
        raise UserError(
            f"a window of {config.window.num_steps} steps takes as many batches, "
            f"[{config.window.num_steps}, S, ...], not {sorted(found)}"
        )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
