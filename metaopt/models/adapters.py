"""Which parameters of a transformer adapt: some of them, or few new ones laid beside them.

    model = adapting(config, AdapterConfig(kind="low_rank", blocks=6), params)

The others are frozen, see `metaopt.frozen`: shared by all tasks, and never differentiated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.frozen import is_prepared, merge
from metaopt.models.transformer import (
    SECOND_MLP,
    TransformerConfig,
    embed,
    read_out,
    run_layers,
    transformer,
)
from metaopt.pytrees import put
from metaopt.ranges import Checked, Layers, Range, Several
from metaopt.types import Array, Key, Model, Params

Matrix = Literal["qkv", "attention_out", "gate", "up", "mlp_out"]
MATRICES: tuple[Matrix, ...] = ("qkv", "attention_out", "gate", "up", "mlp_out")
MLP = ("gate", "up", "mlp_out")
NORMS = ("attention_norm", "mlp_norm", "final_norm")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked):
    """What of a transformer adapts.

    Attributes:
      kind: ``'all'``; the last ``'blocks'`` with the final norm; ``'norms'``, scales and biases of
        the norms, and the biases of the products; the ``'head'``, which a tied one is not; the
        matrices of the last ``'mlps'``; a ``'second_mlp'`` beside the MLP of each of the last
        blocks, whose output matrix is zero at the start (Tandon et al., 2025, arXiv:2512.23675); or
        ``'low_rank'``: each matrix W of a block gets a product beside it, ``x W + (x A) B`` with A
        random and B zero at the start (Hu et al., 2021, LoRA, arXiv:2106.09685, section 4.1; its
        factor α / r is 1 here).
      blocks: number of blocks that adapt, the last ones; for all kinds but ``'all'``, ``'norms'``
        and ``'head'``. None for all.
      rank: columns of A, or hidden units of a second MLP.
      matrices: which matrices get such products, of those that the blocks have.
    """

    kind: Literal["all", "blocks", "norms", "head", "mlps", "second_mlp", "low_rank"] = "low_rank"
    blocks: Layers | None = None
    rank: Annotated[int, Range(1, 4096)] = 8
    matrices: Annotated[tuple[Matrix, ...], Several(different=True)] = MATRICES

    @property
    def adds(self) -> bool:
        """Whether what adapts is laid beside the parameters that there are."""
        return self.kind in ("low_rank", "second_mlp")

    def adapts(self, num_layers: int) -> Callable[[tuple[str, ...]], bool]:
        """A predicate on the path of a parameter of a transformer: whether it adapts."""
        last = [
            f"layer_{i}"
            for i in range(max(0, num_layers - (self.blocks or num_layers)), num_layers)
        ]
        return {
            "all": lambda path: True,
            "blocks": lambda path: path[0] in (*last, "final_norm"),
            "norms": lambda path: bool(set(NORMS) & set(path)) or path[-1] == "bias",
            "head": lambda path: path[0] == "head",
            "mlps": lambda path: path[0] in last and path[1] in MLP,
            "second_mlp": lambda path: path[0] in last and path[1] in SECOND_MLP,
            "low_rank": lambda path: path[0] in last and path[-1] in ("down", "up"),
        }[self.kind]


def extended(config: AdapterConfig, params: Params, key: Key) -> Params:
    """The parameters of a transformer with those that an adapter adds, if it adds any.

    The transformer gives the same as before, since what is added starts at zero. In them
    ``config.adapts`` chooses what is fast, for `metaopt.optimizers.part.on_part`.
    """
    return merge(params, _added(config, params, key)) if config.adds else params


def split(config: AdapterConfig, params: Params, key: Key) -> tuple[Params, Params]:
    """The parameters that adapt and the others: ``merge(others, those)`` are all.

    Args:
      config: which adapt.
      params: those of a `metaopt.models.transformer`.
      key: for the random start of products of low rank.

    Returns:
      ``(fast, frozen)``, nested dicts. Frozen ones that adapt too are not in both. What adapts is
      at least float32, also where the model is kept in bfloat16: small steps would be lost.

    Raises:
      UserError: the transformer has no such parameters.
    """
    if config.adds:
        return _added(config, params, key), params
    adapts = config.adapts(len(_layers(params)))
    fast, frozen = {}, {}
    for keys, leaf in jax.tree.leaves_with_path(params):
        path = tuple(str(key.key) for key in keys)
        put(*((fast, path, _accurate(leaf)) if adapts(path) else (frozen, path, leaf)))
    if not fast:
        raise UserError("the model has no head of its own to adapt: it is the embedding")
    return fast, frozen


def adapting(config: TransformerConfig, adapter: AdapterConfig, params: Params) -> Model:
    """A trained transformer as a model whose parameters are those that adapt.

    It starts as the transformer that it is made of, whatever the key; that draws the start of
    products of low rank. Every learner, estimator and loss takes it.

    Args:
      config: the transformer.
      adapter: which parameters adapt.
      params: its parameters.

    Raises:
      UserError: see `split`.
    """
    fast, frozen = split(adapter, params, jax.random.key(0))
    shapes = jax.eval_shape(lambda: params)
    first = _first_layer(config, adapter)

    def init(key: Key) -> Params:
        return _added(adapter, shapes, key) if adapter.adds else fast

    def trunk(frozen: Params, tokens_SxL: Array) -> Array:
        return run_layers(config, frozen, embed(config, frozen, tokens_SxL), 0, first)

    def apply(params: Params, inputs: Array) -> Array:
        x_SxLxD = inputs if first and is_prepared(inputs) else trunk(params, inputs)
        return read_out(config, params, run_layers(config, params, x_SxLxD, first))

    head = tuple(name for name in transformer(config).head if name in fast)
    return Model(init, apply, head, frozen, trunk if first else None)


def _first_layer(config: TransformerConfig, adapter: AdapterConfig) -> int:
    """The number of layers before all that adapts."""
    if adapter.kind == "head":
        return config.num_layers
    chosen = None if adapter.kind in ("all", "norms") else adapter.blocks
    return max(0, config.num_layers - (chosen or config.num_layers))


def merged(params: Params) -> Params:
    """The parameters with each ``W + A B`` in place of W and the product beside it.

    Raises:
      UserError: there is a second MLP, which nothing else can hold.
    """
    if not isinstance(params, dict):
        return params
    if set(SECOND_MLP) & set(params):
        raise UserError("a second MLP has no place in other formats: adapt another part")
    if "down" not in params:
        return {name: merged(below) for name, below in params.items()}
    others = {name: leaf for name, leaf in params.items() if name not in ("down", "up")}
    added = params["down"] @ params["up"]
    return others | {"kernel": params["kernel"] + added.astype(params["kernel"].dtype)}


def _added(config: AdapterConfig, params: Params, key: Key) -> Params:
    """What an adapter lays beside the parameters, at its start."""
    return (_products if config.kind == "low_rank" else _second_mlps)(config, params, key)


def _second_mlps(config: AdapterConfig, params: Params, key: Key) -> Params:
    layers, added = _layers(params), {}
    up_name, out_name = SECOND_MLP
    for name in layers[-(config.blocks or len(layers)) :]:
        key, drawn = jax.random.split(key)
        like = params[name]["mlp_out"]["kernel"]
        width, dtype = like.shape[1], jnp.promote_types(like.dtype, jnp.float32)
        up = jax.random.normal(drawn, (width, config.rank), dtype) * width**-0.5
        zero = jnp.zeros((config.rank, width), dtype)
        added[name] = {up_name: {"kernel": up}, out_name: {"kernel": zero}}
    return added


def _products(config: AdapterConfig, params: Params, key: Key) -> Params:
    fast: Params = {}
    layers = _layers(params)
    for name in layers[-(config.blocks or len(layers)) :]:
        for matrix in [m for m in config.matrices if m in params[name]]:
            kernel = params[name][matrix]["kernel"]
            key, drawn = jax.random.split(key)
            width, out = kernel.shape
            dtype = jnp.promote_types(kernel.dtype, jnp.float32)
            down = jax.random.normal(drawn, (width, config.rank), dtype) * width**-0.5
            beside = {"down": down, "up": jnp.zeros((config.rank, out), dtype)}
            fast.setdefault(name, {})[matrix] = beside
    if not fast:
        raise UserError(f"the blocks have no matrix of {', '.join(config.matrices)}")
    return fast


def _layers(params: Params) -> list[str]:
    numbers = sorted(int(n.removeprefix("layer_")) for n in params if n.startswith("layer_"))
    return [f"layer_{number}" for number in numbers]


def _accurate(leaf: Array) -> Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
