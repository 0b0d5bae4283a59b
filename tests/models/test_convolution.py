"""The CPU's convolutions against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kontext_jax.models import convolution
from kontext_jax.sharding import MESH_AXES

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """Images of a few pixels count as large."""
    monkeypatch.setattr(convolution, "MIN_PIXELS", 1)


def xla(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1))):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def on(platform: str, num_devices: int = 1):
    sizes = (num_devices, *[1] * (len(MESH_AXES) - 1))
    device = AbstractDevice(platform, num_devices, platform)
    return use_abstract_mesh(AbstractMesh(sizes, MESH_AXES, abstract_device=device))


def gradients(function, x, kernel):
    out, vjp = jax.vjp(function, x, kernel)
    return out, *vjp(normal(*out.shape, seed=2, dtype=out.dtype))


@pytest.mark.parametrize(
    ("size", "channels", "strides", "padding"),
    [
        (3, (4, 6), (1, 1), ((1, 1), (1, 1))),
        (3, (6, 4), (2, 2), ((0, 1), (0, 1))),
        (1, (3, 5), (1, 1), ((0, 0), (0, 0))),
    ],
)
def test_gradients_are_those_of_xla(size, channels, strides, padding, monkeypatch):
    monkeypatch.setattr(convolution, "BLOCK", 40)  # several rows, and several blocks
    x, kernel = normal(2, 12, 8, channels[0]), normal(size, size, *channels, seed=1)
    functions = [lambda x, k, f=f: f(x, k, strides, padding) for f in (convolution.convolve, xla)]
    ours, expected = (jax.jit(lambda x, k, f=f: gradients(f, x, k))(x, kernel) for f in functions)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolve_repeated_repeats_pixels(dtype):
    x, kernel = normal(2, 3, 5, 4, dtype=dtype), normal(3, 3, 4, 6, seed=1)

    def repeated(x, kernel):
        return xla(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel.astype(x.dtype))

    functions = (convolution.convolve_repeated, repeated)
    ours, expected = (jax.jit(lambda x, k, f=f: gradients(f, x, k))(x, kernel) for f in functions)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        scale = float(jnp.max(jnp.abs(b)))
        tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * scale
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)


def test_a_gradient_of_a_gradient_is_that_of_xla():
    x, kernel = normal(3, 4, 4, 2), normal(3, 3, 2, 3, seed=1)

    def penalty(convolve):
        """The gradient by both arguments of a gradient's norm, image by image and recomputed."""

        def loss(x, kernel):
            return jnp.sum(jnp.tanh(convolve(x[None], kernel, (1, 1), ((1, 1), (1, 1)))))

        def norm(x, kernel):
            grads = jax.grad(jax.checkpoint(loss), argnums=(0, 1))(x, kernel)
            return sum(jnp.sum(jnp.square(grad)) for grad in grads)

        return jax.jit(jax.vmap(jax.grad(norm, argnums=(0, 1)), in_axes=(0, None)))

    ours, expected = (penalty(f)(x, kernel) for f in (convolution.convolve, xla))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("platform", "num_devices"), [("tpu", 1), ("gpu", 1), ("cpu", 2)])
def test_other_devices_and_small_images_have_the_convolution_of_xla(
    platform, num_devices, monkeypatch
):
    x, kernel = normal(1, 4, 4, 2), normal(3, 3, 2, 3)

    def program(convolve):
        return str(jax.make_jaxpr(lambda x, k: gradients(convolve, x, k))(x, kernel))

    def ours(x, kernel):
        return convolution.convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)

    with on(platform, num_devices):
        assert program(ours) == program(xla)
    assert program(ours) != program(xla)
    monkeypatch.setattr(convolution, "MIN_PIXELS", 17)
    assert program(ours) == program(xla)
