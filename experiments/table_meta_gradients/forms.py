"""The programs that table_meta_gradients compares: a form of the meta-gradient at a size."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers import jax_models
from benchmarks.peers.problems import REFERENCE
from metaopt import learners, losses, meta_gradients, models
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.measure import Flops, count_flops
from metaopt.ranges import Checked, Count, InnerSteps, Layers, Length, Width
from metaopt.types import Array, Batch, Episode, Model, Params

VOCAB_SIZE = 256  # bytes
HPARAMS = {"inner_learning_rate": 1e-3}
# Without eps_root Adam's derivative at gradients below 1e-8 is up to 1e8, and what float32
# rounds there is the error of the whole.
INNER_OPTIMIZER = functools.partial(optax.adam, eps_root=1e-8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size(Checked):
    """A transformer, the sequences it reads and the number of inner steps.

    Attributes:
      width: D, width of the transformer.
      layers: Number of its layers.
      length: L, tokens in a sequence.
      steps: K, inner steps with Adam.
      sequences: Sequences in the support, and as many in the query.
      head_size: Width of an attention head.
      compute_dtype: Dtype of the layers.
    """

    width: Width = 128
    layers: Layers = 4
    length: Length = 256
    steps: InnerSteps = 8
    sequences: Count = 4
    head_size: Width = 32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.head_size or self.head_size % 2:
            raise UserError(
                f"heads of size {self.head_size} must be even and divide the width {self.width}"
            )

    def __str__(self) -> str:
        return f"d{self.width} L{self.layers} S{self.length} K{self.steps}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A form of the meta-gradient: how it is computed.

    Attributes:
      estimator: estimator of `metaopt.meta_gradients`.
      inner: fields of `InnerLoop`; the steps are scanned unless it unrolls them.
      model: fields of `TransformerConfig`.
      exact: whether it is the gradient that reverse mode gives.
      plain: whether the model is the plain one of `benchmarks.peers.jax_models`, as most people
        write it, with the same parameters.
    """

    estimator: Callable
    inner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exact: bool = True
    plain: bool = False


LAYERS_AGAIN = {"scan_layers": True, "remat": True}
SMALLEST = LAYERS_AGAIN | {"attention_block": 64}
SAVED = {"remat": True, "save_gradients": True}
NAIVE, PLANNED, UNROLLED = "naive", "mixed + planned", "reverse, unrolled"
ROUNDED, ON_HOST = "mixed mode, bfloat16 states", "mixed mode, states on host"
FORMS = {
    NAIVE: Form(estimator=meta_gradients.reverse, plain=True),
    "reverse": Form(estimator=meta_gradients.reverse),
    UNROLLED: Form(estimator=meta_gradients.reverse, inner={"unroll": True}),
    "per-step checkpoint": Form(
        estimator=meta_gradients.reverse, inner={"remat": True}, model=LAYERS_AGAIN
    ),
    "mixed mode": Form(
        estimator=meta_gradients.mixed_mode, inner={"remat": True}, model=LAYERS_AGAIN
    ),
    ROUNDED: Form(
        estimator=meta_gradients.mixed_mode,
        inner={"kept_dtype": "bfloat16"},
        model=LAYERS_AGAIN,
        exact=False,
    ),
    ON_HOST: Form(
        estimator=meta_gradients.mixed_mode, inner={"kept_on": "host"}, model=LAYERS_AGAIN
    ),
    "mixed + saved gradients": Form(
        estimator=meta_gradients.mixed_mode, inner=SAVED, model=LAYERS_AGAIN
    ),
    "mixed + saved, layers kept": Form(estimator=meta_gradients.mixed_mode, inner=SAVED),
    PLANNED: Form(estimator=meta_gradients.mixed_mode, inner={"kept_states": 2}, model=SMALLEST),
    "first order": Form(estimator=meta_gradients.first_order, exact=False),
    "Reptile": Form(estimator=meta_gradients.reptile, exact=False),
}


def estimate(form: Form, size: Size, **inner: Any) -> Callable:
    """The meta-gradient function of a form at a size; ``inner`` overrides the form's own."""
    learner = learners.maml(INNER_OPTIMIZER)
    model = plain_model(size) if form.plain else model_of(size, form.model)
    return form.estimator(learner, losses.next_token(model), loop_of(form, size, **inner))


def loop_of(form: Form, size: Size, **inner: Any) -> InnerLoop:
    """The inner loop of a form at a size; ``inner`` overrides the form's own."""
    return InnerLoop(**({"num_steps": size.steps, "unroll": False} | dict(form.inner) | inner))


def model_of(size: Size, options: Mapping[str, Any]) -> Model:
    """The transformer of a size."""
    return models.transformer(
        models.TransformerConfig(
            vocab_size=VOCAB_SIZE,
            width=size.width,
            num_layers=size.layers,
            num_heads=size.width // size.head_size,
            compute_dtype=size.compute_dtype,
            **options,
        )
    )


def plain_model(size: Size) -> Model:
    """The same function of the same parameters, as most people write it."""
    sizes = dataclasses.replace(
        REFERENCE["lm"], num_layers=size.layers, num_heads=size.width // size.head_size
    )

    def apply(params: Params, tokens: Array) -> Array:
        if size.compute_dtype == "bfloat16":
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        with jax.numpy_rank_promotion("allow"):  # most people add vectors to matrices
            return jax_models.transformer(sizes, params, tokens)

    return model_of(size, {})._replace(apply=apply)


def arguments(size: Size, seed: int = 0) -> tuple:
    """``(meta_params, hparams, episode, key)`` with random bytes."""
    params_key, data_key, key = jax.random.split(jax.random.key(seed), 3)
    params = jax.jit(model_of(size, {}).init)(params_key)
    shape = (2, size.sequences, size.length + 1)
    tokens = jax.random.randint(data_key, shape, 0, VOCAB_SIZE)
    support, query = (Batch(t[:, :-1], t[:, 1:]) for t in tokens)
    hparams = {name: jnp.float32(value) for name, value in HPARAMS.items()}
    return {"params": params}, hparams, Episode(support, query, jnp.int32(0)), key


def shapes(size: Size) -> tuple:
    """The shapes of `arguments`, for programs that are compiled and not run."""
    return jax.eval_shape(lambda: arguments(size))


def flops(form: Form, size: Size, extra_steps: int = 0) -> Flops:
    """Operations of a form, counted on its program.

    A planned scan has loops whose lengths are data. What it computes is every step again,
    once, as under ``remat``, and the extra step evaluations of its plan.
    """
    if not loop_of(form, size).is_planned:
        return count_flops(estimate(form, size), *shapes(size))
    every = dataclasses.replace(form, inner={"remat": True})
    counted = count_flops(estimate(every, size), *shapes(size))
    step = _step_flops(form, size)
    return Flops(
        counted.matmul + extra_steps * step.matmul,
        counted.elementwise + extra_steps * step.elementwise,
    )


def _step_flops(form: Form, size: Size) -> Flops:
    """Operations of one inner step, forward."""
    loss_fn = losses.next_token(model_of(size, form.model))

    def step(meta_params, hparams, episode, _):
        optimizer = INNER_OPTIMIZER(hparams["inner_learning_rate"])
        once = InnerLoop(num_steps=1)
        return adapt(loss_fn, optimizer, meta_params["params"], episode.support, once).params

    return count_flops(step, *shapes(size))
