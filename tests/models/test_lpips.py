"""LPIPS against a reference in NumPy float64, and properties of the distance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.lpips import TRUNKS, Lpips, LpipsConfig, unit_vectors
from kontext_jax.sharding import RULES
from kontext_jax.tree_paths import named_leaves

LAYERS = {  # torchvision's: channels of a convolution with ReLU, "M" max pooling, "-" a tap
    "alex": [64, "-", "M", 192, "-", "M", 384, "-", 256, "-", 256, "-"],
    "vgg": [64, 64, "-", "M", 128, 128, "-", "M", 256, 256, 256, "-"]
    + ["M", 512, 512, 512, "-", "M", 512, 512, 512, "-"],
}
SIZES = {"alex": (31, 43), "vgg": (16, 25)}


@pytest.fixture(scope="module")
def networks(random_network):
    """A network per trunk, with nonnegative heads, so that distances do not cancel."""

    def make(net):
        network = random_network(lambda: Lpips(LpipsConfig(net=net), rngs=nnx.Rngs(0)))
        for head in network.heads:
            head[...] = jnp.abs(head[...])
        return network

    return {net: make(net) for net in TRUNKS}


@pytest.fixture(scope="module")
def model(networks):
    return networks["alex"]


def draw(net):
    """Two pairs of images."""
    shape = (2, 2, *SIZES[net], 3)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    return draw("alex")


def copied(model):
    """A copy of the network, to be modified."""
    return jax.tree.map(lambda x: x, model)


@jax.jit
def run(model, first, second):
    return model(first, second)


@jax.jit
def maps_of(model, images):
    return model.maps(images)


@jax.jit
def gradients(model, first, second):
    """Gradients with respect to both images."""
    return jax.grad(lambda x, y: jnp.sum(model(x, y)), argnums=(0, 1))(first, second)


def convolve(x, kernel, bias, stride, padding):
    """The convolution of one image."""
    x = np.pad(x, [(padding, padding)] * 2 + [(0, 0)])
    size = len(kernel)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))
    return np.tensordot(windows[::stride, ::stride], kernel, axes=((3, 4, 2), (0, 1, 2))) + bias


def taps(model, net, image) -> list[np.ndarray]:
    """Features of one image after each tap."""
    x = (image.astype(np.float64) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    convs = [conv for stage in model.stages for conv in stage]
    size, outputs = 3 if net == "alex" else 2, []
    for layer in LAYERS[net]:
        if layer == "M":
            x = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))
            x = x[::2, ::2].max(axis=(3, 4))
        elif layer == "-":
            outputs.append(x)
        else:
            kernel, bias = (
                np.asarray(p[...], np.float64) for p in (convs[0].kernel, convs[0].bias)
            )
            assert kernel.shape[-1] == layer
            stride, padding = {11: (4, 2), 5: (1, 2), 3: (1, 1)}[len(kernel)]
            x = np.maximum(convolve(x, kernel, bias, stride, padding), 0)
            convs = convs[1:]
    assert not convs
    return outputs


@pytest.mark.parametrize("net", list(TRUNKS))
def test_distance_matches_the_numpy_reference(networks, net):
    model, images = networks[net], draw(net)
    distances = run(model, *images)
    assert distances.shape == (2,) and distances.dtype == jnp.float32
    for i, pair in enumerate(images.swapaxes(0, 1)):
        expected = 0.0
        for f, g, head in zip(
            *(taps(model, net, image) for image in pair), model.heads, strict=True
        ):
            f, g = (x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in (f, g))
            expected += (np.square(f - g) @ np.asarray(head[...], np.float64)).mean()
        assert expected > 0.01
        np.testing.assert_allclose(distances[i], expected, rtol=1e-5)


def test_distance_is_symmetric_and_zero_for_equal_images(model, images):
    first, second = images
    np.testing.assert_array_equal(run(model, first, first), np.zeros(2))
    np.testing.assert_array_equal(run(model, first, second), run(model, second, first))


def test_distances_are_linear_in_the_heads_and_every_head_contributes(model, images):
    total, parts = run(model, *images), []
    for i in range(5):
        one_head = copied(model)
        for j, head in enumerate(one_head.heads):
            head[...] = head[...] * (2.0 if i == j else 0.0)
        parts.append(run(one_head, *images))
    assert np.min(parts) > 0
    np.testing.assert_allclose(np.sum(parts, axis=0), 2 * total, rtol=1e-5)


def test_maps_have_unit_length(model, images):
    for x in maps_of(model, images[0]):
        lengths = np.linalg.norm(np.asarray(x, np.float64), axis=-1)
        np.testing.assert_allclose(lengths, np.ones_like(lengths), atol=1e-6)


def test_gradients_flow_to_both_images(model, images):
    for grad in gradients(model, *images):
        assert (np.abs(grad) > 0).mean() > 0.9


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_gradients_are_finite_if_no_feature_is_active(value):
    """The length of a vector has no gradient at zero, and tiny squares underflow in float32."""
    x = jnp.full((1, 1, 1, 4), value)
    assert not np.any(np.abs(unit_vectors(x)) > 1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(unit_vectors(x)))(x)).all()


def test_bfloat16_keeps_parameters_and_distances_float32(model, images):
    config = LpipsConfig(dtype="bfloat16")
    abstract = nnx.eval_shape(lambda: Lpips(config, rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    half = jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))
    exact, rounded = run(model, *images), run(half, *images)
    assert rounded.dtype == jnp.float32
    assert 0 < np.max(np.abs(rounded / exact - 1)) < 0.02


@pytest.mark.parametrize(
    ("net", "trunk", "heads"), [("alex", 2_469_696, 1_152), ("vgg", 14_714_688, 1_472)]
)
def test_the_networks_have_the_published_sizes(net, trunk, heads):
    abstract = nnx.eval_shape(lambda: Lpips(LpipsConfig(net=net), rngs=nnx.Rngs(0)))
    sizes = {"stages": 0, "heads": 0}
    for param, leaf in named_leaves(abstract).items():
        sizes[param.split("/")[0]] += math.prod(leaf.shape)
    assert sizes == {"stages": trunk, "heads": heads}


def test_new_heads_weigh_all_channels_equally():
    make = jax.jit(lambda: Lpips(LpipsConfig(), rngs=nnx.Rngs(0)).heads)
    for head in jax.tree.leaves(make()):
        np.testing.assert_allclose(head, np.full(len(head), 1 / len(head)), rtol=1e-6)


def test_every_parameter_names_its_axes(model):
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert {axis for axis in axes if axis is not None} <= set(RULES)


@pytest.mark.parametrize("net", list(TRUNKS))
def test_images_that_are_too_small_and_unknown_networks_are_refused(networks, net):
    model = networks[net]
    smallest = TRUNKS[net].smallest
    with pytest.raises(
        ValueError, match=f"Images of 100 x {smallest - 1} pixels are too small for"
    ):
        model(*[jnp.zeros((1, 100, smallest - 1, 3))] * 2)
    out = jax.eval_shape(model, *[jnp.zeros((1, 100, smallest, 3))] * 2)
    assert out.shape == (1,)
    with pytest.raises(ValueError, match="net 'squeeze' is not one of alex, vgg"):
        LpipsConfig(net="squeeze")
