"""The rows of a model that was trained elsewhere: its adapter learns, all else is frozen."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.table_test_time_training.config import Config
from experiments.table_test_time_training.documents import Source
from experiments.table_test_time_training.rows import Row, Settings, Start, Starts
from metaopt import models
from metaopt.frozen import FrozenLoss
from metaopt.losses import ReadingLoss
from metaopt.models.adapters import split
from metaopt.pretrained import Pretrained
from metaopt.training.types import TrainFn
from metaopt.types import MetaParams, Model, Params, Stateful


class PretrainedStarts(Starts):
    """`Starts` of an adapter: "usual" is as it is laid over, and what the others go on from."""

    def __init__(
        self,
        config: Config,
        source: Source,
        directory: Path,
        train_fn: TrainFn,
        tuned: Callable[[Starts, Row, MetaParams], Settings],
        found: Pretrained,
    ):
        """Trains nothing yet."""
        super().__init__(config, source, directory, train_fn, tuned)
        self._shape = found.config
        key = jax.random.key(config.seed)
        self._fast, self._frozen = split(self.sizes.fast, found.params, key)

    def reader(self, start: Start) -> Stateful:
        """The model, as one that reads on."""
        window = self.sizes.full_window if start == "full" else self.sizes.window
        return models.with_window(dataclasses.replace(self._shape, window=window))

    def model(self, start: Start) -> Model:
        """Its parameters alone: what is trained is given by the loss."""
        del start
        return Model(lambda key: self._fast, lambda params, inputs: inputs)

    def loss(self, start: Start) -> Any:
        """The loss of a document that is read on, of what adapts."""
        return FrozenLoss(ReadingLoss(self.reader(start)), self._frozen)

    @functools.cache  # noqa: B019
    def trained(self, start: Start) -> MetaParams:
        """What a start is made of; the usual one is not trained, and full attention uses it."""
        if start in ("usual", "full"):
            return self.learner(start).init(self.begin())
        return super().trained(start)

    def begin(self) -> Params:
        """The usual start of the adapter."""
        return jax.tree.map(jax.numpy.copy, self._fast)

    def _on_fast(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return optimizer

    def _initial(self, start: Start) -> Params:
        del start
        return self.begin()
