import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.models.lpips import Lpips
from kontext_jax.models.perceptual import FeatureDistance, PerceptualConfig, abstract_distance


@pytest.fixture(scope="module")
def distance(random_network) -> FeatureDistance:
    return random_network(lambda: FeatureDistance(EfficientNetConfig.tiny(), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    return first, jnp.clip(first + 0.3 * jnp.sin(9 * first), -1, 1)


def test_distance_is_the_formula(distance, pair):
    expected = []
    for f, g in zip(*(distance.network(x).maps for x in pair), strict=True):
        f, g = (np.asarray(x, np.float64) for x in (f, g))
        f, g = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (f, g))
        expected.append(np.square(f - g).sum(axis=-1).mean(axis=(1, 2)))
    np.testing.assert_allclose(jax.jit(distance)(*pair), np.mean(expected, axis=0), rtol=1e-4)


def test_gradient_matches_central_differences_and_is_zero_for_equal_images(distance, pair):
    first, second = pair
    loss = lambda x: jnp.sum(distance(x, second))  # noqa: E731
    value, gradient = jax.jit(loss), jax.jit(jax.grad(loss))
    by_first = gradient(first)
    step = 1e-2 / jnp.linalg.norm(by_first.ravel())
    slope = (value(first + step * by_first) - value(first - step * by_first)) / (2 * step)
    np.testing.assert_allclose(slope, jnp.sum(jnp.square(by_first)), rtol=2e-2)
    assert np.all(distance(first, first) == 0)
    np.testing.assert_allclose(gradient(second), 0, atol=1e-6)


@pytest.mark.parametrize("network", ["efficientnet", "alex", "vgg"])
def test_every_network_has_a_config(network):
    distance = abstract_distance(PerceptualConfig(network=network, dtype="bfloat16"))
    assert isinstance(distance, FeatureDistance if network == "efficientnet" else Lpips)
    assert distance.config.dtype == "bfloat16"
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    out = jax.eval_shape(lambda d, x: d(x, x), distance, images)
    assert (out.shape, out.dtype) == ((2,), jnp.float32)


def test_unknown_network_is_refused():
    with pytest.raises(ValueError, match="perceptual.network 'x' is not one of efficientnet, alex"):
        PerceptualConfig(network="x")
