"""The inner loop: K differentiable optax steps on the support of one episode.

The estimators differ in how they differentiate it. Reverse mode, first order and mixed mode go
through the steps, each by an inner-gradient function of its own; truncated goes through a window of
them, implicit through the solution they lead to, and evolution strategies through none.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from metaopt.checks import check_adapt, scalar_loss
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.frozen import prepared, reads_on, unbound
from metaopt.pytrees import is_smooth
from metaopt.ranges import Checked, InnerSteps
from metaopt.rematerialization.scan import KeptDtype, KeptOn, planned_scan
from metaopt.types import Array, Batch, InnerGradFn, LossFn, Params, PyTree

INNER_GRADIENTS = "inner_gradients"  # what a recomputed step may keep
MOST_UNROLLED = 200  # steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class InnerLoop(Checked):
    """How an episode is adapted to.

    Attributes:
      num_steps: K, the number of inner steps of training.
      batching: ``same`` steps K times on the whole support; ``split`` cuts it into
        K equal batches, one a step.
      query_loss: what the outer loop descends: the query loss after the ``last`` step, or
        its ``mean`` over the K steps, which makes every number of steps up to K a good
        one (the multi-step loss of Antoniou et al., 2019, with equal weights), or ``annealed``,
        the sum with the `query_weights` that go from the one to the other as
        ``hparams['query_annealing']`` goes from 0 to 1: over the whole training, where nothing
        else is said. Joint pretraining and Reptile have no query loss and do not read it.
      unroll: inner steps laid out one after the other instead of scanned: quicker
        to run on CPU, slower to compile, and larger in memory.
      remat: recompute each inner step in the backward pass instead of keeping its
        intermediate values.
      save_gradients: with ``remat``, keep the inner gradients, which the inner
        optimiser's own derivative needs again: one evaluation of them less, for the bytes
        of the parameters a step.
      kept_states: number of states between the steps that are kept at a time, the others
        being recomputed by the optimal plan of `metaopt.rematerialization.plan`, which also
        finds the number for a memory budget. It implies ``remat`` and a scan. None keeps
        all K.
      kept_dtype: dtype that the kept states, the first excepted, are rounded to: parameters and
        the optimiser's state, in half the bytes. The steps themselves are as precise as ever;
        the meta-gradient is that of steps recomputed from rounded states, and no longer exact.
        None keeps the states as they are. It implies ``remat`` and a scan.
      kept_on: memory that the kept states, the first excepted, lie in: the ``host``'s takes
        none of a GPU's and is slower to reach; on a CPU both are the same. ``host`` implies
        ``remat`` and a scan.
    """

    num_steps: InnerSteps = 5
    batching: Literal["same", "split"] = "same"
    query_loss: Literal["last", "mean", "annealed"] = "last"
    unroll: bool = True
    remat: bool = False
    save_gradients: bool = False
    kept_states: InnerSteps | None = None
    kept_dtype: KeptDtype | None = None
    kept_on: KeptOn = "device"

    def __post_init__(self):
        super().__post_init__()
        if self.save_gradients and (not self.remat or self.is_planned):
            raise UserError(
                "save_gradients says what a recomputed step keeps: it takes remat=True, and "
                "with kept_states, kept_dtype or kept_on='host' there is nothing that it could keep"
            )
        if self.unroll and not self.is_planned and self.num_steps > MOST_UNROLLED:
            raise UserError(
                f"{self.num_steps} inner steps laid out one after the other would compile for "
                "hours: give unroll=False (--inner.no-unroll), which scans them"
            )

    @property
    def is_planned(self) -> bool:
        """Whether it says which states are kept, or how, or where."""
        return bool(self.kept_states or self.kept_dtype) or self.kept_on != "device"


class Adapted(NamedTuple):
    """What the inner loop returns.

    Attributes:
      params: the adapted parameters.
      losses: float32 ``[K]``, the support loss before each step.
      opt_state: state of the inner optimiser after the last step, to resume from.
      probes: ``probe(params, batch)`` before each step, stacked ``[K, ...]``; None without one.
      context: what a document that is read on leaves; empty for other losses.
    """

    params: Params
    losses: Array
    opt_state: optax.OptState
    probes: Any = None
    context: PyTree = ()


def adapt(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    support: Batch,
    config: InnerLoop,
    *,
    num_steps: int | None = None,
    opt_state: optax.OptState | None = None,
    context: PyTree = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
    probe: Callable[..., Any] | None = None,
) -> Adapted:
    """Takes K inner steps, ``θ_{k+1} = θ_k + u_k(∇L(θ_k))``, differentiably.

    Any optax transformation serves, and steps as it does alone: what optax offers beside the
    gradient (``value``, ``grad``, ``value_fn``) is passed to those that ask for it. Its own
    derivative must be finite (that of `optax.radam` is NaN from the third step on). Adam's is
    NaN at a gradient of zero, through the square root of its second moment: that trap is
    closed, see `away_from_zero`. The state keeps the dtypes of its start.

    Called outside `jax.jit`, it is compiled once for equal functions and shapes
    (`metaopt.eager`).

    Args:
      loss_fn: the loss that is stepped on.
      optimizer: the inner optimiser, learning rate and sign included.
      params: where the loop starts.
      support: examples ``[S, ...]``.
      config: see `InnerLoop`.
      num_steps: takes the place of ``config.num_steps``, for an evaluation that goes
        on past the trained number of steps (only with ``batching='same'``); 0 takes none.
      opt_state: state of the inner optimiser of an earlier run that is resumed; None starts one.
      context: of a `metaopt.losses.ReadingLoss`, what an earlier run left; None begins the
        document. The context is carried from step to step, and differentiated.
      grad_fn: turns the loss into ``(params, batch) -> (loss, gradient)``; of a loss that is read
        on it is given ``has_aux=True``, as `jax.value_and_grad` is.
      probe: what else to measure before each step: a function of the parameters and of the
        batch that the step is about to take; and, of a loss that is read on, of the context.

    Returns:
      `Adapted`.

    Raises:
      UserError: S does not divide by K under ``batching='split'``, or is 0; K is negative; or
        a loss, an optimiser or parameters are not what they should be
        (`metaopt.checks.check_adapt`).

    Example:
      >>> adapted = adapt(loss_fn, optax.sgd(0.1), params, episode.support, InnerLoop())
      >>> loss_fn(adapted.params, episode.query)

    References:
      Finn et al., 2017, "Model-Agnostic Meta-Learning", section 2.2.
    """
    steps = config.num_steps if num_steps is None else num_steps
    check_adapt(loss_fn, optimizer, params, support, steps)
    if reads_on(loss_fn) and config.batching != "split":
        raise UserError("a document is read once, a chunk a step: give InnerLoop(batching='split')")
    bind, frozen = unbound(loss_fn)
    run = functools.partial(_adapt, bind, optimizer, config, steps, grad_fn, probe)
    return compile_once(run)(params, support, opt_state, context, frozen)


def _adapt(
    bind, optimizer, config, steps, grad_fn, probe, params, support, opt_state, context, frozen
):
    loss_fn = bind(frozen)
    support, gradient_at = prepared(loss_fn, support), _gradients(loss_fn, grad_fn)
    batches = split_batches(support, steps) if config.batching == "split" else None

    def step(carry, batch):
        params, opt_state, context = carry
        batch = support if batch is None else batch
        loss, grads, after, value_fn = gradient_at(params, batch, context)
        grads = checkpoint_name(grads, INNER_GRADIENTS)
        updates, opt_state = _update(optimizer, grads, opt_state, params, loss, value_fn)
        at = (params, batch, context) if reads_on(loss_fn) else (params, batch)
        measured = None if probe is None else probe(*at)
        return (optax.apply_updates(params, updates), opt_state, after), (loss, measured)

    if context is None:
        context = loss_fn.start(params) if reads_on(loss_fn) else ()
    start = (params, optimizer.init(params) if opt_state is None else opt_state, context)
    (params, last_state, context), (losses, probes) = _scan(config, step, start, batches, steps)
    return Adapted(params, losses, last_state, probes, context)


def _gradients(loss_fn: Any, grad_fn: Any) -> Callable[[Params, Batch, PyTree], tuple]:
    """``(params, batch, context) -> (loss, gradient, context after it, loss of parameters)``."""
    if not reads_on(loss_fn):
        scalar = scalar_loss(loss_fn)
        value_and_grad = grad_fn(scalar)

        def plain(params, batch, context):
            return *value_and_grad(params, batch), context, lambda params: scalar(params, batch)

        return plain

    step = loss_fn.step
    reading_and_grad = grad_fn(lambda params, given: step(params, *given), has_aux=True)

    def reading(params, batch, context):
        (loss, after), grads = reading_and_grad(params, (batch, context))
        return loss, grads, after, lambda params: step(params, batch, context)[0]

    return reading


def _update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    state: optax.OptState,
    params: Params,
    loss: Array,
    value_fn: Callable[[Params], Array],
) -> tuple[Params, optax.OptState]:
    """What the optimiser gives, with the derivative that it has away from zero gradients."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads, state, params, loss):
        updates, new_state = optimizer.update(
            grads, state, params, value=loss, grad=grads, value_fn=value_fn
        )
        return updates, jax.tree.map(_keep_dtype, new_state, state)

    values = update(*jax.lax.stop_gradient((grads, state, params, loss)))
    moved = away_from_zero(grads), away_from_zero(state, squared=True)
    derivatives = update(*moved, params, loss)
    return jax.tree.map(_with_derivative_of, values, derivatives)


