"""Convolutions that train fast on a CPU.

XLA's CPU backend runs a convolution and its gradient by the input at the speed of a matrix product.
Two things are slow, and written differently here on a single CPU device:

- The gradient by the kernel, which XLA computes as a convolution whose window is the whole image.
  Here it is one matrix product per tap of the kernel, for a few rows at a time: the nine products
  of a 3 x 3 kernel find these in the cache.
- A convolution of repeated pixels. Each of the four phases of the output sees only 2 x 2 different
  pixels, so it is a 2 x 2 convolution of the pixels before repetition, with sums of the kernel's
  taps: 4/9 of the operations.

Accelerators, meshes of several CPU devices, and images of few pixels, whose programs would take
longer to compile and no less to run, have XLA's own convolutions.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kontext_jax.sharding import platform

BLOCK = 2048
"""Largest number of positions in a block of rows: 256 KiB of 32 channels in float32."""

MIN_PIXELS = 64**2
"""Fewest pixels of an image for this module's forms."""

Pair = tuple[int, int]


def is_faster_here(x: Float[Array, "B h w i"]) -> bool:
    """Whether this module's forms are faster: on one CPU device, for images large enough."""
    mesh = jax.sharding.get_abstract_mesh()
    is_single_cpu = platform() == "cpu" and (mesh.empty or mesh.size == 1)
    return is_single_cpu and x.shape[1] * x.shape[2] >= MIN_PIXELS


def convolve(
    x: Float[Array, "B _ _ i"],
    kernel: Float[Array, "m n i o"],
    strides: Pair,
    padding: Sequence[Pair],
    **kwargs,
) -> Float[Array, "B _ _ o"]:
    """`jax.lax.conv_general_dilated` of NHWC images, for an `nnx.Conv` without dilation or groups.

    Args:
      x: the images.
      kernel: the kernel.
      strides: of the rows and of the columns.
      padding: before and after the rows, and the columns.
      kwargs: the other arguments of `jax.lax.conv_general_dilated`.
    """
    if is_faster_here(x):
        return _convolve(x, kernel, tuple(strides), tuple(padding))
    return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)


def convolve_repeated(
    x: Float[Array, "B h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "B H W o"]:
    """Repeats each pixel 2 x 2, then convolves with padding 1; in ``x``'s dtype.

    For example, the even rows of the output see the row above with ``kernel[0]`` and their own row
    with ``kernel[1] + kernel[2]``.
    """
    batch, height, width, _ = x.shape

    def phase(row: int, column: int) -> Float[Array, "B h w o"]:
        taps = _phase_taps(_phase_taps(kernel, row, axis=0), column, axis=1)
        padding = ((1 - row, row), (1 - column, column))
        return _convolve(x, taps.astype(x.dtype), (1, 1), padding)

    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in range(2)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _phase_taps(kernel: Array, phase: int, axis: int) -> Array:
    """The two taps, along ``axis``, that the even (0) or the odd (1) outputs see."""
    first, second, third = jnp.split(kernel, 3, axis)
    taps = [first + second, third] if phase else [first, second + third]
    return jnp.concatenate(taps, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, strides: Pair, padding: tuple[Pair, Pair]):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(x, kernel, strides, padding):
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, grad):
    x, kernel = residuals
    _, by_x = jax.vjp(lambda x: _convolve.fun(x, kernel, strides, padding), x)
    return *by_x(grad), _by_kernel(x, grad, kernel, strides, padding)


_convolve.defvjp(_forward, _backward)


def _by_kernel(x, grad, kernel, strides: Pair, padding: tuple[Pair, Pair]):
    """The gradient by the kernel, accumulated in float32."""
    (height, width, inputs, outputs), (batch, rows, columns, _) = kernel.shape, grad.shape
    fits = (n for n in range(1, rows + 1) if rows % n == 0 and batch * n * columns <= BLOCK)
    block = max(fits, default=1)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    spans = [(n - 1) * stride + 1 for n, stride in zip((block, columns), strides, strict=True)]

    def add_block(i, total):
        pixels = lax.dynamic_slice_in_dim(x, i * block * strides[0], spans[0] + height - 1, axis=1)
        grads = lax.dynamic_slice_in_dim(grad, i * block, block, axis=1)
        grads = grads.reshape(-1, outputs).astype(jnp.float32)

        def tap(index):
            start = (0, index // width, index % width, 0)
            seen = lax.dynamic_slice(pixels, start, (batch, *spans, inputs))
            seen = seen[:, :: strides[0], :: strides[1]].reshape(-1, inputs).astype(jnp.float32)
            # A matrix product is faster if its second factor is the wider one.
            return seen.T @ grads if inputs <= outputs else (grads.T @ seen).T

        return total + lax.map(tap, jnp.arange(height * width))

    zeros = jnp.zeros((height * width, inputs, outputs), jnp.float32)
    total = lax.fori_loop(0, rows // block, add_block, zeros)
    return total.reshape(kernel.shape).astype(kernel.dtype)
