"""What decides a training beyond its config: digests of its start, its first tasks and its step.

A config does not say which data, model, loss, learner or estimator it is used with. What they
come to does: the state at step 0, the tasks of the first step, and the program that `jax`
traces of the step, in which all of them are. A digest is the same in every process.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import numpy as np

from metaopt.types import Episode, MetaState


def of_training(step_fn: Callable, state: MetaState, episodes: Episode) -> dict[str, str]:
    """Digests by name: ``start``, ``first tasks`` and, of a compiled function, ``step``.

    Data that the first step does not see are not in them. The first two do not depend on the
    number of devices. The step is traced, as its first call would, and traced only once.

    Args:
      step_fn: ``(state, episodes) -> (state, metrics)``.
      state: at step 0. It is not donated.
      episodes: of step 0.
    """
    found = {"start": of_arrays(state), "first tasks": of_arrays(episodes)}
    if hasattr(step_fn, "lower"):  # another one might do anything when it is called
        found["step"] = of_program(step_fn, state, episodes)
    return found


def of_arrays(tree: Any) -> str:
    """The digest of the dtypes and bytes of arrays, in whatever shape; keys are arrays too.

    Arrays of which other processes hold parts are left out.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
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
