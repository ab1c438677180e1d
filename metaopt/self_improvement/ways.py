"""The quickest way to compute a step, found on the step itself and decided like any change."""

import time

from metaopt.self_improvement.search import tune_resources
from metaopt.self_improvement.trials import Decision, differences
from metaopt.self_improvement.workload import Settings, Snapshot, Workload, changed


def quickest_way(
    workload: Workload, snapshot: Snapshot, *, seconds_budget: float, memory_budget: float
) -> tuple[Snapshot, Decision]:
    """The snapshot with the quickest of the workload's ``execution_options``, and the decision.

    Steps are timed on one batch again and again (`tune_resources`), and what they give is
    thrown away, so this costs seconds and no examples.

    Args:
      workload: with ``execution_options``.
      snapshot: where it stands; its arrays stay as they are.
      seconds_budget, memory_budget: as for `tune_resources`.

    Raises:
      UserError: not even the start can be run within the memory, nor anything else.
    """
    began = time.perf_counter()

    def build(values: Settings):
        settings = {**snapshot.settings, **values}
        batch = workload.sample(settings, snapshot.examples)
        return workload.step(settings), (snapshot.state, batch)

    found = tune_resources(
        build,
        workload.execution_options,
        {name: snapshot.settings[name] for name in workload.execution_options},
        memory_budget=memory_budget,
        seconds_budget=seconds_budget,
    )
    after = changed(workload, snapshot, found.settings)
    changes = differences(snapshot.settings, after.settings)
    chosen = ", ".join(f"{name} {old} to {new}" for name, (old, new) in changes.items())
    return after, Decision(
        step=int(snapshot.state.step),
        examples=snapshot.examples,
        phase=-1,
        verdict="accepted" if changes else "kept",
        changes=changes,
        reason=f"steps are quicker: {chosen}" if changes else "no way to compute a step is quicker",
        evidence=found.evidence,
        trial_examples=0,
        seconds=time.perf_counter() - began,
    )
