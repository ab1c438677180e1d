import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.learners import anil, maml, meta_sgd, per_layer_per_step, per_step_parameters
from metaopt.losses import regression
from metaopt.meta_gradients import reverse
from metaopt.models import TransformerConfig, mlp, transformer
from metaopt.optimizers.part import on_part
from metaopt.types import Batch

RATE = 0.3
HPARAMS = {"inner_learning_rate": jnp.float32(RATE)}
SUPPORT = quadratic.episode().support
MLP = mlp(3, 1, hidden=(4,))
MLP_PARAMS = MLP.init(jax.random.key(0))


def columns(batch):
    return Batch(batch.inputs, batch.targets[:, None])


def path(learner, meta_params, loss, support, num_steps):
    """All of the parameters ``θ_0 ... θ_K`` of the inner loop."""
    adapted = adapt(
        loss,
        learner.inner_opt(meta_params, HPARAMS),
        learner.start(meta_params),
        support,
        InnerLoop(num_steps=num_steps),
        probe=lambda params, _: params,
    )
    return jax.tree.map(
        lambda probes, last: np.concatenate([probes, last[None]]), adapted.probes, adapted.params
    )


@pytest.mark.parametrize("inner_optimizer", [optax.sgd, optax.adam])
@pytest.mark.parametrize(
    "make",
    [
        meta_sgd,
        lambda inner_optimizer: meta_sgd(inner_optimizer, num_steps=2),
        lambda inner_optimizer: per_layer_per_step(inner_optimizer, num_steps=2),
    ],
)
def test_rates_that_have_learned_nothing_make_maml(make, inner_optimizer):
    plain, learner = maml(inner_optimizer), make(inner_optimizer)
    paths = [
        path(each, each.init(quadratic.PARAMS), quadratic.loss, SUPPORT, 3)["head"]
        for each in (plain, learner)
    ]
    np.testing.assert_allclose(*paths, rtol=1e-5)
    assert set(learner.init(quadratic.PARAMS)) == {"params", *learner.learned}


@pytest.mark.parametrize("learner", [meta_sgd(num_steps=2), per_layer_per_step(num_steps=2)])
def test_each_step_has_its_rate_and_steps_past_the_last_use_the_last(learner):
    meta_params = learner.init(quadratic.PARAMS)
    factors = np.array([0.5, 1.5], np.float32)
    meta_params["log_rates"] = jax.tree.map(
        lambda r: np.log(factors).reshape(2, *[1] * (r.ndim - 1)) + jnp.zeros(r.shape),
        meta_params["log_rates"],
    )
    found = path(learner, meta_params, quadratic.loss, SUPPORT, 4)["head"]
    rates = RATE * factors[[0, 1, 1, 1]]
    np.testing.assert_allclose(found, quadratic.descend(quadratic.START, SUPPORT, rates), rtol=1e-5)


