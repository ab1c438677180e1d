"""Devices: the only file that names them.

The state has no device axis: it is placed once, replicated, and `jax.pmap` takes it
with ``in_axes=None``; episodes get a leading device axis. The step is a function of
one device that ends in a `pmean`; forgetting that is silent under pmap.
"""

import functools
import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaopt.console import log
from metaopt.errors import UserError

AXIS = "devices"
Device = Any
"""A `jax.Device`, which jaxlib gives type checkers no stub of."""


def set_up_backend() -> None:
    """What a command does before JAX is first used: virtual CPU devices, compilation cache.

    On the CPU each core becomes a device: two cores as two devices took
    0.58 of the time of one device with two threads for a meta-step of a small model.
    Settings that are there already (``XLA_FLAGS``, ``JAX_NUM_CPU_DEVICES``,
    ``JAX_COMPILATION_CACHE_DIR``) are left as they are.
    """
    counted = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not counted and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "metaopt" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _write_damaged_entries_again()


def _write_damaged_entries_again() -> None:
    """Removes an entry of the compilation cache that cannot be read, so that it is written again.

    By itself jax warns of it in every run and keeps it. There is no public way to it: another
    version of jax may still warn.
    """
    try:
        from jax._src import compilation_cache

        read = compilation_cache.get_executable_and_time
    except (ImportError, AttributeError):
        return
    if hasattr(read, "__wrapped__"):  # by an earlier call
        return

    @functools.wraps(read)
    def read_or_remove(cache_key, *args, **options):
        try:
            return read(cache_key, *args, **options)
        except Exception as error:  # damaged bytes may make XLA raise anything
            folder = Path(jax.config.values["jax_compilation_cache_dir"])
            for path in folder.glob(f"{glob.escape(cache_key)}-*"):
                path.unlink()
            reason = str(error).partition("\n")[0]
            log(f"note: a damaged entry of the cache in {folder} is made again ({reason})")
            return None, None

    compilation_cache.get_executable_and_time = read_or_remove


def default_devices(num_devices: int = 0) -> list[Device]:
    """The first ``num_devices`` devices, or all of them for 0.

    Raises:
      UserError: there are fewer.
    """
    devices = jax.devices()
    if num_devices > len(devices) or num_devices < 0:
        raise UserError(
            f"{num_devices} devices were asked for and {len(devices)} are here; "
            "num_devices=0 takes all of them"
        )
    return devices[: num_devices or len(devices)]


def check_divides(num_tasks: int, num_devices: int) -> None:
    """Raises UserError where a meta-batch does not divide by the devices."""
    below = num_tasks - num_tasks % num_devices
    if below < num_tasks:
        choices = f"{below} or {below + num_devices}" if below else f"{num_devices}"
        raise UserError(
            f"a meta-batch of {num_tasks} tasks does not divide by {num_devices} devices; "
            f"use {choices} tasks, or fewer devices"
        )


