"""Daily series of prices as tasks: the density of the next day's return, from the days before.

A day has features that are made of earlier returns alone; an episode is a stretch of one series,
its support, and the days that follow, its query. So adaptation to a support and the loss on its
query is a walk forward: nothing of the future is ever read.

F counts the features of a day.
"""

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from scipy import signal

from metaopt.errors import UserError
from metaopt.files import one_line
from metaopt.ranges import Checked, Count, Range
from metaopt.types import Array, Batch, Episode, Key, LossFn, Model, Params, TaskSplit

HALF_LIVES = (1, 2, 5, 20, 60)
"""Days in which the weight of a squared return halves, of the variances that are features."""
MEANS = (1, 5, 20)
"""The same of the means of returns."""
BASE, SLOW = 20, 250
"""Half-lives of the variance that a prediction is a factor on, and of the scale of the features."""
BEGIN = 60
"""Days at the start of a series that are read and not predicted."""
_LEAST = 1e-12  # of a variance: days on which nothing was traded


class Series(NamedTuple):
    """A series of prices.

    Attributes:
      dates: ISO dates of the returns, ``[T]``.
      returns: logarithm of each price less that of the one before, float64 ``[T]``.
    """

    dates: np.ndarray
    returns: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeriesConfig(Checked):
    """Sizes of an episode, in days.

    Attributes:
      num_support: days to adapt on.
      num_query: days after them to be judged on.
      split: part of the calendar of all series that is trained on, the earliest.
    """

    num_support: Count = 250
    num_query: Count = 20
    split: Annotated[float, Range(0.1, 0.9)] = 0.5


def read_series(path: Path) -> Series:
    """Reads a CSV file with the columns ``date`` and ``value``, oldest first.

    Days whose price is not above 0 are left out: they have no logarithm.

    Raises:
      UserError: it cannot be read, or has other columns, or dates that are not in order.
    """
    with one_line(path, "read"), path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != ["date", "value"]:
        raise UserError(f"{path} is no series: its first line must be date,value")
    try:
        found = [(row[0], float(row[1])) for row in rows[1:]]
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} has a line that is no date and number: {error}") from None
    found = [(date, value) for date, value in found if 0 < value < math.inf]
    dates = np.array([date for date, _ in found])
    if len(found) <= BEGIN or np.any(dates[1:] <= dates[:-1]):
        raise UserError(f"{path} needs more than {BEGIN} days, each later than the one before")
    values = np.array([value for _, value in found])
    return Series(dates[1:], np.diff(np.log(values)))


def variance(returns: np.ndarray, half_life: float) -> np.ndarray:
    """The exponentially weighted mean of squared returns before each day, ``[T]``.

    The weights of the days that there are sum to one. That of the first day is the square of its
    own return, which is not predicted.
    """
    decay = 0.5 ** (1 / half_life)
    found = _filtered(returns**2 + _LEAST, decay) / (1 - decay ** np.arange(1, len(returns) + 1))
    return np.concatenate([found[:1], found[:-1]])


def _filtered(values: np.ndarray, decay: float) -> np.ndarray:
    """``y_t = (1 − d) x_t + d y_{t−1}``."""
    return np.asarray(signal.lfilter([1 - decay], [1, -decay], values))


def features(returns: np.ndarray) -> np.ndarray:
    """What is known before each day, float32 ``[T, F + 1]``.

    The first column is the logarithm of the variance with the half-life `BASE`; the others are
    logarithms of variances in units of a slow one, and means of returns in units of its root.
    """
    slow = variance(returns, SLOW)
    columns = [np.log(variance(returns, BASE))]
    columns += [np.clip(np.log(variance(returns, h) / slow), -6, 6) for h in HALF_LIVES]
    for half_life in MEANS:
        mean = _filtered(returns / np.sqrt(slow), 0.5 ** (1 / half_life))
        columns.append(np.concatenate([[0.0], mean[:-1]]))
    return np.stack(columns, axis=1).astype(np.float32)


NUM_FEATURES = len(HALF_LIVES) + len(MEANS)
NUM_OUTPUTS = 3
"""Outputs of a model: logarithm of a factor on the variance, degrees of freedom, and direction."""