def test_shared_rates_are_a_diagonal_in_every_step():
    learner = meta_sgd()
    factors = np.array([0.2, 1.0, 2.0])
    log_rates = {"head": jnp.asarray(np.log(factors), jnp.float32)}
    meta_params = {"params": quadratic.PARAMS, "log_rates": log_rates}
    found = path(learner, meta_params, quadratic.loss, SUPPORT, 3)["head"]
    expected = quadratic.descend(quadratic.START, SUPPORT, [RATE * factors] * 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_layers_rate_reaches_that_layer_only():
    learner = per_layer_per_step(num_steps=1)
    meta_params = learner.init(MLP_PARAMS)
    assert jax.tree.map(jnp.shape, meta_params["log_rates"]) == {"layer_0": (1,), "head": (1,)}
    loss, support = regression(MLP), columns(SUPPORT)
    ordinary = path(learner, meta_params, loss, support, 1)
    meta_params["log_rates"]["layer_0"] = jnp.log(jnp.array([3.0]))
    quicker = path(learner, meta_params, loss, support, 1)
    np.testing.assert_array_equal(quicker["head"]["kernel"], ordinary["head"]["kernel"])
    for before, after in zip(
        jax.tree.leaves(ordinary["layer_0"]), jax.tree.leaves(quicker["layer_0"]), strict=True
    ):
        np.testing.assert_allclose(after[1] - after[0], 3 * (before[1] - before[0]), atol=1e-6)


def test_per_step_parameters_are_those_of_their_step_and_nothing_else_moves_them():
    # The bias of the head has values of its own; the rest is adapted as ever.
    def which(params):
        return {
            layer: {name: (layer, name) == ("head", "bias") for name in params[layer]}
            for layer in params
        }

    learner = per_step_parameters(per_layer_per_step(num_steps=2), which, num_steps=2)
    meta_params = learner.init(MLP_PARAMS)
    assert set(meta_params) == {"params", *learner.learned}
    later = meta_params["later"]["head/bias"]
    np.testing.assert_array_equal(later, np.stack([MLP_PARAMS["head"]["bias"]] * 2))
    meta_params["later"]["head/bias"] = jnp.array([[3.0], [5.0]])
    meta_params["params"]["head"]["bias"] = jnp.array([1.0])
    loss, support = regression(MLP), columns(SUPPORT)
    found = path(learner, meta_params, loss, support, 3)
    np.testing.assert_allclose(found["head"]["bias"], [[1.0], [3.0], [5.0], [5.0]], rtol=1e-6)

    params = meta_params["params"]
    gradient = jax.jit(jax.grad(loss))
    for k, bias in enumerate([1.0, 3.0]):  # by hand
        params = params | {"head": params["head"] | {"bias": jnp.array([bias])}}
        grads = gradient(params, support)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        np.testing.assert_allclose(
            found["head"]["kernel"][k + 1], params["head"]["kernel"], rtol=1e-5
        )


def test_every_steps_parameters_have_the_gradient_of_their_own_losses():
    def loss(params, batch):
        return quadratic.loss(params, batch) * params["scale"][0]

    learner = per_step_parameters(
        maml(), lambda params: {name: name == "scale" for name in params}, num_steps=2
    )
    meta_params = learner.init(quadratic.PARAMS | {"scale": jnp.array([2.0])})
    estimate = reverse(learner, loss, InnerLoop(num_steps=2))
    episode = quadratic.episode()

    def by_hand(scales):
        w = jnp.asarray(quadratic.START)
        for scale in scales[:2]:
            gradient = jax.grad(lambda w: quadratic.loss({"head": w}, episode.support))(w)
            w = w - RATE * scale * gradient
        return scales[2] * quadratic.loss({"head": w}, episode.query)

    expected = jax.jit(jax.grad(by_hand))(jnp.full((3,), 2.0))
    grads, _ = jax.jit(estimate)(meta_params, HPARAMS, episode, jax.random.key(0))
    found = jnp.append(grads["params"]["scale"], grads["later"]["scale"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_anil_adapts_the_head_alone_and_learns_the_body_outside():
    loss, support = regression(MLP), columns(SUPPORT)
    learner = anil(MLP)
    found = path(learner, learner.init(MLP_PARAMS), loss, support, 2)
    for leaf in jax.tree.leaves(found["layer_0"]):
        np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * 3))

    def head_loss(head, batch):
        return loss({**MLP_PARAMS, "head": head}, batch)

    head = path(maml(), {"params": MLP_PARAMS["head"]}, head_loss, support, 2)
    chex.assert_trees_all_close(found["head"], head, rtol=1e-5)

    episode = jax.tree.map(jnp.asarray, quadratic.episode())
    episode = episode._replace(support=support, query=columns(episode.query))
    estimate = jax.jit(reverse(learner, loss, InnerLoop(num_steps=2)))
    grads, _ = estimate(learner.init(MLP_PARAMS), HPARAMS, episode, jax.random.key(0))
    assert np.abs(grads["params"]["layer_0"]["kernel"]).max() > 1e-3


def test_anil_refuses_a_tied_head():
    with pytest.raises(UserError, match="untie it"):
        anil(transformer(TransformerConfig(vocab_size=5, width=4, num_heads=2, tie_head=True)))


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.polyak_sgd(), optax.adamw(0.1)])
def test_an_optimizer_on_some_entries_is_the_same_as_on_these_alone(optimizer):
    # A line search is given the value, the gradient and the function, of the head alone.
    loss = regression(MLP)

    def whole(params):
        return loss(params, columns(SUPPORT))

    def steps(optimizer, loss, params):
        optimizer, state = optax.with_extra_args_support(optimizer), optimizer.init(params)
        for _ in range(2):
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            params = optax.apply_updates(params, updates)
        return params

    body = {"layer_0": MLP_PARAMS["layer_0"]}
    head = {"head": MLP_PARAMS["head"]}
    found = jax.jit(
        lambda: steps(on_part(optimizer, lambda path: path[0] == "head"), whole, MLP_PARAMS)
    )()
    expected = jax.jit(lambda: steps(optimizer, lambda h: whole(body | h), head))()
    chex.assert_trees_all_equal(found["layer_0"], MLP_PARAMS["layer_0"])
    chex.assert_trees_all_close(found["head"], expected["head"], rtol=1e-5)


@pytest.mark.parametrize(
    ("learner", "other"),
    [
        (meta_sgd(num_steps=2), meta_sgd()),
        (meta_sgd(), meta_sgd(num_steps=2)),
        (per_layer_per_step(num_steps=2), meta_sgd(num_steps=2)),
    ],
)
def test_rates_of_another_learner_are_refused_and_not_broadcast(learner, other):
    with pytest.raises(AssertionError, match=r"rank|shape"):
        path(learner, other.init(quadratic.PARAMS), quadratic.loss, SUPPORT, 2)
