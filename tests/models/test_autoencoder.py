"""The autoencoder against references in NumPy float64."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.compilation import hlo
from kontext_jax.models import autoencoder as ae
from kontext_jax.sharding import RULES, MeshConfig, make_mesh
from kontext_jax.weights.autoencoder import to_json

TINY = ae.AutoencoderConfig.tiny()


def filled(make, seed=0):
    """A module with random parameters, so that scales and biases have an effect.

    NumPy draws them: compiling an initialiser for each shape takes longer than all tests together.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(mean + rng.normal(size=leaf.shape) * fan_in**-0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(make))


def autoencoder(**kwargs) -> ae.Autoencoder:
    config = ae.AutoencoderConfig.tiny(**kwargs)
    return filled(lambda: ae.Autoencoder(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return autoencoder()


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 3)), jnp.float32)


def float64(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def group_norm(x, norm):
    batch, height, width, channels = x.shape
    groups = x.reshape(batch, height * width, norm.num_groups, channels // norm.num_groups)
    mean = groups.mean(axis=(1, 3), keepdims=True)
    var = groups.var(axis=(1, 3), keepdims=True)
    x = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    return x * float64(norm.scale) + float64(norm.bias)


def convolve(x, layer, stride=1, before=1, after=1):
    """Loops over output pixels; pads with ``before`` and ``after`` zeros along each side."""
    kernel, bias = float64(layer.kernel), float64(layer.bias)
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for row in range(height):
        for column in range(width):
            top, left = stride * row, stride * column
            window = x[:, top : top + size, left : left + size]
            out[:, row, column] = np.einsum("bijc,ijco->bo", window, kernel) + bias
    return out


def swish(x):
    return x / (1 + np.exp(-x))


def test_flux_has_83_819_683_parameters(caplog):
    start = time.process_time()
    config = ae.AutoencoderConfig.flux()
    with jax.log_compiles():
        abstract = jax.eval_shape(lambda: ae.Autoencoder(config, rngs=nnx.Rngs(0)))
    assert "ompil" not in caplog.text, "the shapes need no computation"
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    assert count == 83_819_683
    assert len(jax.tree.leaves(abstract)) == 244
    assert time.process_time() - start < 20
    assert (config.downsample, config.token_channels, config.pixels_per_token) == (8, 64, 16)


def test_every_parameter_names_its_axes(model):
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert len(axes) == param.ndim
        assert {axis for axis in axes if axis is not None} <= set(RULES)


def test_shapes_and_dtypes_of_encode_and_decode(model, images):
    latents = jax.eval_shape(lambda m, x: m.encode(x), model, images)
    assert latents.shape == (2, 2, 4, 6)
    assert (TINY.downsample, TINY.token_channels, TINY.pixels_per_token) == (4, 24, 8)
    assert jax.eval_shape(lambda m, z: m.decode(z), model, latents).shape == images.shape

    half = ae.AutoencoderConfig.tiny(dtype="bfloat16")
    half = jax.eval_shape(lambda: ae.Autoencoder(half, rngs=nnx.Rngs(0)))
    latents = jax.eval_shape(lambda m, x: m.encode(x), half, images)
    decoded = jax.eval_shape(lambda m, z: m.decode(z), half, latents)
    assert latents.dtype == decoded.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))


def test_group_norm_is_exact_far_from_zero():
    norm = filled(lambda: ae.GroupNorm(TINY.num_groups, 16, rngs=nnx.Rngs(0)))
    x = 3000 + np.random.default_rng(1).normal(size=(2, 8, 8, 16))
    x = jnp.asarray(x, jnp.float32)
    # E[x^2] - E[x]^2 in float32 would be wrong in the first digit.
    np.testing.assert_allclose(norm(x), group_norm(np.asarray(x, np.float64), norm), atol=2e-3)


def test_group_norm_rounds_once():
    norm = filled(lambda: ae.GroupNorm(TINY.num_groups, 16, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 4, 16)), jnp.bfloat16)
    exact = norm(x.astype(jnp.float32))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("outputs", [8, 16])
def test_resnet_block_matches_its_formula(outputs):
    block = filled(lambda: ae.ResnetBlock(TINY, 8, outputs, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, 5, 4, 8)).astype(np.float32)
    h = convolve(swish(group_norm(x.astype(np.float64), block.norm1)), block.conv1)
    h = convolve(swish(group_norm(h, block.norm2)), block.conv2)
    shortcut = x if outputs == 8 else convolve(x, block.nin_shortcut, before=0, after=0)
    np.testing.assert_allclose(block(jnp.asarray(x)), shortcut + h, atol=2e-5)


