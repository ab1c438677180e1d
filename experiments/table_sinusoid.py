"""Few-shot regression of sinusoids: MAML and Meta-SGD as published, better learners beside them.

`--protocol li` makes table 1 of Li et al., 2017 (Meta-SGD, arXiv:1707.09835), meta-training
with 5 shots: `y = A sin(ωx + b)`, A in [0.1, 5], ω in [0.8, 1.2], b in [0, π], x in [-5, 5];
an MLP of 2 x 40 ReLU; one inner step; 60 000 meta-steps of 4 tasks with 10 query examples.
MAML steps at 0.01; Meta-SGD's rates, of either sign, start at one number between 0.005 and
0.1. The outer optimiser of both is Finn et al.'s: Adam at 0.001, no clipping. The test has 1000
curves with 10 supports each (the paper: 100 with 100), and judges by the mean squared error at
100 evenly spaced x. Published: MAML 1.13 / 0.85 / 0.71 and Meta-SGD 0.90 / 0.63 / 0.50 for
5 / 10 / 20 shots; expect about 1.14 / 0.83 / 0.66 and 0.86 / 0.60 / 0.46. The full text was
not at hand: query examples, meta-batch, first weights and the outer optimiser are those of the
MAML code as far as they are known, and a difference there is one in the protocol.

`--protocol finn` draws curves over inner steps, as figure 3 of Finn et al., 2017 (MAML): ω = 1,
10 shots, 70 000 meta-steps of 25 tasks, one inner step at 0.001, the default of the released
code. At the paper's 0.01 the first steps are better (0.53 and 0.41) and later ones diverge on
some of the curves.

    python -m experiments.table_sinusoid                     # about ten minutes on two cores
    python -m experiments.table_sinusoid --protocol finn     # about six
    python -m experiments.table_sinusoid --preset smoke      # tiny, to see that all works
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.evaluate import make_curves, tuned_curves
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Count, InnerSteps, Range, Rate, RateOr0, Seed, Seeds, Several, Steps
from metaopt.reporting import plots
from metaopt.reporting.results import Published, beside_published
from metaopt.statistics import interval
from metaopt.tasks.sinusoid import SinusoidConfig, evaluation_episodes, sinusoid
from metaopt.training.types import TrainFn
from metaopt.types import Array, Batch, Episode, Key, Learner, MetaParams, Model, Params

RATES_TRIED = (0.001, 0.003, 0.01, 0.03)
"""Inner rates for the row that is not trained to adapt."""
SOURCE = "Li et al., 2017, arXiv:1707.09835, table 1 (5-shot meta-training)"
PUBLISHED = {
    "MAML": {5: (1.13, 0.18), 10: (0.85, 0.14), 20: (0.71, 0.12)},
    "Meta-SGD": {5: (0.90, 0.16), 10: (0.63, 0.12), 20: (0.50, 0.10)},
}
"""Mean and half of the 95 % interval, by the shots of the test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Sinusoid regression: the published learners, and better ones beside them.

    Attributes:
      protocol: Protocol: li, a table over the shots of the test (Li et al., 2017), or finn, curves
        over the inner steps of the test (Finn et al., 2017).
      seeds: Seeds; every row is trained once with each, and cells are means over them.
      meta_steps: Number of meta-steps of each training.
      steps_per_call: Meta-steps in one compiled call; a divisor of meta_steps.
      tasks_per_step: Tasks of a meta-step.
      num_support: Shots of training.
      num_query: Examples in a training task that the adapted model is judged by.
      test_shots: Shots of the test, for finn one number.
      max_inner_steps: Length of the curves of finn.
      inner_rate: Inner rate of MAML.
      first_rates: Limits between which the published Meta-SGD draws the rate it starts from.
      learning_rate: Rate of the outer Adam of the published rows.
      weight_std: Deviation of the truncated normal from which the published rows draw weights;
        biases start at zero.
      better: Outer optimiser of the rows of 5 inner steps; its cosine ends with the
        training unless decay_steps says when.
      test_curves: Number of sinusoids of the test.
      supports_per_curve: Number of supports of each of them.
      test_points: Number of evenly spaced inputs on which it is judged.
      eval_seed: Seed of the test.
    """

    protocol: Literal["li", "finn"] = "li"
    seeds: Seeds = (0, 1, 2)
    meta_steps: Steps = 60_000
    steps_per_call: Count = 1000
    tasks_per_step: Count = 4
    num_support: Count = 5
    num_query: Count = 10
    test_shots: Annotated[tuple[Count, ...], Several(different=True)] = (5, 10, 20)
    max_inner_steps: InnerSteps = 10
    inner_rate: Rate = 0.01
    first_rates: tuple[Rate, Rate] = (0.005, 0.1)
    learning_rate: RateOr0 = 1e-3
    weight_std: Annotated[float, Range(1e-12, 1e4)] = 0.01
    better: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(
            learning_rate=1e-3, rates_learning_rate=1e-2, clip_norm=10.0, warmup_steps=100
        )
    )
    test_curves: Count = 1000
    supports_per_curve: Count = 10
    test_points: Annotated[int, Range(2, 10**6)] = 100  # 2 span the inputs
    eval_seed: Seed = 1234

    def __post_init__(self):
        super().__post_init__()
        if self.meta_steps % self.steps_per_call:
            raise UserError(
                f"{self.meta_steps} meta-steps cannot be cut into calls of {self.steps_per_call}; "
                "make steps_per_call a divisor of meta_steps"
            )
        if self.protocol == "finn" and len(self.test_shots) > 1:
            raise UserError("the curves of finn are of one number of shots: give one test_shots")
        low, high = self.first_rates
        if low > high:
            raise UserError(f"first_rates {self.first_rates} must be the lower one and the higher")


def presets(preset: str = "cpu", protocol: str = "li") -> Config:
    """The defaults for ``--preset`` and ``--protocol``."""
    config = Config()
    if protocol == "finn":
        config = Config(
            protocol="finn",
            meta_steps=70_000,
            tasks_per_step=25,
            num_support=10,
            test_shots=(10,),
            inner_rate=0.001,
            seeds=(0,),
        )
    if preset == "gpu":
        return dataclasses.replace(config, preset="gpu", seeds=(0, 1, 2, 3, 4))
    if preset == "smoke":
        return dataclasses.replace(
            config,
            preset="smoke",
            seeds=(0,),
            meta_steps=20,
            steps_per_call=10,
            test_curves=16,
            supports_per_curve=2,
            better=dataclasses.replace(config.better, warmup_steps=2),
        )
    return config


class SinusoidRow(NamedTuple):
    """A learner and how it is trained.

    Attributes:
      name: Name in the table.
      learner: What is meta-learned, for a seed.
      outer: Its outer optimiser.
      inner: Its inner loop, in training and test alike.
      estimator: How its gradient is found.
      weight_std: Deviation of its initial weights; None for the model's own initialisation.
      draws_rate: Whether its inner rate starts at one drawn by `first_rate`.
      inner_rate: Rate that its learned rates are factors of; None for the config's.
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


