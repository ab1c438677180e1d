"""Where formats keep the tensors of a model, and the way from them to parameters and back.

A format names the same matrices differently, may keep them transposed, queries, keys and values
apart, and the features of rotary heads in another order. A `Layout` says which of it a format does;
`to_params` and `to_tensors` do the rest, for every format alike.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.models import TransformerConfig, transformer
from metaopt.pytrees import put
from metaopt.types import Params

DType = Literal["float32", "bfloat16"]


class Layout(NamedTuple):
    """How a format keeps the tensors of an architecture.

    Attributes:
      names: the name of each part without its ``.weight`` or ``.bias``, ``{}`` for the number of a
        layer. Parts have our names, but for queries, keys and values, ``q``, ``k`` and ``v``, where
        these are apart.
      transposed: matrices of layers are ``[out, in]``, and not ``[in, out]`` as here.
      neighbours: of queries and keys the features 2i and 2i + 1 are a rotary pair, and not i and
        i + F / 2 as here.
      passed_over: ends of the names of tensors that are no parameters, such as causal masks.
    """

    names: Mapping[str, str]
    transposed: bool = True
    neighbours: bool = False
    passed_over: tuple[str, ...] = ()


class Stored(NamedTuple):
    """A parameter as a format keeps it.

    Attributes:
      path: keys of our parameter.
      names: the tensors that it is made of, one, or three along its last axis.
      columns: how much of the last axis each takes.
      transposed: whether they are kept so.
      paired: whether the rotary pairs of each are to be sorted.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    columns: tuple[int, ...]
    transposed: bool
    paired: tuple[bool, ...]


def to_params(
    config: TransformerConfig,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: DType,
) -> Params:
    """The parameters of a model from the tensors of a file.

    Args:
      config: the model.
      layout: how the file keeps them.
      shapes: the shape of each tensor of the file, by name.
      read: ``name -> tensor``; each is read once, when it is its turn.
      dtype: of the parameters.

    Raises:
      UserError: a tensor is missing, too many, or of another shape than the config's.
    """
    expected = jax.eval_shape(transformer(config).init, jax.random.key(0))
    stored = list(_stored(config, layout, expected))
    wanted = {name for each in stored for name in each.names}
    extra = [n for n in shapes if n not in wanted and not n.endswith(layout.passed_over)]
    if missing := sorted(wanted - set(shapes)):
        raise UserError(f"{_several('tensor', missing)} missing: the file and its config differ")
    if extra:
        raise UserError(f"{_several('tensor', sorted(extra))} not known in this architecture")
    params: Params = {}
    for each in stored:
        shape = _leaf(expected, each.path).shape
        for name, columns in zip(each.names, each.columns, strict=True):
            part = (*shape[:-1], columns)
            if tuple(shapes[name]) != (kept := part[::-1] if each.transposed else part):
                raise UserError(
                    f"tensor {name} is {list(shapes[name])}, and the config asks for {list(kept)}"
                )
        put(params, each.path, jnp.asarray(_ours(config, each, read), dtype))
    return params


def to_tensors(config: TransformerConfig, layout: Layout, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a model by the names of a format, in the dtype of the parameters."""
    tensors = {}
    for each in _stored(config, layout, params):
        whole = np.asarray(_leaf(params, each.path))
        parts = np.split(whole, np.cumsum(each.columns)[:-1], axis=-1)
        for name, part, paired in zip(each.names, parts, each.paired, strict=True):
            part = to_neighbours(part, config.head_size) if paired else part
            tensors[name] = np.ascontiguousarray(part.T if each.transposed else part)
    return tensors


def from_neighbours(x: np.ndarray, head_size: int) -> np.ndarray:
    """Features of heads ``[..., H F]``: from pairs 2i, 2i + 1 to pairs i, i + F / 2."""
    apart = x.reshape(*x.shape[:-1], -1, head_size // 2, 2)
    return np.swapaxes(apart, -1, -2).reshape(x.shape)


def to_neighbours(x: np.ndarray, head_size: int) -> np.ndarray:
    """The inverse of `from_neighbours`."""
    apart = x.reshape(*x.shape[:-1], -1, 2, head_size // 2)
    return np.swapaxes(apart, -1, -2).reshape(x.shape)


def _ours(config: TransformerConfig, each: Stored, read: Callable[[str], np.ndarray]) -> np.ndarray:
    parts = []
    for name, paired in zip(each.names, each.paired, strict=True):
        part = read(name).T if each.transposed else read(name)
        parts.append(from_neighbours(part, config.head_size) if paired else part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _stored(config: TransformerConfig, layout: Layout, params: Params) -> Iterator[Stored]:
    """All parameters of a tree of arrays or shapes, in its order."""
    heads = (config.num_heads, config.kv_heads, config.kv_heads)
    for keys, leaf in jax.tree.leaves_with_path(params):
        path = tuple(str(key.key) for key in keys)
        *layer, part, field = path
        number = [int(name.removeprefix("layer_")) for name in layer]
        suffix = "bias" if field == "bias" else "weight"
        parts, columns, paired = (part,), (leaf.shape[-1],), (False,)
        if part == "qkv" and "q" in layout.names:
            parts, columns = ("q", "k", "v"), tuple(n * config.head_size for n in heads)
            paired = (layout.neighbours, layout.neighbours, False)
        names = tuple(f"{layout.names[p].format(*number)}.{suffix}" for p in parts)
        transposed = field == "kernel" and (layout.transposed or part == "head")
        yield Stored(path, names, columns, transposed, paired)


def _leaf(tree: Params, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def _several(what: str, names: list[str]) -> str:
    """``tensor a is``, ``tensors a, b, c and 4 more are``."""
    if len(names) == 1:
        return f"{what} {names[0]} is"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}s {', '.join(names[:3])}{more} are"
