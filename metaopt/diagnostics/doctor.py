"""The doctor: whether a meta-gradient is right, what it costs, and where it breaks.

It compares an estimator, on any model, learner and inner optimiser, with reverse mode and with
finite differences of the objective.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import measure
from metaopt.diagnostics.finite_differences import directional_derivative, normal_like
from metaopt.diagnostics.nonfinite import (
    Failure,
    find_failure,
    first_failing_length,
    run_inner_loop,
)
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients import reverse
from metaopt.pytrees import all_finite
from metaopt.types import (
    Array,
    Episode,
    Estimator,
    Hparams,
    Key,
    Learner,
    LossFn,
    MetaGradFn,
    MetaParams,
    Params,
    PyTree,
)


class Agreement(NamedTuple):
    """Two gradients: ``cosine`` between them, and ``error = |a − b| / |b|``."""

    cosine: float
    error: float


class Derivative(NamedTuple):
    """The derivative of the objective along one random direction, found by three methods.

    Attributes:
      differences: central finite differences.
      uncertainty: their spread over three neighbouring steps.
      estimator: product of the estimator's gradient with the direction.
      reference: product of the reference's gradient with the direction.
    """

    differences: float
    uncertainty: float
    estimator: float
    reference: float


class Cost(NamedTuple):
    """Bytes of working memory, and seconds a call (None if nothing was timed)."""

    temp: int
    seconds: measure.Timing | None


class Report(NamedTuple):
    """What `examine` found.

    Attributes:
      names: names of the estimator and the reference.
      dtype: dtype of the parameters, such as ``float64``.
      agreement: agreement of the estimator with the reference.
      parts: agreement in each of the meta-parameters (``params``, ``log_rates``).
      derivatives: one for each direction.
      estimator: cost of the estimator.
      reference: cost of the reference.
      failure: where the objective's derivative, or else the estimator's gradient, becomes NaN or
        inf; None if both are finite.
    """

    names: tuple[str, str]
    dtype: str
    agreement: Agreement
    parts: dict[str, Agreement]
    derivatives: tuple[Derivative, ...]
    estimator: Cost
    reference: Cost
    failure: Failure | None

    def errors(self, of: Literal["estimator", "reference", "uncertainty"]) -> list[float]:
        """Distance from the finite differences along each direction, relative to their size.

        Their size is the root mean square over the directions, so that a direction in which the
        objective happens to be flat does not dominate.
        """
        differences = np.array([d.differences for d in self.derivatives])
        size = float(np.sqrt(np.mean(differences**2))) or 1.0
        found = np.array([getattr(d, of) for d in self.derivatives])
        gap = found if of == "uncertainty" else np.abs(found - differences)
        return [float(x) for x in gap / size]

    def agrees(self) -> bool:
        """The gradient is the reference's: the error is at most the root of the rounding unit."""
        return self.agreement.error <= float(jnp.finfo(self.dtype).eps) ** 0.5

    def confirmed(self, of: Literal["estimator", "reference"]) -> bool | None:
        """Whether finite differences confirm a gradient; None if they cannot tell.

        They confirm it if the largest error is at most the sum of ten times their own uncertainty
        and the cube root of the rounding unit. They cannot tell if their uncertainty is above 0.1.
        """
        uncertainty = np.max(self.errors("uncertainty"))  # NaN if one is, unlike Python's max
        if not uncertainty <= 0.1:
            return None
        rounding = float(jnp.finfo(self.dtype).eps) ** (1 / 3)
        return bool(np.max(self.errors(of)) <= 10 * uncertainty + rounding)

    def describe(self) -> list[str]:
        """The findings in words, one a line."""
        if self.failure is None:
            found = [self._against_reference()]
            found += [
                self._against_differences("estimator"),
                self._against_differences("reference"),
            ]
        else:
            found = [self.failure.describe()]
        ours, theirs = self.estimator, self.reference
        found.append(self._compared("memory", ours.temp, theirs.temp, measure.human_bytes))
        if ours.seconds and theirs.seconds:
            seconds = ours.seconds.median, theirs.seconds.median
            found.append(self._compared("time", *seconds, lambda s: f"{s * 1e3:.3g} ms"))
        return found

    def _against_reference(self) -> str:
        if self.agrees():
            return f"{self.names[0]} agrees with {self.names[1]} to {self.agreement.error:.1e}"
        parts = {"": self.agreement} | (self.parts if len(self.parts) > 1 else {})
        return f"{self.names[0]} differs from {self.names[1]}: " + "; ".join(
            f"{name}{': ' if name else ''}cosine {part.cosine:.4f}, error {part.error:.1e}"
            for name, part in parts.items()
        )

    def _against_differences(self, of: Literal["estimator", "reference"]) -> str:
        name, verdict = self.names[of == "reference"], self.confirmed(of)
        if verdict is None:
            return f"finite differences in {self.dtype} are too uncertain to judge {name}"
        return (
            f"{name} {'agrees' if verdict else 'disagrees'} with finite differences "
            f"along {len(self.derivatives)} directions: error {np.max(self.errors(of)):.1e}, "
            f"their own uncertainty {np.max(self.errors('uncertainty')):.1e}"
        )

    def _compared(self, what: str, ours: float, theirs: float, show: Callable[[Any], str]) -> str:
        ratio = f"{ours / theirs:.2f} times" if theirs else "against"
        return f"{what} {show(ours)}, {ratio} {self.names[1]}'s {show(theirs)}"


