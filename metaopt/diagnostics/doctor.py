"""The doctor: whether a meta-gradient is right, what it costs, and where it breaks.

It compares an estimator, on any model, learner and inner optimiser, with reverse mode and with
finite differences of the objective.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import measure
from metaopt.diagnostics.finite_differences import directional_derivative
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
from metaopt.ranges import Count, check_value
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


class Examined(NamedTuple):
    """An estimator, and what was measured of it.

    Attributes:
      name: name of the estimator.
      temp: bytes of working memory.
      seconds: seconds a call; None if nothing was timed.
      slopes: product of its gradient with each direction, float64 ``[n]``.
    """

    name: str
    temp: int
    seconds: measure.Timing | None
    slopes: np.ndarray


class Report(NamedTuple):
    """What `examine` found.

    Attributes:
      dtype: dtype of the parameters, such as ``float64``.
      agreement: agreement of the estimator with the reference.
      parts: agreement in each of the meta-parameters (``params``, ``log_rates``).
      estimator: the estimator.
      reference: what it is compared with.
      differences: derivative of the objective along each direction by central finite differences,
        float64 ``[n]``.
      uncertainties: their spread over three neighbouring steps, ``[n]``.
      failure: where the objective's derivative, or else the estimator's gradient, becomes NaN or
        inf; None if both are finite.
    """

    dtype: str
    agreement: Agreement
    parts: dict[str, Agreement]
    estimator: Examined
    reference: Examined
    differences: np.ndarray
    uncertainties: np.ndarray
    failure: Failure | None

    def error(self, of: Examined) -> float:
        """The largest distance of a gradient from the finite differences, relative to their size.

        Their size is the root mean square over the directions, so that a direction in which the
        objective happens to be flat does not dominate.
        """
        return self._relative(np.abs(of.slopes - self.differences))

    @property
    def uncertainty(self) -> float:
        """The largest uncertainty of the finite differences, relative to their size."""
        return self._relative(self.uncertainties)

    def _relative(self, distances: np.ndarray) -> float:
        size = np.sqrt(np.mean(self.differences**2)) or 1.0
        return float(np.max(distances / size))  # NaN if one is, unlike Python's max

    def agrees(self) -> bool:
        """The gradient is the reference's: the error is at most the root of the rounding unit."""
        return self.agreement.error <= float(jnp.finfo(self.dtype).eps) ** 0.5

    def confirmed(self, of: Examined) -> bool | None:
        """Whether finite differences confirm a gradient; None if they cannot tell.

        They confirm it if the largest error is at most the sum of ten times their own uncertainty
        and the cube root of the rounding unit. They cannot tell if their uncertainty is above 0.1.
        """
        if not self.uncertainty <= 0.1:
            return None
        rounding = float(jnp.finfo(self.dtype).eps) ** (1 / 3)
        return self.error(of) <= 10 * self.uncertainty + rounding

    def describe(self) -> list[str]:
        """The findings in words, one a line."""
        ours, theirs = self.estimator, self.reference
        found = (
            [self.failure.describe()]
            if self.failure
            else [self._against_reference(), *map(self._against_differences, (ours, theirs))]
        )
        found.append(self._compared("memory", ours.temp, theirs.temp, measure.human_bytes))
        if ours.seconds and theirs.seconds:
            seconds = ours.seconds.median, theirs.seconds.median
            found.append(self._compared("time", *seconds, lambda s: f"{s * 1e3:.3g} ms"))
        return found

    def _against_reference(self) -> str:
        names = self.estimator.name, self.reference.name
        if self.agrees():
            return f"{names[0]} agrees with {names[1]} to {self.agreement.error:.1e}"
        parts = {"": self.agreement} | (self.parts if len(self.parts) > 1 else {})
        return f"{names[0]} differs from {names[1]}: " + "; ".join(
            f"{name}{': ' if name else ''}cosine {part.cosine:.4f}, error {part.error:.1e}"
            for name, part in parts.items()
        )

    def _against_differences(self, of: Examined) -> str:
        verdict = self.confirmed(of)
        if verdict is None:
            return f"finite differences in {self.dtype} are too uncertain to judge {of.name}"
        return (
            f"{of.name} {'agrees' if verdict else 'disagrees'} with finite differences "
            f"along {len(self.differences)} directions: error {self.error(of):.1e}, "
            f"their own uncertainty {self.uncertainty:.1e}"
        )

    def _compared(self, what: str, ours: float, theirs: float, show: Callable[[Any], str]) -> str:
        ratio = f"{ours / theirs:.2f} times" if theirs else "against"
        return f"{what} {show(ours)}, {ratio} {self.reference.name}'s {show(theirs)}"


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
) -> Report:
    """Compares an estimator with a reference and with finite differences, on one episode.

    Everything is computed in the dtype of the parameters. Rounding hides in float32 what it
    hides in float64 only below 1e-10. So judge exactness in float64 (``with
    jax.enable_x64(True)`` and `to_dtype`), and memory and time in float32.

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

    Returns:
      `Report`.

    Raises:
      UserError: there are no directions, the parameters are of several dtypes, or an estimator
        gives something else than a meta-gradient.
    """
    estimators = [estimator, reference]
    if outer_loss is not None:
        estimators = [functools.partial(e, outer_loss=outer_loss) for e in estimators]
    dtype = _dtype(params)
    check_value("directions", directions, Count)
    point = to_dtype(learner.init(params), dtype)
    hparams, episode = to_dtype(hparams, dtype), jax.tree.map(jnp.asarray, episode)
    arguments = (point, hparams, episode, key)
    compiled = [
        measure.compile_for(_bound(e, learner, loss_fn, inner), *arguments) for e in estimators
    ]
    names = [_name(e) for e in estimators]
    grads = [_gradient(n, c(*arguments), point) for n, c in zip(names, compiled, strict=True)]
    run = run_inner_loop(learner, loss_fn, inner, outer_loss)
    failure = None
    if not all_finite(grads[1]):
        failure = find_failure(learner, loss_fn, inner, point, hparams, episode, outer_loss)
    elif not all_finite(grads[0]):
        failure = first_failing_length(estimators[0], learner, loss_fn, inner, arguments)
    timings: list[Any] = [None, None]
    if rounds:
        calls = {str(i): functools.partial(c, *arguments) for i, c in enumerate(compiled)}
        timings = list(measure.interleaved(calls, rounds).values())
    keys = jax.random.split(jax.random.fold_in(key, 1), directions)
    vectors = [jax.jit(optax.tree.random_like)(k, point) for k in keys]
    differences, uncertainties = _differences(
        lambda m: run(m, hparams, episode).objective(inner, hparams), point, vectors
    )
    flat = [_flat(vector) for vector in vectors]
    slopes = [np.array([_flat(gradient) @ v for v in flat]) for gradient in grads]
    temps = [measure.compiled_memory(c).temp for c in compiled]
    examined, expected = map(Examined, names, temps, timings, slopes)
    return Report(
        str(dtype),
        _agreement(*grads),
        {name: _agreement(grads[0][name], grads[1][name]) for name in grads[1]},
        examined,
        expected,
        differences,
        uncertainties,
        failure,
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


def to_dtype(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point leaves in a dtype: float64 under ``jax.enable_x64(True)`` alone."""

    def cast(x):
        x = jnp.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def _dtype(params: Params) -> np.dtype:
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    dtypes = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
    if len(dtypes) != 1:
        raise UserError(
            f"the parameters are of the dtypes {sorted(map(str, dtypes))}: one is needed to "
            "say how exact a gradient is; cast them to it"
        )
    return dtypes.pop()


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


def _differences(
    objective: Callable[[MetaParams], Array], point: MetaParams, vectors: list[MetaParams]
) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives along vectors by finite differences, and their uncertainties, both ``[n]``."""

    @jax.jit
    def objective_at(vector, step):
        return objective(jax.tree.map(lambda p, v: p + step * v, point, vector))

    dtype = _dtype(point)
    found = [
        directional_derivative(functools.partial(objective_at, vector), dtype) for vector in vectors
    ]
    slopes, uncertainties = np.array(found).T
    return slopes, uncertainties


def _name(estimator: Any) -> str:
    """The name of a function, or of the one that `functools.partial` binds."""
    while isinstance(estimator, functools.partial):
        estimator = estimator.func
    return getattr(estimator, "__name__", "estimator")
