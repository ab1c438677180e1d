"""Muon on what is a matrix of a hidden layer, Adam on all else."""

import jax
import optax
from optax import contrib

from metaopt.types import Array, PyTree

NOT_HIDDEN = ("embed", "head")
RMS = 0.2


def scale_by_muon() -> optax.GradientTransformation:
    """Momentum of which every matrix is replaced by the nearest with equal singular values.

    It is for meta-parameters: of ``params`` the matrices of hidden layers are taken so, in stacks
    ``[L, in, out]`` each for itself, and kernels ``[H, W, in, out]`` as matrices
    ``[H · W · in, out]``; a kernel of another kind with three axes would be taken for a stack.
    Embedding, head, vectors, and what is learned beside the parameters go by Adam. A matrix's
    update has a root mean square of 0.2, about that of Adam's: both go by one rate and one
    decay, and a rate that was found for AdamW will do for Muon.

    References:
      Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al.,
      2025, "Muon is Scalable for LLM Training", section 2.2, for the root mean square.
    """

    def matrices(meta_params: PyTree) -> PyTree:
        return jax.tree.map_with_path(_matrix, meta_params)

    both = contrib.muon(1.0, muon_weight_dimension_numbers=matrices, consistent_rms=RMS)
    return optax.chain(both, optax.scale(-1.0))  # ascent, as optax's other ``scale_by`` are


def _matrix(path: tuple, x: Array) -> contrib.MuonDimensionNumbers | None:
    """Which axes are summed over in a product with the matrix; None where it is none."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if names[0] != "params" or x.ndim < 2 or any(name in NOT_HIDDEN for name in names):
        return None
    inputs = (1,) if x.ndim == 3 else tuple(range(x.ndim - 1))
    return contrib.MuonDimensionNumbers(inputs, x.ndim - 1)
