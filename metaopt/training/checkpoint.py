"""Checkpoints of a meta-training run, by orbax: the state, the key and the data position.

A checkpoint holds every leaf of the `MetaState` as a NumPy array under its path, so it
does not depend on the devices that made it, and one small JSON object, the record: the
fingerprint of the training, the shapes and the caller's notes. Orbax writes it in the
background and under a temporary name until it is whole, with a manifest of its files, so that
no damage passes unseen; older ones are deleted only after that.
"""

import contextlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.training.fingerprint import Fingerprint, Origin, check_config, check_training
from metaopt.training.host_leaves import check_finite, devices_of, leaf_types, place, to_host
from metaopt.training.manifest import what_is_damaged, write_manifest
from metaopt.training.runs import as_json, versions
from metaopt.types import MetaState

Example = MetaState | Callable[[dict[str, Any]], MetaState]
"""A state with the structure and placement to restore to, or ``notes -> state``."""


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      state: the state, each leaf placed as the one of the example is.
      notes: the JSON object that was saved beside it.
      valid_loss: validation loss it was saved with; infinite without one.
    """

    state: MetaState
    notes: dict[str, Any]
    valid_loss: float


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best by validation loss.

    A context manager; leaving it waits for what is being written. Every process of a
    multi-process run makes the same calls, and only the first one writes.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        fingerprint: Fingerprint,
        keep_last: int = 3,
        read_only: bool = False,
    ):
        """Open, or create, the checkpoints in ``directory``.

        Args:
          directory: where they are.
          fingerprint: what must not change between saving and restoring.
          keep_last: number of the newest that are kept, at least one, beside the best.
          read_only: nothing is created or changed; only `best_leaves` may be called.

        Raises:
          UserError: the directory cannot be made or written to.
        """
        self._directory = Path(directory).absolute()
        self._fingerprint = Fingerprint(*map(as_json, fingerprint))
        self._preservation = _LatestAndBest(keep_last)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preservation,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        with self._one_line("opened"):
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._preservation.valid_losses = {
            step: self._valid_loss(step) for step in self._manager.all_steps()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type, *_) -> None:
        with contextlib.suppress(Exception) if error_type else self._one_line("written"):
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
        leaves = to_host(state)
        check_finite(leaves)
        valid_loss = valid_loss if math.isfinite(valid_loss) else math.inf
        host = {
            "fingerprint": self._fingerprint._asdict(),
            "versions": versions(),
            "devices": devices_of(state),
            "leaves": leaf_types(state),
            "key_impl": str(jax.random.key_impl(state.key)),
            "valid_loss": valid_loss,
            "notes": notes or {},
        }
        self._preservation.valid_losses[step] = valid_loss
        with self._one_line("written"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(leaves), host=ocp.args.JsonSave(host)
                ),
                force=True,
            )

    def _seal(self) -> None:
        """Adds the manifest, when all files are there and before the checkpoint has its name."""
        for unnamed in self._directory.glob("*.orbax-checkpoint-tmp"):
            write_manifest(unnamed, ("host", "state"))

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
          UserError: it cannot be written, for want of space say. The checkpoints before are
            as they were.
        """
        with self._one_line("written"):
            self._manager.wait_until_finished()

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run went back to before them."""
        self.wait()
        for later in [saved for saved in self.steps if saved > step]:
            self._manager.delete(later)

    def restore_latest(self, example: Example) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none.

        A damaged one is renamed ``damaged-<step>-<time>`` and the one before is taken, which
        is said in a line. The example gives structure, shapes, dtypes and shardings; its leaves
        may be `jax.ShapeDtypeStruct`. A state whose structure depends on what was noted
        is given as a function of the notes. Another number of devices is said in a line too.

        Raises:
          UserError: the checkpoint is of another config (the fields are named) or of another
            training (what differs is named), of a state with other leaves (the first is named),
            or none can be read.
        """
        return self._restore(self.steps[::-1], example)

    def restore_best(self, example: Example) -> Restored | None:
        """The checkpoint of the lowest validation loss; None where none was evaluated.

        Damage and errors are treated as in `restore_latest`.
        """
        losses = self._preservation.valid_losses
        evaluated = [step for step in self.steps if math.isfinite(losses[step])]
        # One whose record is damaged may have been the best: it is not passed over in silence.
        damaged = [step for step in self.steps if math.isnan(losses[step])] if evaluated else []
        return self._restore(damaged + sorted(evaluated, key=lambda step: losses[step]), example)

    def best_leaves(self) -> dict[str, np.ndarray]:
        """The best checkpoint, or the newest if none was evaluated: path to value of each leaf.

        A path reads like ``.meta_params['params']['head']``. Nothing is compared with the
        fingerprint.

        Raises:
          UserError: there is no checkpoint, or it is damaged.
        """
        losses = self._preservation.valid_losses
        evaluated = [step for step in self.steps if not math.isinf(losses[step])]
        candidates = sorted(evaluated, key=lambda step: losses[step]) or self.steps[::-1]
        if not candidates:
            raise UserError(f"there is no checkpoint in {self._directory}")
        try:
            return self._load(candidates[0], "state", ocp.args.StandardRestore())
        except _Damaged as error:
            damage = _in_words({candidates[0]: str(error)})
            raise UserError(f"{damage} in {self._directory}: put back a good copy") from None

    def _restore(self, steps: Sequence[int], example: Example) -> Restored | None:
        """The first of ``steps`` that can be read."""
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                restored = self._read(step, example)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            if damaged:
                self._set_aside(damaged)
                log(
                    f"warning: {_in_words(damaged)} in {self._directory}; set aside as damaged-*, "
                    f"the checkpoint of step {step} is used"
                )
            return restored
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self._directory} can be read ({_in_words(damaged)}); "
                "put back a good copy, or move the directory away to start again"
            )
        return None

    def _read(self, step: int, example: Example) -> Restored:
        record = self._load(step, "host", ocp.args.JsonRestore())
        if missing := _RECORD - record.keys():
            raise _Damaged(f"its record lacks {min(missing)!r}")
        saved = Origin(
            Fingerprint(**record["fingerprint"]), record["versions"]["jax"], record["devices"]
        )
        check_config(saved.fingerprint, self._fingerprint, self._directory)
        example = example(record["notes"]) if callable(example) else example
        self._check_leaves(record, example)
        now = Origin(self._fingerprint, jax.__version__, devices_of(example))
        check_training(saved, now, self._directory)
        leaves = self._load(step, "state", ocp.args.StandardRestore())
        state = place(leaves, example, key_impl=record["key_impl"])
        return Restored(state, record["notes"], record["valid_loss"])

    def _load(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> dict[str, Any]:
        if damage := what_is_damaged(self._directory / str(step), item):
            raise _Damaged(damage)
        try:
            loaded = self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # damaged bytes may make storage raise anything
            reason = str(error).partition("\n")[0][:200]
            raise _Damaged(f"{item}: {type(error).__name__}: {reason}") from error
        if not isinstance(loaded, dict):
            raise _Damaged(f"{item}: no dict")
        return loaded

    def _check_leaves(self, record: dict[str, Any], example: MetaState) -> None:
        saved, wanted = record["leaves"], leaf_types(example)
        for path in wanted | saved:
            before, now = saved.get(path, "absent"), wanted.get(path, "absent")
            if before != now:
                raise UserError(
                    f"the checkpoints in {self._directory} hold another state: {path} is {before} "
                    f"there and {now} here; use the model and learner that made it"
                )

    def _valid_loss(self, step: int) -> float:
        """NaN where the record is damaged."""
        try:
            return float(self._load(step, "host", ocp.args.JsonRestore())["valid_loss"])
        except (_Damaged, KeyError, TypeError, ValueError):
            return math.nan

    def _set_aside(self, damaged: Iterable[int]) -> None:
        """Rename damaged checkpoints, so that their steps can be saved again."""
        multihost_utils.sync_global_devices("every process has found the damage")
        for step in damaged if jax.process_index() == 0 else ():
            aside = self._directory / f"damaged-{step}-{time.time_ns()}"
            os.rename(self._directory / str(step), aside)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        """What the file system refuses, of which storage makes a ValueError, as a `UserError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None)
            reason = os.strerror(number) if number else str(error).partition("\n")[0][:200]
            raise UserError(
                f"the checkpoints in {self._directory} cannot be {what} ({reason}); put that right "
                "and run again: it resumes from the last one that is whole"
            ) from error


def _keep_orbax_quiet() -> None:
    """Orbax raises an error, and logs it as well with its traceback, several times over.

    It also closes its event loop at the first one, at which every other array that is being
    read or written just then complains.
    """

    def is_not_of_orbax(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname

    def unraisable(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    logging.getLogger("absl").addFilter(is_not_of_orbax)
    before, sys.unraisablehook = sys.unraisablehook, unraisable


_keep_orbax_quiet()


_RECORD = {"fingerprint", "versions", "devices", "leaves", "key_impl", "valid_loss", "notes"}


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
        kept |= {step for step in steps if math.isnan(self.valid_losses[step])}  # for restore_best
        evaluated = [step for step in steps if math.isfinite(self.valid_losses[step])]
        if evaluated:
            kept.add(min(evaluated, key=lambda step: self.valid_losses[step]))
        return [step in kept for step in steps]


def _in_words(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"step {step} is damaged ({why})" for step, why in damaged.items())
