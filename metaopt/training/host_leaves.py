"""The leaves of a `MetaState` on the host, by path, and the way back to devices."""

import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.pytrees import is_key
from metaopt.types import MetaState, PyTree


def _flat(state: MetaState) -> dict[str, Any]:
    """Path to leaf; a path reads like ``.meta_params['params']['head']``."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def leaf_types(state: MetaState) -> dict[str, str]:
    """Path to dtype and shape, such as ``'float32[2, 3]'`` or ``'key<fry>[]'``."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _flat(state).items()}


def to_host(state: MetaState) -> dict[str, np.ndarray]:
    """Path to a copy; leaves of size zero, which storage refuses, are left out."""
    return {
        path: np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        for path, leaf in _flat(state).items()
        if leaf.size
    }


def place(
    leaves: dict[str, np.ndarray], example: PyTree, prefix: str = "", key_impl: str | None = None
) -> PyTree:
    """Leaves by path, which begins with ``prefix``, to a tree like the example, placed like it.

    Raises:
      ValueError: a leaf is missing or of another shape.
    """

    def placed(path, like):
        path = f"{prefix}{jax.tree_util.keystr(path)}"
        value = leaves.get(path)
        if value is None and not like.size:
            value = np.zeros(like.shape, like.dtype)
        if value is None or (not is_key(like) and value.shape != like.shape):
            there = "missing" if value is None else f"of shape {list(value.shape)} there"
            raise ValueError(f"{path} is {there} and {list(like.shape)}")
        on_devices = jax.device_put(value, getattr(like, "sharding", None))
        # Keys are wrapped once in place: they cannot be sent to devices of other processes.
        return jax.random.wrap_key_data(on_devices, impl=key_impl) if is_key(like) else on_devices

    return jax.tree_util.tree_map_with_path(placed, example)


def check_finite(leaves: dict[str, np.ndarray]) -> None:
    """Raises FloatingPointError where a meta-parameter is NaN or infinite."""
    for path, leaf in leaves.items():
        floating = path.startswith(".meta_params") and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if floating and not np.isfinite(leaf).all():
            raise FloatingPointError(f"{path} is not finite")


def devices_of(state: MetaState) -> dict[str, Any] | None:
    """Platform, machine and number of devices that a state is on; None for mere shapes."""
    sharding = getattr(state.step, "sharding", None)
    if sharding is None:
        return None
    devices = sharding.device_set
    kind = {"platform": next(iter(devices)).platform, "machine": platform.machine()}
    return kind | {"num_devices": len(devices)}
