"""FID's InceptionV3 against a reference in NumPy float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.inception import Inception, InceptionConfig
from kontext_jax.sharding import RULES

TINY = InceptionConfig.tiny()


@pytest.fixture(scope="module")
def model(random_network):
    """A network with large kernels, so that differences of images survive all the ReLUs."""
    model = random_network(lambda: Inception(TINY, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: 1.8 * leaf if leaf.ndim == 4 else leaf, model)


@pytest.fixture(scope="module")
def images():
    """Two different images of the network's input size, so that they are not resized."""
    rng = np.random.default_rng(0)
    grey = rng.uniform(-0.5, 0.5, (2, 1, 1, 3))
    return (grey + rng.uniform(-0.5, 0.5, (2, 107, 107, 3))).astype(np.float32)


@jax.jit
def run(model, images):
    return model(images)


def windows(x: np.ndarray, size, stride: int, padding, fill: float) -> np.ndarray:
    """All windows of an image: [h w C i j]."""
    margins = [(padding[0], padding[0]), (padding[1], padding[1]), (0, 0)]
    x = np.pad(x, margins, constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, size, (0, 1))[::stride, ::stride]


def conv(x: np.ndarray, conv: nnx.Conv, stride: int = 1, padding=(0, 0)) -> np.ndarray:
    kernel, bias = (np.asarray(p[...], np.float64) for p in (conv.kernel, conv.bias))
    x = windows(x, kernel.shape[:2], stride, padding, 0.0)
    return np.maximum(np.einsum("yxcij,ijco->yxo", x, kernel, optimize=True) + bias, 0)


def mean_pool(x: np.ndarray) -> np.ndarray:
    return np.nanmean(windows(x, (3, 3), 1, (1, 1), np.nan), axis=(3, 4))


def max_pool(x: np.ndarray, stride: int, padding: int) -> np.ndarray:
    return windows(x, (3, 3), stride, (padding, padding), -np.inf).max(axis=(3, 4))


def block_a(m, x):
    once = conv(conv(x, m.branch5x5_1), m.branch5x5_2, padding=(2, 2))
    twice = conv(conv(x, m.branch3x3dbl_1), m.branch3x3dbl_2, padding=(1, 1))
    twice = conv(twice, m.branch3x3dbl_3, padding=(1, 1))
    return [conv(x, m.branch1x1), once, twice, conv(mean_pool(x), m.branch_pool)]


def block_b(m, x):
    twice = conv(conv(x, m.branch3x3dbl_1), m.branch3x3dbl_2, padding=(1, 1))
    return [conv(x, m.branch3x3, 2), conv(twice, m.branch3x3dbl_3, 2), max_pool(x, 2, 0)]


def block_c(m, x):
    row, column = dict(padding=(0, 3)), dict(padding=(3, 0))
    once = conv(conv(x, m.branch7x7_1), m.branch7x7_2, **row)
    once = conv(once, m.branch7x7_3, **column)
    twice = conv(conv(x, m.branch7x7dbl_1), m.branch7x7dbl_2, **column)
    twice = conv(conv(twice, m.branch7x7dbl_3, **row), m.branch7x7dbl_4, **column)
    twice = conv(twice, m.branch7x7dbl_5, **row)
    return [conv(x, m.branch1x1), once, twice, conv(mean_pool(x), m.branch_pool)]


def block_d(m, x):
    once = conv(conv(x, m.branch3x3_1), m.branch3x3_2, 2)
    wide = conv(conv(x, m.branch7x7x3_1), m.branch7x7x3_2, padding=(0, 3))
    wide = conv(conv(wide, m.branch7x7x3_3, padding=(3, 0)), m.branch7x7x3_4, 2)
    return [once, wide, max_pool(x, 2, 0)]


def block_e(m, x, pooled):
    once = conv(x, m.branch3x3_1)
    twice = conv(conv(x, m.branch3x3dbl_1), m.branch3x3dbl_2, padding=(1, 1))
    return [
        conv(x, m.branch1x1),
        conv(once, m.branch3x3_2a, padding=(0, 1)),
        conv(once, m.branch3x3_2b, padding=(1, 0)),
        conv(twice, m.branch3x3dbl_3a, padding=(0, 1)),
        conv(twice, m.branch3x3dbl_3b, padding=(1, 0)),
        conv(pooled, m.branch_pool),
    ]


