"""Recurrent language models: Elman, gated recurrent unit, long short-term memory."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from metaopt.indices import as_tokens
from metaopt.models.linen import from_linen
from metaopt.ranges import Layers, Vocabulary, Width, check_value
from metaopt.types import Array, Model

CELLS = {"rnn": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}


class Recurrent(nn.Module):
    """An embedding ``embed``, recurrent layers ``layer_0, ...`` and a linear ``head``."""

    vocab_size: int
    width: int
    cell: Callable[..., nn.RNNCellBase]
    num_layers: int

    @nn.compact
    def __call__(self, tokens_SxL: Array) -> Array:
        """Maps integers ``[S, L]`` to logits ``[S, L, V]``."""
        tokens_SxL = as_tokens("tokens", tokens_SxL, self.vocab_size)
        x: Any = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_SxL)
        for i in range(self.num_layers):
            cell = self.cell(self.width, name=f"layer_{i}")
            # Zeros, whatever the key, in the dtype of the parameters: the cell's are float32.
            start = cell.initialize_carry(jax.random.key(0), (x.shape[0], self.width))
            start = jax.tree.map(lambda leaf, x=x: leaf.astype(x.dtype), start)
            x = nn.RNN(cell)(x, initial_carry=start)
        # All tokens in one axis: see `metaopt.models.transformer`.
        logits = nn.Dense(self.vocab_size, name="head")(x.reshape(-1, self.width))
        return logits.reshape(*tokens_SxL.shape, self.vocab_size)


def recurrent(
    vocab_size: int,
    width: int,
    cell: Literal["rnn", "gru", "lstm"] = "gru",
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
    check_value("cell", cell, Literal["rnn", "gru", "lstm"])
    check_value("vocab_size", vocab_size, Vocabulary)
    check_value("width", width, Width)
    check_value("num_layers", num_layers, Layers)
    return from_linen(
        Recurrent(vocab_size, width, CELLS[cell], num_layers), np.zeros((1, 1), np.int32)
    )
