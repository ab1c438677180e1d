"""The rows of `table_sinusoid`: learners as published, and better ones."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.table_sinusoid.config import Config
from metaopt import learners, meta_gradients
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.types import Learner, MetaParams, Params


class Row(NamedTuple):
    """A learner and how it is trained.

    Attributes:
      name: as it stands in the table.
      learner: what is meta-learned, for a seed.
      outer: its outer optimiser.
      inner: its inner loop, in training and test alike.
      estimator: how its gradient is found.
      weight_std: of its initial weights; None for the model's own initialisation.
      draws_rate: whether its inner rate starts at one drawn by `first_rate`.
      inner_rate: what its learned rates are factors of; None for the config's.
    """

    name: str
    learner: Callable[[int], Learner]
    outer: OuterConfig
    inner: InnerLoop = InnerLoop(num_steps=1)
    estimator: Callable = meta_gradients.reverse
    weight_std: float | None = None
    draws_rate: bool = False
    inner_rate: float | None = None


def signed_meta_sgd(first_rate: float) -> Learner:
    """Meta-SGD in its published form: ``θ' = θ − α ⊙ ∇L(θ)``, where α has either sign.

    Every entry of α starts at ``first_rate``; the inner learning rate is not read.

    References:
      Li et al., 2017, "Meta-SGD: Learning to Learn Quickly", eq. (2).
    """

    def init(params: Params) -> MetaParams:
        full = functools.partial(jnp.full_like, fill_value=first_rate)
        return {"params": params, "rates": jax.tree.map(full, params)}

    def inner_opt(meta_params, hparams):
        del hparams
        rates = meta_params["rates"]
        return optax.stateless(lambda grads, _: jax.tree.map(lambda g, a: -a * g, grads, rates))

    return learners.maml()._replace(init=init, inner_opt=inner_opt, learned=("rates",))


def first_rate(config: Config, seed: int) -> float:
    """The rate that the published Meta-SGD starts from, drawn once for a seed."""
    return float(np.random.default_rng(seed).uniform(*config.first_rates))


def inner_hparams(config: Config, row: Row, seed: int) -> dict[str, np.float32]:
    """The inner rate of a row, or what its learned rates are factors of."""
    rate = first_rate(config, seed) if row.draws_rate else row.inner_rate or config.inner_rate
    return {"inner_learning_rate": np.float32(rate)}


def make_rows(config: Config) -> list[Row]:
    """The rows of the protocol: as published, then ours.

    Raises:
      UserError: ``config.rows`` names one that is not there.
    """
    rows = as_published(config) + ours(config)
    if config.protocol == "finn":
        maml, meta_sgd, *_, several_steps = rows
        joint = maml._replace(name="joint pretraining", estimator=meta_gradients.joint)
        rows = [joint, maml, meta_sgd, several_steps]
    unknown = set(config.rows) - {row.name for row in rows}
    if unknown:
        names = ", ".join(row.name for row in rows)
        raise UserError(f"no row {sorted(unknown)[0]!r} in this protocol; there are {names}")
    return [row for row in rows if not config.rows or row.name in config.rows]


def as_published(config: Config) -> list[Row]:
    """MAML and Meta-SGD; Adam at a constant rate, without clipping."""
    rate, std = config.learning_rate, config.weight_std
    outer = OuterConfig(learning_rate=rate, rates_learning_rate=rate, clip_norm=math.inf)
    return [
        Row("MAML", lambda _: learners.maml(), outer, weight_std=std),
        Row("Meta-SGD", _signed(config), outer, weight_std=std, draws_rate=True),
    ]


def ours(config: Config) -> list[Row]:
    """Variants of the published Meta-SGD, and rates for each of 5 inner steps.

    The variants: rates that stay positive; the model's own initial weights with a cosine.
    """
    _, meta_sgd = as_published(config)
    decay_steps = max(config.meta_steps, config.better.warmup_steps + 1)
    better = dataclasses.replace(
        config.better, decay_steps=config.better.decay_steps or decay_steps
    )
    cosine = dataclasses.replace(meta_sgd.outer, decay_steps=config.meta_steps)
    several = InnerLoop(num_steps=5)
    per_layer = learners.per_layer_per_step(num_steps=several.num_steps)
    per_step = learners.meta_sgd(num_steps=several.num_steps)
    return [
        meta_sgd._replace(name="Meta-SGD, positive rates", learner=lambda _: learners.meta_sgd()),
        meta_sgd._replace(name="Meta-SGD, better trained", outer=cosine, weight_std=None),
        Row("per-layer-per-step, 5 steps", lambda _: per_layer, better, several, inner_rate=0.01),
        Row("Meta-SGD, 5 steps", lambda _: per_step, better, several, inner_rate=0.01),
    ]


def _signed(config: Config) -> Callable[[int], Learner]:
    return lambda seed: signed_meta_sgd(first_rate(config, seed))
