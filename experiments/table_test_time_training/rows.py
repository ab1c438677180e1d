"""The rows of a source: what each starts from, how it reads, and how it was trained for that."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.table_test_time_training.config import Config
from experiments.table_test_time_training.documents import Source
from metaopt import learners, meta_gradients, models
from metaopt.fit import FitConfig, Problem, fit
from metaopt.losses import ReadingLoss
from metaopt.measure import count_flops
from metaopt.meta_gradients.first_order import stopped_gradients
from metaopt.meta_gradients.mixed_mode import forward_over_reverse
from metaopt.models.adapters import extended
from metaopt.optimizers.outer import OuterConfig
from metaopt.optimizers.part import on_part
from metaopt.streams.dynamic_evaluation import decay_towards
from metaopt.training.types import TrainFn
from metaopt.types import (
    Estimator,
    Hparams,
    Learner,
    LossFn,
    MetaParams,
    Model,
    Params,
    Stateful,
)

Start = Literal["usual", "joint", "FOMAML", "second order", "learned rates", "recurrent", "full"]
Rule = Literal["isolated", "still", "SGD", "RMS", "fast"]
ALONE: tuple[Start, ...] = ("recurrent", "full")
"""Starts that are trained by themselves, for as many operations as the others have in all."""


class Row(NamedTuple):
    """A way to read a document.

    Attributes:
      name: Name in the table.
      start: What it starts from.
      rule: How it learns: not at all, with windows apart (isolated) or with the context carried
        (still); all weights by gradient descent (SGD) or by the RMS rule (RMS); or the fast ones by
        gradient descent (fast).
    """

    name: str
    start: Start
    rule: Rule


STATIC, WINDOW = Row("static", "joint", "isolated"), Row("sliding window", "joint", "still")
DYNAMIC = Row("SGD dynamic evaluation", "joint", "SGD")
RMS = Row("RMS dynamic evaluation", "joint", "RMS")
TTT = Row("TTT", "joint", "fast")
FIRST = Row("FOMAML-TTT", "FOMAML", "fast")
SECOND = Row("second-order TTT", "second order", "fast")
RATES = Row("second-order TTT with learned rates", "learned rates", "fast")
RECURRENT, FULL = Row("recurrent", "recurrent", "still"), Row("full attention", "full", "still")
ROWS = (STATIC, WINDOW, DYNAMIC, RMS, TTT, FIRST, SECOND, RATES, RECURRENT, FULL)
FEW = (STATIC, WINDOW, DYNAMIC, TTT, FIRST, SECOND)
"""Rows of the sources that are not books."""
USUAL = (Row("static", "usual", "isolated"), Row("sliding window", "usual", "still"))
OF_PRETRAINED = (*USUAL, Row("TTT", "usual", "fast"), DYNAMIC, FIRST, SECOND, FULL)
"""Rows of a model that was trained elsewhere: its adapter starts as usual, or is trained.