def inner_hparams(config: Config, row: SinusoidRow, seed: int) -> dict[str, np.float32]:
    """The inner rate of a row, or what its learned rates are factors of."""
    rate = first_rate(config, seed) if row.draws_rate else row.inner_rate or config.inner_rate
    return {"inner_learning_rate": np.float32(rate)}


def make_rows(config: Config) -> list[SinusoidRow]:
    """The rows of the protocol: as published, then ours.

    Raises:
      UserError: ``config.rows`` names one that the protocol does not have.
    """
    rows = as_published(config) + ours(config)
    if config.protocol == "finn":
        maml, meta_sgd, *_, several_steps = rows
        joint = maml._replace(name="joint pretraining", estimator=meta_gradients.joint)
        rows = [joint, maml, meta_sgd, several_steps]
    return harness.select(rows, config.rows)


def as_published(config: Config) -> list[SinusoidRow]:
    """MAML and Meta-SGD; Adam at a constant rate, without clipping."""
    rate, std = config.learning_rate, config.weight_std
    outer = OuterConfig(learning_rate=rate, rates_learning_rate=rate, clip_norm=math.inf)
    return [
        SinusoidRow("MAML", lambda _: learners.maml(), outer, weight_std=std),
        SinusoidRow("Meta-SGD", _signed(config), outer, weight_std=std, draws_rate=True),
    ]


def ours(config: Config) -> list[SinusoidRow]:
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
    several_steps = functools.partial(SinusoidRow, outer=better, inner=several, inner_rate=0.01)
    return [
        meta_sgd._replace(name="Meta-SGD, positive rates", learner=lambda _: learners.meta_sgd()),
        meta_sgd._replace(name="Meta-SGD, better trained", outer=cosine, weight_std=None),
        several_steps("per-layer-per-step, 5 steps", lambda _: per_layer),
        several_steps("Meta-SGD, 5 steps", lambda _: per_step),
    ]


