"""Evolution strategies: the meta-gradient from losses alone, over a run or its windows."""

from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.checks import check_call, check_key, check_parts
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients.windows import (
    InnerRun,
    Windows,
    check_window,
    mean_over_windows,
    run_window,
    start_run,
)
from metaopt.ranges import Count, Positive, Range, check_value
from metaopt.types import Array, Key, Learner, LossFn, MetaGradFn, MetaParams, Params


def evolution(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    *,
    num_pairs: int = 16,
    sigma: float = 0.01,
    window: int | None = None,
    reuse_noise: bool = False,
    pairs_at_a_time: int = 0,
    outer_loss: LossFn | None = None,
) -> MetaGradFn:
    """The gradient of the loss smoothed by Gaussian noise on the meta-parameters.

    Mathematics: P pairs of particles run the inner loop at ``m ± ε_i``, ``ε_i ~ N(0, σ²)``,
    and ``g = 1 / (2 σ² P) Σ_i ε_i (L(m + ε_i) − L(m − ε_i))``, unbiased for the gradient of
    ``E L(m + ε)``. With windows every particle keeps an inner state of its own and draws
    new noise in each, ``ε_ij`` in window j; with ``ξ_ij = Σ_{l ≤ j} ε_il`` the gradient of a
    window is ``1 / (2 σ² P) Σ_i ξ_ij (L_ij⁺ − L_ij⁻)``. It counts what earlier windows did to
    this one, so the mean over windows is unbiased where `truncated` is not.

    Noise on ``params`` is drawn once a run, since they are read where it starts: new noise
    would only add variance. ``reuse_noise`` does so for all meta-parameters.

    Nothing is differentiated but the inner loss, for the inner steps: the outer loss may be flat
    in places or not differentiable (an error rate). The variance grows with the number of
    meta-parameters.

    Args:
      learner, loss_fn, outer_loss: as for `reverse`.
      inner: the inner loop, of K steps.
      num_pairs: P, the antithetic pairs.
      sigma: σ, the standard deviation of the noise, of meta-parameters of every kind.
      window: W, a divisor of K; None for K, which is plain antithetic ES.
      reuse_noise: one noise a run instead of one a window.
      pairs_at_a_time: pairs that are run together, for less memory; 0 for all.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``; the metrics are
      means over the 2P particles, so ``loss`` is the smoothed query loss after K steps.

    Raises:
      UserError: W does not divide K, or an option is out of its range.

    References:
      Salimans et al., 2017, "Evolution Strategies as a Scalable Alternative to Reinforcement
      Learning"; Vicol et al., 2021, "Unbiased Gradient Estimation in Unrolled Computation
      Graphs with Persistent Evolution Strategies"; Li et al., 2023, "Variance-Reduced
      Gradient Estimation via Noise-Reuse in Online Evolution Strategies".
    """
    windows = evolution_windows(
        learner,
        loss_fn,
        inner,
        num_pairs=num_pairs,
        sigma=sigma,
        window=window,
        reuse_noise=reuse_noise,
        pairs_at_a_time=pairs_at_a_time,
        outer_loss=outer_loss,
    )
    return mean_over_windows(windows, inner, check_window(inner, window))


class Particles(NamedTuple):
    """The carry of `evolution_windows`.

    Attributes:
      params: parameters of the particles, ``[P, 2, ...]``, the one at ``m + ε`` first.
      opt_state: states of their inner optimisers, ``[P, 2, ...]``.
      step: int32 scalar, inner steps so far; 0 once there are K of them.
      noise_sum: ξ, the sum of all noise on the first of each pair in this run, ``[P, ...]``.
      key: key for the noise of the next windows.
    """

    params: Params
    opt_state: optax.OptState
    step: Array
    noise_sum: MetaParams
    key: Key


def evolution_windows(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    *,
    num_pairs: int = 16,
    sigma: float = 0.01,
    window: int | None = None,
    reuse_noise: bool = False,
    pairs_at_a_time: int = 0,
    outer_loss: LossFn | None = None,
) -> Windows:
    """`evolution` one window at a time; arguments and errors are its own."""
    outer_loss = check_parts(learner, loss_fn, inner, outer_loss)
    window = check_window(inner, window)
    check_value("num_pairs", num_pairs, Count)
    check_value("sigma", sigma, Positive)
    check_value("pairs_at_a_time", pairs_at_a_time, Annotated[int, Range(0, num_pairs)])
    loss_of_window = run_window(learner, loss_fn, inner, window, outer_loss=outer_loss)

    def init(meta_params, hparams, episode, key):
        check_call(learner, meta_params, hparams, episode)
        check_key(key)
        run = start_run(learner, meta_params, hparams)
        params, opt_state = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_pairs, 2, *jnp.shape(x))),
            (run.params, run.opt_state),
        )
        noise = jax.tree.map(
            lambda m: jnp.zeros((num_pairs, *jnp.shape(m)), jnp.result_type(m)), meta_params
        )
        return Particles(params, opt_state, run.step, noise, key)

    def step(meta_params, hparams, episode, particles):
        key, noise_key = jax.random.split(particles.key)
        fresh = _draw(noise_key, meta_params, num_pairs, sigma)
        noise, noise_sum = _add_noise(particles, fresh, reuse_noise)

        def of_pair(params, opt_state, noise):
            def of_particle(sign, params, opt_state):
                perturbed = jax.tree.map(lambda m, e: m + sign * e, meta_params, noise)
                run = InnerRun(params, opt_state, particles.step)
                return loss_of_window(perturbed, hparams, episode, run)

            return jax.vmap(of_particle)(jnp.array([1, -1]), params, opt_state)

        losses, (metrics, runs) = jax.lax.map(
            lambda pair: of_pair(*pair),
            (particles.params, particles.opt_state, noise),
            # None is a plain loop: `lax.map` would otherwise vmap over groups of one.
            batch_size=None if pairs_at_a_time == 1 else pairs_at_a_time or num_pairs,
        )
        weights = (losses[:, 0] - losses[:, 1]) / (2 * sigma**2 * num_pairs)
        grads = jax.tree.map(lambda xi: jnp.tensordot(weights, xi, axes=1), noise_sum)
        metrics = jax.tree.map(lambda x: x.mean(axis=(0, 1)), metrics)
        run = Particles(runs.params, runs.opt_state, runs.step[0, 0], noise_sum, key)
        return grads, metrics, run

    return Windows(init, step)


def _draw(key: Key, meta_params: MetaParams, num_pairs: int, sigma: float) -> MetaParams:
    """Noise of deviation σ for the first particle of each pair, ``[P, ...]``."""
    keys = jax.random.split(key, num_pairs)
    normal = jax.vmap(lambda key: optax.tree.random_like(key, meta_params))(keys)
    return jax.tree.map(lambda e: sigma * e, normal)


def _add_noise(
    particles: Particles, fresh: MetaParams, reuse_noise: bool
) -> tuple[MetaParams, MetaParams]:
    """The noise of this window and the sum ξ over the run with it.

    Where noise is drawn once a run, that one noise is the sum.
    """
    starts = particles.step == 0
    noise, noise_sum = {}, {}
    for name, old in particles.noise_sum.items():
        if reuse_noise or name == "params":
            noise[name] = jax.tree.map(partial(jnp.where, starts), fresh[name], old)
            noise_sum[name] = noise[name]
        else:
            noise[name] = fresh[name]
            noise_sum[name] = jax.tree.map(
                lambda new, old: new + jnp.where(starts, 0, old), fresh[name], old
            )
    return noise, noise_sum