All of what adapts is fast, so that dynamic evaluation is TTT from an adapter that was trained by
next-token prediction.
"""
SCALED = (DYNAMIC, FIRST, SECOND)
"""Rows that are compared over widths."""


class Settings(NamedTuple):
    """Rate and decay of a reading."""

    rate: float
    decay: float


class Starts:
    """What the rows of a source start from: models, learners and trainings.

    "usual" is untrained, of a model that was trained elsewhere alone.
    "joint" is next-token prediction. FOMAML, second order and learned rates go on from where it was
    after ``pretrain_steps``, and so does it, each for as many operations as ``meta_steps`` of
    second order. A recurrent model and full attention spend as much in all.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        directory: Path,
        train_fn: TrainFn,
        tuned: Callable[["Starts", Row, MetaParams], Settings],
    ):
        """Trains nothing yet; ``tuned`` gives the settings that meta-training steps with."""
        self.config, self.source, self.sizes = config, source, source.sizes
        self._directory, self._train_fn, self._tuned = directory, train_fn, tuned

    def reader(self, start: Start) -> Stateful:
        """The model of a start, as one that reads on."""
        if start == "recurrent":
            return models.with_memory(self.source.vocab_size, self._recurrent_width)
        return models.with_window(self.transformer(start))

    def model(self, start: Start) -> Model:
        """The same model, which takes whole documents."""
        if start == "recurrent":
            return models.recurrent(self.source.vocab_size, self._recurrent_width)
        return models.transformer(self.transformer(start))

    def learner(self, start: Start) -> Learner:
        """What is meta-learned; only the fast weights move, and decay to their start."""

        def on_fast(rate: Any) -> optax.GradientTransformation:
            return self._on_fast(optax.sgd(rate))

        plain = (learners.meta_sgd if start == "learned rates" else learners.maml)(on_fast)

        def inner_opt(meta_params: MetaParams, hparams: Hparams) -> optax.GradientTransformation:
            back = decay_towards(plain.start(meta_params), hparams["decay"])
            return optax.chain(plain.inner_opt(meta_params, hparams), back)

        return plain._replace(inner_opt=inner_opt)

    def _on_fast(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return on_part(optimizer, self.sizes.fast.adapts(self.sizes.num_layers))

    @functools.cache  # noqa: B019
    def begin(self) -> Params:
        """Parameters after ``pretrain_steps`` of next-token prediction."""
        sizes, params = self.sizes, self._initial("joint")
        found = self._fit("pretraining", "joint", sizes.pretrain_steps, params, sizes.pretrain)
        return found["params"]

    @functools.cache  # noqa: B019
    def trained(self, start: Start) -> MetaParams:
        """What a start is made of, trained when it is first asked for."""
        sizes, steps = self.sizes, self.steps(start)
        if start in ALONE:
            return self._fit(start, start, steps, self._initial(start), sizes.pretrain)
        settings = None
        if start != "joint":
            settings = self._tuned(self, TTT, {"params": self.begin()})
        return self._fit(start, start, steps, self.begin(), sizes.outer, settings)

    def steps(self, start: Start) -> int:
        """The steps of a training after pretraining, of `ALONE` of all."""
        budget = self.sizes.meta_steps * self._operations("second order")
        if start in ALONE:
            budget += self.sizes.pretrain_steps * self._operations("joint")
        return max(1, round(budget / self._operations(start)))

    def loss(self, start: Start) -> ReadingLoss:
        """The loss of a document that is read on."""
        return ReadingLoss(self.reader(start))

    def transformer(self, start: Start) -> models.TransformerConfig:
        """The shape of the model of a start."""
        times = self.sizes.full_window // self.sizes.window if start == "full" else 1
        return self.sizes.transformer(self.source.vocab_size, times * self.sizes.window)

    @property
    def _recurrent_width(self) -> int:
        """The width at which a GRU has as many parameters as the transformer."""
        shapes = jax.eval_shape(lambda: self._initial("joint"))
        number = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        b = 2 * self.source.vocab_size
        return max(1, round((math.sqrt(b * b + 24 * number) - b) / 12))  # 6 w² + 2 V w

    def _initial(self, start: Start) -> Params:
        key = jax.random.key(self.config.seed)
        params = self.model(start).init(key)
        if start == "recurrent":
            return params
        return extended(self.sizes.fast, params, jax.random.fold_in(key, 1))

    def _training(self, start: Start, meta: bool) -> tuple[Learner, Estimator, LossFn]:
        """What is learned, how its gradient is found, and the loss."""
        if meta:
            grad_fn = stopped_gradients if start == "FOMAML" else forward_over_reverse
            estimator = functools.partial(meta_gradients.streaming, grad_fn=grad_fn)
            return self.learner(start), estimator, self.loss(start)
        return learners.maml(), meta_gradients.joint, self.loss(start)

    @functools.cache  # noqa: B019
    def _operations(self, start: Start) -> float:
        """Counted operations of the gradient of one document, without what is recomputed."""
        learner, estimator, loss_fn = self._training(start, start not in ("joint", *ALONE))
        inner = dataclasses.replace(self.config.inner, kept_states=None)
        drawn = self.source.train.train.sample(jax.random.key(0), 1)
        episode = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), drawn)
        meta_params = jax.eval_shape(lambda: learner.init(self._initial(start)))
        scalars = {"inner_learning_rate": jnp.float32(0), "decay": jnp.float32(0)}
        estimate = estimator(learner, loss_fn, inner)
        return count_flops(estimate, meta_params, scalars, episode, jax.random.key(0)).total

    def _fit(
        self,
        name: str,
        start: Start,
        steps: int,
        params: Params,
        outer: OuterConfig,
        settings: Settings | None = None,
    ) -> MetaParams:
        """A training; of next tokens without settings."""
        config = self.config
        learner, estimator, loss_fn = self._training(start, settings is not None)
        rate, decay = settings or Settings(0.0, 0.0)
        return fit(
            Problem(self.source.train, self.model(start), loss_fn),
            learner,
            estimator,
            inner=config.inner,
            outer=outer.ending_at(steps),
            config=FitConfig(
                seed=config.seed,
                num_steps=steps,
                tasks_per_step=self.sizes.tasks_per_step,
                tasks_at_a_time=self.sizes.tasks_at_a_time,
                log_every=max(1, steps // 50),
            ),
            directory=self._directory,
            name=f"{self.source.name}: {name}",
            params=params,
            hparams={"inner_learning_rate": rate, "decay": decay},
            key=jax.random.key(config.seed + (name != "pretraining")),
            train_fn=self._train_fn,
        ).meta_params