def _signed(config: Config) -> Callable[[int], Learner]:
    return lambda seed: signed_meta_sgd(first_rate(config, seed))


def initial_params(model: Model, row: SinusoidRow, key: Key) -> Params:
    """The model's initialisation, or truncated normal weights with biases of zero."""
    params = model.init(key)
    if row.weight_std is None:
        return params
    leaves, treedef = jax.tree.flatten(params)
    draw = jax.nn.initializers.truncated_normal(row.weight_std)
    drawn = [
        draw(key, x.shape, x.dtype) if x.ndim > 1 else jnp.zeros_like(x)
        for key, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def make_problem(config: Config) -> Problem:
    """The tasks of training, and the regression model of Finn et al., 2017."""
    model = models.mlp(1, 1)
    sizes = {name: getattr(config, name) for name in ("num_support", "num_query")}
    family = sinusoid(SinusoidConfig(**sizes, vary_frequency=config.protocol == "li"))
    return Problem(family, model, losses.regression(model))


def train_row(
    config: Config, row: SinusoidRow, seed: int, directory: Path, train_fn: TrainFn
) -> MetaParams:
    """What the row has learned with a seed; resumed from its latest checkpoint."""
    init_key, data_key = jax.random.split(jax.random.key(seed))
    problem, calls = make_problem(config), config.steps_per_call

    def step_key(key: Key, step: int | Array) -> Key:
        """The keys of a call are split from one, so that they depend on its length."""
        return jax.random.split(jax.random.fold_in(key, step // calls), calls)[step % calls]

    fitted = fit(
        problem,
        row.learner(seed),
        row.estimator,
        inner=row.inner,
        outer=row.outer,
        config=FitConfig(
            num_steps=config.meta_steps,
            tasks_per_step=config.tasks_per_step,
            num_devices=1,  # a step of so small a model takes less time than an all-reduce
            steps_per_call=calls,
            log_every=calls,
            checkpoint_every=20 * calls,
            keep_last=1,
            # The loss is a mean, and one task on which five learned rates diverge exceeds any
            # limit; its gradient is clipped, and training goes on.
            divergence_factor=math.inf,
        ),
        directory=directory,
        name=f"{row.name}, seed {seed}",
        params=initial_params(problem.model, row, init_key),
        hparams=inner_hparams(config, row, seed),
        key=data_key,
        step_key=step_key,
        train_fn=train_fn,
    )
    return fitted.meta_params


def make_tests(config: Config, eval_seed: int) -> dict[int, Episode]:
    """The episodes of a test by the number of shots, all of the same curves."""

    def episodes(shots: int) -> Episode:
        sinusoids = SinusoidConfig(
            num_support=shots,
            num_query=config.test_points,
            vary_frequency=config.protocol == "li",
        )
        return evaluation_episodes(
            sinusoids,
            jax.random.key(eval_seed),
            num_curves=config.test_curves,
            supports_per_curve=config.supports_per_curve,
        )

    return {shots: episodes(shots) for shots in config.test_shots}


def losses_of_row(
    config: Config, row: SinusoidRow, seed: int, meta_params: MetaParams
) -> dict[int, np.ndarray]:
    """Losses after 0, 1, 2 ... inner steps, ``[E, steps + 1]``, by the number of shots.

    The row that is not trained to adapt has its rate tuned, for every number of steps, on
    other curves.
    """
    num_steps = config.max_inner_steps if config.protocol == "finn" else row.inner.num_steps
    devices = parallel.default_devices()
    learner = row.learner(seed)
    curves = make_curves(learner, make_problem(config).loss_fn, row.inner, num_steps, devices, 500)
    tests = make_tests(config, config.eval_seed)
    if row.estimator is meta_gradients.joint:
        ((shots, test),) = tests.items()
        valid = make_tests(config, config.eval_seed + 1)[shots]
        tuned = tuned_curves(curves, meta_params, {}, RATES_TRIED, valid, test)
        return {shots: tuned.losses}
    hparams = inner_hparams(config, row, seed)
    return {shots: curves(meta_params, hparams, test) for shots, test in tests.items()}


def check(config: Config, rows: Sequence[SinusoidRow]) -> None:
    """Raises UserError where what the config asks for cannot be computed."""
    model = models.mlp(1, 1)
    points: Any = jax.ShapeDtypeStruct((config.num_query, 1), jnp.float32)
    shots: Any = jax.ShapeDtypeStruct((config.num_support, 1), jnp.float32)
    feasible.check(
        [(row.learner(config.seeds[0]), row.estimator, row.inner) for row in rows],
        model.init,
        losses.regression(model),
        Batch(shots, shots),
        Batch(points, points),
        config.tasks_per_step,
    )
    tested = config.test_curves * config.supports_per_curve
    size = 8 * tested * (sum(config.test_shots) + len(config.test_shots) * config.test_points)
    feasible.check_bytes(size, f"to hold {tested:,} tests", "lower their number or size")


def add_row(
    table: harness.TableRun,
    config: Config,
    row: SinusoidRow,
    found: Sequence[Mapping[int, np.ndarray]],
) -> None:
    """Adds the cells of a row: of each number of shots, or for finn of numbers of inner steps.

    Args:
      table: Table of the run.
      config: Config of the run.
      row: The row.
      found: For each seed, losses ``[E, steps + 1]`` by the number of shots.
    """
    curves = np.repeat(np.arange(config.test_curves), config.supports_per_curve)
    for shots in config.test_shots:
        losses_SxExK = np.stack([of_seed[shots] for of_seed in found])
        losses_SxExK = np.where(np.isnan(losses_SxExK), np.inf, losses_SxExK)  # diverged
        steps = [row.inner.num_steps]
        if config.protocol == "finn":
            steps = [step for step in harness.STEPS if step <= config.max_inner_steps]
            table.keep(row.name, losses=losses_SxExK)
        for step in steps:
            losses_SxE, column = losses_SxExK[:, :, step], f"{shots}-shot"
            fields: dict[str, Any] = {}
            per_seed = losses_SxE.mean(axis=1).tolist()
            if config.protocol == "finn":
                median = float(np.median(losses_SxE))  # the means are of those that diverge
                column = harness.step_column(step)
                fields = {"median": median if np.isfinite(median) else None}
            elif shots in PUBLISHED.get(row.name, {}):
                value, half = PUBLISHED[row.name][shots]
                fields = {"published": Published(value, SOURCE, half)}
            table.add(
                row.name,
                column,
                interval(losses_SxE.mean(axis=0), curves),
                per_seed=per_seed if np.isfinite(per_seed).all() else None,
                num_inner_steps=row.inner.num_steps,
                **fields,
            )


def draw(table: harness.TableRun, config: Config, rows: Sequence[SinusoidRow]) -> None:
    """Means over inner steps with their intervals, and dotted the medians.

    The axis ends above the worst start: what diverges leaves the picture.
    """
    groups = np.repeat(np.arange(config.test_curves), config.supports_per_curve)
    figure = plots.new_figure()
    axes = figure.subplots()
    lowest, worst_start = math.inf, 0.0
    styles = plots.styles(row.name for row in rows)
    for row in rows:
        losses_SxExK = table.kept(row.name)["losses"]
        mean, half = harness.curve(losses_SxExK.mean(axis=0), groups)
        medians = np.median(losses_SxExK, axis=(0, 1))
        lowest, worst_start = min(lowest, medians.min()), max(worst_start, mean[0])
        steps, color = np.arange(len(mean)), styles[row.name]["color"]
        mean = np.where(np.isfinite(mean), mean, np.nan)
        axes.plot(steps, mean, label=row.name, markersize=4, **styles[row.name])
        axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12, lw=0)
        axes.plot(steps, medians, color=color, linestyle=":", linewidth=1)
    title = f"New sinusoids, {config.test_shots[0]} shots (dotted: median)"
    axes.set(xlabel="inner steps", ylabel="mean squared error", title=title)
    axes.set_yscale("log")
    axes.set_ylim(lowest / 2, 2 * worst_start)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    plots.save(figure, table.directory / "curves.png")


def run(config: Config) -> None:
    """Trains and tests the rows with every seed, and writes the table."""
    train_fn = harness.begin(config)
    rows = make_rows(config)
    check(config, rows)
    table = harness.TableRun(
        "table_sinusoid",
        config,
        presets,
        table="sinusoid" if config.protocol == "li" else "sinusoid/finn",
        unit="mean squared error",
        rows=[row.name for row in rows],
        seeds=config.seeds,
        episodes=config.test_curves * config.supports_per_curve,
    )
    for row in table.pending(rows):
        found = []
        for seed in config.seeds:
            meta_params = train_row(config, row, seed, table.directory, train_fn)
            found.append(losses_of_row(config, row, seed, meta_params))
        add_row(table, config, row, found)
    if config.protocol == "finn":
        draw(table, config, rows)
    table.finish(beside_published(table.records))


if __name__ == "__main__":
    harness.main("table_sinusoid", run, presets, __doc__)
