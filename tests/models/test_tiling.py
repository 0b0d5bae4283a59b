"""Tiles: their places and weights, and their blended outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models import tiling
from kontext_jax.models.tiling import TilingConfig, tiles
from kontext_jax.sharding import MeshConfig, make_mesh
from tests.models.test_autoencoder import autoencoder


@pytest.fixture(scope="module")
def model():
    return autoencoder(channels=8, num_groups=4, channel_multipliers=(1, 1), remat="none")


@pytest.mark.parametrize(
    ("length", "first"), [(8, [0]), (9, [0, 1]), (14, [0, 6]), (20, [0, 6, 12]), (5, [0])]
)
@pytest.mark.parametrize("outputs", [1, 4])
def test_tiles_end_with_the_image_and_their_weights_add_up(length, first, outputs):
    tile = min(8, length)
    starts, weights = tiles(length, tile, 2, outputs)
    assert starts.tolist() == first
    total = np.zeros(outputs * length)
    for start, weight in zip(starts, weights, strict=True):
        total[outputs * start :][: outputs * tile] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_change_linearly_over_the_overlap():
    _, weights = tiles(14, 8, 2, 2)
    np.testing.assert_allclose(weights[0, -5:], [1, 1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(weights[1, :5], [0, 0.25, 0.5, 0.75, 1])


def test_tiles_of_a_pointwise_function_are_exact():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 18, 26, 3)), jnp.float32)
    config = TilingConfig(tile=4, overlap=1)
    doubled = tiling._blended(lambda x: jnp.repeat(x, 2, axis=2).repeat(2, axis=1), x, config, 1, 2)
    np.testing.assert_allclose(doubled, x.repeat(2, axis=1).repeat(2, axis=2), atol=1e-6)
    halved = tiling._blended(lambda x: x[:, ::2, ::2], x, config, 2, 1)
    np.testing.assert_allclose(halved, x[:, ::2, ::2], atol=1e-6)


def test_one_tile_is_the_network_itself(model):
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 8, 12, 3)), jnp.float32)
    config = TilingConfig(tile=8, overlap=2)
    run = jax.jit(lambda m, x: (m.encode(x), tiling.tiled_encode(m, x, config)))
    expected, latents = run(model, x)
    np.testing.assert_allclose(latents, expected, atol=1e-6)


def test_large_images_are_encoded_and_decoded_in_tiles(model, monkeypatch):
    """Two tiles, each of which the network sees alone, blended over their overlap."""
    monkeypatch.setattr(tiling, "MAX_PIXELS", 100)
    monkeypatch.setattr(tiling, "TilingConfig", lambda: TilingConfig(tile=6, overlap=2))
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 20, 12, 3)), jnp.float32)

    def run(model, x):
        z = tiling.encode(model, x)
        halves = [model.encode(half) for half in (x[:, :12], x[:, 8:])]
        parts = [model.decode(half) for half in (z[:, :6], z[:, 4:])]
        return (z, *halves), (tiling.decode(model, z), *parts)

    for (blended, first, second), overlap in zip(jax.jit(run)(model, x), (2, 4), strict=True):
        weight = (jnp.arange(overlap) / overlap).reshape(1, -1, 1, 1)
        middle = (1 - weight) * first[:, -overlap:] + weight * second[:, :overlap]
        expected = jnp.concatenate([first[:, :-overlap], middle, second[:, overlap:]], axis=1)
        np.testing.assert_allclose(blended, expected, atol=1e-5)


def test_an_image_whose_rows_the_mesh_splits_is_larger(monkeypatch):
    monkeypatch.setattr(tiling, "MAX_PIXELS", 100)
    shape = (1, 16, 32, 3)
    assert tiling._is_large(shape)
    for sizes, is_large in (({"context": 8}, False), ({"fsdp": 2, "context": 4}, True)):
        with jax.set_mesh(make_mesh(MeshConfig(**({"data": 1, "fsdp": 1} | sizes)))):
            assert tiling._is_large(shape) == is_large


def test_what_cannot_be_tiled_is_refused(model):
    config = TilingConfig(tile=4, overlap=2)
    with pytest.raises(ValueError, match="9 x 16 pixels need sides divisible by 2"):
        tiling.tiled_encode(model, jnp.zeros((1, 9, 16, 3)), config)
    discrete = autoencoder(
        channels=8, num_groups=4, channel_multipliers=(1,), latent_channels=3, fsq_levels=(5, 4, 3)
    )
    with pytest.raises(ValueError, match="discrete latents cannot be blended"):
        tiling.tiled_encode(discrete, jnp.zeros((1, 16, 16, 3)), config)
    with pytest.raises(ValueError, match="overlap 4 must be smaller than tile 4"):
        TilingConfig(tile=4, overlap=4)
