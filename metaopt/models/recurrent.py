"""Recurrent language models: Elman, gated recurrent unit, long short-term memory."""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.indices import as_tokens
from metaopt.ranges import Layers, Vocabulary, Width, check_value
from metaopt.types import Array, Key, Model, Params, Stateful

Cell = Literal["rnn", "gru", "lstm"]
CELLS = {"rnn": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}


class Recurrent(nn.Module):
    """An embedding ``embed``, recurrent layers ``layer_0, ...`` and a linear ``head``."""

    vocab_size: int
    width: int
    cell: Callable[..., nn.RNNCellBase]
    num_layers: int

    @nn.compact
    def __call__(self, tokens_SxL: Array, context: Any = None) -> tuple[Array, Any]:
        """Integers ``[S, L]`` and states of the layers to logits ``[S, L, V]`` and the states."""
        tokens_SxL = as_tokens("tokens", tokens_SxL, self.vocab_size)
        x: Any = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_SxL)
        context = self.start(x.shape[0], x.dtype) if context is None else context
        after = []
        for i, start in enumerate(context):
            cell = self.cell(self.width, name=f"layer_{i}")
            end, x = nn.RNN(cell, return_carry=True)(x, initial_carry=start)
            after.append(end)
        # All tokens in one axis: see `metaopt.models.transformer`.
        logits = nn.Dense(self.vocab_size, name="head")(x.reshape(-1, self.width))
        return logits.reshape(*tokens_SxL.shape, self.vocab_size), tuple(after)

    def start(self, sequences: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
        """The states of the layers before any token: zeros."""
        cell = self.cell(self.width, parent=None)
        state = cell.initialize_carry(jax.random.key(0), (sequences, self.width))
        return self.num_layers * (jax.tree.map(lambda leaf: leaf.astype(dtype), state),)


def recurrent(
    vocab_size: int,
    width: int,
    cell: Cell = "gru",
    num_layers: int = 1,
) -> Model:
    """A recurrent language model, scanned over time, whose state starts at zero.

    Args:
      vocab_size: V, at least 2.
      width: D, of the embedding and of every layer's state.
      cell: ``'rnn'`` (Elman, 1990: ``h' = tanh(W x + U h + b)``), ``'gru'`` (Cho et
        al., 2014, arXiv:1406.1078) or ``'lstm'`` (Hochreiter and Schmidhuber, 1997,
        with the forget gate of Gers et al., 2000).
      num_layers: layers one above the other.

    Returns:
      A model from integers ``[S, L]`` to float32 logits ``[S, L, V]``. A token outside the
      vocabulary gives NaN from there on, or a UserError where its value is known.

    Raises:
      UserError: if ``cell`` is unknown, ``vocab_size`` is less than 2, or ``width``
        or ``num_layers`` is less than 1.
    """
    module = _checked(vocab_size, width, cell, num_layers)
    example = np.zeros((1, 1), np.int32)

    def init(key: Key) -> Params:
        return module.init(key, example)["params"]

    def apply(params: Params, tokens_SxL: Array) -> Array:
        return _run(module, params, None, tokens_SxL)[0]

    return Model(init, apply)


def with_memory(vocab_size: int, width: int, cell: Cell = "gru", num_layers: int = 1) -> Stateful:
    """`recurrent` as a model that reads on: its context is the states of its layers.

    Raises:
      UserError: see `recurrent`.
    """
    module = _checked(vocab_size, width, cell, num_layers)
    model = recurrent(vocab_size, width, cell, num_layers)
    return Stateful(model.init, module.start, functools.partial(_run, module))


def _checked(vocab_size: int, width: int, cell: Cell, num_layers: int) -> Recurrent:
    check_value("cell", cell, Cell)
    check_value("vocab_size", vocab_size, Vocabulary)
    check_value("width", width, Width)
    check_value("num_layers", num_layers, Layers)
    return Recurrent(vocab_size, width, CELLS[cell], num_layers)


def _run(
    module: Recurrent, params: Params, context: Any, tokens_SxL: Array
) -> tuple[Array, tuple[Any, ...]]:
    return cast(tuple[Array, Any], module.apply({"params": params}, tokens_SxL, context))
