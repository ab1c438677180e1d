"""Models, one file an architecture: constructors that return `metaopt.types.Model`.

flax is imported nowhere else. A new architecture is a new file with one function
that returns a ``Model``; `as_model` makes one of a module of Linen, NNX or Equinox, or of a pair of
functions. `with_cache`, `with_window` and `with_memory` give models that read on, in parts.
"""

from metaopt.models.adapters import AdapterConfig, adapting
from metaopt.models.bigram import bigram, ngram
from metaopt.models.conv import conv
from metaopt.models.mlp import mlp
from metaopt.models.own import as_model
from metaopt.models.recurrent import recurrent, with_memory
from metaopt.models.stateful import with_cache, with_window
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
    "recurrent",
    "transformer",
    "with_cache",
    "with_memory",
    "with_window",
]
