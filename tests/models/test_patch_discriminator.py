import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.patch_discriminator import PatchConfig, PatchDiscriminator

CONFIG = PatchConfig(channels=8, num_layers=2, num_groups=4, num_scales=2)
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32, 40, 3)), jnp.float32)


def make(random_network, config=CONFIG):
    return random_network(lambda: PatchDiscriminator(config, rngs=nnx.Rngs(0)))


def test_default_has_pix2pix_s_parameters_and_patches():
    network = nnx.eval_shape(lambda: PatchDiscriminator(PatchConfig(), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(network)) == 2_765_633
    logits = jax.eval_shape(lambda n, x: n(x), network, jnp.zeros((2, 256, 256, 3)))
    assert [x.shape for x in logits] == [(2, 30, 30)]


def test_no_statistics_leak_between_images(random_network):
    network = jax.jit(make(random_network))
    together, apart = network(IMAGES), [network(image[None]) for image in IMAGES]
    for scale, logits in enumerate(together):
        separate = np.concatenate([logits[scale] for logits in apart])
        np.testing.assert_allclose(logits, separate, atol=1e-5)
    assert [x.shape for x in together] == [(3, 6, 8), (3, 2, 3)]


def test_second_scale_judges_the_image_at_half_its_size(random_network):
    network = make(random_network)
    halves = IMAGES.reshape(3, 16, 2, 20, 2, 3).mean(axis=(2, 4))
    _, second = network(IMAGES)
    np.testing.assert_allclose(second, network.scales[1](halves), atol=1e-5)


def test_smallest_image_has_a_logit_at_every_scale(random_network):
    network = make(random_network)
    side = CONFIG.smallest
    assert all(x.size for x in jax.eval_shape(network, jnp.zeros((1, side, side, 3))))
    with pytest.raises(ValueError, match="Images of 23 x 40 pixels are too small .* needs 24"):
        network(jnp.zeros((1, 23, 40, 3)))


def test_bfloat16_has_float32_parameters_and_logits(random_network):
    config = PatchConfig(channels=8, num_layers=2, num_groups=4, dtype="bfloat16")
    network = make(random_network, config)
    assert {x.dtype for x in jax.tree.leaves(network)} == {jnp.dtype("float32")}
    (logits,) = network(IMAGES)
    (exact,) = make(random_network, PatchConfig(channels=8, num_layers=2, num_groups=4))(IMAGES)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.1 * float(jnp.abs(exact).max()))


def test_channels_must_be_whole_groups():
    with pytest.raises(ValueError, match="channels 8 must be a multiple of its num_groups 3"):
        PatchConfig(channels=8, num_groups=3)