def test_attention_block_matches_its_formula():
    block = filled(lambda: ae.AttnBlock(TINY, 16, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 16)).astype(np.float32)

    def project(cells, layer):
        return cells @ float64(layer.kernel) + float64(layer.bias)

    cells = group_norm(x.astype(np.float64), block.norm).reshape(2, 12, 16)
    q, k, v = (project(cells, layer) for layer in (block.q, block.k, block.v))
    weights = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(16))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = x + project(weights @ v, block.proj_out).reshape(x.shape)
    np.testing.assert_allclose(block(jnp.asarray(x)), expected, atol=2e-5)


def test_downsample_pads_only_below_and_to_the_right():
    step = filled(lambda: ae.Downsample(TINY, 8, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, 6, 8, 8)).astype(np.float32)
    expected = convolve(x.astype(np.float64), step.conv, stride=2, before=0, after=1)
    assert expected.shape == (2, 3, 4, 8)
    np.testing.assert_allclose(step(jnp.asarray(x)), expected, atol=1e-5)


def test_upsample_repeats_pixels():
    step = filled(lambda: ae.Upsample(TINY, 8, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(1, 2, 3, 8)).astype(np.float32)
    doubled = np.zeros((1, 4, 6, 8))
    for row in range(4):
        for column in range(6):
            doubled[:, row, column] = x[:, row // 2, column // 2]
    np.testing.assert_allclose(step(jnp.asarray(x)), convolve(doubled, step.conv), atol=1e-5)


def test_the_decoder_applies_its_finest_level_last(model):
    outputs = [level.block[-1].conv2.kernel.shape[-1] for level in model.decoder.up]
    assert outputs == [16, 32, 64]
    assert [level.upsample is not None for level in model.decoder.up] == [False, True, True]
    assert [level.downsample is not None for level in model.encoder.down] == [True, True, False]


def test_log_variance_is_clamped(images):
    model = autoencoder(channel_multipliers=(1,))
    shift = np.zeros(12, np.float32)
    shift[:2], shift[6:9], shift[9:] = 100, 100, -100
    model.encoder.conv_out.bias[...] = jnp.asarray(shift)
    mean, logvar = jax.jit(lambda m, x: m.moments(x))(model, images)
    assert float(jnp.max(mean)) > 90
    np.testing.assert_array_equal(logvar[..., :3], 20.0)
    np.testing.assert_array_equal(logvar[..., 3:], -30.0)


def test_encode_scales_the_mean_or_a_sample(images):
    model = autoencoder(channel_multipliers=(1,))
    key = jax.random.key(7)
    run = jax.jit(lambda m, x: (m.moments(x), m.encode(x), m.encode(x, key)))
    (mean, logvar), latents, sample = run(model, images)
    np.testing.assert_allclose(latents, 0.3611 * (mean - 0.1159), atol=1e-6)
    noise = jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(sample - latents, 0.3611 * jnp.exp(logvar / 2) * noise, atol=1e-5)


def test_gradients_reach_every_parameter(images):
    model = autoencoder(channels=8, num_groups=4, channel_multipliers=(1,))

    def loss(model, x):
        return jnp.mean(jnp.square(model.decode(model.encode(x, jax.random.key(1))) - x))

    grads = jax.jit(jax.grad(loss))(model, images)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert bool(jnp.all(jnp.isfinite(grad))), name
        # A bias of the keys shifts all logits of a query equally, so it has no gradient.
        assert ".k.bias" in name or float(jnp.max(jnp.abs(grad))) > 1e-6, name


@pytest.mark.parametrize(
    ("sizes", "rows", "is_split"),
    [
        ({"context": 8}, 24, True),  # all devices have all 12 rows of the latents
        pytest.param({"context": 8}, 32, True, marks=pytest.mark.slow),
        pytest.param({"context": 4, "tensor": 2}, 32, True, marks=pytest.mark.slow),
        # fsdp holds copies of the single image.
        pytest.param({"fsdp": 2, "context": 4}, 32, False, marks=pytest.mark.slow),
    ],
)
def test_rows_of_images_are_split_over_the_mesh(sizes, rows, is_split):
    model = autoencoder(channels=8, num_groups=4, channel_multipliers=(1, 2))
    x = np.random.default_rng(0).uniform(-1, 1, (1, rows, 8, 3)).astype(np.float32)

    def loss(model, x):
        out = model.decode(model.encode(x))
        return jnp.mean(jnp.sin(3 * out)), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = step(model, x)
    with jax.set_mesh(make_mesh(MeshConfig(**({"data": 1, "fsdp": 1} | sizes)))):
        compiled = step.lower(model, x).compile()
        results = compiled(model, x)
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    collectives = hlo.analyse(compiled.as_text()).collectives
    assert ("collective-permute" in collectives) == is_split
    if is_split:
        assert results[0][1].addressable_shards[0].data.shape == (1, rows // 8, 8, 3)
    if sizes == {"context": 8} and rows == 32:
        # The keys and values of two attention blocks. Their gradients are reduced.
        assert collectives["all-gather"].count == 4


def test_gradients_do_not_depend_on_remat():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 8)), jnp.float32)
    grad = jax.jit(jax.grad(lambda level: jnp.mean(jnp.square(level(x)))))
    grads = []
    for remat in ("full", "none"):
        config = ae.AutoencoderConfig.tiny(remat=remat)
        level = filled(lambda c=config: ae.Level(c, [8, 16], ae.Downsample, rngs=nnx.Rngs(0)))
        assert ("remat" in str(jax.make_jaxpr(grad)(level))) == (remat == "full")
        grads.append(jax.tree.leaves(grad(level)))
    for a, b in zip(*grads, strict=True):
        assert float(jnp.max(jnp.abs(a))) > 1e-6
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_pack_latents_matches_a_loop_and_unpack_inverts_it():
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 5)).astype(np.float32)
    expected = np.zeros((2, 6, 20), np.float32)
    for row, column, channel in np.ndindex(4, 6, 5):
        token = (row // 2) * 3 + column // 2
        feature = channel * 4 + (row % 2) * 2 + column % 2
        expected[:, token, feature] = latents[:, row, column, channel]
    packed = ae.pack_latents(jnp.asarray(latents))
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(ae.unpack_latents(packed, (4, 6)), latents)


def test_to_uint8_inverts_to_pixels_and_clips():
    values = jnp.arange(256, dtype=jnp.uint8)
    images = jnp.broadcast_to(values.reshape(16, 16, 1), (16, 16, 3))
    pixels = ae.to_pixels(images)
    assert float(pixels.min()) == -1 and float(pixels.max()) == 1
    np.testing.assert_array_equal(ae.to_uint8(pixels), images)
    np.testing.assert_array_equal(ae.to_uint8(3 * pixels)[0], 0)
    np.testing.assert_array_equal(ae.to_uint8(3 * pixels)[-1], 255)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"channels": 20}, "channels 20 must be a multiple of num_groups 8"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers \(1, 0\)"),
        ({"remat": "save_named"}, r"remat 'save_named' is not one of full, none\."),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ae.AutoencoderConfig.tiny(**wrong)


