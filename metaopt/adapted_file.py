"""A file of adapted parameters: an npz of arrays, and a line that says whose they are."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.files import local_path, write_bytes
from metaopt.npz import Form, read_npz
from metaopt.types import Params

_ABOUT = "about"


def save_adapted(path: Path | str, params: Params, about: dict[str, Any]) -> None:
    """Writes parameters with what they belong to.

    Raises:
      UserError: the file is there already, or cannot be written.
    """
    path = local_path(path)
    if path.exists():
        raise UserError(f"{path} is there already: give another name, or move it away")
    arrays = {name: _native(np.asarray(leaf)) for name, leaf in _leaves(params).items()}
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **{_ABOUT: json.dumps(about), **arrays})
    write_bytes(path, packed.getvalue())


def read_about(path: Path | str) -> dict[str, Any]:
    """What the parameters of a file belong to; empty if the file says nothing that is understood.

    Raises:
      UserError: it is no such file or a damaged one.
    """
    try:
        about = json.loads(str(read_npz(local_path(path), {_ABOUT: Form(np.str_, ())})[_ABOUT]))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def read_adapted(path: Path | str, example: Params) -> Params:
    """The parameters of a file.

    Args:
      path: of the file.
      example: arrays, or their shapes, of what it must hold.

    Raises:
      UserError: it is no such file or a damaged one, or holds something else.
    """
    leaves = _leaves(example)
    forms = {name: Form(_native_dtype(x.dtype), tuple(x.shape)) for name, x in leaves.items()}
    found = read_npz(local_path(path), forms)
    arrays = [jnp.asarray(found[name], like.dtype) for name, like in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(example), arrays)


def _leaves(params: Params) -> dict[str, Any]:
    return {jax.tree_util.keystr(k): leaf for k, leaf in jax.tree.leaves_with_path(params)}


def _native_dtype(dtype: Any) -> np.dtype:
    """A dtype that npz files have: float32 for bfloat16."""
    return np.dtype(np.float32) if np.dtype(dtype).kind == "V" else np.dtype(dtype)


def _native(array: np.ndarray) -> np.ndarray:
    return array.astype(_native_dtype(array.dtype))
