"""Finite scalar quantisation (FSQ): each channel is bounded and rounded to a few levels.

Mentzer et al., arXiv 2309.15505. A vector of the channels' levels is a code. No codebook is
learned, so none can collapse. Gradients pass through the rounding unchanged.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MARGIN = 1e-3
"""Share by which the bounds lie beyond the outermost levels, so that these are reached."""


def quantize(z: Float[Array, "*b z"], levels: Sequence[int]) -> Float[Array, "*b z"]:
    """Quantised values in [-1, 1], with straight-through gradients; float32.

    Args:
      z: unbounded values.
      levels: number of levels of each channel.
    """
    half, offset, width = (jnp.asarray(x, jnp.float32) for x in _bounds(levels))
    shape = (1,) * (z.ndim - 1) + (-1,)
    half, offset, width = (x.reshape(shape) for x in (half, offset, width))
    shift = jnp.arctanh(offset / half)
    bounded = half * jnp.tanh(z.astype(jnp.float32) + shift) - offset
    rounded = jax.lax.stop_gradient(jnp.round(bounded))
    return (rounded + (bounded - jax.lax.stop_gradient(bounded))) / width


def codes(quantized: Float[Array, "*b z"], levels: Sequence[int]) -> Int[Array, "*b"]:
    """The index of each vector of quantised values, from 0 to ``prod(levels) - 1``."""
    _, _, width = _bounds(levels)
    bases = np.cumprod([1, *levels[:-1]])
    shape = (1,) * (quantized.ndim - 1) + (-1,)
    width = jnp.asarray(width, jnp.float32).reshape(shape)
    digits = jnp.round((quantized + 1.0) * width).astype(jnp.int32)
    return jnp.sum(digits * jnp.asarray(bases, jnp.int32).reshape(shape), axis=-1)


def _bounds(levels: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half the range before rounding, its offset for even numbers, and half the levels' width."""
    levels = np.asarray(levels, np.float64)
    half = (levels - 1) * (1 + MARGIN) / 2
    return half, np.where(levels % 2 == 0, 0.5, 0.0), levels // 2


def num_codes(levels: Sequence[int]) -> int:
    """The number of codes."""
    return math.prod(levels)
