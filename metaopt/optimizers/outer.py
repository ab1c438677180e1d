"""The outer optimiser, its settings read from the state."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.optimizers.muon import scale_by_muon
from metaopt.optimizers.schedule_free import ScheduleFreeState, schedule_free
from metaopt.ranges import Checked, Range, RateOr0, Share, StepsOr0
from metaopt.types import Array, Hparams, PyTree

Optimizer = Literal[
    "adam", "sgd", "momentum", "rmsprop", "adagrad", "lars", "lion", "muon", "schedule_free"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OuterConfig(Checked):
    """The outer optimiser, AdamW if not another, with clipping, warm-up and cosine decay.

    Attributes:
      optimizer: adam, sgd, momentum, rmsprop, adagrad, lars, lion or muon, with optax's settings
        (`metaopt.optimizers.muon`); or schedule_free, AdamW whose parameters are an average
        in place of a decay of the rate (`metaopt.optimizers.schedule_free`), for which larger
        rates than AdamW's are usual.
      learning_rate: peak outer rate of the parameters; ``hparams['outer_learning_rate']``.
      rates_learning_rate: peak outer rate of all that is learned beside the
        parameters; ``hparams['rates_learning_rate']``.
      weight_decay: decoupled, on the parameters alone; ``hparams['weight_decay']``.
      rates_decay: the same on all that is learned beside them, such as the logarithms of learned
        rates, which it pulls back to the one rate that they started from.
      momentum: decay of momentum and lars; ``hparams['momentum']``.
      clip_norm: largest global norm of the meta-gradient, inf for any; ``hparams['clip_norm']``.
      warmup_steps: number of meta-steps, W, in which the rate rises linearly from
        ``1 / (W + 1)`` of the peak; the step after them has the whole peak.
      decay_steps: the meta-step at which the cosine, which begins after the warm-up,
        ends; 0 keeps the peak, and so does schedule_free.
      final_fraction: what is left of the peak at the end of the cosine.
    """

    optimizer: Optimizer = "adam"
    learning_rate: RateOr0 = 1e-3
    rates_learning_rate: RateOr0 = 1e-2
    weight_decay: RateOr0 = 0.0
    rates_decay: RateOr0 = 0.0
    momentum: Annotated[float, Range(0, 0.9999)] = 0.9
    clip_norm: Annotated[float, Range(1e-12, math.inf)] = 1.0
    warmup_steps: Annotated[int, Range(0, 10**8)] = 0
    decay_steps: StepsOr0 = 0
    final_fraction: Share = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"decay_steps={self.decay_steps} must exceed warmup_steps={self.warmup_steps}"
            )

    def ending_at(self, num_steps: int) -> "OuterConfig":
        """The same with a cosine to the end of ``num_steps``, unless ``decay_steps`` is set.

        schedule_free takes no notice of it: its average does what a decay would do.
        """
        decay_steps = self.decay_steps or max(num_steps, self.warmup_steps + 1)
        return dataclasses.replace(self, decay_steps=decay_steps)

    def varied(self, optimizer: str, longer: float) -> "OuterConfig":
        """The same with another optimiser, and a schedule of ``longer`` times as many steps."""
        warmup_steps = round(longer * self.warmup_steps)
        decay_steps = self.decay_steps and max(round(longer * self.decay_steps), warmup_steps + 1)
        return dataclasses.replace(
            self,
            optimizer=optimizer,  # type: ignore[arg-type]
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
        )

    def hparams(self) -> dict[str, jax.Array]:
        """The scalars of the outer loop that may change during a run."""
        values = {
            "outer_learning_rate": self.learning_rate,
            "rates_learning_rate": self.rates_learning_rate,
            "weight_decay": self.weight_decay,
            "clip_norm": self.clip_norm,
        }
        if self.optimizer in ("momentum", "lars"):
            values["momentum"] = self.momentum
        return {name: jnp.float32(value) for name, value in values.items()}


OuterOpt = Callable[[Hparams], optax.GradientTransformation]
"""``hparams -> optax.GradientTransformation``, built inside every traced step.

