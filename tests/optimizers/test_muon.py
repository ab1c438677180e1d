import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.optimizers.muon import RMS, scale_by_muon

KEYS = iter(jax.random.split(jax.random.key(0), 20))


def normal(*shape):
    return jax.random.normal(next(KEYS), shape)


GRADIENT = {
    "params": {
        "embed": {"embedding": normal(9, 4)},
        "layers": {"up": {"kernel": normal(3, 4, 8)}, "bias": normal(5)},
        "layer_0": {"kernel": normal(3, 3, 2, 6)},
        "layer_1": {"kernel": normal(8, 4)},
        "head": {"kernel": normal(4, 9)},
    },
    "log_rates": {"layer_1": normal(8, 4)},
}


def step(transform, gradient=GRADIENT):
    return transform.update(gradient, transform.init(gradient), gradient)[0]


def as_matrix(x):
    return np.asarray(x).reshape(-1, x.shape[-1])


def test_a_matrix_of_a_hidden_layer_has_equal_singular_values_of_one_size():
    update = step(scale_by_muon())["params"]
    kernels = [as_matrix(update[name]["kernel"]) for name in ("layer_0", "layer_1")]
    for matrix in [*kernels, *map(as_matrix, update["layers"]["up"]["kernel"])]:
        values = np.linalg.svd(matrix, compute_uv=False) / max(matrix.shape) ** 0.5 / RMS
        # Five steps of the iteration bring the singular values to between 0.7 and 1.2.
        assert values.min() > 0.6 and values.max() < 1.3
        np.testing.assert_allclose(matrix.std(), RMS, rtol=0.3)


def test_it_descends_in_the_direction_of_the_gradient():
    update, gradient = (x["params"]["layer_1"]["kernel"] for x in (step(scale_by_muon()), GRADIENT))
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    polar = RMS * 8**0.5 * u @ v
    assert np.sum(polar * update) > 0.95 * np.linalg.norm(polar) * np.linalg.norm(update)


def test_a_matrix_of_a_stack_goes_for_itself():
    both = step(scale_by_muon())["params"]["layers"]["up"]["kernel"]
    for i in range(3):
        alone = {"params": {"up": GRADIENT["params"]["layers"]["up"]["kernel"][i]}}
        np.testing.assert_allclose(step(scale_by_muon(), alone)["params"]["up"], both[i], atol=1e-5)


def test_all_else_goes_by_adam():
    muon, adam = step(scale_by_muon()), step(optax.scale_by_adam(nesterov=True))
    for name in ("embed", "head"):
        jax.tree.map(np.testing.assert_allclose, muon["params"][name], adam["params"][name])
    np.testing.assert_allclose(muon["params"]["layers"]["bias"], adam["params"]["layers"]["bias"])
    jax.tree.map(np.testing.assert_allclose, muon["log_rates"], adam["log_rates"])


def test_no_gradient_is_no_step():
    nothing = jax.tree.map(jnp.zeros_like, GRADIENT)
    assert all(not np.any(x) for x in jax.tree.leaves(step(scale_by_muon(), nothing)))
