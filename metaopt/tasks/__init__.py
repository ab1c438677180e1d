"""Task families, one file each: distributions over episodes of support and query.

Each is a function of its config, of the same name as its file: `linear`, `sinusoid`, `markov`,
`ciphers`, `text`, `images`. `fresh_tasks` makes one of a function that draws the examples of a
task, `one_episode` one of a single episode, and `missing_tokens` turns one of next tokens into one
of missing tokens.
"""

from metaopt.tasks.ciphers import CipherConfig, ciphers
from metaopt.tasks.fresh import fresh_tasks
from metaopt.tasks.images import ImagesConfig, images
from metaopt.tasks.linear import LinearConfig, linear
from metaopt.tasks.markov import MarkovConfig, markov
from metaopt.tasks.missing import missing_tokens
from metaopt.tasks.single import one_episode
from metaopt.tasks.sinusoid import SinusoidConfig, sinusoid
from metaopt.tasks.text import TextConfig, text

__all__ = [
    "CipherConfig",
    "ImagesConfig",
    "LinearConfig",
    "MarkovConfig",
    "SinusoidConfig",
    "TextConfig",
    "ciphers",
    "fresh_tasks",
    "images",
    "linear",
    "markov",
    "missing_tokens",
    "one_episode",
    "sinusoid",
    "text",
]
