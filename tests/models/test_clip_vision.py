"""CLIP's image encoder against a reference in NumPy float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from kontext_jax.models.clip import ClipConfig
from kontext_jax.models.clip_vision import (
    MEAN,
    STD,
    ClipPair,
    ClipPairConfig,
    ClipVision,
    ClipVisionConfig,
    resize_and_crop,
)
from kontext_jax.sharding import RULES

TINY = ClipVisionConfig.tiny()


@pytest.fixture(scope="module")
def model(random_network):
    return random_network(lambda: ClipVision(TINY, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def images():
    """Images of the network's input size, so that they are not resized."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)


def with_config(model, **kwargs) -> ClipVision:
    """The same weights under another config."""
    config = dataclasses.replace(model.config, **kwargs)
    other = jax.eval_shape(lambda: ClipVision(config, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@jax.jit
def run(model, images):
    return model(images)


def float64(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def layer_norm(x, norm, layer=slice(None)):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
    return x * float64(norm.scale)[layer] + float64(norm.bias)[layer]


def reference(model, image: np.ndarray) -> np.ndarray:
    """The vector of one image, patch by patch and head by head."""

    def affine(x, linear, layer):
        return x @ float64(linear.kernel)[layer] + float64(linear.bias)[layer]

    image = ((image.astype(np.float64) + 1) / 2 - MEAN) / STD
    kernel, positions = float64(model.patch_embedding.kernel), float64(model.position_embedding)
    x = [float64(model.class_embedding)]
    for i, j in np.ndindex(2, 2):
        patch = image[8 * i : 8 * (i + 1), 8 * j : 8 * (j + 1)]
        x.append(np.einsum("hwi,hwio->o", patch, kernel))
    x = layer_norm(np.stack(x) + positions, model.first_norm)
    blocks, head_dim = model.blocks, TINY.hidden_size // TINY.num_heads
    for layer in range(TINY.num_layers):
        h, attention = layer_norm(x, blocks.norm1, layer), blocks.attention
        q, k, v = (affine(h, getattr(attention, name), layer) for name in "qkv")
        mixed = np.zeros_like(x)
        for head in range(TINY.num_heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            exps = np.exp(q[:, at] @ k[:, at].T / math.sqrt(head_dim))
            mixed[:, at] = exps / exps.sum(axis=1, keepdims=True) @ v[:, at]
        x = x + affine(mixed, attention.out_proj, layer)
        h = affine(layer_norm(x, blocks.norm2, layer), blocks.mlp.fc1, layer)
        x = x + affine(h / (1 + np.exp(-1.702 * h)), blocks.mlp.fc2, layer)
    return layer_norm(x[0], model.final_norm) @ float64(model.projection.kernel)


def test_encoder_matches_the_numpy_reference(model, images):
    maps, pooled = run(model, images)
    assert maps == () and pooled.shape == (2, 24) and pooled.dtype == jnp.float32
    for image, vector in zip(images, pooled, strict=True):
        expected = reference(model, image)
        assert expected.std() > 0.1
        np.testing.assert_allclose(vector, expected, atol=5e-5)


def pillow(image: np.ndarray, size: int) -> np.ndarray:
    """torchvision's Resize and CenterCrop, channel by channel, in float32."""
    height, width = image.shape[:2]
    short = min(height, width)
    after = int(size * width / short), int(size * height / short)
    left, top = (round((side - size) / 2) for side in after)
    for shape in ((after[0], height), after):
        resized = [
            np.asarray(Image.fromarray(channel).resize(shape, Image.Resampling.BICUBIC))
            for channel in np.moveaxis(image, -1, 0)
        ]
        image = np.stack(resized, axis=-1).clip(-1, 1)
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(16, 16), (40, 16), (16, 19), (37, 53), (90, 61), (7, 12), (5, 5)], ids=str
)
def test_resize_and_crop_matches_pillow(shape):
    """Images larger and smaller than 16 pixels, with even, odd and rounded margins."""
    image = np.random.default_rng(0).uniform(-1.2, 1.2, (*shape, 3)).astype(np.float32)
    image = image.clip(-1, 1)
    cropped = jax.jit(resize_and_crop, static_argnums=1)(image[None], 16)
    assert cropped.shape == (1, 16, 16, 3) and cropped.dtype == jnp.float32
    np.testing.assert_allclose(cropped[0], pillow(image, 16), atol=1e-5)


def test_wide_images_are_cropped_or_squeezed(model):
    wide = np.random.default_rng(1).uniform(-1, 1, (1, 16, 32, 3)).astype(np.float32)
    cropped = run(model, wide).pooled
    np.testing.assert_allclose(cropped, run(model, wide[:, :, 8:24]).pooled, atol=1e-5)
    uncropped = with_config(model, crop=False)
    squeezed = run(uncropped, wide).pooled
    square = jax.image.resize(wide, (1, 16, 16, 3), "cubic")
    np.testing.assert_allclose(squeezed, run(uncropped, square).pooled, atol=1e-5)
    assert np.abs(squeezed - cropped).max() > 0.1


def test_vectors_of_texts_are_projected(random_network):
    config = ClipPairConfig(text=ClipConfig.tiny(), vision=TINY)
    pair = random_network(lambda: ClipPair(config, rngs=nnx.Rngs(0)))
    ids = np.array([[518, 3, 9, 519], [518, 7, 519, 519]], np.int32)
    encode = jax.jit(lambda pair, ids: (pair.encode_text(ids), pair.text(ids)))
    vectors, unprojected = encode(pair, ids)
    assert vectors.shape == (2, 24)
    expected = float64(unprojected) @ float64(pair.text_projection.kernel)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "count"),
    [(ClipVisionConfig.vit_b32(), 87_849_216), (ClipVisionConfig.vit_l14(), 303_966_208)],
    ids=["vit_b32", "vit_l14"],
)
def test_the_presets_have_the_published_sizes(config, count):
    abstract = jax.eval_shape(lambda: ClipVision(config, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == count
    images = jax.ShapeDtypeStruct((2, 300, 200, 3), jnp.float32)
    pooled = jax.eval_shape(lambda model, images: model(images), abstract, images).pooled
    assert pooled.shape == (2, config.projection_dim) and pooled.dtype == jnp.bfloat16


def test_every_parameter_names_its_axes(model):
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert {axis for axis in axes if axis is not None} <= set(RULES)


def test_bfloat16_keeps_float32_parameters(model, images):
    half = with_config(model, dtype="bfloat16")
    abstract = jax.eval_shape(lambda: ClipVision(half.config, rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    out, exact = run(half, images).pooled, run(model, images).pooled
    assert out.dtype == jnp.bfloat16
    assert 0 < float(jnp.sqrt(jnp.mean(jnp.square(out.astype(jnp.float32) - exact)))) < 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 must be a multiple of num_heads 5"),
        ({"image_size": 20}, "image_size 20 must be a multiple of patch_size 8"),
        ({"image_size": 0}, "image_size 0 must be a multiple of patch_size 8"),
        ({"remat": "some"}, "remat 'some' is not one of full, none"),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ClipVisionConfig.tiny(**wrong)
