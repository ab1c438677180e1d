"""A search: races from one ground, for as long as something is proposed and can be afforded."""

from collections.abc import Callable, Iterator, Sequence

from metaopt.self_improvement.budget import TrialConfig, affordable
from metaopt.self_improvement.trials import Decision, Ground, Proposer, decide, stand
from metaopt.self_improvement.workload import LeftOut, Snapshot, Workload


def races(
    workload: Workload,
    snapshot: Snapshot,
    proposer: Proposer,
    config: TrialConfig,
    share: float,
    phase: int,
    decisions: Sequence[Decision],
    *,
    skip: Callable[[], LeftOut],
    check: Callable[[], None],
) -> Iterator[tuple[Ground, Decision]]:
    """Where a search stands after each of its races, and what was decided.

    Args:
      workload: the training.
      snapshot: where all trials start; its arrays stay as they are.
      proposer: names what to try.
      config: how it is tried.
      share: of the run that trials may cost which are not gone on with.
      phase: of the search.
      decisions: all of the run; each that is given is to be added to them before the next.
      skip: the stretches of the data that are left out by now.
      check: as for `decide`.

    Raises:
      FloatingPointError: the held-out loss of the snapshot is not finite.
    """
    ground: Ground | None = None
    while True:
        now = ground.snapshot if ground else snapshot
        last = _last(decisions, now, phase)
        spent = sum(decision.trial_examples for decision in decisions if decision.phase == phase)
        changes, size = affordable(
            workload,
            now,
            proposer(now, decisions, phase),
            config,
            share * workload.num_examples - spent,
            size=last.size if last else 0,
        )
        if not changes:
            return
        ground = ground or stand(workload, snapshot)
        ground, decision = decide(
            workload, ground, changes, config, phase, size=size, last=last, skip=skip(), check=check
        )
        yield ground, decision


def _last(decisions: Sequence[Decision], now: Snapshot, phase: int) -> Decision | None:
    """The decision before, if it was of the same search."""
    if not decisions or decisions[-1].verdict == "rolled back":
        return None
    same = decisions[-1].phase == phase and decisions[-1].examples == now.examples
    return decisions[-1] if same else None


def is_closed(decisions: Sequence[Decision], now: Snapshot, phase: int) -> bool:
    """Whether the run has gone on from the search of this phase."""
    return any(
        decision.phase == phase
        and decision.verdict != "rolled back"
        and decision.examples < now.examples
        for decision in decisions
    )
