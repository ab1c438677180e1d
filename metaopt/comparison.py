"""Learners side by side: every row is trained on the same episodes and judged on the same ones.

A row is a learner with an estimator. All rows start from the same parameters (jointly
pretrained, or the random initialisation), see the same tasks in the same order, and are
evaluated on the same held-out episodes, so that differences are paired. Rates that are not
learned are tuned on validation tasks, alike for all rows.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
import optax

from metaopt import parallel
from metaopt.console import log
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.evaluate import CurveFn, TunedCurves, make_curves, tuned_curves, tuned_rates
from metaopt.fit import FitConfig, Problem, check_devices, fit, validation_episodes
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.measure import count_flops
from metaopt.meta_gradients import joint
from metaopt.optimizers.outer import OuterConfig
from metaopt.pytrees import digest_of
from metaopt.ranges import (
    Checked,
    Count,
    CountOr0,
    InnerSteps,
    Rate,
    Seed,
    Several,
    Steps,
    StepsOr0,
)
from metaopt.training.loop import TrainFn, train
from metaopt.training.progress import Progress
from metaopt.types import Episode, Estimator, Hparams, Learner, MetaParams, Model, Params


class Row(NamedTuple):
    """A learner and the estimator that trains it.

    Attributes:
      name: name in the table.
      learner: what is meta-learned.
      estimator: how; None leaves the random initialisation untrained.
      inner_optimizer: ``learning_rate -> optax.GradientTransformation``; rows with
        another one tune a training rate of their own.
      inner: inner loop of its training; None for that of the comparison.
      spends_as: a row whose operations it spends: it is trained for as many more steps as one of
        its own is cheaper, by counted operations. None for the steps that all have.
    """

    name: str
    learner: Learner
    estimator: Estimator | None
    inner_optimizer: Callable[..., optax.GradientTransformation] = optax.sgd
    inner: InnerLoop | None = None
    spends_as: "Row | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonConfig(Checked):
    """How long, on how much, and judged on what.

    Attributes:
      seed: seed of the initialisation and of the training episodes.
      num_devices: number of devices; 0 for all.
      tasks_per_step: the meta-batch, over all devices.
      tasks_at_a_time: on one device; 0 all by vmap, 1 one by one in a scan, between
        them groups.
      pretrain_steps: steps of joint pretraining that every trained row starts from.
      meta_steps: number of steps of each row after that, the joint row too; see `Row.spends_as`.
      max_inner_steps: number of inner steps of the evaluation.
      inner_rates: inner learning rates tried on the validation tasks.
      eval_every: interval between evaluations on the validation tasks, in meta-steps; the best
        evaluated state is kept. 0 keeps the last state.
      checkpoint_every: meta-steps between checkpoints.
      valid_episodes: episodes that rates and checkpoints are chosen on.
      test_episodes: episodes that are reported.
      eval_seed: seed of both; fixed, so that two runs are comparable line by line.
    """

    seed: Seed = 0
    num_devices: CountOr0 = 0
    tasks_per_step: Count = 8
    tasks_at_a_time: CountOr0 = 0
    pretrain_steps: StepsOr0 = 0
    meta_steps: Steps = 1000
    max_inner_steps: InnerSteps = 10
    inner_rates: Annotated[tuple[Rate, ...], Several()] = (0.003, 0.01, 0.03, 0.1, 0.3)
    eval_every: StepsOr0 = 0
    checkpoint_every: Steps = 200
    valid_episodes: Count = 64
    test_episodes: Count = 600
    eval_seed: Seed = 1234

    @property
    def most_episodes(self) -> int:
        """The largest number of episodes that are held at a time."""
        return max(self.tasks_per_step, self.valid_episodes, self.test_episodes)


SHARED = ("seed", "num_devices", "tasks_per_step", "tasks_at_a_time", "checkpoint_every")
"""The fields of a `ComparisonConfig` that are those of each `FitConfig`."""


class RowResult(NamedTuple):
    """A row after training, on the test episodes.

    Attributes:
      row: which.
      meta_params: what it learned.
      hparams: with the inner rate that suits the trained number of steps best.
      curves: float64 ``[E, max_inner_steps + 1]``, in the unit of the loss.
      rates: ``[max_inner_steps + 1]``, the inner rate for each number of steps.
      seconds: duration of training and evaluation, in this process.
    """

    row: Row
    meta_params: MetaParams
    hparams: Hparams
    curves: np.ndarray
    rates: np.ndarray
    seconds: float


def check_settings(inner: InnerLoop, config: ComparisonConfig) -> list[parallel.Device]:
    """The devices of a comparison, if its settings fit them and one another.

    Raises:
      UserError: the meta-batch does not divide by the devices or the groups, or the inner
        loop is longer than the evaluation.
    """
    devices = check_devices(config.num_devices, config.tasks_per_step, config.tasks_at_a_time)
    if inner.num_steps > config.max_inner_steps:
        raise UserError(
            f"training takes {inner.num_steps} inner steps and evaluation only "
            f"{config.max_inner_steps}: raise max_inner_steps"
        )
    return devices


class Comparison:
    """Trains and evaluates rows that share a problem and its episodes.

    Everything that can be wrong with the settings is found when it is made.
    """

    def __init__(
        self,
        problem: Problem,
        inner: InnerLoop,
        outer: OuterConfig,
        config: ComparisonConfig,
        train_fn: TrainFn = train,
    ):
        """Checks the settings, see `check_settings`.

        The cosine of the outer rate ends with each training, unless
        ``outer.decay_steps`` says when, and so do the weights of an annealed query loss. What
        runs the steps is `train`, or what takes its place.
        """
        self.problem, self.inner, self.outer, self.config = problem, inner, outer, config
        self._train_fn = train_fn
        self.devices = check_settings(inner, config)
        self._tuned: dict[tuple[Callable, str], float] = {}

    @functools.cached_property
    def valid(self) -> Episode:
        """The episodes that rates and checkpoints are chosen on."""
        config = self.config
        return validation_episodes(self.problem.family, config.eval_seed, config.valid_episodes)

    @functools.cached_property
    def test(self) -> Episode:
        """The episodes that are reported."""
        _, key = jax.random.split(jax.random.key(self.config.eval_seed))
        return self.problem.family.test.sample(key, self.config.test_episodes)

    def random_init(self) -> Params:
        """The initial parameters that every row shares."""
        return random_init(self.problem.model, self.config.seed)

    def pretrain(self, directory: Path) -> Params:
        """Joint pretraining before the rows part, or the random initialisation for 0 steps."""
        steps = self.config.pretrain_steps
        if not steps:
            return self.random_init()
        log(f"pretraining: {steps} joint steps, which all trained rows start from")
        row = Row("pretraining", maml(), joint)
        rate = self.config.inner_rates[0]  # joint training takes no inner step
        meta_params = self._train(row, self.random_init(), range(steps), rate, directory)
        return meta_params["params"]

    def run(self, row: Row, start: Params, directory: Path, *, one_rate: bool = False) -> RowResult:
        """Trains a row from ``start`` and evaluates it on the test episodes.

        With ``one_rate`` the whole curve is at the rate that is best after the trained
        number of steps; otherwise every number of steps has its own.
        """
        began = time.monotonic()
        rate = self._training_rate(row, start)
        if row.estimator is None:
            meta_params = row.learner.init(self.random_init())
        else:
            tuned = f", inner rate {rate:g} (tuned on validation tasks)"
            at = "" if row.estimator is joint else tuned  # joint training takes no inner step
            number = self.num_steps(row)
            log(f"{row.name}: training {number} steps{at}")
            first = self.config.pretrain_steps
            steps = range(first, first + number)
            every = -(-self.config.eval_every * number // self.config.meta_steps)
            # Joint training takes no inner step: a rate that nothing reads tells no two apart.
            read = every or row.estimator is not joint
            used = rate if read else self.config.inner_rates[0]
            meta_params = self._train(row, start, steps, used, directory, eval_every=every)
        tuned = self._test(row, meta_params, rate, one_rate)
        hparams = {"inner_learning_rate": np.float32(tuned.rates[self.inner.num_steps])}
        seconds = time.monotonic() - began
        return RowResult(row, meta_params, hparams, tuned.losses, tuned.rates, seconds)

    def num_steps(self, row: Row) -> int:
        """Steps that a row is trained for, see `Row.spends_as`."""
        if row.spends_as is None:
            return self.config.meta_steps
        times = self._operations(row.spends_as) / self._operations(row)
        return max(1, round(self.config.meta_steps * times))

    def _operations(self, row: Row) -> float:
        """Counted operations of the meta-gradient of one task."""
        assert row.estimator is not None
        problem, inner = self.problem, row.inner or self.inner
        outer_loss = {"outer_loss": problem.outer_loss} if problem.outer_loss else {}
        estimate = row.estimator(row.learner, problem.loss_fn, inner, **outer_loss)
        key = jax.random.key(0)
        episode = jax.tree.map(lambda x: x[0], problem.family.train.sample(key, 1))
        meta_params = jax.eval_shape(lambda: row.learner.init(problem.model.init(key)))
        hparams = {"inner_learning_rate": np.float32(self.config.inner_rates[0])}
        return count_flops(lambda m: estimate(m, hparams, episode, key)[0], meta_params).total

    def _test(self, row: Row, meta_params: MetaParams, rate: float, one_rate: bool) -> TunedCurves:
        """Curves of the test episodes; ``rate`` is that of training.

        Rates that are learned are not tuned as well: they are used as they were trained.
        """
        log(f"{row.name}: evaluating on {self.config.test_episodes} episodes")
        curves, learned = self._curves(row.learner), row.learner.learned
        if one_rate and not learned:
            rate = self._best_rate(row.name, row.learner, meta_params)
        if one_rate or learned:
            return tuned_curves(curves, meta_params, {}, (rate,), self.valid, self.test)
        rates = self.config.inner_rates
        with self._tuning(row.name) as tuning:
            return tuned_curves(
                curves, meta_params, {}, rates, self.valid, self.test, tuning.update
            )

    def _tuning(self, name: str) -> Progress:
        total = len(self.config.inner_rates)
        return Progress(f"{name}: tuning the inner rate", total=total, first="compiling")

    def _curves(self, learner: Learner, num_steps: int | None = None) -> CurveFn:
        return make_curves(
            learner,
            self.problem.loss_fn,
            self.inner,
            self.config.max_inner_steps if num_steps is None else num_steps,
            self.devices,
            self.config.tasks_at_a_time,
            outer_loss=self.problem.outer_loss,
        )

    def _training_rate(self, row: Row, start: Params) -> float:
        """The rate best on the validation tasks after K steps from where training starts."""
        alike = row.inner_optimizer, digest_of(start)
        if alike not in self._tuned:
            learner = maml(row.inner_optimizer)
            self._tuned[alike] = self._best_rate(row.name, learner, learner.init(start))
        return self._tuned[alike]

    def _best_rate(self, name: str, learner: Learner, meta_params: MetaParams) -> float:
        """The rate best on the validation tasks after the trained number of steps."""
        curves = self._curves(learner, self.inner.num_steps)
        rates = self.config.inner_rates
        with self._tuning(name) as tuning:
            best = tuned_rates(curves, meta_params, {}, rates, self.valid, tuning.update)
        return float(best[-1])

    def _train(
        self,
        row: Row,
        start: Params,
        steps: range,
        rate: float,
        directory: Path,
        *,
        eval_every: int = 0,
    ) -> MetaParams:
        """Trains on the episodes of these steps; the best checkpoint evaluated, or the last."""
        assert row.estimator is not None
        config = FitConfig(
            num_steps=len(steps),
            log_every=max(1, len(steps) // 100),
            eval_every=eval_every,
            **{name: getattr(self.config, name) for name in SHARED},
        )
        fitted = fit(
            self.problem,
            row.learner,
            row.estimator,
            inner=row.inner or self.inner,
            outer=self.outer.ending_at(len(steps)),
            config=config,
            directory=directory,
            name=row.name,
            params=start,
            hparams={"inner_learning_rate": rate},
            step_key=lambda key, step: jax.random.fold_in(key, steps.start + step),
            valid=self.valid,
            train_fn=self._train_fn,
        )
        return fitted.meta_params


def random_init(model: Model, seed: int) -> Params:
    """The initial parameters that every row of a `Comparison` of this seed shares."""
    init_key, _ = jax.random.split(jax.random.key(seed))
    return compile_once(model.init)(init_key)


class Named(Protocol):
    """Something with a name, such as a row."""

    @property
    def name(self) -> str:
        """The name in a table."""
        ...


AnyNamed = TypeVar("AnyNamed", bound=Named)


def select(rows: Sequence[AnyNamed], names: Sequence[str]) -> list[AnyNamed]:
    """The rows of these names, in the order of ``rows``; all of them for no names.

    Raises:
      UserError: a name is not there.
    """
    unknown = set(names) - {row.name for row in rows}
    if unknown:
        raise UserError(
            f"no row {sorted(unknown)[0]!r}; there are {', '.join(row.name for row in rows)}"
        )
    return [row for row in rows if not names or row.name in names]
