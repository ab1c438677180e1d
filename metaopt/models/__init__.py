"""Models, one file an architecture: constructors that return `metaopt.types.Model`.

flax is imported nowhere else. A new architecture is a new file with one function
that returns a ``Model``; `as_model` makes one of a module of Linen, NNX or Equinox, or of a pair
of functions.
"""

from metaopt.models.adapters import AdapterConfig, adapting
from metaopt.models.bigram import bigram, ngram
from metaopt.models.conv import conv
from metaopt.models.mlp import mlp
from metaopt.models.own import as_model
from metaopt.models.reader import reader
from metaopt.models.recurrent import recurrent
from metaopt.models.transformer import TransformerConfig, transformer

__all__ = [
    "AdapterConfig",
    "TransformerConfig",
    "adapting",
    "as_model",
    "bigram",
    "conv",
    "mlp",
    "ngram",
    "reader",
    "recurrent",
    "transformer",
]
