"""Preprocessing of images for feature networks, and batched pooled features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.models.dino import Dino, DinoConfig
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.models.features import check_taps, pooled_features, standardise
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("size", [7, 16, 40], ids="to {} pixels".format)
def test_standardise_resizes_like_pillow(size):
    image = pixels(1, 24, 18, 3)
    out = jax.jit(standardise, static_argnums=(1, 2, 3))(image, size, MEAN, STD)
    assert out.shape == (1, size, size, 3) and out.dtype == jnp.float32
    for channel in range(3):
        resized = Image.fromarray(image[0, :, :, channel]).resize((size, size), Image.BICUBIC)
        unit = (np.asarray(resized, np.float64) + 1) / 2
        expected = (unit - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(out[0, :, :, channel], expected, atol=1e-5)


def test_standardise_only_scales_images_of_the_right_size():
    image = jnp.broadcast_to(jnp.array([-1.0, 0.0, 1.0]), (2, 8, 8, 3))
    out = standardise(image, 8, MEAN, STD)
    np.testing.assert_array_equal(out, np.broadcast_to([-1, 1, 0.4375], out.shape))


@pytest.mark.parametrize("taps", [(0, 4), (-1, 2), (2, 1), (1, 1)], ids=str)
def test_invalid_taps_are_refused(taps):
    message = r"taps \(.*\) must be ascending indices of blocks, from 0 to 3\."
    with pytest.raises(ValueError, match=message):
        check_taps(taps, 4)


KINDS = {Dino: DinoConfig.tiny(), EfficientNet: EfficientNetConfig.tiny()}


@pytest.mark.parametrize("batch_size", [3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_in_the_order_of_images_of_several_sizes(random_network, kind, batch_size):
    """Neither the number of images nor a batch of three is a multiple of the eight devices."""
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    network = random_network(lambda: kind(KINDS[kind], rngs=nnx.Rngs(0)))
    network = jax.device_put(network, shardings_of(network, mesh))
    sizes = [(20, 12), (16, 16)] * 5 + [(20, 12)] * 8
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    vectors = pooled_features(network, images, mesh, batch_size)
    assert vectors.shape == (18, {Dino: 32, EfficientNet: 24}[kind])
    assert vectors.dtype == np.float32
    vector_of = jax.jit(lambda network, image: network(to_pixels(image[None])).pooled[0])
    for image, vector in zip(images, vectors, strict=True):
        np.testing.assert_allclose(vector, vector_of(network, image), atol=1e-5)


def test_an_empty_list_of_images_is_refused():
    with pytest.raises(ValueError, match="There are no images to compute features of"):
        pooled_features(lambda images: None, [], make_mesh(MeshConfig()))