def day_losses(model: Model, params: Params, batch: Batch) -> tuple[Array, Array]:
    """The losses of each day: of its return, and of its direction.

    Mathematics: with the base variance b of the first column, the return has Student's t
    distribution of mean 0, of variance ``b exp(o_1)`` and of ``ν = 2.1 + softplus(o_2)`` degrees of
    freedom; it is above 0 with the chance ``sigmoid(o_3)``.

    Args:
      model: ``[S, F]`` to ``[S, 3]``.
      params: its parameters.
      batch: `features` ``[S, F + 1]`` and returns ``[S]``.

    Returns:
      Negative log densities of the returns and negative log chances of the directions, nats
      ``[S]``.
    """
    outputs = model.apply(params, batch.inputs[:, 1:])
    log_variance = batch.inputs[:, 0] + outputs[:, 0]
    nu = 2.1 + jax.nn.softplus(outputs[:, 1])
    log_scale = 0.5 * (log_variance + jnp.log((nu - 2) / nu))
    z = batch.targets * jnp.exp(-log_scale)
    constant = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * jnp.log(nu * jnp.pi)
    log_density = constant - log_scale - (nu + 1) / 2 * jnp.log1p(z**2 / nu)
    signs = jnp.where(batch.targets > 0, 1.0, -1.0)
    return -log_density, jax.nn.softplus(-signs * outputs[:, 2])


def return_loss(model: Model) -> LossFn:
    """The mean of both losses of `day_losses`, nats a day."""

    def loss(params: Params, batch: Batch) -> Array:
        of_return, of_direction = day_losses(model, params, batch)
        return jnp.mean(of_return) + jnp.mean(of_direction)

    return loss


def split_date(series: Mapping[str, Series], config: SeriesConfig) -> str:
    """The first date that is not trained on, the same for all series: they fall together."""
    dates = np.unique(np.concatenate([x.dates for x in series.values()]))
    return str(dates[int(config.split * len(dates))])


def stretches(series: Mapping[str, Series], config: SeriesConfig) -> TaskSplit:
    """Stretches of each series before `split_date`, to train on; ``task`` indexes their names.

    Raises:
      UserError: a series is too short.
    """
    length = config.num_support + config.num_query
    days = [_days(x) for x in series.values()]
    date = split_date(series, config)
    ends = [int(np.searchsorted(x.dates, date)) for x in series.values()]
    for name, end in zip(series, ends, strict=True):
        if end < BEGIN + length:
            raise UserError(f"{name!r} is too short for stretches of {length} days: lower them")

    def sample(key: Key, num_tasks: int) -> Episode:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        tasks: Any = rng.integers(len(days), size=num_tasks).astype(np.int32)
        begins = [int(rng.integers(BEGIN, ends[i] - length + 1)) for i in tasks.tolist()]
        found = [_stretch(days[i], b, config) for i, b in zip(tasks, begins, strict=True)]
        return _stack(found)._replace(task=tasks)

    return TaskSplit(sample, tuple(series))


def walk_forward(series: Series, config: SeriesConfig, date: str) -> Episode:
    """A series from a date on, in queries that follow one another, each with its support.

    Args:
      series: which.
      config: sizes.
      date: see `split_date`.

    Returns:
      Episodes ``[E, ...]``, each support ending the day before its query begins.

    Raises:
      UserError: the series is too short.
    """
    days = _days(series)
    begin = int(np.searchsorted(series.dates, date))
    last = len(days.targets) - config.num_query
    starts = [i - config.num_support for i in range(begin, last + 1, config.num_query)]
    if not starts or starts[0] < BEGIN:
        raise UserError("a series is too short to walk through: lower num_support or num_query")
    return _stack([_stretch(days, start, config) for start in starts])


def _length(config: SeriesConfig) -> int:
    return config.num_support + config.num_query


def _days(series: Series) -> Batch:
    inputs: Any = features(series.returns)
    targets: Any = series.returns.astype(np.float32)
    return Batch(inputs, targets)


def _stretch(days: Batch, begin: int, config: SeriesConfig) -> Episode:
    middle, end = begin + config.num_support, begin + _length(config)
    support, query = (
        Batch(days.inputs[part], days.targets[part])
        for part in (slice(begin, middle), slice(middle, end))
    )
    return Episode(support, query)


def _stack(found: list[Episode]) -> Episode:
    return jax.tree.map(lambda *x: np.stack(x), *found)
