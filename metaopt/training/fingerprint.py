"""What decides a training: its config, and digests of its data, its start and its program.

A config does not say which data, model, loss, learner or estimator it is used with. What they
give does: the first tasks, the initial state, and the program that `jax` traces, in which all of
them are. A digest is the same in every process.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.pytrees import digest_of
from metaopt.training.runs import differences
from metaopt.types import MetaState


class Fingerprint(NamedTuple):
    """What decides the states of a training, and a record of how they are computed.

    Attributes:
      config: configs that must not change, as `metaopt.training.runs.as_json` gives them.
      arrays: digests (`digest_of`) by name, compared on the same kind of device.
      programs: digests (`of_program`) by name, compared there under the same version of jax. A
        name that only one of two fingerprints has is not compared.
      execution: options that change how a state is computed and not what it is. Recorded alone.
    """

    config: Mapping[str, Any]
    arrays: Mapping[str, str] = {}
    programs: Mapping[str, str] = {}
    execution: Mapping[str, Any] = {}


class Origin(NamedTuple):
    """A fingerprint, and what its digests were computed with.

    Attributes:
      fingerprint: the fingerprint.
      jax: version of jax.
      devices: ``platform``, ``machine`` and ``num_devices``; None for mere shapes, of which
        nothing but the config is compared.
    """

    fingerprint: Fingerprint
    jax: str
    devices: Mapping[str, Any] | None


def check_config(saved: Fingerprint, now: Fingerprint, directory: Path) -> None:
    """Raises UserError, with the fields, if the config of a directory is another one."""
    if changed := differences(saved.config, now.config):
        raise UserError(
            f"the checkpoints in {directory} were made with another config ({changed}); "
            "go back to it, or give a new directory"
        )


def check_training(saved: Origin, now: Origin, directory: Path) -> None:
    """Refuses a directory of another training, and logs what could not be compared.

    Random numbers differ between kinds of device, and programs between versions of jax too.

    Raises:
      UserError: an array or a program differs, with the names of those that do.
    """
    if saved.devices is None or now.devices is None:
        return
    changed, (before, after) = [], (saved.fingerprint, now.fingerprint)
    if all(saved.devices[name] == now.devices[name] for name in ("platform", "machine")):
        names = dict(before.arrays) | dict(after.arrays)
        changed += [name for name in names if before.arrays.get(name) != after.arrays.get(name)]
        common = before.programs.keys() & after.programs.keys() if saved.jax == now.jax else ()
        changed += sorted(n for n in common if before.programs[n] != after.programs[n])
    if changed:
        raise UserError(
            f"the checkpoints in {directory} are of another training, of other "
            f"data, model, loss or learner (what differs: {', '.join(changed)}); go back "
            "to it, or give a new directory"
        )
    if saved.jax != now.jax:
        log(
            f"note: {directory.name} was trained under jax {saved.jax}, and this is {now.jax}: "
            "whether the loss, the learner and the estimator are the same is not checked"
        )
    if saved.devices != now.devices:
        log(
            f"note: {directory.name} was trained on {_number(saved.devices)} and resumes on "
            f"{_number(now.devices)}: sums differ in the last digits"
        )


def _number(devices: Mapping[str, Any]) -> str:
    """``'1 cpu device'``."""
    number = devices["num_devices"]
    return f"{number} {devices['platform']} device{'s' if number > 1 else ''}"


def of_step(
    config: Mapping[str, Any], step_fn: Callable, state: MetaState, batch: Any
) -> Fingerprint:
    """The fingerprint of a training of which only the compiled step is known.

    The program of the step is left out if it was not compiled: another function might do anything
    when it is called. It is traced, as its first call would, and traced only once.

    Args:
      config: configs that must not change.
      step_fn: ``(state, batch) -> (state, metrics)``.
      state: initial state. It is not donated.
      batch: first batch.
    """
    arrays = {"start": digest_of(state), "first tasks": digest_of(batch)}
    programs = {}
    if hasattr(step_fn, "lower"):
        sharding = getattr(state.step, "sharding", None)
        number = len(sharding.device_set) if sharding else 1
        programs[f"step on {number} devices"] = of_program(step_fn, state, batch)
    return Fingerprint(config, arrays, programs)


def of_program(function: Callable, *args: Any) -> str:
    """The digest of what a function computes, as jax traces it, with the constants in it."""
    program = jax.make_jaxpr(function)(*args)
    text = re.sub(r"\bname=\S+|0x[0-9a-f]+", "", str(program))
    constants = digest_of(list(_constants(program)))
    return hashlib.sha256((text + constants).encode()).hexdigest()


def _constants(program: Any) -> Iterator[Any]:
    """The arrays that a program and the programs within it hold, in order."""
    if isinstance(program, jax.extend.core.ClosedJaxpr):
        yield from program.consts
        program = program.jaxpr
    if isinstance(program, jax.extend.core.Jaxpr):
        for equation in program.eqns:
            for value in equation.params.values():
                yield from _constants(value)
    elif isinstance(program, tuple | list):
        for part in program:
            yield from _constants(part)
