"""What of a space is worth a trial: a scalar of the state that no update reads is not."""

import jax
from jax.interpreters import partial_eval

from metaopt.self_improvement.space import Space
from metaopt.self_improvement.workload import Snapshot, Workload
from metaopt.training.loop import StepFn
from metaopt.types import Episode, MetaState


def scalars_read(step_fn: StepFn, state: MetaState, episodes: Episode) -> frozenset[str]:
    """The names of ``state.hparams`` on which the next parameters or optimiser state depend.

    The step is traced and not run. What its metrics alone depend on is not read, and what it only
    hands on in ``state.hparams`` neither.

    Args:
      step_fn: of the state and the episodes.
      state: arrays, or `jax.ShapeDtypeStruct`s in their place.
      episodes: of one step.
    """
    closed, (after, metrics) = jax.make_jaxpr(step_fn, return_shape=True)(state, episodes)
    nothing = jax.tree.map(lambda _: False, (after, metrics))
    structure, read = jax.tree.structure((state, episodes)), frozenset()
    while True:
        kept = jax.tree.map(lambda _: True, after)._replace(
            # A scalar that is read decides, and so does what it becomes.
            hparams={name: name in read for name in after.hparams}
        )
        wanted = jax.tree.leaves((kept, nothing[1]))
        _, used = partial_eval.dce_jaxpr(closed.jaxpr, wanted)
        hparams = jax.tree.unflatten(structure, used)[0].hparams
        found = frozenset(name for name, is_used in hparams.items() if is_used)
        if found <= read:
            return found
        read |= found


def searched_space(workload: Workload, snapshot: Snapshot) -> Space:
    """The space without the scalars that the updates from here do not read.

    All of it, where the step cannot be traced.
    """
    scalars = workload.space.keys() & snapshot.state.hparams.keys()
    if not scalars:
        return workload.space
    settings = snapshot.settings
    batch = workload.sample(settings, snapshot.examples)
    try:
        read = scalars_read(workload.step(settings), snapshot.state, batch)
    except Exception:  # whatever cannot be traced: a run is not lost for what it need not try
        return workload.space
    return {k: axis for k, axis in workload.space.items() if k not in scalars or k in read}
