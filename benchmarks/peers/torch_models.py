"""The models of metaopt as `torch.nn.Module`s that compute the same functions.

Parameters are loaded from metaopt's, so nothing is initialised here. Attention,
normalisation and activations are the forms that differentiate twice.
"""

# pyright: reportMissingImports=false

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.problems import NUM_CLASSES, VOCAB_SIZE, Sizes

RMS_EPSILON = 1e-6
NUM_CONV_LAYERS = 4


class MLP(nn.Module):
    """Two hidden layers with ReLU: `metaopt.models.mlp`."""

    def __init__(self, width: int):
        """``width`` of both hidden layers."""
        super().__init__()
        self.layer_0 = nn.Linear(1, width)
        self.layer_1 = nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[S, 1]`` to ``[S, 1]``."""
        return self.head(torch.relu(self.layer_1(torch.relu(self.layer_0(x)))))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int):
        """``width`` D."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[S, L, D]`` to ``[S, L, D]``."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPSILON) * self.scale


class Block(nn.Module):
    """Attention and MLP, each behind an RMS norm: `metaopt.models.transformer.Block`."""

    def __init__(self, width: int, num_heads: int):
        """``width`` D with ``num_heads`` H."""
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor) -> Tensor:
        """Maps the stream ``[S, L, D]`` to the next."""
        x = x + self.attention(self.attention_norm(x), cos, sin, hidden)
        up = self.up(self.mlp_norm(x))
        return x + self.mlp_out(F.gelu(up, approximate="tanh"))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor) -> Tensor:
        """Causal self-attention; ``hidden [L, L]`` is true for what a token may not see."""
        S, L, D = x.shape
        qkv = self.qkv(x).reshape(S, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]  # [S, H, L, F]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.attention_out((weights @ value).transpose(1, 2).reshape(S, L, D))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: ``x [S, H, L, F]``, ``cos`` and ``sin`` ``[L, F / 2]``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Transformer(nn.Module):
    """A language model over bytes: `metaopt.models.transformer`."""

    cos: Tensor
    sin: Tensor
    hidden: Tensor

    def __init__(self, sizes: Sizes):
        """Makes the layers, of the width, number, heads and length of the sizes."""
        super().__init__()
        width = sizes.width
        self.num_layers = sizes.num_layers
        self.embed = nn.Embedding(VOCAB_SIZE, width)
        for i in range(sizes.num_layers):
            self.add_module(f"layer_{i}", Block(width, sizes.num_heads))
        self.final_norm = RMSNorm(width)
        self.head = nn.Linear(width, VOCAB_SIZE, bias=False)
        head_size = width // sizes.num_heads
        frequency = 10_000.0 ** (-torch.arange(0, head_size, 2).float() / head_size)
        angle = torch.arange(sizes.length).float()[:, None] * frequency
        later = torch.ones(sizes.length, sizes.length).triu(1).bool()
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("hidden", later, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps int64 ``[S, L]`` to logits ``[S, L, V]``."""
        x = self.embed(tokens)
        for i in range(self.num_layers):
            x = getattr(self, f"layer_{i}")(x, self.cos, self.sin, self.hidden)
        return self.head(self.final_norm(x))


class ConvLayer(nn.Module):
    """3x3 convolution of stride 2, batch norm of the batch itself, ReLU."""

    def __init__(self, channels: int, filters: int):
        """From ``channels`` to ``filters``."""
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(filters, channels, 3, 3))
        self.scale = nn.Parameter(torch.ones(filters))
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[S, C, size, size]`` to ``[S, filters, ceil(size / 2), ...]``, 'SAME' padding."""
        before, after = (0, 1) if x.shape[-1] % 2 == 0 else (1, 1)
        x = F.conv2d(F.pad(x, (before, after, before, after)), self.kernel, stride=2)
        return torch.relu(F.batch_norm(x, None, None, self.scale, self.bias, training=True))


class ConvNet(nn.Module):
    """Four layers, a mean over positions and a linear head: `metaopt.models.conv`."""

    def __init__(self, filters: int):
        """``filters`` in every layer."""
        super().__init__()
        for i in range(NUM_CONV_LAYERS):
            self.add_module(f"layer_{i}", ConvLayer(filters if i else 1, filters))
        self.head = nn.Linear(filters, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``[S, 1, size, size]`` to logits ``[S, V]``."""
        for i in range(NUM_CONV_LAYERS):
            x = getattr(self, f"layer_{i}")(x)
        return self.head(x.mean((2, 3)))


def make_module(sizes: Sizes, params: dict[str, np.ndarray]) -> nn.Module:
    """The module of a problem with metaopt's parameters in it."""
    if sizes.name == "sinusoid":
        module: nn.Module = MLP(sizes.width)
    elif sizes.name == "lm":
        module = Transformer(sizes)
    else:
        module = ConvNet(sizes.width)
    module.load_state_dict(dict(as_torch(path, value) for path, value in params.items()))
    return module


def as_torch(path: str, value: np.ndarray) -> tuple[str, Tensor]:
    """A parameter by torch's name and in its layout (outputs first)."""
    *parents, name = path.split("/")
    if value.ndim == 4:  # height, width, in, out
        value = value.transpose(3, 2, 0, 1)
    elif name == "kernel":
        name, value = "weight", value.T
    elif name == "embedding":
        name = "weight"
    return ".".join([*parents, name]), torch.from_numpy(np.array(value, order="C"))


def make_loss(sizes: Sizes):
    """``(outputs, targets) -> scalar``: mean squared error or cross-entropy in nats."""
    if sizes.name == "sinusoid":
        return F.mse_loss

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

    return cross_entropy


def as_tensors(sizes: Sizes, batch: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[T, S, ...]`` as torch takes them: channels first, int64 labels."""
    inputs, targets = (torch.from_numpy(np.array(array)) for array in batch)
    if sizes.name == "omniglot":
        inputs = inputs.movedim(-1, -3).contiguous()
    as_labels = {torch.int32: torch.int64}
    inputs = inputs.to(as_labels.get(inputs.dtype, inputs.dtype))
    return inputs, targets.to(as_labels.get(targets.dtype, targets.dtype))