def replicate(tree: Any, devices: Sequence[Device]) -> Any:
    """Places a pytree whole on every device; unplaced, a second step would compile again."""
    mesh = Mesh(np.array(devices), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_over_devices(tree: Any, num_devices: int) -> Any:
    """Reshapes leaves ``[N·T, ...]`` to ``[N, T, ...]``.

    Raises:
      UserError: the leading axis does not divide by N.
    """

    def split(x):
        check_divides(x.shape[0], num_devices)
        return x.reshape(num_devices, x.shape[0] // num_devices, *x.shape[1:])

    return jax.tree.map(split, tree)


def parallel_step(step: Callable, devices: Sequence[Device], shared: Any = None) -> Callable:
    """``(state, episodes [N, T, ...]) -> (state, metrics)`` over the devices.

    On several CPU devices it returns when the step is done. A collective there needs a thread of
    the client for each device, and there are as many threads as cores. Each device also lets only
    32 computations be in flight, and a launch that waits for one of them to end holds such a
    thread. Steps that are dispatched ahead, or the copy of a state leaf by leaf behind them,
    can so take the thread that the second half of a collective needs: a deadlock. With no step
    in flight there is none. It costs the time of one dispatch, 0.8 ms for a state of 53 leaves.

    Args:
      step: a step of one device that averages over the axis `AXIS`.
      devices: where it runs.
      shared: arrays that the step is given as a third argument, the same in every call: as
        constants of the program they would be in memory twice more.

    Returns:
      The compiled step. It donates its state: the one passed in is gone afterwards.
    """
    compiled = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0) if shared is None else (None, 0, None),
        out_axes=(None, None),
        donate_argnums=(0,),
        devices=devices,
    )
    if shared is not None:
        compiled = _with(compiled, replicate(shared, devices))
    if len(devices) == 1 or devices[0].platform != "cpu":
        return compiled

    @functools.wraps(compiled)
    def finished(state, episodes):
        out = compiled(state, episodes)
        jax.block_until_ready(jax.tree.leaves(out)[-1:])  # all that a program gives is done at once
        return out

    finished.lower = compiled.lower  # type: ignore[attr-defined]
    return finished


def _with(step: Callable, shared: Any) -> Callable:
    @functools.wraps(step)
    def given(state, episodes):
        return step(state, episodes, shared)

    return given


def single_step(step: Callable, shared: Any = None) -> Callable:
    """`parallel_step` on one device, of a step that averages over no axis: `jax.jit` alone.

    A jit costs a quarter of the dispatch of a pmap, and rounds as the step by itself does.
    """

    def on_first(state, episodes, *shared):
        return step(state, jax.tree.map(lambda x: x[0], episodes), *shared)

    compiled = jax.jit(on_first, donate_argnums=0)
    return compiled if shared is None else _with(compiled, shared)


def parallel_members(
    function: Callable, devices: Sequence[Device], *, donate: bool = False
) -> Callable:
    """``(members [N, M, ...], shared) -> [N, M, ...]``: M members on each device, by vmap.

    Args:
      function: ``(member, shared) -> out``, of one member.
      devices: N of them; what comes out stays on them.
      donate: whether the members passed in are used up.
    """
    return jax.pmap(
        jax.vmap(function, in_axes=(0, None)),
        in_axes=(0, None),
        donate_argnums=(0,) if donate else (),
        devices=devices,
    )


def parallel_map(function: Callable, devices: Sequence[Device], most: int = 0) -> Callable:
    """Maps ``function(shared, tasks [T, ...]) -> [T, ...]`` over ``[N·T, ...]`` tasks.

    Tasks that do not fill the devices are padded with copies of the first, whose
    results are dropped. What comes out is on the host.

    Args:
      function: of one device.
      devices: N of them.
      most: the largest T of one call, so that one program serves all larger numbers of tasks; 0
        for any.
    """
    mapped = jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=devices)
    num_devices = len(devices)

    def apply(shared, tasks):
        tasks = jax.device_get(tasks)
        num_tasks = jax.tree.leaves(tasks)[0].shape[0]
        each = -(-num_tasks // num_devices)
        size = num_devices * (min(each, most) if most else each)
        padding = -num_tasks % size
        padded = jax.tree.map(
            lambda x: np.concatenate([x, np.repeat(x[:1], padding, axis=0)]), tasks
        )
        # Replicated whatever it was: the same values placed in another way compile again.
        shared = replicate(shared, devices)
        calls = []
        for start in range(0, num_tasks, size):
            part = jax.tree.map(lambda x, i=start: x[i : i + size], padded)
            calls.append(mapped(shared, split_over_devices(part, num_devices)))
        outs = jax.device_get(calls)

        def join(*parts):
            return np.concatenate([x.reshape(-1, *x.shape[2:]) for x in parts])[:num_tasks]

        return jax.tree.map(join, *outs)

    return apply
