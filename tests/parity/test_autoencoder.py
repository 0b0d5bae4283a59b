"""Compares FLUX's autoencoder with diffusers' AutoencoderKL."""

import jax
import numpy as np
import pytest

from tests.parity import draws, ours

REASON = "needs the convert extra: pip install -e '.[convert]'"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"multiples": (1,), "layers": 1, "groups": 8}, (7, 5)),
        ({"multiples": (1, 3), "layers": 1, "groups": 16}, (14, 22)),
        ({}, (24, 56)),
    ],
    ids=["one level", "two levels", "FLUX's four"],
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