Its scalars are read from the state, so that changing them compiles nothing.
"""


def outer_optimizer(config: OuterConfig) -> OuterOpt:
    """The optimiser of meta-parameters, AdamW if not another, its settings read from the state.

    The returned function is called inside the step: the shape of the schedule is
    fixed, the scalars come from ``hparams`` and may change without a recompile.
    """
    schedule = _schedule(config)

    def on_params(meta_params: PyTree) -> PyTree:
        return {name: name == "params" for name in meta_params}

    def beside_params(meta_params: PyTree) -> PyTree:
        return {name: name != "params" for name in meta_params}

    pull_back = optax.add_decayed_weights(config.rates_decay, mask=beside_params)

    def chain(hparams: Hparams) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(hparams["clip_norm"]),
            _direction(config.optimizer, hparams),
            optax.add_decayed_weights(hparams["weight_decay"], mask=on_params),
            *([pull_back] if config.rates_decay else []),
            optax.scale_by_schedule(schedule),
            _descend_by_two_rates(hparams),
        )

    def averaged(hparams: Hparams) -> optax.GradientTransformation:
        def rates_of(count: Array, meta_params: PyTree) -> PyTree:
            level = schedule(count)
            return {name: level * rate for name, rate in _two_rates(hparams, meta_params).items()}

        return schedule_free(chain(hparams), rates_of)

    return averaged if config.optimizer == "schedule_free" else chain


def at_update(opt_state: optax.OptState, number: int) -> optax.OptState:
    """The state of an outer optimiser with its schedule where it is before that update."""
    parts = (optax.ScaleByScheduleState, ScheduleFreeState)

    def is_part(part) -> bool:
        return isinstance(part, parts)

    def moved(part):
        count = jnp.array(number, jnp.int32)  # one for each part: a step donates all of them
        if isinstance(part, ScheduleFreeState):
            base_state = jax.tree.map(moved, part.base_state, is_leaf=is_part)
            return part._replace(count=count, base_state=base_state)
        return part._replace(count=count) if is_part(part) else part

    return jax.tree.map(moved, opt_state, is_leaf=is_part)


def _direction(optimizer: Optimizer, hparams: Hparams) -> optax.GradientTransformation:
    """Which way, before decay and rate."""
    if optimizer == "sgd":
        return optax.identity()
    if optimizer == "momentum":
        return optax.trace(hparams["momentum"])  # type: ignore[arg-type]
    if optimizer == "rmsprop":
        return optax.scale_by_rms()
    if optimizer == "adagrad":
        return optax.scale_by_rss(initial_accumulator_value=1e-4)
    if optimizer == "lars":
        momentum = optax.trace(hparams["momentum"])  # type: ignore[arg-type]
        return optax.chain(optax.scale_by_trust_ratio(), momentum)
    if optimizer == "muon":
        return scale_by_muon()
    if optimizer == "schedule_free":  # Adam without its first moment
        return optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)
    return optax.scale_by_lion() if optimizer == "lion" else optax.scale_by_adam()


def _schedule(config: OuterConfig) -> optax.Schedule:
    """The fraction of the peak rate at each step, counted from 0."""
    decay = optax.constant_schedule(1.0)
    if config.decay_steps and config.optimizer != "schedule_free":
        steps = config.decay_steps - config.warmup_steps
        decay = optax.cosine_decay_schedule(1.0, steps, config.final_fraction)

    def schedule(count):
        # Counting from one, so that the first step of a warm-up is not of length zero.
        warm_up = jnp.minimum(1.0, (count + 1) / (config.warmup_steps + 1))
        return warm_up * decay(jnp.maximum(count - config.warmup_steps, 0))

    return schedule


def _two_rates(hparams: Hparams, meta_params: PyTree) -> dict[str, Array]:
    """Peak rates by name: one of the parameters, one of all that is beside them."""
    names = {True: "outer_learning_rate", False: "rates_learning_rate"}
    return {name: hparams[names[name == "params"]] for name in meta_params}


def _descend_by_two_rates(hparams: Hparams) -> optax.GradientTransformation:
    """Steps against the updates by `_two_rates`."""

    def update(updates: PyTree, _) -> PyTree:
        rates = _two_rates(hparams, updates)
        return {
            name: jax.tree.map(lambda u, rate=rates[name]: -rate * u, updates[name])
            for name in updates
        }

    return optax.stateless(update)
