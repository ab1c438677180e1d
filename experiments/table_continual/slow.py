"""Slow series as stand-ins for sensors: the next value, from what was measured before.

Sunspots by year, CO2 by week and the temperature of the Pacific by month, which statsmodels brings
along. A linear function of earlier values predicts how the next one differs from the last; it
starts from zero, which predicts no change. The learners of `continual/text` follow a series from
begin to end, scored before they learn; beside them recursive least squares that forgets. All are
tuned on the first half, and the second half is reported: by how many per cent the squared error is
below that of no change.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.table_continual.cleaning import part_of
from experiments.table_continual.config import Config
from experiments.table_continual.text import LEARNERS, Settings, best_of, settings_of
from metaopt import losses, models
from metaopt.console import log
from metaopt.streams import continual
from metaopt.types import Batch

TABLE = "continual/slow"
NEAR = 4
"""Values just before the next one that are read; three more are of one season ago."""
BATCH = 2
"""Values that are learned from in one step."""
FORGETTING = tuple(1 - np.geomspace(1e-4, 0.1, 12))
"""Weights of an observation against the one after it that least squares is tuned over."""
Errors = Callable[[Settings], np.ndarray]
"""``settings -> squared errors of a series``, in its order."""


class Row(NamedTuple):
    """A learner of slow series.

    Attributes:
      name: Name in the table.
      learner: Its name in `continual/text`; None for least squares.
    """

    name: str
    learner: str | None


ROWS = (
    Row("slow: least squares", None),
    *(Row(f"slow: {row.name}", row.name) for row in LEARNERS if row.name != "EWC"),
)


class Slow(NamedTuple):
    """A series, cut into what is known and what is predicted.

    Attributes:
      inputs: float32 ``[T, NEAR + 3]``: earlier values less the last one, and a one.
      targets: float32 ``[T]``: the next value less the last one; both in units of the root mean
        square of all differences before.
      season: values in a season.
    """

    inputs: np.ndarray
    targets: np.ndarray
    season: int

    @property
    def half(self) -> int:
        """Where the second half begins."""
        return len(self.targets) // (2 * BATCH) * BATCH


def is_installed() -> bool:
    """Whether the library that brings the series is there."""
    return importlib.util.find_spec("statsmodels") is not None


def read_all() -> dict[str, Slow]:
    """The series by name."""
    from statsmodels import datasets  # late: an extra

    def values(name: str) -> np.ndarray:
        data = getattr(datasets, name).load_pandas().data
        if name == "co2":  # weeks without a measurement keep the one before
            data = data.ffill()
        return data.drop(columns="YEAR", errors="ignore").to_numpy(np.float64).ravel()

    return {
        "sunspots": cut(values("sunspots"), season=11),
        "CO2": cut(values("co2"), season=52),
        "El Niño": cut(values("elnino"), season=12),
    }


def cut(values: np.ndarray, season: int) -> Slow:
    """A series as examples; nothing in an example is of later than what it predicts."""
    begin = season + 2
    count = (len(values) - begin) // BATCH * BATCH
    now = np.arange(begin, begin + count)  # what is predicted
    lags = [*range(2, NEAR + 1), season - 1, season, season + 1]
    squares = np.diff(values) ** 2
    scale = np.sqrt(np.cumsum(squares) / np.arange(1, len(values)))[now - 2]
    last = values[now - 1]
    columns = [(values[now - lag] - last) / scale for lag in lags]
    inputs = np.stack([*columns, np.ones(count)], axis=1)
    targets = (values[now] - last) / scale
    return Slow(inputs.astype(np.float32), targets.astype(np.float32), season)


def least_squares_errors(series: Slow, forgetting: float, ridge: float = 1.0) -> np.ndarray:
    """The squared error of recursive least squares on each example, before it is learned from.

    Mathematics: the weights are ``argmin_w Σ_i λ^{t−i} (y_i − w·x_i)² + λ^t r |w|²`` over the
    examples so far. Like the other learners it learns from `BATCH` examples at a time.

    Args:
      series: the examples.
      forgetting: λ.
      ridge: r.

    Returns:
      float64 ``[T]``.
    """
    inputs, targets = series.inputs.astype(np.float64), series.targets.astype(np.float64)
    inverse = np.eye(inputs.shape[1]) / ridge
    weights, errors = np.zeros(len(inverse)), np.empty(len(targets))
    with np.errstate(all="ignore"):  # forgetting too much can diverge: tuning leaves it out
        for begin in range(0, len(targets), BATCH):
            batch = slice(begin, begin + BATCH)
            errors[batch] = (targets[batch] - inputs[batch] @ weights) ** 2
            for x, y in zip(inputs[batch], targets[batch], strict=True):
                spread = inverse @ x
                gain = spread / (forgetting + x @ spread)
                weights = weights + gain * (y - weights @ x)
                inverse = (inverse - np.outer(gain, spread)) / forgetting
    return errors


def errors_of(row: Row, series: Slow, config: Config) -> Errors:
    """What gives the squared errors of a row on a series; compiled once."""
    if row.learner is None:
        return lambda settings: least_squares_errors(series, settings["forgetting"])
    model = models.mlp(series.inputs.shape[1], 1, hidden=())
    loss_fn, zero = (
        losses.regression(model),
        jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0))),
    )
    inputs = series.inputs.reshape(-1, BATCH, series.inputs.shape[1])
    batches = Batch(jnp.asarray(inputs), jnp.asarray(series.targets.reshape(-1, BATCH, 1)))
    capacity = max(1, int(config.memory_share * len(series.targets)))
    example = jax.tree.map(lambda x: x[0], batches)
    learner = {x.name: x for x in LEARNERS}[row.learner].make(loss_fn, capacity, example)
    follow = jax.jit(functools.partial(continual.follow, learner))

    def errors(settings: Settings) -> np.ndarray:
        hparams = {name: jnp.float32(value) for name, value in settings.items()}
        _, found = follow(learner.init(zero), batches, jax.random.key(0), hparams)
        return np.repeat(np.asarray(found, np.float64), BATCH)  # means over each batch

    return errors


def add_rows(table: harness.TableRun, config: Config, rows: Sequence[Row]) -> None:
    """Tunes and follows the rows on every series."""
    grids = {row.name: row for row in LEARNERS}
    for row in table.pending(rows):
        tried = [{"forgetting": float(x)} for x in FORGETTING]
        if row.learner is not None:
            learner = grids[row.learner]
            if "inner_learning_rate" in learner.grid:
                learner = learner._replace(grid={"inner_learning_rate": (0.01, 0.03, 0.1)})
            tried = settings_of(learner, config, config.drifting.linear_rates)
        for name, series in read_all().items():
            errors = errors_of(row, series, config)
            half = series.half
            settings = best_of(tried, lambda x, e=errors, h=half: e(x)[:h].mean(), row.name)
            gain = _seasons(series.targets**2.0 - errors(settings), series)
            found = part_of(gain, _seasons(series.targets**2.0, series))
            table.add(
                row.name,
                name,
                found,
                table=TABLE,
                unit="% of the squared error of no change",
                better="higher",
                over="95 % intervals over seasons of 11 years, 52 weeks and 12 months",
                settings=settings,
            )
    log("slow series are followed")


def _seasons(values: np.ndarray, series: Slow) -> np.ndarray:
    """Means of the second half over whole seasons."""
    later = values[series.half :]
    count = len(later) // series.season
    return later[: count * series.season].reshape(count, series.season).mean(axis=1)
