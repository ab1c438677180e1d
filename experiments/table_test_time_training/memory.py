"""The memory that meta-training through a document takes, as the compiler plans it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments.table_test_time_training.config import INNER, Sizes
from metaopt import learners, models
from metaopt.diagnostics import feasible
from metaopt.losses import ReadingLoss
from metaopt.measure import compile_for, compiled_memory
from metaopt.meta_gradients.mixed_mode import forward_over_reverse
from metaopt.meta_gradients.streaming import streaming
from metaopt.models.adapters import extended
from metaopt.optimizers.part import on_part
from metaopt.rematerialization.plan import schedule
from metaopt.statistics import Interval
from metaopt.types import Episode, InnerGradFn

TABLE = "test_time_training/memory"


class Form(NamedTuple):
    """A way to compute the meta-gradient of a document.

    Attributes:
      name: Name in the table.
      grad_fn: The inner-gradient function.
      kept_states: States between the steps that are kept; None for all.
    """

    name: str
    grad_fn: InnerGradFn = jax.value_and_grad
    kept_states: int | None = None


FORMS = (
    Form("reverse mode"),
    Form("mixed mode", forward_over_reverse),
    Form("reverse mode, 4 states kept", kept_states=4),
    Form("mixed mode, 4 states kept", forward_over_reverse, 4),
)


def program(sizes: Sizes, vocab_size: int, form: Form, updates: int) -> tuple[Callable, tuple]:
    """The meta-gradient of one document, a number of updates long, and its arguments' shapes."""
    config = sizes.transformer(vocab_size, sizes.window)
    adapts = sizes.fast.adapts(sizes.num_layers)
    inner = dataclasses.replace(INNER, kept_states=form.kept_states)
    estimate = streaming(
        learners.maml(lambda rate: on_part(optax.sgd(rate), adapts)),
        ReadingLoss(models.with_window(config)),
        inner,
        grad_fn=form.grad_fn,
    )

    def start():
        key = jax.random.key(0)
        return extended(sizes.fast, models.transformer(config).init(key), key)

    half = feasible.tokens(updates // 2, sizes.chunk)
    episode = jax.eval_shape(lambda half: Episode(half, half, jnp.int32(0)), half)
    hparams = {"inner_learning_rate": jax.ShapeDtypeStruct((), jnp.float32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return estimate, ({"params": jax.eval_shape(start)}, hparams, episode, key)


def add_rows(table: harness.TableRun, sizes: Sizes, updates: tuple[int, ...]) -> None:
    """Compiles each form for each number of updates; nothing is run."""
    for form in table.pending(FORMS, table=TABLE):
        for number in updates:
            function, shapes = program(sizes, 256, form, number)
            memory = compiled_memory(compile_for(function, *shapes)).temp / 2**20
            again = 0.0  # each step that is reversed is computed again, and those on the way to it
            if form.kept_states is not None:
                again = 1 + schedule(number, form.kept_states).extra_steps / number
            for column, unit, value in (
                (f"{number} updates", "MiB", memory),
                (f"computed again, {number}", "of the updates", again),
            ):
                table.add(form.name, column, Interval(value, np.nan, 1), table=TABLE, unit=unit)