def _keep_dtype(new: Any, old: Any) -> Any:
    """``new`` in the dtype of ``old``: lars and schedule_free follow that of the rate."""
    return jnp.asarray(new, jnp.result_type(old)) if is_smooth(old) else new


def _with_derivative_of(value: Any, other: Any) -> Any:
    return _first_as_second(value, other) if is_smooth(value) else value


@jax.custom_jvp
def _first_as_second(value: Array, other: Array) -> Array:
    """The value of the one, with the derivative of the other, in both modes and any order."""
    del other
    return value


@_first_as_second.defjvp
def _derivative_of_second(primals, tangents):
    return _first_as_second(*primals), tangents[1]


def _scan(config: InnerLoop, step: Callable, start: Any, batches: Batch | None, num_steps: int):
    """`jax.lax.scan`, with what the config says is kept for the backward pass."""
    if config.is_planned and num_steps:
        return planned_scan(
            step,
            start,
            batches,
            length=num_steps,
            kept_states=config.kept_states or num_steps,
            kept_dtype=config.kept_dtype,
            kept_on=config.kept_on,
        )
    if config.remat:
        keep = jax.checkpoint_policies.save_only_these_names(INNER_GRADIENTS)
        policy = keep if config.save_gradients else None
        step = jax.checkpoint(step, prevent_cse=config.unroll, policy=policy)
    return jax.lax.scan(step, start, batches, length=num_steps, unroll=config.unroll)