def reference(m, image):
    x = conv(conv(image.astype(np.float64), m.conv2d_1a_3x3, 2), m.conv2d_2a_3x3)
    x = max_pool(conv(x, m.conv2d_2b_3x3, padding=(1, 1)), 2, 0)
    x = max_pool(conv(conv(x, m.conv2d_3b_1x1), m.conv2d_4a_3x3), 2, 0)
    blocks = [(block_a, m.mixed_5b), (block_a, m.mixed_5c), (block_a, m.mixed_5d)]
    blocks += [(block_b, m.mixed_6a)]
    blocks += [(block_c, m.mixed_6b), (block_c, m.mixed_6c), (block_c, m.mixed_6d)]
    blocks += [(block_c, m.mixed_6e), (block_d, m.mixed_7a)]
    for block, module in blocks:
        x = np.concatenate(block(module, x), axis=-1)
    x = np.concatenate(block_e(m.mixed_7b, x, mean_pool(x)), axis=-1)
    x = np.concatenate(block_e(m.mixed_7c, x, max_pool(x, 1, 1)), axis=-1)
    assert x.shape == (2, 2, 128)
    return x.mean(axis=(0, 1))


def test_network_matches_the_numpy_reference(model, images):
    maps, pooled = run(model, images)
    expected = np.stack([reference(model, image) for image in images])
    assert maps == () and pooled.shape == (2, 128) and pooled.dtype == jnp.float32
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * expected.max()
    np.testing.assert_allclose(pooled, expected, atol=1e-5 * expected.max())


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation without antialiasing; pixels at the edges are repeated."""
    for axis in (0, 1):
        length = image.shape[axis]
        centres = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(centres).astype(int)
        high, weight = np.minimum(low + 1, length - 1), (centres - low).reshape(-1, 1, 1)
        rows = np.moveaxis(image, axis, 0)
        image = np.moveaxis((1 - weight) * rows[low] + weight * rows[high], 0, axis)
    return image


@pytest.mark.parametrize("shape", [(250, 107), (40, 300)], ids=str)
def test_images_of_other_sizes_are_resized_without_antialiasing(model, shape):
    image = np.random.default_rng(1).uniform(-1, 1, (*shape, 3)).astype(np.float32)
    resized = bilinear(image.astype(np.float64), 107).astype(np.float32)
    expected = run(model, resized[None]).pooled
    scale = np.abs(expected).max()
    np.testing.assert_allclose(run(model, image[None]).pooled, expected, atol=1e-4 * scale)


def test_fid_network_has_the_published_sizes():
    """torchvision's 23,834,568 parameters include the classifier but not the auxiliary one."""
    abstract = jax.eval_shape(lambda: Inception(InceptionConfig(), rngs=nnx.Rngs(0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(abstract)]
    biases = [shape for shape in shapes if len(shape) == 1]
    assert len(biases) == 94
    unfolded = sum(map(math.prod, shapes)) + sum(map(math.prod, biases))
    assert unfolded == 23_834_568 - 1000 * (2048 + 1)
    images = jax.ShapeDtypeStruct((2, 300, 200, 3), jnp.float32)
    _, pooled = jax.eval_shape(lambda model, images: model(images), abstract, images)
    assert pooled.shape == (2, 2048)


def test_every_parameter_names_its_axes(model):
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert len(axes) == param.ndim
        assert {axis for axis in axes if axis is not None} <= set(RULES)


def test_bfloat16_keeps_float32_parameters(images):
    config = InceptionConfig.tiny(dtype="bfloat16")
    abstract = jax.eval_shape(lambda: Inception(config, rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    pooled = jax.eval_shape(lambda model, images: model(images).pooled, abstract, images)
    assert pooled.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"input_size": 74}, "input_size 74 must be 75 pixels or more."),
        ({"thinning": 32}, "thinning 32 must be 1, 2, 4, 8 or 16."),
    ],
)
def test_invalid_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        InceptionConfig(**setting)
