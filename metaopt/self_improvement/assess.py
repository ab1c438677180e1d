"""Self-evaluation: how good a run is, what a change did to it, and what it costs.

Everything is measured on held-out episodes that are the same every time, so that two
measurements are paired: the noise of which episodes were drawn falls out of their difference.
Intervals are Student's t over tasks, as in `metaopt.evaluate`. Losses are in the unit of the
run (nats a token, squared error), lower is better. numpy and scipy only: nothing is compiled.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from metaopt.errors import UserError
from metaopt.statistics import Interval, t_interval
from metaopt.training.runs import as_json


class Measurement(NamedTuple):
    """What was measured at one point of a run.

    Attributes:
      step: updates done.
      tokens: tokens (or examples) seen since the start.
      seconds: training time since the start, without that of the evaluations.
      losses: ``[E]``, the held-out loss of every episode or sequence, always in one order.
      flops: floating-point operations since the start, where they are known.
    """

    step: int
    tokens: int
    seconds: float
    losses: np.ndarray
    flops: float | None = None


class Assessment(NamedTuple):
    """How a run stands, and what the time since the last assessment was worth.

    Attributes:
      step, tokens, seconds, flops: as measured, since the start of the run.
      loss: mean held-out loss.
      improvement: by how much the loss fell since the last assessment, paired over
        episodes; positive is better. None at the first.
      per_second: improvement a second of training since the last assessment.
      per_flop: improvement a floating-point operation since then.
      per_cost: 1 / (time × resources), per second and unit of resource, for the time since
        the last assessment: what the same piece of work cost, whatever it was worth.
    """

    step: int
    tokens: int
    seconds: float
    flops: float | None
    loss: Interval
    improvement: Interval | None
    per_second: float | None
    per_flop: float | None
    per_cost: float | None


def assess(
    now: Measurement,
    last: Measurement | None = None,
    *,
    groups: np.ndarray | None = None,
    resources: float = 1.0,
) -> Assessment:
    """The assessment of one measurement, against the last one where there is one.

    Args:
      now: the measurement.
      last: the one before, over the same episodes.
      groups: ``[E]``, the task of each episode; None where each is of its own.
      resources: what is used up at a time: devices, say, or GiB of memory.

    Returns:
      `Assessment`. An efficiency is None where nothing was spent or it is not known.

    Raises:
      ValueError: the two measurements are not of the same episodes.
    """
    spent = now.seconds - (last.seconds if last else 0.0)
    fall = _fall(last.losses, now.losses, groups) if last else None
    before = last.flops if last else None
    operations = None if now.flops is None or before is None else now.flops - before
    with np.errstate(invalid="ignore"):  # the spread of losses that are not finite
        loss = t_interval(np.asarray(now.losses, np.float64), _groups(now.losses, groups))
    return Assessment(
        now.step,
        now.tokens,
        now.seconds,
        now.flops,
        loss,
        fall,
        _share(fall.mean if fall else None, spent),
        _share(fall.mean if fall else None, operations),
        _share(1.0, spent * resources),
    )


class Verdict(NamedTuple):
    """What a change did to the held-out loss.

    Attributes:
      outcome: ``'better'``, ``'worse'`` or, where the noise allows either, ``'noise'``.
      difference: mean loss after less mean loss before, over tasks; infinite where the
        outcome rests on losses that are not finite.
      ci95: half the width of its 95 % interval; NaN where there is none.
      n: tasks behind it.
    """

    outcome: Literal["better", "worse", "noise"]
    difference: float
    ci95: float
    n: int


def compare(
    before: np.ndarray,
    after: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    margin: float = 0.0,
) -> Verdict:
    """Whether held-out losses fell, rose, or did neither beyond noise.

    A change is ``'better'`` only where the whole 95 % interval of the mean difference lies
    below ``-margin``, and ``'worse'`` only where it lies above ``margin``: one that does
    nothing is taken for better in 2.5 % of cases, and so is at most one that gains no
    more than ``margin``. From a single task nothing can be told: that is noise.

    A loss after the change that is not finite is worse, whatever was before; one before it
    that is not, where all are finite after it, makes the change better.

    Args:
      before: ``[E]``, the loss of every held-out episode without the change.
      after: ``[E]``, of the same episodes, with it.
      groups: ``[E]``, the task of each episode; None where each is of its own. Differences
        of one task are averaged first: they are not independent.
      margin: the smallest difference that matters, in the unit of the loss. Where it is not
        a number (a share of a loss that diverged) finite losses differ by noise only.

    Raises:
      ValueError: shapes differ, there is nothing to compare, or the margin is negative.
    """
    if margin < 0:
        raise ValueError(f"margin {margin} must not be negative")
    fall = _fall(before, after, groups)
    if not np.all(np.isfinite(after)):
        return Verdict("worse", math.inf, math.nan, fall.n)
    if not np.all(np.isfinite(before)):
        return Verdict("better", -math.inf, math.nan, fall.n)
    outcome = "noise"
    if fall.mean - fall.ci95 > margin:
        outcome = "better"
    elif fall.mean + fall.ci95 < -margin:
        outcome = "worse"
    return Verdict(outcome, -fall.mean, fall.ci95, fall.n)


def _fall(before, after, groups) -> Interval:
    """By how much losses fell, over the same episodes; NaN where one of them is not finite."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape:
        raise ValueError(f"not the same episodes: {before.shape} before, {after.shape} after")
    finite = np.all(np.isfinite(before)) and np.all(np.isfinite(after))
    fall = before - after if finite else np.full(after.shape, np.nan)
    return t_interval(fall, _groups(after, groups))