def test_sides_of_images_must_be_multiples_of_a_cell(model):
    with pytest.raises(ValueError, match="10 x 16 pixels need sides divisible by 4"):
        model.encode(jnp.zeros((1, 10, 16, 3)))


@pytest.mark.parametrize("kind", [{"fsq_levels": (5, 4, 3)}, {"codebook_size": 60}])
def test_discrete_latents_are_quantised_and_have_codes(kind):
    model = autoencoder(latent_channels=3, **kind)
    config = model.config
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    z, logvar = jax.jit(lambda m, x: m.moments(x))(model, images)
    assert np.all(logvar == ae.MIN_LOGVAR) and config.num_codes == 60
    sample = jax.jit(lambda m, x: m.encode(x, jax.random.key(0)))(model, images)
    np.testing.assert_allclose(sample, model.scaled(z), rtol=1e-6)
    codes = np.asarray(jax.jit(lambda m, x: m.codes(x))(model, images))
    assert codes.shape == z.shape[:3] and 0 <= codes.min() <= codes.max() < 60
    assert len(np.unique(codes)) == len(np.unique(np.asarray(z).reshape(-1, 3), axis=0)) > 1
    with pytest.raises(ValueError, match="Discrete latents .* have no layout"):
        to_json(config)


@pytest.mark.parametrize(
    ("levels", "message"),
    [((5, 4), r"\(5, 4\) must have a number for each"), ((5, 4, 1), "must be 2 or more")],
)
def test_invalid_levels_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        ae.AutoencoderConfig.tiny(latent_channels=3, fsq_levels=levels)


def test_latents_have_one_kind_of_codes():
    with pytest.raises(ValueError, match="fsq_levels and codebook_size exclude each other"):
        ae.AutoencoderConfig.tiny(latent_channels=3, fsq_levels=(5, 4, 3), codebook_size=60)
