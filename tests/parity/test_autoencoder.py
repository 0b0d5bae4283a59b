"""Compares FLUX's autoencoder with diffusers' AutoencoderKL."""

import jax
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.weights import export
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.reading import ArrayReader
from tests.parity import draws, ours

REASON = "needs the convert extra: pip install -e '.[convert]'"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)

from diffusers import AutoencoderKL  # noqa: E402

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"multiples": (1,), "layers": 1, "groups": 8}, (7, 5)),
        ({"multiples": (1, 3), "layers": 1, "groups": 16, "quant_conv": True}, (14, 22)),
        ({}, (24, 56)),
    ],
    ids=["one level", "two levels, quant_conv", "FLUX's four"],
)
def test_encode_and_decode(tmp_path, settings, size):
    network = theirs.autoencoder(**settings)
    model = ours.load(theirs.save(network, tmp_path), "autoencoder")
    images = draws.pixels("images", 2, *size, 3)
    mean, logvar = jax.jit(lambda model, x: model.moments(x))(model, images)
    expected_mean, expected_logvar = theirs.encode(network, images)
    assert expected_mean.std() > 0.1 and expected_logvar.std() > 0.1
    np.testing.assert_allclose(mean, expected_mean, atol=5e-5)
    np.testing.assert_allclose(logvar, expected_logvar, atol=5e-5)

    latents = draws.normal("latents", *mean.shape)
    decoded = jax.jit(lambda model, x: model.decode(x))(model, latents)
    expected = theirs.decode(network, latents)
    assert expected.shape == images.shape and expected.std() > 0.1
    np.testing.assert_allclose(decoded, expected, atol=5e-5)


@pytest.mark.parametrize("quant_conv", [False, True])
def test_exported_network_decodes_the_same_in_diffusers(random_network, tmp_path, quant_conv):
    config = AutoencoderConfig.tiny(channels=8, quant_conv=quant_conv)
    model = random_network(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    export.write_diffusers(ArrayReader(NETWORKS["autoencoder"], model), tmp_path, {})
    network = AutoencoderKL.from_pretrained(tmp_path)
    assert (network.quant_conv is not None) == quant_conv
    images, latents = draws.pixels("images", 2, 16, 24, 3), draws.normal("latents", 2, 4, 6, 6)
    decoded = jax.jit(lambda model, x: model.decode(x))(model, latents)
    np.testing.assert_allclose(decoded, theirs.decode(network, latents), atol=5e-5)
    for actual, expected in zip(
        jax.jit(lambda model, x: model.moments(x))(model, images),
        theirs.encode(network, images),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, atol=5e-5)