def _groups(losses, groups) -> np.ndarray:
    return np.arange(np.size(losses)) if groups is None else np.asarray(groups)


def _share(gain: float | None, spent: float | None) -> float | None:
    return gain / spent if gain is not None and spent is not None and spent > 0 else None


class Classification(NamedTuple):
    """How well classes are told apart; all numbers in [0, 1].

    Attributes:
      accuracy: share of examples of which the class is right.
      precision, recall, f1: means over classes, each class alike (macro).
      per_class: class to its precision, recall, F1 and number of true examples
        (``'support'``).
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    per_class: dict[str, dict[str, float]]


def classification(targets: np.ndarray, predictions: np.ndarray) -> Classification:
    """Accuracy, precision, recall and F1, over all classes that occur and for each.

    Of a class that was never predicted the precision is 0, and of one that is predicted
    but never true the recall.

    Args:
      targets: the true classes, integers or strings of any shape.
      predictions: the predicted ones, of the same shape.

    Raises:
      UserError: scikit-learn is not installed.
      ValueError: shapes differ or there is nothing to judge.
    """
    try:
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support
    except ImportError as error:
        raise UserError(
            "precision and recall need scikit-learn: pip install 'metaopt[improve]'"
        ) from error
    targets, predictions = np.asarray(targets), np.asarray(predictions)
    if targets.shape != predictions.shape or not targets.size:
        raise ValueError(f"need classes of one shape, got {targets.shape}, {predictions.shape}")
    targets, predictions = targets.ravel(), predictions.ravel()
    classes = np.unique(np.concatenate([targets, predictions]))
    scores: Any = precision_recall_fscore_support(
        targets, predictions, labels=classes, average=None, zero_division=cast(Any, 0.0)
    )
    table = np.stack(scores, axis=1).astype(float)  # [classes, 4]
    names = ("precision", "recall", "f1", "support")
    per_class: dict[str, dict[str, float]] = {
        str(name): dict(zip(names, row, strict=True))
        for name, row in zip(classes, table.tolist(), strict=True)
    }
    accuracy = float(accuracy_score(targets, predictions))
    precision, recall, f1 = table[:, :3].mean(axis=0).tolist()
    return Classification(accuracy, precision, recall, f1, per_class)


def as_record(value: Any) -> Any:
    """Anything of this module as plain JSON: named tuples as dicts, not finite as None.

    Arrays become lists, paths strings, dataclasses dicts.
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): as_record(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_record(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return as_record(as_json(value))
