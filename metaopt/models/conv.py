"""The four-layer convolutional network of few-shot classification."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.models.linen import from_linen
from metaopt.models.primitives import VARIANCE_EPSILON, batch_norm, matmul
from metaopt.ranges import Vocabulary, Width, check_value
from metaopt.types import Array, Model, Params

NUM_LAYERS = 4


def _same_padding(size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that a window of 3 gives ``ceil(size / stride)`` outputs."""
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


def conv3x3(x: Array, kernel: Array, stride: int = 1) -> Array:
    """A 3x3 convolution with 'SAME' padding, as nine shifted slices and one matrix product.

    It equals `jax.lax.conv_general_dilated`. A kernel for each task, though, makes
    that one a grouped convolution, which CPUs are slow at and whose second
    derivative is slower still; a batched matrix product is fast everywhere.

    Args:
      x: ``[S, height, width, C_in]``.
      kernel: ``[3, 3, C_in, C_out]``.
      stride: step in both directions.

    Returns:
      ``[S, ceil(height / stride), ceil(width / stride), C_out]``.
    """
    patches = _patches(x, stride).reshape(-1, 9 * x.shape[-1])
    # All positions in one axis: the gradient of a product with several is slow on CPU.
    product = matmul(patches, kernel.reshape(-1, kernel.shape[-1]))
    return product.reshape(x.shape[0], *(-(-size // stride) for size in x.shape[1:3]), -1)


def _patches(x: Array, stride: int) -> Array:
    """The 3x3 neighbourhoods, ``[S, rows, columns, 9 C]``, with zeros around the image.

    At stride 2 two neighbouring columns are one stretch of memory: six slices do, of pairs and
    of single ones. The barrier keeps the compiler from computing ``x`` once for every slice.
    """
    S, height, width, C = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    above, below = _same_padding(height, stride)
    before, after = _same_padding(width, stride)
    if stride == 2:
        after = 2 * (columns + 1) - width - before
    padded = jnp.pad(x, ((0, 0), (above, below), (before, after), (0, 0)))
    padded = jax.lax.optimization_barrier(padded)
    lines = [padded[:, i : i + (rows - 1) * stride + 1 : stride] for i in range(3)]
    if stride == 2:
        pairs = [line.reshape(S, rows, columns + 1, 2 * C) for line in lines]
        parts = [part for pair in pairs for part in (pair[:, :, :-1], pair[:, :, 1:, :C])]
    else:
        parts = [line[:, :, j : j + columns] for line in lines for j in range(3)]
    return jnp.concatenate(parts, axis=-1)


def normalise(x: Array, scale: Array, bias: Array, num_reference: int | None = None) -> Array:
    """Batch norm of each channel of ``[S, height, width, C]`` by the statistics of this batch.

    With ``num_reference`` they are those of that number of first examples alone.
    """
    scale, bias = scale[None], bias[None]
    if num_reference is None:
        return batch_norm(x.reshape(-1, x.shape[-1]), scale, bias).reshape(x.shape)
    reference = x[:num_reference]
    mean = jnp.mean(reference, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean((reference - mean) ** 2, axis=(0, 1, 2), keepdims=True)
    normalised = (x - mean) * jax.lax.rsqrt(variance + VARIANCE_EPSILON)
    return normalised * scale[None, None] + bias[None, None]


def max_pool2x2(x: Array) -> Array:
    """The maxima of 2x2 blocks, leaving out an odd last row or column.

    By comparisons, whose derivatives of any order are plain operations. That of a reduction
    looks for what equals the maximum, and is NaN if the compiler computes ``x`` twice, with other
    roundings, and nothing does.
    """
    S, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    blocks = x[:, : 2 * rows, : 2 * columns].reshape(S, rows, 2, columns, 2, channels)
    upper, lower = blocks[:, :, 0], blocks[:, :, 1]
    highest = jnp.where(upper >= lower, upper, lower)
    left, right = highest[:, :, :, 0], highest[:, :, :, 1]
    return jnp.where(left >= right, left, right)


class ConvLayer(nn.Module):
    """Convolution, batch norm, ReLU, and a halving of height and width."""

    filters: int
    downsample: str
    num_reference: int | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[S, height, width, C_in]`` to ``[S, height / 2, width / 2, filters]``."""
        shape = (3, 3, x.shape[-1], self.filters)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.filters,))
        bias = self.param("bias", nn.initializers.zeros, (self.filters,))
        stride = 2 if self.downsample == "stride" else 1
        x = conv3x3(x, kernel, stride)
        x = jax.nn.relu(normalise(x, scale, bias, self.num_reference))
        return x if self.downsample == "stride" else max_pool2x2(x)


class ConvNet(nn.Module):
    """Four layers ``layer_0 ... layer_3`` and a linear ``head``."""

    num_classes: int
    filters: int
    downsample: str
    num_reference: int | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps images ``[S, height, width, C]`` to logits ``[S, V]``."""
        for i in range(NUM_LAYERS):
            layer = ConvLayer(self.filters, self.downsample, self.num_reference, name=f"layer_{i}")
            x = layer(x)
        if self.downsample == "stride":
            x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


def conv(
    image_shape: tuple[int, int, int],
    num_classes: int,
    filters: int = 64,
    downsample: Literal["stride", "max_pool"] = "stride",
    num_reference: int | None = None,
) -> Model:
    """Four times [3x3 convolution, batch norm, ReLU, halving], then a linear head.

    Batch norm is **transductive**, in training and in evaluation: each channel is
    normalised by the mean and variance of the batch that the model is given, and
    no running statistics are kept. The prediction for one query image therefore
    depends on the other images of its batch; published MAML results share this. With
    ``num_reference`` the statistics are those of that number of first images of a batch, whatever
    comes after them: the same parameters, asked not to look at the other images.
    The convolutions have no bias, since batch norm would take it away.

    Args:
      image_shape: height, width and channels of an image.
      num_classes: V.
      filters: channels of every layer. Finn et al. use 64 for Omniglot and 32 for
        miniImageNet.
      downsample: ``'stride'``, convolutions of stride 2 and a mean over what is
        left, which Finn et al. use on Omniglot; or ``'max_pool'``, 2x2 pooling and
        a head on every position, the network of Vinyals et al.
      num_reference: how many first images of a batch batch norm takes its statistics from;
        None for all of them.

    Returns:
      A model from float32 ``[S, height, width, channels]`` to logits ``[S, V]``.

    Raises:
      UserError: if ``downsample`` is unknown, there are fewer than 2 classes or no
        filters, or the images are too small to be pooled four times.

    References:
      Vinyals et al., 2016. Matching Networks for One Shot Learning.
      arXiv:1606.04080, section 4.1.
      Finn, Abbeel, Levine, 2017. arXiv:1703.03400, section 5.2.
    """
    check_value("downsample", downsample, Literal["stride", "max_pool"])
    check_value("num_classes", num_classes, Vocabulary)
    check_value("filters", filters, Width)
    if downsample == "max_pool" and min(image_shape[:2]) < 2**NUM_LAYERS:
        raise UserError(
            f"images of {image_shape[0]}x{image_shape[1]} are too small for four poolings: "
            f"use at least {2**NUM_LAYERS}x{2**NUM_LAYERS}, or downsample='stride'"
        )
    network = ConvNet(num_classes, filters, downsample, num_reference)
    return from_linen(network, jnp.zeros((1, *image_shape)))


def is_normalisation(params: Params) -> Params:
    """Which parameters of `conv` are batch norm's scale and bias: a bool in place of each."""

    def name(path: tuple) -> str:
        return jax.tree_util.keystr(path[-1:], simple=True)

    leaves = jax.tree.leaves_with_path(params)
    layers = {path[:-1] for path, _ in leaves if name(path) == "scale"}
    return jax.tree.map_with_path(
        lambda path, _: path[:-1] in layers and name(path) in ("scale", "bias"), params
    )
