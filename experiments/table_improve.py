"""Does ``--improve`` repair a bad outer rate, and what does it cost a good one?

Joint pretraining and MAML (Finn et al., 2017) of a small transformer on domains of text start from
an outer rate that is far too small or far too large, and from the one that Optuna found in 16 runs
of the same length. Each then trains under the closed loop. Its loss on domains never seen is
compared with that of a plain run at the tuned rate, and its time with that run's. The outer rate
warms up over a twentieth of a run, and runs are short or long.

    python -m experiments.table_improve                     # on Python's own sources, under an hour
    python -m experiments.table_improve --tasks text --folder FOLDER
    python -m experiments.table_improve --preset smoke      # a minute or two, to see that all works

Times are without compiling; trials are what is tried and thrown away, with the evaluations that
judge it, in operations counted. A run under the loop goes through all of its steps, and what it
tries comes on top. Of joint pretraining the loss is before any inner step, of MAML after as many as
in training. The loop may also change the inner rate of MAML, which tuning leaves as it is.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import numpy as np
import optuna

from experiments import harness
from experiments.optuna_search import best_params
from metaopt import learners, losses, meta_gradients
from metaopt.comparison import Comparison, ComparisonConfig, Row
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.evaluate import make_curves
from metaopt.files import read_json_lines
from metaopt.fit import FitConfig, Fitted, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.languages import (
    LanguageConfig,
    check,
    digest,
    is_text,
    make_family,
    make_model,
    text_config,
)
from metaopt.measure import compile_seconds
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Count, Range, Rate, Seed, Several, Steps
from metaopt.self_improvement.improving import improving_train
from metaopt.statistics import Interval, interval, t_interval
from metaopt.tasks.text import short_summary
from metaopt.training.loop import Diverged, train
from metaopt.training.runs import slug
from metaopt.training.types import TrainFn
from metaopt.types import Episode, Estimator

LEARNERS: dict[str, Estimator] = {
    "joint pretraining": meta_gradients.joint,
    "MAML": meta_gradients.reverse,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageConfig, harness.RunConfig):
    """Trainings with bad and good outer rates under the closed loop, beside tuned ones.

    Attributes:
      steps: Lengths of the runs, in meta-steps.
      factor: Factor by which a bad rate is too small or too large.
      num_trials: Runs of each length by which Optuna finds the rate.
      rates: Least and largest rate that it may choose.
      seeds: Seeds of the start and the data that every cell is of.
      warmup: Part of a run in which the outer rate rises.
      inner_rate: Inner learning rate of MAML.
      comparison: Tasks of a meta-step, and the episodes that are judged on.
    """

    steps: Annotated[tuple[Steps, ...], Several(different=True)] = (400, 3000)
    factor: Annotated[float, Range(1.001, 1e6)] = 30.0
    num_trials: Count = 16
    rates: tuple[Rate, Rate] = (3e-4, 0.3)
    seeds: Annotated[tuple[Seed, ...], Several(different=True)] = (0, 1, 2)
    warmup: Annotated[float, Range(0, 0.5)] = 0.05
    inner_rate: Rate = 0.05
    comparison: ComparisonConfig = dataclasses.field(default_factory=ComparisonConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.rates[0] >= self.rates[1]:
            raise UserError(f"rates {self.rates} must be the least and the largest, in this order")
        if not is_text(self.tasks):
            raise UserError(f"--tasks {self.tasks}: the table is of text; give stdlib or text")


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(
        preset=preset,  # type: ignore[arg-type]
        tasks="stdlib",
        model="transformer",
        width=32,
        num_layers=1,
        num_support=4,
        num_query=4,
        length=32,
        inner=InnerLoop(num_steps=3, query_loss="mean"),
        comparison=ComparisonConfig(
            tasks_per_step=4, tasks_at_a_time=1, valid_episodes=48, test_episodes=240
        ),
    )
    if preset == "smoke":
        comparison = dataclasses.replace(config.comparison, valid_episodes=8, test_episodes=16)
        small = {"num_valid_domains": 2, "num_test_domains": 3, "width": 8, "length": 16}
        return dataclasses.replace(
            config, **small, steps=(60,), num_trials=2, seeds=(0,), comparison=comparison
        )
    if preset == "gpu":
        comparison = dataclasses.replace(config.comparison, tasks_per_step=32, tasks_at_a_time=0)
        return dataclasses.replace(
            config,
            width=256,
            num_layers=4,
            num_heads=4,
            length=128,
            steps=(2000, 10_000),
            comparison=comparison,
        )
    return config


class Start(NamedTuple):
    """A row: a training from one rate.

    Attributes:
      learner: Name of what is trained.
      steps: Length of the run.
      times: Factor on the tuned rate.
      name: Name in the table.
    """

    learner: str
    steps: int
    times: float
    name: str


class Timed(NamedTuple):
    """A finished training.

    Attributes:
      fitted: What it gave.
      seconds: Time of its steps, without compiling.
      directory: Where it was written.
    """

    fitted: Fitted
    seconds: float
    directory: Path


def make_rows(config: Config) -> list[Start]:
    """The rows that the config asks for."""
    said = f"{config.factor:g} times"
    starts = {f"{said} too small": 1 / config.factor, f"{said} too large": config.factor}
    rows = [
        Start(learner, steps, times, f"{learner}, {steps} steps, {start}")
        for learner in LEARNERS
        for steps in config.steps
        for start, times in (starts | {"tuned rate": 1.0}).items()
    ]
    return harness.select(rows, config.rows)


class Study:
    """What the rows share: the problem, its episodes, and the trainings that are done.

    Everything that can be wrong with the config is found when it is made.
    """

    def __init__(self, config: Config):
        self.config, self.directory = config, Path()
        model, inner, settings = make_model(config), config.inner, config.comparison
        compared = [Row(name, learners.maml(), estimator) for name, estimator in LEARNERS.items()]
        check(config, settings, compared, model)
        self.problem = Problem(make_family(config), model, losses.next_token(model))
        self.episodes = Comparison(self.problem, inner, OuterConfig(), settings)
        self._curves = make_curves(
            learners.maml(), self.problem.loss_fn, inner, inner.num_steps, self.episodes.devices, 1
        )

    def losses(self, learner: str, fitted: Fitted, episodes: Episode) -> np.ndarray:
        """The losses of a training on held-out episodes, ``[E]`` nats a byte."""
        rate = fitted.hparams["inner_learning_rate"]
        hparams = {"inner_learning_rate": np.float32(rate)}
        curves = self._curves(fitted.meta_params, hparams, episodes)
        return curves[:, -1 if learner == "MAML" else 0]

    def training(self, start: Start, rate: float, seed: int, train_fn: TrainFn, name: str) -> Timed:
        """One training, from its beginning.

        Raises:
          Diverged: a loss is NaN or inf, or far too large.
        """
        config = self.config
        place = self.directory / slug(f"{start.learner} {start.steps} {name} {seed}")
        if place.exists():
            shutil.rmtree(place)  # of a run that was stopped: its time would not be its own
        jax.clear_caches()  # the programs of a hundred trainings would exhaust what LLVM may map
        spent: list[float] = []

        def timed(*args, **options):
            began, compiled = time.perf_counter(), compile_seconds()
            trained = train_fn(*args, **options)
            spent.append(time.perf_counter() - began - (compile_seconds() - compiled))
            return trained

        outer = OuterConfig(learning_rate=rate, warmup_steps=round(config.warmup * start.steps))
        fitted = fit(
            self.problem,
            learners.maml(),
            LEARNERS[start.learner],
            inner=config.inner,
            outer=outer.ending_at(start.steps),
            config=FitConfig(
                seed=seed,
                num_steps=start.steps,
                log_every=max(1, start.steps // 20),
                checkpoint_every=start.steps,
                tasks_per_step=config.comparison.tasks_per_step,
                tasks_at_a_time=config.comparison.tasks_at_a_time,
                num_devices=config.comparison.num_devices,
            ),
            directory=place,
            name=name,
            hparams={"inner_learning_rate": config.inner_rate},
            train_fn=timed,
        )
        return Timed(fitted, spent[0], place)

    def tuned_rate(self, start: Start) -> float:
        """The outer rate that Optuna finds for a length, by validation loss; resumed if stopped."""
        name, (low, high) = f"{start.learner}, {start.steps} steps", self.config.rates

        def objective(trial: optuna.Trial) -> float:
            rate = trial.suggest_float("rate", low, high, log=True)
            try:
                found = self.training(start, rate, max(self.config.seeds) + 1, train, "tuning")
            except Diverged:
                return float("inf")
            return float(self.losses(start.learner, found.fitted, self.episodes.valid).mean())

        number = self.config.num_trials
        best = best_params(objective, self.directory, name, num_trials=number, seed=0)
        return float(best["rate"])


def ratio(found: Sequence[np.ndarray], reference: Sequence[np.ndarray], tasks: np.ndarray):
    """The ratio of mean losses of several seeds, ``[E]`` each, with its interval over tasks."""
    mean = float(np.mean(reference))
    difference = interval(np.mean(found, axis=0) - np.mean(reference, axis=0), tasks)
    return Interval(1 + difference.mean / mean, difference.ci95 / mean, difference.n)


def run(config: Config) -> None:
    """Trains all rows beside tuned runs, and writes the table."""
    harness.begin()
    rows, study = make_rows(config), Study(config)
    for line in short_summary(text_config(config, 0)):
        log(line)
    table = harness.TableRun(
        "table_improve",
        config,
        presets,
        table="improve/text",
        unit="ratio of held-out losses",
        rows=[row.name for row in rows],
        seeds=config.seeds,
        episodes=config.comparison.test_episodes,
        data=digest(config),
    )
    study.directory = table.directory / "trainings"
    tasks = np.asarray(study.episodes.test.task)
    for row in table.pending(rows):
        add_row(table, study, row, tasks)
    table.finish()


def add_row(table: harness.TableRun, study: Study, row: Start, tasks: np.ndarray) -> None:
    """Trains from one rate under the loop, once a seed, each beside a plain run that is tuned."""
    rate, test = study.tuned_rate(row), study.episodes.test
    found, reference, times, tried, ends = [], [], [], [], []
    for seed in study.config.seeds:
        log(f"{row.name}: seed {seed}")
        plain = study.training(row, rate, seed, train, "plain")
        improved = study.training(row, rate * row.times, seed, improving_train, row.name)
        reference.append(study.losses(row.learner, plain.fitted, test))
        found.append(study.losses(row.learner, improved.fitted, test))
        times.append(improved.seconds / plain.seconds)
        decisions = read_json_lines(improved.directory / "decisions.jsonl")
        examples = row.steps * study.config.comparison.tasks_per_step
        tried.append(100 * sum(each["trial_examples"] for each in decisions) / examples)
        ends.append({k: float(v) for k, v in improved.fitted.hparams.items()})
    more = {"tuned_rate": rate, "start_rate": rate * row.times, "settings": ends}
    more["over"] = "95 % intervals over domains, paired"
    table.add(row.name, "ratio to tuned", ratio(found, reference, tasks), **more)
    over = "those of times and trials over seeds"
    for column, values, unit in (
        ("time ratio", times, "ratio of seconds without compiling"),
        ("trials", tried, "% of the run"),
    ):
        table.add(row.name, column, t_interval(np.asarray(values)), unit=unit, over=over)


if __name__ == "__main__":
    harness.main("table_improve", run, presets, __doc__)
