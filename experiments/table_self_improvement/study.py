"""What the rows of `table_self_improvement` share."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.table_self_improvement import tuning
from experiments.table_self_improvement.config import Config
from experiments.table_self_improvement.workloads import Problem, language_model
from metaopt.self_improvement.loop import Outcome, run
from metaopt.self_improvement.workload import Setting, Settings
from metaopt.statistics import Interval, t_interval


class Cell(NamedTuple):
    """One number of a row.

    Attributes:
      column: of the table.
      found: the number with its interval.
      more: further entries of its record.
    """

    column: str
    found: Interval
    more: dict[str, Any] = {}  # noqa: RUF012


class Study:
    """What rows share: the config, the run's directory, and the tuned language model."""

    def __init__(self, config: Config, directory: Path):
        self.config, self.directory = config, directory
        self._lm: tuple[Problem, dict[str, Setting], Outcome] | None = None

    def lm(self) -> tuple[Problem, dict[str, Setting], Outcome]:
        """The language model, its tuned settings and the run with them."""
        if self._lm is None:
            problem, config = language_model(self.config), self.config
            settings = tuning.tuned(
                problem, self.lm_settings, config.num_trials, config.seed, self.directory / "tuning"
            )
            every = config.loop.assess_every
            place = self.directory / "tuned"
            outcome = tuning.plain(problem, settings, place, assess_every=every)
            self._lm = problem, settings, outcome
        return self._lm

    def lm_settings(self, trial: Any) -> dict[str, Setting]:
        """What tuning searches through."""
        return {
            "outer_learning_rate": trial.suggest_float("rate", 1e-4, 0.1, log=True),
            "weight_decay": trial.suggest_float("decay", 1e-4, 3.0, log=True),
            "batch_size": trial.suggest_categorical("batch", self.config.lm.batches),
        }

    def improved(self, problem: Problem, settings: Settings, name: str, **options: Any) -> Outcome:
        """A run under the closed loop."""
        place = self.directory / name
        place.mkdir(parents=True, exist_ok=True)
        return run(problem.workload, settings, directory=place, config=self.config.loop, **options)


def in_turns(
    rounds: int, plain: Callable[[], Outcome], improved: Callable[[str], Outcome]
) -> tuple[Outcome, Interval]:
    """The first of several runs under the loop, and their times beside those of plain runs.

    Args:
      rounds: runs under the loop; before and after each is a plain one.
      plain: a run that changes nothing.
      improved: what is to stand behind the name of the run -> a run under the loop.

    Returns:
      The first run, and the ratio of seconds with its interval over the rounds.
    """
    beside, found = [plain().ledger.seconds], []
    for i in range(rounds):
        found.append(improved(f" {i}" if i else ""))
        beside.append(plain().ledger.seconds)
    pairs = zip(found, itertools.pairwise(beside), strict=True)
    return found[0], mean([2 * run.ledger.seconds / sum(around) for run, around in pairs])


def ratio(losses: np.ndarray, reference: np.ndarray) -> Interval:
    """The ratio of two mean losses, with the interval of their paired difference."""
    found = t_interval(losses - reference, np.arange(len(losses)))
    mean = float(reference.mean())
    return Interval(1 + found.mean / mean, found.ci95 / mean, found.n)


def mean(values: Sequence[float]) -> Interval:
    """Of numbers that are independent of each other, such as those of several seeds."""
    return t_interval(np.asarray(values, float), np.arange(len(values)))


def single(value: float) -> Interval:
    """A number measured once."""
    return Interval(value, float("nan"), 1)


def described(outcome: Outcome) -> dict[str, Any]:
    """What the record of a run under the loop says beside the number."""
    return {
        "settings": outcome.snapshot.settings,
        "seconds": outcome.ledger.seconds,
        "compile_seconds": outcome.ledger.compile_seconds,
        "trial_share": outcome.ledger.trial_examples / max(1, outcome.ledger.examples),
        "decided": [
            f"step {decision.step}, {decision.verdict}: {decision.reason}"
            for decision in outcome.decisions
        ],
    }
