"""What `table_self_improvement` writes: cells, and the trajectories as figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from experiments import harness
from experiments.table_self_improvement.config import Config
from experiments.table_self_improvement.mnist import SHOWN
from experiments.table_self_improvement.rows import BAD_STARTS
from experiments.table_self_improvement.study import Cell
from metaopt.files import read_json_lines
from metaopt.reporting import plots

TABLE, BASELINES = "self_improvement", "self_improvement_baselines"
SHARES = "self_improvement_shares"
OVER = "95 % intervals over held-out examples, paired"
UNITS = {
    "ratio to tuned": "ratio of held-out losses",
    "ratio to undisturbed": "ratio of held-out losses",
    "untreated ratio": "ratio of held-out losses",
    "time ratio": "ratio of seconds without compiling",
    "throughput ratio": "ratio of tokens a second",
    "recovered": "% of the throughput or loss that a fault costs, 50 steps after the alarm",
    "tokens ratio": "ratio of tokens, those of trials among them",
}


class Assessed(TypedDict):
    """What is drawn of a line of ``metrics.jsonl``."""

    tokens: int
    valid_loss: float | None
    scores: NotRequired[dict[str, float | None]]


def add_cells(table: harness.TableRun, row: str, cells: Iterable[Cell], name: str = TABLE) -> None:
    """Adds the cells of a row to the table of a name.

    The rows of `TABLE` and `SHARES` are different trainings and no rivals: none is the best.
    """
    for cell in cells:
        fields: dict[str, Any] = {
            "unit": UNITS.get(cell.column, ""),
            "better": "lower",
            "over": OVER,
        }
        fields |= {"episodes": cell.found.n} | cell.more
        table.add(row, cell.column, cell.found, **fields, table=name, limit=name != BASELINES)


def draw(table: harness.TableRun, config: Config) -> None:
    """The held-out loss by tokens of the language model, the test error by epoch of MNIST."""
    trainings = table.directory / "trainings"
    improved = _trajectories(trainings, "improved")
    tuned = {"tuned": _trajectory(trainings / "tuned")}
    drawn = {name: points for name, points in (tuned | improved).items() if len(points) > 1}
    if drawn:
        plots.trajectories(
            table.directory / "curves.png",
            drawn,
            dashed=_trajectories(trainings, "untreated"),
            x_label="tokens",
            y_label="held-out loss, nats a token",
            title="Language model: bad starts under the closed loop, and untreated (dashed)",
        )

    accuracies = {
        name: _trajectory(trainings / place, "test_accuracy") for place, name in SHOWN.items()
    }
    errors = {
        name: points * [1 / config.mnist.num_train, -1] + [0, 1]
        for name, points in accuracies.items()
        if len(points) > 1
    }
    if errors:
        plots.trajectories(
            table.directory / "mnist.png",
            errors,
            x_label="epochs",
            y_label="test error, 1 − accuracy",
            title="MNIST by gradient descent: a bad start under the closed loop",
            y_scale="log",
        )


def _trajectories(trainings: Path, kind: str) -> dict[str, np.ndarray]:
    return {name: _trajectory(trainings / f"{kind} {name}") for name in BAD_STARTS}


def _trajectory(training: Path, quantity: str = "valid_loss") -> np.ndarray:
    """Of a training, ``[points, 2]``: tokens and a quantity that was assessed."""
    found = read_json_lines(training / "metrics.jsonl", Assessed)
    lines = [line | line.get("scores", {}) for line in found]
    known = [(x["tokens"], x[quantity]) for x in lines if x.get(quantity) is not None]
    return np.array(known).reshape(-1, 2)
