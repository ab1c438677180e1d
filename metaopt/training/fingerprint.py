"""What decides a training: its config, and digests of its data, its start and its program.

A config does not say which data, model, loss, learner or estimator it is used with. What they
give does: the first tasks, the initial state, and the program that `jax` traces, in which all of
them are. A digest is the same in every process.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend
import numpy as np

from metaopt.training.host_leaves import is_key
from metaopt.types import MetaState


class Fingerprint(NamedTuple):
    """What decides the states of a training, and a record of how they are computed.

    Attributes:
      config: configs that must not change, as `metaopt.training.runs.as_json` gives them.
      arrays: digests (`of_arrays`) by name, compared on the same kind of device.
      programs: digests (`of_program`) by name, compared there under the same version of jax. A
        name that only one of two fingerprints has is not compared.
      execution: options that change how a state is computed and not what it is. Recorded alone.
    """

    config: Mapping[str, Any]
    arrays: Mapping[str, str] = {}
    programs: Mapping[str, str] = {}
    execution: Mapping[str, Any] = {}


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
    arrays = {"start": of_arrays(state), "first tasks": of_arrays(batch)}
    programs = {}
    if hasattr(step_fn, "lower"):
        sharding = getattr(state.step, "sharding", None)
        number = len(sharding.device_set) if sharding else 1
        programs[f"step on {number} devices"] = of_program(step_fn, state, batch)
    return Fingerprint(config, arrays, programs)


def of_arrays(tree: Any) -> str:
    """The digest of the dtypes and bytes of arrays, in whatever shape; keys are arrays too.

    Arrays of which other processes hold parts are left out.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            if is_key(leaf):
                digest.update(str(jax.random.key_impl(leaf)).encode())
                leaf = jax.random.key_data(leaf)
            if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
                continue
            leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
        array = np.asarray(leaf)
        digest.update(str(array.dtype).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def of_program(function: Callable, *args: Any) -> str:
    """The digest of what a function computes, as jax traces it, with the constants in it."""
    program = jax.make_jaxpr(function)(*args)
    text = re.sub(r"\bname=\S+|0x[0-9a-f]+", "", str(program))
    constants = of_arrays(list(_constants(program)))
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
