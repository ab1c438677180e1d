"""What the closed loop is compared with: tuned runs, and other ways to spend as much."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import optuna

from experiments.optuna_search import best_params
from experiments.table_self_improvement.workloads import Problem
from metaopt.optimizers.self_tuned import self_tuned
from metaopt.self_improvement.loop import LoopConfig, Outcome, run
from metaopt.self_improvement.workload import Setting, Settings, Workload, begin, steps
from metaopt.training.population import initial_population, train_population
from metaopt.training.recorder import Diverged
from metaopt.types import MetaState

PLAIN = LoopConfig(phases=(), shares=(), assess_every=1.0, max_responses=0)
"""A run that changes nothing and is evaluated at its end."""
Suggest = Callable[[optuna.Trial], dict[str, Setting]]


def plain(problem: Problem, settings: Settings, directory: Path, **changes: Any) -> Outcome:
    """A run that changes nothing, from its start; raises `Diverged` like any other."""
    if directory.exists():
        shutil.rmtree(directory)  # of a run that was stopped: its time would not be its own
    directory.mkdir(parents=True)
    config = dataclasses.replace(PLAIN, **changes)
    return run(problem.workload, settings, directory=directory, config=config)


def final_loss(problem: Problem, settings: Settings, directory: Path) -> float:
    """Of a plain run, held out; infinite where it diverged."""
    try:
        return plain(problem, settings, directory).curve[-1].loss.mean
    except Diverged:
        return float("inf")


def tuned(
    problem: Problem, suggest: Suggest, num_trials: int, seed: int, directory: Path
) -> dict[str, Setting]:
    """The best settings of several plain runs, by Optuna's TPE; resumed where it was stopped."""

    def objective(trial: optuna.Trial) -> float:
        settings = problem.settings | suggest(trial)
        return final_loss(problem, settings, directory / "trial")

    name = problem.workload.name
    best = best_params(objective, directory, name, num_trials=num_trials, seed=seed)
    return problem.settings | suggest(optuna.trial.FixedTrial(best))  # type: ignore[arg-type]


def searched(
    problem: Problem, suggest: Suggest, share: float, *, num_parts: int, prune: bool, seed: int
) -> dict[str, Setting]:
    """The best settings of short runs that together take a share of a whole one.

    Each is a run of its own, with its own cosine, and of 1 / num_parts of that share; with
    ``prune`` Hyperband judges them on the way and stops the worse ones, so there are more.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    budget = share * problem.workload.num_examples
    short = problem.workload._replace(num_examples=round(budget / num_parts))
    pruner = optuna.pruners.HyperbandPruner(max_resource=3) if prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        study_name=f"{problem.workload.name}, seed {seed}",  # Hyperband's brackets are by its hash
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=pruner,
    )
    spent = []

    def objective(trial: optuna.Trial) -> float:
        settings, loss = problem.settings | suggest(trial), float("inf")
        snapshot = begin(short, settings)
        for rung, end in enumerate(rungs_of(short, settings)):
            before = snapshot.examples
            for step in steps(short, snapshot, end):
                snapshot = step.snapshot
            spent.append(snapshot.examples - before)
            loss = float(np.mean(short.evaluate(snapshot.state)))
            trial.report(loss, rung + 1)
            if not np.isfinite(loss) or trial.should_prune():
                raise optuna.TrialPruned
        return loss

    while sum(spent) + short.num_examples / 2 <= budget:
        study.optimize(objective, n_trials=1)
    return problem.settings | suggest(optuna.trial.FixedTrial(study.best_params))  # type: ignore[arg-type]


def rungs_of(workload: Workload, settings: Settings) -> list[int]:
    """A ninth, a third and all of a run, in whole steps."""
    size = workload.examples_per_step(settings)
    parts = (workload.num_examples // 9, workload.num_examples // 3, workload.num_examples)
    return sorted({max(size, part // size * size) for part in parts})


def by_population(
    problem: Problem,
    settings: Settings,
    share: float,
    bounds: Mapping[str, tuple[float, float]],
    *,
    size: int,
    seed: int,
) -> MetaState:
    """The best of a population whose members together go through a share of a whole run.

    The first member has the given settings, and the others draw theirs within the bounds.
    """
    workload, key = problem.workload, jax.random.key(seed)
    assert problem.pure_step is not None and problem.pure_loss is not None
    batch = workload.examples_per_step(settings)
    num_steps = int(share * workload.num_examples / batch / size)
    states = initial_population(begin(workload, settings).state, size, bounds, key)
    best, _ = train_population(
        states,
        problem.pure_step,
        lambda step: jax.tree.map(lambda x: x[0], workload.sample(settings, step * batch)),
        problem.pure_loss,
        bounds=bounds,
        steps=num_steps,
        ready_every=max(1, num_steps // 10),
        key=key,
    )
    return best


def by_hypergradient(problem: Problem, settings: Settings) -> MetaState:
    """A whole run whose rate is learned on the way (`self_tuned`), and nothing else."""
    workload = problem.workload
    state = begin(workload, settings).state
    optimizer = optax.chain(
        optax.clip_by_global_norm(float(settings["clip_norm"])),
        self_tuned(
            optax.scale_by_adam(),
            learning_rate=float(settings["outer_learning_rate"]),
            weight_decay=float(settings["weight_decay"]),
        ),
    )

    @jax.jit
    def step(params, opt_state, episode):
        grads = jax.grad(problem.loss_fn)(params, jax.tree.map(lambda x: x[0, 0], episode.support))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = state.meta_params["params"]
    opt_state = optimizer.init(params)
    for position in range(0, workload.num_examples, workload.examples_per_step(settings)):
        params, opt_state = step(params, opt_state, workload.sample(settings, position))
    return state._replace(meta_params={"params": params})