def query_weights(num_steps: int, annealing: Array | float) -> Array:
    """The weights of the query losses after 1..K steps, float32 ``[K]``, which sum to one.

    Mathematics: ``w_k = (1 − a) / K + a [k = K]``: equal at a = 0, all on the last at a = 1.

    Args:
      num_steps: K.
      annealing: a, a scalar in [0, 1]; it may be traced.

    References:
      Antoniou et al., 2019, "How to train your MAML", section 4 (MSL), whose weights go the
      same way in training, though those of the earlier steps stop a little above zero.
    """
    return (1 - annealing) / num_steps + annealing * jax.nn.one_hot(num_steps - 1, num_steps)


def split_batches(support: Batch, num_steps: int) -> Batch:
    """Cuts ``[S, ...]`` into one batch a step, ``[K, S / K, ...]``."""
    size = jax.tree.leaves(support)[0].shape[0]
    check_split(size, num_steps)
    return jax.tree.map(lambda x: x.reshape(num_steps, size // num_steps, *x.shape[1:]), support)


def check_split(num_examples: int, num_steps: int) -> None:
    """Raises UserError where K does not divide S."""
    if num_steps < 1 or num_examples % num_steps:
        raise UserError(
            f"{num_examples} support examples cannot be split into {num_steps} equal batches; "
            "make the support a multiple of the inner steps or use batching='same'"
        )


def away_from_zero(tree: PyTree, *, squared: bool = False) -> PyTree:
    """Moves numbers too small to be squared away from zero, by about 1e-16 in float32.

    A second moment is a square, and the derivative of its square root at zero is infinite;
    infinity times the zero derivative of the square is NaN. `adapt` takes an optimiser's
    derivative at gradients and at a state moved so, and its values at both as they are. The
    derivative of the gradient itself, which at a stationary point is not zero, goes through.
    For an entry that the batch does not touch (an absent symbol, a dead unit) it is zero, and
    so is what comes of it.

    Args:
      tree: gradients, or the state of an optimiser; what is not floating-point is left alone.
        float16 has no such numbers: there they would be moved by 8.
      squared: they are, or may be, squares: moved by the square of the distance.
    """

    def guard(x):
        if not is_smooth(x):
            return x
        # 1e3: so that (1 - β2) floor² is still a normal number.
        floor = 1e3 * float(jnp.finfo(jnp.result_type(x)).tiny) ** 0.5
        floor = floor**2 if squared else floor
        return x + jnp.where(jnp.abs(x) < floor, jnp.where(x < 0, -floor, floor), 0.0)

    return jax.tree.map(guard, tree)
