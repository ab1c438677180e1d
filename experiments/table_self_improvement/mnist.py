"""The row `mnist` of `table_self_improvement`: a convolutional network by gradient descent."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.table_self_improvement import tuning
from experiments.table_self_improvement.study import Cell, Study, described, mean
from experiments.table_self_improvement.workloads import mnist
from metaopt.self_improvement.loop import Outcome
from metaopt.statistics import classification

SHOWN = {
    "improved mnist": "closed loop",
    "mnist fixed": "tuned, fixed rate",
    "mnist cosine": "tuned, cosine",
    "untreated mnist": "untreated",
}
"""Of the figure: directories of trainings with the first seed."""


class Compared(NamedTuple):
    """The runs of one seed.

    Attributes:
      improved: under the loop.
      predicted: its classes on the test.
      labels: those of the test.
      tuned: test accuracy of the best fixed rate and of the best cosine, by the loss held out.
      best: which of the two is the better, by the same.
      untreated: test accuracy.
    """

    improved: Outcome
    predicted: np.ndarray
    labels: np.ndarray
    tuned: dict[str, float]
    best: str
    untreated: float

    @property
    def accuracy(self) -> float:
        """Of the run under the loop."""
        return float(np.mean(self.predicted == self.labels))


def mnist_row(study: Study) -> Iterator[Cell]:
    """MNIST by SGD: accuracy against that of the best fixed rate and the best cosine."""
    seeds = [study.config.seed + i for i in range(study.config.mnist.num_seeds)]
    runs = [_compare(study, seed, "" if seed == seeds[0] else f" {seed}") for seed in seeds]
    scores = classification(runs[0].labels, runs[0].predicted)
    common = {"seeds": seeds, "episodes": len(runs[0].labels)}
    common |= {"better": "higher", "over": "those of mnist over seeds"}
    more = described(runs[0].improved) | {
        "unit": "ratio of test accuracies",
        "accuracies": [run.accuracy for run in runs],
        "rates": [run.improved.snapshot.settings["outer_learning_rate"] for run in runs],
        "precision": scores.precision,
        "recall": scores.recall,
        "f1": scores.f1,
        "best_fixed": [run.tuned["fixed"] for run in runs],
        "best_cosine": [run.tuned["cosine"] for run in runs],
    }
    found = mean([run.accuracy / run.tuned[run.best] for run in runs])
    yield Cell("ratio to tuned", found, more | common)
    untreated = mean([run.untreated / run.tuned[run.best] for run in runs])
    yield Cell("untreated ratio", untreated, {"unit": "ratio of test accuracies"} | common)


def _compare(study: Study, seed: int, suffix: str) -> Compared:
    config = dataclasses.replace(study.config, seed=seed)
    every = config.loop.assess_every

    def place(name: str) -> Path:
        return study.directory / f"{name}{suffix}"

    accuracies, losses = {}, {}
    both = {schedule: mnist(config, schedule) for schedule in ("fixed", "cosine")}
    for schedule, digits in both.items():
        found = {}
        for rate in config.mnist.rates:
            settings = digits.problem.settings | {"outer_learning_rate": rate}
            found[rate] = tuning.final_loss(digits.problem, settings, place("trial"))
        rate = min(found, key=lambda rate: found[rate])
        settings = digits.problem.settings | {"outer_learning_rate": rate}
        again = tuning.plain(
            digits.problem, settings, place(f"mnist {schedule}"), assess_every=every
        )
        accuracies[schedule] = float(np.mean(digits.predict(again.snapshot.state) == digits.labels))
        losses[schedule] = found[rate]
    best = min(losses, key=lambda schedule: losses[schedule])
    digits = both["cosine"]
    start = digits.problem.settings | {"outer_learning_rate": config.mnist.start_rate}
    improved = study.improved(digits.problem, start, f"improved mnist{suffix}")
    untreated = tuning.plain(digits.problem, start, place("untreated mnist"), assess_every=every)
    return Compared(
        improved,
        digits.predict(improved.snapshot.state),
        digits.labels,
        accuracies,
        best,
        float(np.mean(digits.predict(untreated.snapshot.state) == digits.labels)),
    )
