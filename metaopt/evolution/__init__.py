"""A model that goes on evolving with its data, generation after generation."""

from metaopt.evolution.config import EvolveConfig
from metaopt.evolution.life import GENERATIONS, LANGUAGES, Generation, Life, check

__all__ = ["GENERATIONS", "LANGUAGES", "EvolveConfig", "Generation", "Life", "check"]
