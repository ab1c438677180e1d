"""Optuna as the tables use it: whole runs, one after the other, resumed where they were stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from metaopt.training.progress import Progress
from metaopt.training.runs import slug


def best_params(
    objective: Callable[[optuna.Trial], float],
    directory: Path,
    name: str,
    *,
    num_trials: int,
    seed: int,
) -> dict[str, Any]:
    """The parameters of the lowest value among trials that Optuna's TPE suggests.

    Args:
      objective: trial -> value, lower is better; infinity for a run that diverged.
      directory: where the trials are kept, in ``tuning.sqlite``; several searches may share it.
      name: name of the search.
      num_trials: number of trials, those from before a resume among them.
      seed: seed of the sampler.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{directory / 'tuning.sqlite'}",
        study_name=slug(name),
        sampler=optuna.samplers.TPESampler(seed=seed),
        load_if_exists=True,
    )
    finished = sum(trial.state.is_finished() for trial in study.trials)
    with Progress(f"tuning {name}", total=num_trials, start=finished) as shown:
        for done in range(finished, num_trials):
            study.optimize(objective, n_trials=1)
            shown.update(done + 1, best=study.best_value)
    return study.best_params
