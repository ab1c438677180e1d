"""The pieces of the convolutional network against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import conv
from metaopt.models.conv import conv3x3, is_normalisation, max_pool2x2, normalise

KEY = jax.random.key(0)


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_and_a_product_equal_a_convolution(stride):
    image = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))  # odd and even, padded differently
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    expected = jax.lax.conv_general_dilated(
        image, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(conv3x3(image, kernel, stride), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_gives_each_channel_the_mean_and_deviation_it_is_told():
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (4, 5, 5, 2))
    out = normalise(x, scale=jnp.array([1.0, 2.0]), bias=jnp.array([0.0, -1.0]))
    np.testing.assert_allclose(out.mean(axis=(0, 1, 2)), [0, -1], atol=1e-5)
    np.testing.assert_allclose(out.std(axis=(0, 1, 2)), [1, 2], rtol=1e-4)


def test_pooling_takes_the_maxima_of_blocks():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    window, strides = (1, 2, 2, 1), (1, 2, 2, 1)
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")
    np.testing.assert_array_equal(max_pool2x2(x), expected)


@pytest.mark.parametrize("downsample, features", [("stride", 4), ("max_pool", 2 * 4)])
def test_the_network_does_not_see_the_contrast_of_its_batch(downsample, features):
    model = conv((16, 32, 1), 5, filters=4, downsample=downsample)
    params = model.init(jax.random.key(0))
    assert params["head"]["kernel"].shape == (features, 5)
    images = 10 * jax.random.normal(jax.random.key(1), (3, 16, 32, 1))
    apply = jax.jit(model.apply)
    logits = apply(params, images)
    assert logits.shape == (3, 5)
    np.testing.assert_allclose(apply(params, 2 * images), logits, rtol=1e-3, atol=1e-3)
    alone = apply(params, images[:1])
    assert np.abs(alone - logits[:1]).max() > 1e-2  # transductive: the others matter


def test_statistics_of_the_first_images_make_the_others_independent():
    whole, by_two = (conv((8, 8, 1), 3, filters=2, num_reference=n) for n in (None, 2))
    params = jax.jit(whole.init)(KEY)
    shapes = jax.tree.map(jnp.shape, (params, jax.eval_shape(by_two.init, KEY)))
    assert shapes[0] == shapes[1]
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def outputs(params):
        few, others = images[:2], images[jnp.array([0, 1, 3])]
        three = by_two.apply(params, images), by_two.apply(params, others), whole.apply(params, few)
        return *three, whole.apply(params, images)

    together, without_one, first_two, by_all = outputs(params)
    np.testing.assert_allclose(together[:2], first_two, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(together[3], without_one[2], rtol=1e-4, atol=1e-6)
    assert np.abs(by_all[3] - together[3]).max() > 1e-2


def test_normalisation_is_the_scales_and_biases_of_the_layers():
    mask = is_normalisation(jax.eval_shape(conv((8, 8, 1), 3, filters=2).init, KEY))
    layer = {"kernel": False, "scale": True, "bias": True}
    layers = {f"layer_{i}": layer for i in range(4)}
    assert mask == layers | {"head": {"kernel": False, "bias": False}}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: conv((28, 28, 1), 1), "num_classes is 1"),
        (lambda: conv((28, 28, 1), 5, downsample="mean"), "'mean'"),
        (lambda: conv((15, 28, 1), 5, downsample="max_pool"), "15x28"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