def examine(
    estimator: Estimator,
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    params: Params,
    hparams: Hparams,
    episode: Episode,
    key: Key,
    *,
    outer_loss: LossFn | None = None,
    directions: int = 4,
    reference: Estimator = reverse,
    rounds: int = 10,
    meta_params: MetaParams | None = None,
) -> Report:
    """Compares an estimator with a reference and with finite differences, on one episode.

    Everything is computed in the dtype of the parameters. Rounding hides in float32 what it
    hides in float64 only below 1e-10. So judge exactness in float64 (``with
    jax.enable_x64(True)`` and `to_float64`), and memory and time in float32.

    Args:
      estimator: ``(learner, loss_fn, inner) -> MetaGradFn``; options bound by `functools.partial`.
      learner: what is meta-learned.
      loss_fn: what the inner loop descends, as the learner changes it.
      inner: the inner loop.
      params: initial parameters; all floating-point leaves of one dtype.
      hparams: ``inner_learning_rate`` and what else the learner reads.
      episode: one task.
      key: key of the directions, and of the estimator's noise if there is any.
      outer_loss: what the adapted parameters are judged by; None for ``loss_fn``.
      directions: number of standard normal directions along which derivatives are compared.
      reference: estimator that is taken as the truth.
      rounds: timed calls of each, alternating; 0 times nothing.
      meta_params: where the meta-gradient is taken; by default ``learner.init(params)``.

    Returns:
      `Report`.

    Raises:
      UserError: there are no directions, the parameters are of several dtypes, or an estimator
        gives something else than a meta-gradient.
    """
    if outer_loss is not None:
        estimator, reference = (
            functools.partial(e, outer_loss=outer_loss) for e in (estimator, reference)
        )
    dtype = _dtype(params)
    if directions < 1:
        raise UserError(f"directions={directions}: at least 1 is needed to compare derivatives")
    point = _cast(learner.init(params) if meta_params is None else meta_params, dtype)
    hparams, episode = _cast(hparams, dtype), jax.tree.map(jnp.asarray, episode)
    arguments = (point, hparams, episode, key)
    estimators = (estimator, reference)
    compiled = [
        measure.compile_for(_bound(e, learner, loss_fn, inner), *arguments) for e in estimators
    ]
    grads, expected = (
        _gradient(_name(e), run(*arguments), point)
        for e, run in zip(estimators, compiled, strict=True)
    )
    run = run_inner_loop(learner, loss_fn, inner, outer_loss)
    keys = jax.random.split(jax.random.fold_in(key, 1), directions)
    failure = None
    if not all_finite(expected):
        failure = find_failure(learner, loss_fn, inner, point, hparams, episode, outer_loss)
    elif not all_finite(grads):
        failure = first_failing_length(estimator, learner, loss_fn, inner, arguments)
    costs = _costs(compiled, arguments, rounds)
    return Report(
        names=(_name(estimator), _name(reference)),
        dtype=str(dtype),
        agreement=_agreement(grads, expected),
        parts={name: _agreement(grads[name], expected[name]) for name in expected},
        derivatives=_derivatives(
            lambda m: run(m, hparams, episode).objective(inner, hparams),
            point,
            (grads, expected),
            keys,
        ),
        estimator=costs[0],
        reference=costs[1],
        failure=failure,
    )


