"""DINOv2 against a reference in NumPy float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.dino import Dino, DinoConfig, bicubic_weights
from kontext_jax.models.layers import REMAT_POLICIES
from kontext_jax.sharding import RULES

TINY = DinoConfig.tiny()
erf = np.vectorize(math.erf)


@pytest.fixture(scope="module")
def model(random_network):
    return random_network(lambda: Dino(TINY, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def images():
    """Images of the network's input size, so that they are not resized."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)


def with_config(model, **kwargs) -> Dino:
    """The same weights under another config."""
    config = dataclasses.replace(model.config, **kwargs)
    other = jax.eval_shape(lambda: Dino(config, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@jax.jit
def run(model, images):
    return model(images)


def float64(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def layer_norm(x, scale, bias):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale + bias


def reference(model, image: np.ndarray):
    """Outputs of all blocks, and the class token's vector, patch by patch and head by head."""

    def of_layer(module, layer):
        names = ("kernel", "bias") if hasattr(module, "kernel") else ("scale", "bias")
        return [float64(getattr(module, name))[layer] for name in names]

    cells, size = TINY.input_size // 14, TINY.hidden_size
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    image = ((image.astype(np.float64) + 1) / 2 - mean) / std
    kernel, bias = (float64(p) for p in (model.patch_embedding.kernel, model.patch_embedding.bias))
    table = float64(model.position_embeddings)[0]
    weights = bicubic_weights(TINY.trained_size // 14, cells).astype(np.float64)
    x = [float64(model.cls_token)[0, 0] + table[0]]
    for i, j in np.ndindex(cells, cells):
        patch = image[14 * i : 14 * (i + 1), 14 * j : 14 * (j + 1)]
        position = np.outer(weights[i], weights[j]).ravel() @ table[1:]
        x.append(np.einsum("hwi,hwio->o", patch, kernel) + bias + position)
    x, outputs = np.stack(x), []
    blocks, head_dim = model.blocks, size // TINY.num_heads
    for layer in range(TINY.num_layers):
        h = layer_norm(x, *of_layer(blocks.norm1, layer))
        q, k, v = (
            h @ kernel + bias
            for kernel, bias in (of_layer(getattr(blocks.attention, n), layer) for n in "qkv")
        )
        mixed = np.zeros_like(x)
        for head in range(TINY.num_heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            logits = q[:, at] @ k[:, at].T / math.sqrt(head_dim)
            exps = np.exp(logits - logits.max(axis=1, keepdims=True))
            mixed[:, at] = exps / exps.sum(axis=1, keepdims=True) @ v[:, at]
        kernel, bias = of_layer(blocks.attention.out_proj, layer)
        x = x + float64(blocks.layer_scale1)[layer] * (mixed @ kernel + bias)
        h = layer_norm(x, *of_layer(blocks.norm2, layer))
        kernel, bias = of_layer(blocks.mlp.fc1, layer)
        h = h @ kernel + bias
        h = h * (1 + erf(h / math.sqrt(2))) / 2
        kernel, bias = of_layer(blocks.mlp.fc2, layer)
        x = x + float64(blocks.layer_scale2)[layer] * (h @ kernel + bias)
        outputs.append(x[1:].reshape(cells, cells, size))
    return outputs, layer_norm(
        x[0], float64(model.final_norm.scale), float64(model.final_norm.bias)
    )


@pytest.mark.parametrize("taps", [(0, 2), (1, 3), ()], ids=str)
def test_network_matches_the_numpy_reference(model, images, taps):
    """With positions for 3 x 3 patches resampled to 2 x 2; also with a tap at the last block."""
    maps, pooled = run(with_config(model, taps=taps), images)
    assert [x.shape for x in maps] == [(2, 2, 2, 32)] * len(taps) and pooled.shape == (2, 32)
    for i, image in enumerate(images):
        outputs, vector = reference(model, image)
        for feature_map, tap in zip(maps, taps, strict=True):
            np.testing.assert_allclose(feature_map[i], outputs[tap], atol=5e-5)
        np.testing.assert_allclose(pooled[i], vector, atol=5e-5)


def test_bicubic_weights_match_pytorch():
    """The cubic with a = -0.75 has values -0.09375 and 0.59375 half-way; no antialiasing."""
    far, near = -0.09375, 0.59375
    expected = [[far + near, near, far, 0], [0, far, near, near + far]]
    np.testing.assert_array_equal(bicubic_weights(4, 2), np.float32(expected))
    np.testing.assert_array_equal(bicubic_weights(5, 5), np.eye(5, dtype=np.float32))
    np.testing.assert_allclose(bicubic_weights(37, 16).sum(axis=1), np.ones(16), atol=1e-6)


def test_positions_are_not_resampled_at_the_trained_size(model):
    grid = run(with_config(model, input_size=42), jnp.zeros((1, 42, 42, 3))).maps[0]
    assert grid.shape == (1, 3, 3, 32)
    np.testing.assert_array_equal(model._positions(3), model.position_embeddings[...])


def test_images_of_other_sizes_are_resized(model):
    """Images of one colour have the same features at all sizes."""
    outputs = [run(model, jnp.full((1, *size, 3), 0.3)) for size in [(28, 28), (50, 9)]]
    for a, b in zip(*map(jax.tree.leaves, outputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_gradients_reach_every_pixel_and_do_not_depend_on_remat(model):
    images = np.random.default_rng(1).uniform(-1, 1, (1, 40, 40, 3)).astype(np.float32)

    def loss(images, model):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(model(images)))

    grad = jax.jit(jax.grad(loss))
    expected, *others = (grad(images, with_config(model, remat=remat)) for remat in REMAT_POLICIES)
    assert np.abs(expected).min() > 0
    for other in others:
        np.testing.assert_allclose(other, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DinoConfig.vits14(), 22_056_576),
        (DinoConfig.vitb14(), 86_580_480),
        (DinoConfig.vitl14(), 304_368_640),
    ],
    ids=["vits14", "vitb14", "vitl14"],
)
def test_the_presets_have_the_published_sizes(config, count):
    """Published counts include the mask token, which this network does not have."""
    abstract = jax.eval_shape(lambda: Dino(config, rngs=nnx.Rngs(0)))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    assert parameters + config.hidden_size == count
    images = jax.ShapeDtypeStruct((2, 300, 200, 3), jnp.float32)
    maps, pooled = jax.eval_shape(lambda model, images: model(images), abstract, images)
    assert [x.shape for x in maps] == [(2, 16, 16, config.hidden_size)] * 4
    assert pooled.shape == (2, config.hidden_size) and pooled.dtype == jnp.bfloat16


def test_every_parameter_names_its_axes(model):
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert {axis for axis in axes if axis is not None} <= set(RULES)


def test_bfloat16_keeps_float32_parameters(model, images):
    half = with_config(model, dtype="bfloat16")
    abstract = jax.eval_shape(lambda: Dino(half.config, rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    out, exact = run(half, images).pooled, run(model, images).pooled
    assert out.dtype == jnp.bfloat16
    assert 0 < float(jnp.sqrt(jnp.mean(jnp.square(out.astype(jnp.float32) - exact)))) < 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 must be a multiple of num_heads 5"),
        ({"input_size": 30}, "input_size 30 must be a multiple of 14, the patch size"),
        ({"trained_size": 0}, "trained_size 0 must be a multiple of 14, the patch size"),
        ({"taps": (4,)}, r"taps \(4,\) must be ascending indices of blocks, from 0 to 3"),
        ({"remat": "some"}, "remat 'some' is not one of full, none"),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DinoConfig.tiny(**wrong)
