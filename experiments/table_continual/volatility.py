"""Daily prices: how volatile will tomorrow be, beside GARCH(1,1), and will it go up?

A small network turns variances of the past into the density of the next return. It is meta-trained
by MAML on all series until a date, and walks forward through what follows: it adapts to
the last year, and predicts the next month. GARCH(1,1) with Student's t (Bollerslev, 1987), by the
library arch, is fitted again every month on all days so far. `gain on GARCH` is the difference of
their log densities, in nats a day; `direction` how much better than a coin the sign is foreseen.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from experiments import harness
from experiments.table_continual.config import Config
from metaopt import learners, meta_gradients, models
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.evaluate import make_curves
from metaopt.fit import FitConfig, Problem, check_devices, fit
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.statistics import interval
from metaopt.tasks.series import (
    NUM_FEATURES,
    NUM_OUTPUTS,
    Series,
    day_losses,
    read_series,
    return_loss,
    split_date,
    stretches,
    walk_forward,
)
from metaopt.training.progress import Progress
from metaopt.training.runs import slug
from metaopt.training.types import TrainFn
from metaopt.types import Episode, MetaParams, Params, TaskFamily

TABLE, COLUMN, ALL = "continual/volatility", "gain on GARCH", "all series"
INNER = InnerLoop(num_steps=3, query_loss="mean")


class Row(NamedTuple):
    """A series, or all of them."""

    name: str


def read_all(folder: str) -> dict[str, Series]:
    """The series of a folder, by the name of their file.

    Raises:
      UserError: there is none, or arch is not installed.
    """
    try:
        import arch
    except ImportError:
        raise UserError("--series needs the library arch: pip install 'metaopt[series]'") from None
    del arch
    paths = sorted(Path(folder).expanduser().glob("*.csv"))
    if not paths:
        raise UserError(f"there is no CSV file in {folder}: give a folder of series")
    if len({slug(path.stem) for path in paths}) < len(paths):
        raise UserError(f"two series of {folder} have names that are too alike: rename one")
    return {path.stem: read_series(path) for path in paths}


def garch_losses(returns: np.ndarray, begin: int, block: int, end: int) -> np.ndarray:
    """The loss of GARCH(1,1) with Student's t on each day from ``begin`` to ``end``, nats.

    It is fitted on all days before each block; within the block its variance goes on with the days
    that have passed.
    """
    from arch import arch_model  # late: an extra

    losses, scaled = [], 100 * returns  # as its optimiser likes it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in range(begin, end, block):
            known = scaled[:start]
            fitted = arch_model(known, mean="Zero", vol="GARCH", p=1, q=1, dist="t").fit(disp="off")
            stop = min(start + block, end)
            model = arch_model(scaled[:stop], mean="Zero", vol="GARCH", p=1, q=1, dist="t")
            sigma = np.asarray(model.fix(fitted.params).conditional_volatility)[start:]
            nu = float(np.asarray(fitted.params)[-1])
            losses.append(_student_loss(scaled[start:stop], sigma, nu))
    return np.concatenate(losses) - np.log(100)


def _student_loss(values: np.ndarray, sigma: np.ndarray, nu: float) -> np.ndarray:
    scale = sigma * np.sqrt((nu - 2) / nu)
    constant = special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2) - np.log(nu * np.pi) / 2
    return np.log(scale) - constant + (nu + 1) / 2 * np.log1p((values / scale) ** 2 / nu)


class Study:
    """The series, and a model that is meta-trained on their earlier half."""

    def __init__(self, config: Config, series: dict[str, Series]):
        self.config, self.series = config, series
        self.model = models.mlp(NUM_FEATURES, NUM_OUTPUTS, hidden=(config.volatility.width,))
        self.family_split = stretches(series, config.volatility.series)
        self.date = split_date(series, config.volatility.series)
        self.loss_fn = return_loss(self.model)
        self._trained: MetaParams | None = None

        def measure(params: Params, episode: Episode) -> jax.Array:
            of_return, of_direction = day_losses(self.model, params, episode.query)
            return jnp.stack([of_return.mean(), of_direction.mean()])

        devices = check_devices(1, 1, 0)
        self._curves = make_curves(
            learners.maml(), self.loss_fn, INNER, INNER.num_steps, devices, measure=measure
        )

    def train(self, directory: Path, train_fn: TrainFn) -> MetaParams:
        """What MAML learns of the earlier halves; once."""
        if self._trained is None:
            config, split = self.config.volatility, self.family_split
            self._trained = fit(
                Problem(TaskFamily("series", split, split, split), self.model, self.loss_fn),
                learners.maml(),
                meta_gradients.reverse,
                inner=INNER,
                outer=OuterConfig(learning_rate=3e-3, warmup_steps=20).ending_at(config.meta_steps),
                config=FitConfig(
                    seed=self.config.seed,
                    num_steps=config.meta_steps,
                    tasks_per_step=16,
                    num_devices=1,
                    log_every=max(1, config.meta_steps // 20),
                ),
                directory=directory,
                name="meta-training on series",
                hparams={"inner_learning_rate": config.inner_rate},
                train_fn=train_fn,
            ).meta_params
        return self._trained

    def losses(self, meta_params: MetaParams, name: str) -> np.ndarray:
        """Losses of return and direction on each block of a series, ``[E, K + 1, 2]``."""
        episodes = walk_forward(self.series[name], self.config.volatility.series, self.date)
        hparams = {"inner_learning_rate": np.float32(self.config.volatility.inner_rate)}
        return self._curves(meta_params, hparams, episodes)

    def months(self, name: str, blocks: int) -> np.ndarray:
        """The month in which each block of a series begins, as text ``[E]``."""
        series, size = self.series[name], self.config.volatility.series.num_query
        begin = int(np.searchsorted(series.dates, self.date))
        return np.array([x[:7] for x in series.dates[begin::size][:blocks]])

    def garch(self, name: str, blocks: int) -> np.ndarray:
        """The loss of GARCH on each block of a series ``[E]``."""
        sizes, returns = self.config.volatility.series, self.series[name].returns
        begin = int(np.searchsorted(self.series[name].dates, self.date))
        end = begin + blocks * sizes.num_query
        found = garch_losses(returns, begin, sizes.num_query, end)
        return found.reshape(blocks, sizes.num_query).mean(axis=1)


def add_rows(table: harness.TableRun, study: Study, train_fn: TrainFn) -> None:
    """Walks through every series, and pools them."""
    names = list(study.series)
    with Progress("GARCH and walks", total=len(names), first="fitting") as progress:
        for i, row in enumerate(table.pending([Row(f"series: {name}") for name in names])):
            name = row.name.removeprefix("series: ")
            found = study.losses(study.train(table.directory, train_fn), name)
            garch = study.garch(name, len(found))
            table.keep(row.name, ours=found, garch=garch)
            _add(table, row.name, found, garch, None)
            progress.update(i + 1)
    for row in table.pending([Row(ALL)]):
        kept = [table.kept(f"series: {name}") for name in names]
        ours, garch = (np.concatenate([x[key] for x in kept]) for key in ("ours", "garch"))
        lengths = [len(x["garch"]) for x in kept]
        groups = np.concatenate([study.months(n, k) for n, k in zip(names, lengths, strict=True)])
        _add(table, row.name, ours, garch, groups)
    log("series are walked through")


def _add(
    table: harness.TableRun,
    row: str,
    ours: np.ndarray,
    garch: np.ndarray,
    groups: np.ndarray | None,
) -> None:
    over = "95 % intervals over months, in which all series fall together"
    for column, values in (
        (COLUMN, garch - ours[:, -1, 0]),
        ("not adapted", garch - ours[:, 0, 0]),
        ("direction", np.log(2) - ours[:, -1, 1]),
    ):
        found = interval(values, groups)
        table.add(row, column, found, table=TABLE, unit="nats a day", better="higher", over=over)
