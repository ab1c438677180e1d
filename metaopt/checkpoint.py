"""Checkpoints of a meta-training run, by orbax: the state, the key and the data position.

A checkpoint holds every leaf of the `MetaState` as a NumPy array under its path, so it
does not depend on the devices that made it, and one small JSON object: the fingerprint
of the config, the shapes, a checksum and the caller's notes. Orbax writes it in the
background and under a temporary name until it is whole; older ones go only after that.
"""

import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from metaopt.errors import UserError
from metaopt.progress import say
from metaopt.runs import as_json, differences, versions
from metaopt.types import MetaState

Example = MetaState | Callable[[dict[str, Any]], MetaState]
"""A state with the structure and placement to restore to, or ``notes -> state``."""


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      state: the state, each leaf placed as the one of the example is.
      notes: the JSON object that was saved beside it.
      valid_loss: the validation loss it was saved with; infinite where there was none.
    """

    state: MetaState
    notes: dict[str, Any]
    valid_loss: float


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best by validation loss.

    A context manager; leaving it waits for what is being written. Every process of a
    multi-process run makes the same calls, and only the first one writes.
    """

    def __init__(self, directory: Path | str, *, fingerprint: dict[str, Any], keep_last: int = 3):
        """Open, or create, the checkpoints in ``directory``.

        Args:
          directory: where they are.
          fingerprint: what must not change between saving and restoring: the config.
          keep_last: how many of the newest are kept, at least one, beside the best.
        """
        self._directory = Path(directory).absolute()
        self._fingerprint = as_json(fingerprint)
        self._preservation = _LatestAndBest(keep_last)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preservation, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._preservation.valid_losses = {
            step: self._valid_loss(step) for step in self._manager.all_steps()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: MetaState, *, valid_loss: float = math.inf, notes: dict[str, Any] | None = None
    ) -> None:
        """Start to save a state; it is copied at once, so it may be donated afterwards.

        A step that is there already is left as it is.

        Args:
          state: the whole state, on any devices, the same in every process.
          valid_loss: what the best is chosen by, lower is better.
          notes: JSON object given back on restoring.

        Raises:
          FloatingPointError: a meta-parameter is not finite; nothing is written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        leaves = _host_leaves(state)
        _check_finite(leaves)
        valid_loss = valid_loss if math.isfinite(valid_loss) else math.inf
        host = {
            "fingerprint": self._fingerprint,
            "versions": versions(),
            "leaves": _leaf_types(state),
            "key_impl": str(jax.random.key_impl(state.key)),
            "crc32": _crc32(leaves),
            "valid_loss": valid_loss,
            "notes": notes or {},
        }
        self._preservation.valid_losses[step] = valid_loss
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves), host=ocp.args.JsonSave(host)
            ),
            force=True,
        )

    def wait(self) -> None:
        """Wait until everything is written, and raise what went wrong with it."""
        self._manager.wait_until_finished()

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run went back to before them."""
        self.wait()
        for later in [saved for saved in self.steps if saved > step]:
            self._manager.delete(later)

    def restore_latest(self, example: Example) -> Restored | None:
        """The newest checkpoint that can be read; None where there is no checkpoint.

        A damaged one is renamed ``damaged-<step>-<time>``, with a warning, and the one
        before is taken. The example gives structure, shapes, dtypes and shardings; its leaves
        may be `jax.ShapeDtypeStruct`. A state whose structure depends on what was noted
        is given as a function of the notes.

        Raises:
          UserError: the checkpoint is of another config (the fields are named), of a
            state with other leaves (the first is named), or none can be read.
        """
        return self._restore(self.steps[::-1], example)

    def restore_best(self, example: Example) -> Restored | None:
        """The checkpoint of the lowest validation loss; None where none was evaluated.

        Damage and errors are treated as in `restore_latest`.
        """
        losses = self._preservation.valid_losses
        evaluated = [step for step in self.steps if math.isfinite(losses[step])]
        return self._restore(sorted(evaluated, key=lambda step: losses[step]), example)

    def _restore(self, steps: Sequence[int], example: Example) -> Restored | None:
        """The first of ``steps`` that can be read."""
        damaged = []
        for step in steps:
            try:
                restored = self._read(step, example)
            except _Damaged as error:
                say(f"warning: the checkpoint of step {step} is damaged ({error}); trying another")
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self._directory} can be read (steps {damaged}); "
                "put back a good copy, or move the directory away to start again"
            )
        return None

    def _read(self, step: int, example: Example) -> Restored:
        host = self._load(step, "host", ocp.args.JsonRestore())
        self._check_config(host)
        example = example(host["notes"]) if callable(example) else example
        self._check_leaves(host, example)
        leaves = self._load(step, "state", ocp.args.StandardRestore())
        if _crc32(leaves) != host["crc32"]:
            raise _Damaged("its checksum does not match")
        state = _place(leaves, example, host["key_impl"])
        return Restored(state, host["notes"], host["valid_loss"])

    def _load(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> dict[str, Any]:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise _Damaged(f"{type(error).__name__}: {reason}") from error

    def _check_config(self, host: dict[str, Any]) -> None:
        config = differences(host["fingerprint"], self._fingerprint)
        if config:
            raise UserError(
                f"the checkpoints in {self._directory} were made with another config ({config}); "
                "go back to it, or give a new directory"
            )

    def _check_leaves(self, host: dict[str, Any], example: MetaState) -> None:
        saved, wanted = host["leaves"], _leaf_types(example)
        for path in wanted | saved:
            before, now = saved.get(path, "absent"), wanted.get(path, "absent")
            if before != now:
                raise UserError(
                    f"the checkpoints in {self._directory} hold another state: {path} is {before} "
                    f"there and {now} here; use the model and learner that made it"
                )

    def _valid_loss(self, step: int) -> float:
        try:
            return self._load(step, "host", ocp.args.JsonRestore())["valid_loss"]
        except (_Damaged, KeyError):
            return math.inf

    def _set_aside(self, damaged: Sequence[int]) -> None:
        """Rename damaged checkpoints, so that their steps can be saved again."""
        if not damaged:
            return
        multihost_utils.sync_global_devices("every process has found the damage")
        for step in damaged if jax.process_index() == 0 else ():
            aside = self._directory / f"damaged-{step}-{time.time_ns()}"
            os.rename(self._directory / str(step), aside)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()


class _Damaged(Exception):
    """A checkpoint that cannot be read."""


class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest ``keep_last`` and the one of the lowest validation loss."""

    def __init__(self, keep_last: int):
        self.keep_last = keep_last
        self.valid_losses: dict[int, float] = {}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-self.keep_last :])
        evaluated = [step for step in steps if math.isfinite(self.valid_losses[step])]
        if evaluated:
            kept.add(min(evaluated, key=lambda step: self.valid_losses[step]))
        return [step in kept for step in steps]


def _flat(state: MetaState) -> dict[str, Any]:
    """Path to leaf; a path reads like ``.meta_params['params']['head']``."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _leaf_types(state: MetaState) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _flat(state).items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _host_leaves(state: MetaState) -> dict[str, np.ndarray]:
    """Path to a copy; leaves of size zero, which storage refuses, are left out."""
    return {
        path: np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for path, leaf in _flat(state).items()
        if leaf.size
    }


def _place(leaves: dict[str, np.ndarray], example: MetaState, key_impl: str) -> MetaState:
    """Leaves by path to a state, placed like the example."""

    def place(path, like):
        value = leaves.get(jax.tree_util.keystr(path))
        if value is None:
            value = np.zeros(like.shape, like.dtype)
        placed = jax.device_put(value, getattr(like, "sharding", None))
        # Keys are wrapped once in place: they cannot be sent to devices of other processes.
        return jax.random.wrap_key_data(placed, impl=key_impl) if _is_key(like) else placed

    return jax.tree_util.tree_map_with_path(place, example)


def _check_finite(leaves: dict[str, np.ndarray]) -> None:
    for path, leaf in leaves.items():
        floating = path.startswith(".meta_params") and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if floating and not np.isfinite(leaf).all():
            raise FloatingPointError(f"{path} is not finite")


def _crc32(leaves: dict[str, np.ndarray]) -> int:
    """Checksum of the values: storage notices a missing byte but not a changed one."""
    crc = 0
    for path in sorted(leaves):
        crc = zlib.crc32(np.ascontiguousarray(leaves[path]).reshape(-1).view(np.uint8).data, crc)
    return crc
