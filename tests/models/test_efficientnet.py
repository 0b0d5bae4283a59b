"""EfficientNet-Lite against a reference in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.sharding import RULES

TINY = EfficientNetConfig.tiny()


@pytest.fixture(scope="module")
def model(random_network):
    return random_network(lambda: EfficientNet(TINY, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def images():
    """Images of the network's input size, so that they are not resized."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)


@jax.jit
def run(model, images):
    return model(images)


def convolve(conv: nnx.Conv, x: np.ndarray, stride: int = 1, depthwise: bool = False):
    """The convolution of one image, pixel by pixel."""
    kernel, bias = (np.asarray(p[...], np.float64) for p in (conv.kernel, conv.bias))
    size, out = len(kernel), -(-len(x) // stride)
    padding = max((out - 1) * stride + size - len(x), 0)
    x = np.pad(x, [(padding // 2, padding - padding // 2)] * 2 + [(0, 0)])
    y = np.zeros((out, out, len(bias)))
    for i, j in np.ndindex(out, out):
        window = x[i * stride : i * stride + size, j * stride : j * stride + size]
        if depthwise:
            y[i, j] = (window * kernel[:, :, 0]).sum(axis=(0, 1)) + bias
        else:
            y[i, j] = np.einsum("hwi,hwio->o", window, kernel) + bias
    return y


def relu6(x):
    return np.clip(x, 0, 6)


def reference(model, image):
    """Outputs of all blocks, the pooled vector, and the logits."""
    x = ((image.astype(np.float64) + 1) * 127.5 - 127) / 128
    x = relu6(convolve(model.stem, x, stride=2))
    outputs = []
    for block, stride in zip(model.blocks, (1, 2, 1, 2), strict=True):
        h = x if block.expand is None else relu6(convolve(block.expand, x))
        h = relu6(convolve(block.depthwise, h, stride, depthwise=True))
        h = convolve(block.project, h)
        x = h + x if h.shape == x.shape else h
        outputs.append(x)
    pooled = relu6(convolve(model.head, x)).mean(axis=(0, 1))
    kernel, bias = (np.asarray(p[...], np.float64) for p in (model.classifier.kernel,
                                                             model.classifier.bias))  # fmt: skip
    return outputs, pooled, pooled @ kernel + bias


def test_network_matches_the_numpy_reference(model, images):
    maps, pooled = run(model, images)
    logits = jax.jit(lambda model, images: model.logits(images))(model, images)
    assert [x.shape[1:] for x in maps] == [(8, 8, 8), (4, 4, 12), (2, 2, 16)]
    for i, image in enumerate(images):
        outputs, vector, expected_logits = reference(model, image)
        for feature_map, tap in zip(maps, TINY.taps, strict=True):
            np.testing.assert_allclose(feature_map[i], outputs[tap], atol=2e-5)
        np.testing.assert_allclose(pooled[i], vector, atol=2e-5)
        np.testing.assert_allclose(logits[i], expected_logits, atol=2e-5)


def test_images_of_other_sizes_are_resized(model):
    """Images of one colour have the same features at all sizes."""
    sizes = [(16, 16), (5, 9), (64, 40)]
    outputs = [run(model, jnp.full((1, *size, 3), 0.3)) for size in sizes]
    for other in outputs[1:]:
        for a, b in zip(jax.tree.leaves(outputs[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_gradients_reach_every_pixel(model):
    grad = jax.jit(jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(model(x)))))
    assert np.abs(grad(jnp.full((1, 24, 24, 3), 0.1))).min() > 0


def test_lite0_has_the_published_sizes():
    """4,652,008 parameters; folding removes one of a norm's two parameters per channel."""
    config = EfficientNetConfig.lite0()
    abstract = jax.eval_shape(lambda: EfficientNet(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    convolutions = [abstract.stem, abstract.head]
    for block in abstract.blocks:
        convolutions += [c for c in (block.expand, block.depthwise, block.project) if c]
    assert len(convolutions) == 49
    assert count + sum(math.prod(conv.bias.shape) for conv in convolutions) == 4_652_008
    images = jax.ShapeDtypeStruct((2, 300, 200, 3), jnp.float32)
    maps, pooled = jax.eval_shape(lambda model, images: model(images), abstract, images)
    assert pooled.shape == (2, 1280)
    assert [x.shape[1:] for x in maps] == [(56, 56, 24), (28, 28, 40), (14, 14, 112), (7, 7, 320)]


def test_every_parameter_names_its_axes(model):
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert len(axes) == param.ndim
        assert {axis for axis in axes if axis is not None} <= set(RULES)


def test_bfloat16_keeps_float32_parameters(images):
    model = EfficientNet(EfficientNetConfig.tiny(dtype="bfloat16"), rngs=nnx.Rngs(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    assert {x.dtype for x in jax.tree.leaves(run(model, images))} == {jnp.dtype("bfloat16")}


def test_invalid_taps_are_refused():
    with pytest.raises(
        ValueError, match=r"taps \(4,\) must be ascending indices of blocks, from 0 to 3"
    ):
        EfficientNetConfig.tiny(taps=(4,))