def _bound(estimator: Estimator, learner: Learner, loss_fn: LossFn, inner: InnerLoop) -> MetaGradFn:
    estimate = estimator(learner, loss_fn, inner)
    if not callable(estimate):
        raise UserError(
            f"{_name(estimator)} must return a function (meta_params, hparams, episode, key) -> "
            f"(meta-gradient, metrics), not an object of type {type(estimate).__name__}"
        )
    return estimate


def _gradient(name: str, found: Any, meta_params: MetaParams) -> MetaParams:
    shapes = jax.tree.map(jnp.shape, meta_params)
    if not isinstance(found, tuple) or jax.tree.map(jnp.shape, found[0]) != shapes:
        raise UserError(
            f"what {name} gives must be a pair (meta-gradient, metrics), the gradient of the "
            f"structure and the shapes of the meta-parameters {', '.join(meta_params)}"
        )
    return found[0]


def to_float64(tree: PyTree) -> PyTree:
    """Floating-point leaves in float64, on the host; to be used under ``jax.enable_x64(True)``."""

    def convert(x):
        is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return np.asarray(x, np.float64) if is_float else x

    return jax.tree.map(convert, tree)


def _dtype(params: Params) -> np.dtype:
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    dtypes = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
    if len(dtypes) != 1:
        raise UserError(
            f"the parameters are of the dtypes {sorted(map(str, dtypes))}: one is needed to "
            "say how exact a gradient is; cast them to it"
        )
    return dtypes.pop()


def _cast(tree: PyTree, dtype: np.dtype) -> PyTree:
    def cast(x):
        x = jnp.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def _agreement(grads: PyTree, expected: PyTree) -> Agreement:
    """In float64 on the host, so that the comparison adds no rounding of its own."""
    a, b = (_flat(tree) for tree in (grads, expected))
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if norms == (0.0, 0.0):
        return Agreement(1.0, 0.0)
    cosine = float(a @ b) / (norms[0] * norms[1]) if all(norms) else 0.0
    error = float(np.linalg.norm(a - b)) / norms[1] if norms[1] else float("inf")
    return Agreement(cosine, error)


def _flat(tree: PyTree) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def _derivatives(
    objective: Callable[[MetaParams], Array],
    meta_params: MetaParams,
    gradients: tuple[MetaParams, MetaParams],
    keys: Key,
) -> tuple[Derivative, ...]:
    """Along one standard normal direction for each key."""

    @jax.jit
    def objective_at(direction, step):
        return objective(jax.tree.map(lambda p, v: p + step * v, meta_params, direction))

    found = []
    for key in keys:
        direction = jax.jit(normal_like)(key, meta_params)
        products = (float(_flat(grads) @ _flat(direction)) for grads in gradients)
        dtype = _dtype(meta_params)
        slope, uncertainty = directional_derivative(
            lambda h, v=direction: objective_at(v, h), dtype
        )
        found.append(Derivative(slope, uncertainty, *products))
    return tuple(found)


def _costs(compiled: list[jax.stages.Compiled], arguments: tuple, rounds: int) -> list[Cost]:
    temps = [measure.compiled_memory(c).temp for c in compiled]
    if not rounds:
        return [Cost(temp, None) for temp in temps]
    calls = {str(i): lambda c=c: c(*arguments) for i, c in enumerate(compiled)}
    timings = measure.interleaved(calls, rounds).values()
    return [Cost(temp, timing) for temp, timing in zip(temps, timings, strict=True)]


def _name(estimator: Any) -> str:
    """The name of a function, or of the one that `functools.partial` binds."""
    while isinstance(estimator, functools.partial):
        estimator = estimator.func
    return getattr(estimator, "__name__", "estimator")
