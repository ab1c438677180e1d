"""Models, one file an architecture: constructors that return `metaopt.types.Model`.

flax is imported nowhere else. A new architecture is a new file with one function
that returns a ``Model``; `linen.as_model` makes one of a flax module.
"""

from metaopt.models.bigram import bigram, ngram
from metaopt.models.conv import conv
from metaopt.models.mlp import mlp
from metaopt.models.recurrent import recurrent
from metaopt.models.transformer import TransformerConfig, transformer

__all__ = ["TransformerConfig", "bigram", "conv", "mlp", "ngram", "recurrent", "transformer"]
