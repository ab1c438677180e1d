"""What of a transformer adapts, and losses whose other parameters are arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import (
    Batch,
    FitConfig,
    InnerLoop,
    Problem,
    adapt,
    evaluate,
    fit,
    learners,
    measure,
    meta_gradients,
)
from metaopt.errors import UserError
from metaopt.frozen import FrozenLoss, merge, prepared, unbound, whole
from metaopt.losses import next_token
from metaopt.models import TransformerConfig, transformer
from metaopt.models.adapters import AdapterConfig, adapting, extended, merged, split
from metaopt.optimizers.part import chosen, listing, on_part, path_of
from metaopt.rematerialization.plan import plan_for
from metaopt.sequence import decoding
from metaopt.streams.dynamic_evaluation import cut_segments, segment_loss
from metaopt.tasks import MarkovConfig, markov

CONFIG = TransformerConfig(
    vocab_size=5, width=8, num_layers=3, num_heads=2, activation="swiglu", biases="qkv"
)
MODEL = transformer(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
FAMILY = markov(MarkovConfig(vocab_size=5, num_support=2, num_query=2, length=6))
KINDS = {
    "all": {"embed", "layer_0", "layer_1", "layer_2", "final_norm", "head"},
    "blocks": {"layer_1", "layer_2", "final_norm"},
    "norms": {"layer_0", "layer_1", "layer_2", "final_norm"},
    "head": {"head"},
    "low_rank": {"layer_1", "layer_2"},
    "mlps": {"layer_1", "layer_2"},
    "second_mlp": {"layer_1", "layer_2"},
}

ADDS = ("low_rank", "second_mlp")


def made(kind, **fields):
    return split(AdapterConfig(kind=kind, blocks=2, rank=2, **fields), PARAMS, jax.random.key(1))


def problem_of(fast, loss_fn):
    return Problem(FAMILY, MODEL._replace(init=lambda key: fast), loss_fn)


@pytest.mark.parametrize("kind", KINDS)
def test_what_adapts_and_the_rest_are_the_model(kind):
    fast, frozen = made(kind)
    assert set(fast) == KINDS[kind]
    tokens = np.arange(10).reshape(2, 5) % 5
    found = MODEL.apply(merge(frozen, fast), tokens)
    np.testing.assert_array_equal(found, MODEL.apply(PARAMS, tokens))
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (fast, frozen, PARAMS)]
    assert sum(sizes[:2]) == sizes[2] + (sizes[0] if kind in ADDS else 0)
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(fast)}
    if kind == "norms":
        assert names == {"scale", "bias"}


def test_products_of_low_rank_are_those_of_the_sum():
    fast, frozen = made("low_rank", matrices=("qkv", "mlp_out"))
    assert {name for layer in fast.values() for name in layer} == {"qkv", "mlp_out"}
    fast = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), fast)
    whole, tokens = merge(frozen, fast), np.arange(10).reshape(2, 5) % 5
    beside, summed = MODEL.apply(whole, tokens), MODEL.apply(merged(whole), tokens)
    np.testing.assert_allclose(beside, summed, rtol=1e-5, atol=1e-5)
    assert np.abs(beside - MODEL.apply(PARAMS, tokens)).max() > 1e-2
    assert jax.tree.structure(merged(whole)) == jax.tree.structure(PARAMS)


def test_what_the_model_has_not_cannot_adapt():
    tied = transformer(TransformerConfig(vocab_size=5, width=8, tie_head=True))
    params = tied.init(jax.random.key(0))
    with pytest.raises(UserError, match="no head of its own"):
        split(AdapterConfig(kind="head"), params, jax.random.key(0))
    with pytest.raises(UserError, match="no matrix of gate"):
        split(AdapterConfig(matrices=("gate",)), params, jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_trunk_computed_ahead_changes_nothing(kind, scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    model = adapting(config, AdapterConfig(kind=kind, blocks=2, rank=2), PARAMS)
    assert (model.trunk is not None) == (kind not in ("all", "norms"))
    params = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(1)))
    tokens = np.arange(12).reshape(2, 6) % 5
    segments = cut_segments(tokens.ravel(), 3, context=2)
    for loss_fn, batch in (
        (next_token(model), Batch(tokens[:, :-1], tokens[:, 1:])),
        (segment_loss(model), Batch(segments.inputs, segments.targets)),
    ):
        ahead = prepared(loss_fn, batch)
        assert (ahead is batch) == (model.trunk is None)
        expected = loss_fn.loss_fn(merge(model.frozen, params), batch)
        np.testing.assert_allclose(loss_fn(params, ahead), expected, rtol=1e-6)
        np.testing.assert_allclose(loss_fn(params, batch), expected, rtol=1e-6)
        assert prepared(loss_fn, ahead) is ahead


def test_the_trunk_is_computed_once_and_not_differentiated():
    model = adapting(CONFIG, AdapterConfig(kind="blocks", blocks=1), PARAMS)
    loss_fn, params = next_token(model), model.init(jax.random.key(0))
    tokens = jnp.zeros((1, 4), jnp.int32)
    batch = Batch(tokens, tokens)
    inner = InnerLoop(num_steps=3)

    def cost(loss_fn):
        def adapted(params):
            return adapt(loss_fn, optax.sgd(0.1), params, batch, inner).params

        return measure.count_flops(adapted, params).total

    ahead = cost(loss_fn)
    plain = cost(lambda p, batch: loss_fn.loss_fn(merge(model.frozen, p), batch))
    below = measure.count_flops(lambda frozen: model.trunk(frozen, tokens), model.frozen).total
    assert below and plain - ahead == 2 * below


def test_the_start_is_the_model_and_its_key_draws_what_is_random():
    for kind in KINDS:
        model = adapting(CONFIG, AdapterConfig(kind=kind, blocks=2, rank=2), PARAMS)
        starts = [model.init(jax.random.key(seed)) for seed in (0, 0, 1)]
        alike = [jax.tree.map(np.array_equal, starts[0], other) for other in starts[1:]]
        assert all(jax.tree.leaves(alike[0]))
        assert all(jax.tree.leaves(alike[1])) == (kind not in ADDS)
        tokens = np.arange(10).reshape(2, 5) % 5
        found = model.apply(whole(model, starts[0]), tokens)
        np.testing.assert_array_equal(found, MODEL.apply(PARAMS, tokens))
        assert jax.tree.structure(starts[0]) == jax.tree.structure(made(kind)[0])


def test_a_model_in_bfloat16_adapts_in_float32():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    for kind in KINDS:
        model = adapting(config, AdapterConfig(kind=kind, blocks=2, rank=2), low)
        params = model.init(jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        tokens = np.arange(10).reshape(2, 5) % 5
        batch, inner = Batch(tokens[:, :-1], tokens[:, 1:]), InnerLoop(num_steps=3)
        adapted = adapt(next_token(model), optax.sgd(0.1), params, batch, inner)
        assert adapted.losses.dtype == np.float32 and adapted.losses[2] < adapted.losses[0]
        full = adapting(CONFIG, AdapterConfig(kind=kind, blocks=2, rank=2), PARAMS)
        same = adapt(next_token(full), optax.sgd(0.1), params, batch, inner)
        np.testing.assert_allclose(adapted.losses, same.losses, rtol=0.02)


@pytest.mark.parametrize("kind", ["norms", "all"])
def test_a_kept_state_of_the_memory_plan_is_what_adapts_alone(kind):
    model = adapting(CONFIG, AdapterConfig(kind=kind), PARAMS)
    learner, (bind, frozen) = learners.maml(), unbound(next_token(model))
    episode = jax.tree.map(lambda x: x[0], FAMILY.train.sample(jax.random.key(0), 1))
    meta_params = learner.init(model.init(jax.random.key(0)))
    hparams, steps = {"inner_learning_rate": jnp.float32(0.1)}, 32

    def function_of(kept):
        inner = InnerLoop(num_steps=steps, unroll=False, kept_states=kept)

        def estimate(meta_params, frozen):
            made = meta_gradients.mixed_mode(learner, bind(frozen), inner)
            return made(meta_params, hparams, episode, jax.random.key(0))[0]

        return estimate

    far, all_kept = (
        plan_for(function_of, kept, (meta_params, frozen), 1e9).predicted_bytes
        for kept in (10, steps)
    )
    size = sum(x.nbytes for x in jax.tree.leaves(meta_params))
    assert (all_kept - far) / (steps - 10) == pytest.approx(size, rel=0.3)


def test_text_is_generated_from_what_has_adapted():
    model = adapting(CONFIG, AdapterConfig(kind="head"), PARAMS)
    key = jax.random.key(0)
    found = decoding.generate(model, model.init(key), np.array([1, 2]), 5, key)
    np.testing.assert_array_equal(found, decoding.generate(MODEL, PARAMS, np.array([1, 2]), 5, key))


def test_a_training_is_that_of_a_closure():
    """On two devices, several steps a call."""
    fast, frozen = made("low_rank")
    plain, ahead = next_token(MODEL), adapting(CONFIG, AdapterConfig(blocks=2, rank=2), PARAMS)
    losses = (
        next_token(ahead),
        FrozenLoss(plain, frozen),
        lambda p, batch: plain(merge(frozen, p), batch),
    )
    config = FitConfig(num_steps=2, tasks_per_step=2, num_devices=2, steps_per_call=2)
    inner, learner = InnerLoop(num_steps=2), learners.maml()
    found = []
    for loss_fn in losses:
        problem = problem_of(fast, loss_fn)
        fitted = fit(problem, learner, meta_gradients.reverse, inner=inner, config=config)
        judged = evaluate(
            problem, learner, fitted.meta_params, fitted.hparams, inner=inner, num_episodes=4
        )
        found.append((fitted.meta_params, judged.losses))
    assert jax.tree.structure(found[0][0]["params"]) == jax.tree.structure(fast)
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[0], other
        )


def test_the_program_of_a_step_does_not_hold_the_frozen_parameters():
    fast, frozen = made("norms")

    class Stopped(Exception):
        pass

    def program(loss_fn, *given):
        def stop(training, config, directory):
            step = training.step_fn
            compiled = step if hasattr(step, "lower") else step.__wrapped__
            args = training.state, training.sample(0), *given
            raise Stopped(compiled.lower(*args).as_text())

        with pytest.raises(Stopped) as stopped:
            config = FitConfig(tasks_per_step=1, num_devices=1)
            fit(problem_of(fast, loss_fn), learners.maml(), config=config, train_fn=stop)
        return str(stopped.value)

    plain = next_token(MODEL)
    held = program(lambda p, batch: plain(merge(frozen, p), batch))
    given = program(FrozenLoss(plain, frozen), (frozen, ()))
    size = 8 * sum(x.size for x in jax.tree.leaves(frozen))  # hexadecimal digits
    assert len(held) - len(given) > size / 2


def test_other_frozen_parameters_are_another_training(tmp_path):
    fast, frozen = made("norms")
    config = FitConfig(num_steps=1, tasks_per_step=2, num_devices=1)
    for changed in (frozen, jax.tree.map(lambda x: x + 1, frozen)):
        problem = problem_of(fast, FrozenLoss(next_token(MODEL), changed))
        if changed is not frozen:
            with pytest.raises(UserError, match="what differs: frozen parameters"):
                fit(problem, learners.maml(), config=config, directory=tmp_path)
        else:
            fit(problem, learners.maml(), config=config, directory=tmp_path)


@pytest.mark.parametrize("estimator", ["mixed_mode", "first_order"])
def test_estimators_take_frozen_losses(estimator):
    fast, frozen = made("blocks")
    learner, inner = learners.meta_sgd(num_steps=2), InnerLoop(num_steps=2)
    episode = jax.tree.map(lambda x: x[0], FAMILY.train.sample(jax.random.key(0), 1))
    hparams = {"inner_learning_rate": jnp.float32(0.1)}
    estimate = getattr(meta_gradients, estimator)

    @jax.jit
    def found(fast, frozen):
        loss_fn = FrozenLoss(next_token(MODEL), frozen)
        return estimate(learner, loss_fn, inner)(
            learner.init(fast), hparams, episode, jax.random.key(0)
        )

    grads, metrics = found(fast, frozen)
    assert set(grads["params"]) == KINDS["blocks"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_adapts_is_chosen_by_its_path_and_the_rest_stays(kind):
    config = AdapterConfig(kind=kind, blocks=2, rank=2)
    params = extended(config, PARAMS, jax.random.key(1))
    tokens = np.arange(10).reshape(2, 5) % 5
    np.testing.assert_array_equal(MODEL.apply(params, tokens), MODEL.apply(PARAMS, tokens))
    adapts = config.adapts(CONFIG.num_layers)
    fast = made(kind)[0]
    found = {path_of(p) for p, _ in jax.tree.leaves_with_path(chosen(params, adapts))}
    assert found == {path_of(p) for p, _ in jax.tree.leaves_with_path(fast)}
    number = sum(x.size for x in jax.tree.leaves(fast))
    assert f"{number:,} of " in listing(params, adapts).splitlines()[-1]
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    moved = adapt(
        next_token(MODEL), on_part(optax.sgd(0.5), adapts), params, batch, InnerLoop(num_steps=2)
    ).params
    for (path, old), new in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(moved), strict=True
    ):
        has_moved = not np.array_equal(old, new)
        assert not has_moved or adapts(path_of(path))
    assert not np.allclose(MODEL.apply(moved, tokens), MODEL.apply(PARAMS, tokens))


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(UserError, match="nothing of the parameters is chosen"):
        on_part(optax.sgd(0.1), lambda path: False).init(PARAMS)
