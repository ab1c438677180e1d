"""The closed loop: a training that watches itself, tries changes, and goes back where one hurts.

Between two decisions it trains as usual. A decision is a set of short trials (`trials`) of
what a proposer names (`proposers`); an alarm that the state is damaged brings the last
sound snapshot back. What was decided, and on which evidence, is in ``decisions.jsonl``; a
memory of past runs, where there is one, gives the start and is told the end.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from metaopt.errors import UserError
from metaopt.measure import count_flops
from metaopt.self_improvement.course import Course
from metaopt.self_improvement.journal import Journal, Ledger
from metaopt.self_improvement.kinship import RunRecord
from metaopt.self_improvement.loop_config import LoopConfig, Outcome
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.resources import peak_flops
from metaopt.self_improvement.trials import Proposer
from metaopt.self_improvement.workload import Settings, Snapshot, Workload, begin
from metaopt.signals import StopSignals
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint, of_step
from metaopt.training.loop import checkpoint_directory
from metaopt.training.runs import lock_directory

__all__ = ["Ledger", "LoopConfig", "Outcome", "record_of", "run"]


def run(
    workload: Workload,
    settings: Settings,
    *,
    directory: Path | str,
    config: LoopConfig | None = None,
    proposer: Proposer | None = None,
    memory: Memory | None = None,
    interventions: Sequence[tuple[int, Settings]] = (),
    fingerprint: Fingerprint | None = None,
    monitor: Mapping[str, Any] | None = None,
) -> Outcome:
    """Trains to the end, from the latest checkpoint if there is one, improving on the way.

    Writes to ``directory``: checkpoints in a folder of the workload's name; ``metrics.jsonl``
    with the assessments; ``monitor.jsonl``; and ``decisions.jsonl``. Ctrl-C or SIGTERM saves
    and leaves; the same call goes on.

    Args:
      workload: the training.
      settings: to start with; every setting that may be changed has a value.
      directory: of the run.
      config: when to do what; `LoopConfig` if not given.
      proposer: what names changes; `pattern_search` over all of the space if not given.
      memory: of past runs; it proposes the start, and is told the end.
      interventions: settings that are changed from outside while the run goes on, as
        ``(examples, settings)``: someone at the console, or a fault that is put in.
      fingerprint: what decides the states beside the settings; a checkpoint of another is refused.
        If not given, it is `of_step` of the first settings.
      monitor: further arguments of `Monitor`: ``read_memory``, and ``flops_per_step`` and
        ``peak_flops`` in place of those that `LoopConfig.count_flops` finds.

    Returns:
      `Outcome`.

    Raises:
      UserError: a setting is missing or out of bounds; the checkpoints are of another run;
        another process has the directory.
      Diverged: going back did not help.
      Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    config = config or LoopConfig()
    if jax.process_count() > 1:
        _check_agreement(workload, memory)
    first, interventions = begin(workload, settings), sorted(interventions, key=lambda e: e[0])
    if fingerprint is None:
        batch = workload.sample(settings, 0)
        fingerprint = of_step({}, workload.step(settings), first.state, batch)
    directory, path = Path(directory), checkpoint_directory(directory, workload.name)
    options = _per_example(monitor or {}, workload.examples_per_step(settings))
    with (
        lock_directory(directory),
        Checkpoints(path, fingerprint=fingerprint) as checkpoints,
        StopSignals() as stop,
    ):
        if config.count_flops and "flops_per_example" not in options:
            options = _counted(workload, first) | options
        identity = _identity(workload, settings, config, interventions)
        flops = options.get("flops_per_example")
        journal = Journal(workload, directory, checkpoints, identity, flops)
        loop = Course(workload, config, proposer, journal, stop, interventions)
        snapshot, new = loop.start(first, memory)
        with loop.watched(snapshot, directory, options):
            outcome = loop.run(snapshot)
    if memory is not None and new:
        memory.remember(record_of(workload, outcome))
    return outcome


def _check_agreement(workload: Workload, memory: Memory | None) -> None:
    """Raises UserError where several processes might decide differently, each by what it sees."""
    if memory is not None:
        raise UserError("several processes: ask the memory before, and give all one start")
    timed = [name for name, axis in workload.space.items() if axis.score != "loss"]
    if timed := sorted([*timed, *workload.ways]):
        raise UserError(
            f"several processes: {', '.join(timed)} would be chosen by the clock of each; "
            "find the values in one process, and leave them out of the space and the ways"
        )


def _identity(workload, settings, config, interventions) -> dict[str, Any]:
    """What decides the states."""
    loop = {name: value for name, value in vars(config).items() if name != "count_flops"}
    return {
        "task": dict(workload.task),
        "num_examples": workload.num_examples,
        "space": dict(workload.space),
        "settings": dict(settings),
        "loop": loop,
        "interventions": list(interventions),
    }


def _per_example(monitor: Mapping[str, Any], size: int) -> dict[str, Any]:
    options = dict(monitor)
    flops = options.pop("flops_per_step", None)
    return options if flops is None else options | {"flops_per_example": flops / size}


def _counted(workload: Workload, first: Snapshot) -> dict[str, float]:
    """The operations of an example and the peak of the devices; nothing where it is not known."""
    settings = first.settings
    batch = workload.sample(settings, 0)
    try:
        flops = count_flops(workload.step(settings), first.state, batch).total
    except Exception:  # a run is not lost for its statistics, whatever cannot be traced
        return {}
    size = workload.examples_per_step(settings)
    return {"peak_flops": peak_flops(), "flops_per_example": flops / size}


def record_of(workload: Workload, outcome: Outcome) -> RunRecord:
    """What is worth remembering of a run."""
    tokens = outcome.snapshot.examples * workload.tokens_per_example
    return RunRecord(
        name=workload.name,
        task=workload.task,
        settings=outcome.snapshot.settings,
        loss=outcome.curve[-1].loss.mean,
        tokens=tokens,
        seconds=outcome.ledger.seconds,
        curve=[(point.tokens, point.loss.mean) for point in outcome.curve],
        decisions=[d.as_json() for d in [*outcome.earlier, *outcome.decisions]],
    )
