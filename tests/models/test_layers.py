"""The layers against references in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.geometry import MAX_POSITION
from kontext_jax.models import layers

AXES = (4, 6, 6)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rotated(x, positions):
    rotation = layers.rope(jnp.asarray(positions)[None], AXES, 10000.0)
    return np.asarray(layers.apply_rope(x[None], rotation)[0], np.float64)


def test_rope_rotates_pairs_of_channels():
    """Pair k of an axis with d channels rotates by position * 10000 ** (-2 k / d)."""
    positions = np.array([[0, 0, 0], [1, 30, 7], [3, MAX_POSITION - 1, 1000]])
    x = normal(3, 2, 16)
    angles = np.concatenate(
        [positions[:, [i]] * 10000.0 ** (-2.0 * np.arange(d // 2) / d) for i, d in enumerate(AXES)],
        axis=1,
    )
    pairs = np.asarray(x, np.float64)[..., 0::2] + 1j * np.asarray(x, np.float64)[..., 1::2]
    expected = pairs * np.exp(1j * angles)[:, None]
    result = rotated(x, positions)
    np.testing.assert_allclose(result[..., 0::2], expected.real, atol=1e-6)
    np.testing.assert_allclose(result[..., 1::2], expected.imag, atol=1e-6)
    np.testing.assert_array_equal(result[0], x[0])  # position (0, 0, 0), that of text


def test_rope_depends_only_on_differences_of_positions():
    q, k = normal(1, 1, 16), normal(1, 1, 16, seed=1)

    def score(query, key):
        return np.sum(rotated(q, np.array([query])) * rotated(k, np.array([key])))

    base = score([0, 3, 5], [1, 9, 2])
    np.testing.assert_allclose(score([4, 103, 25], [5, 109, 22]), base, atol=1e-5)
    assert abs(score([0, 3, 5], [1, 9, 3]) - base) > 1e-3


def test_timestep_embedding_has_cosines_first():
    t = jnp.array([[0.0, 437.0, 1000.0]])
    angles = np.asarray(t, np.float64)[..., None] * np.exp(-np.log(1e4) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(layers.timestep_embedding(t), expected, atol=1e-4)
    assert layers.timestep_embedding(t)[0, 0].tolist() == [1.0] * 128 + [0.0] * 128


def test_layer_norm_matches_its_formula():
    x = np.asarray(3 * normal(2, 5, 16) + 2, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x, jnp.float32)), expected, atol=2e-6)


def test_eps_of_the_norms_is_1e_6():
    """A signal of 1e-3 has a mean square of 1e-6, to which eps adds as much again."""
    x = 1e-3 * jnp.array([[[1.0, -1.0]]])
    np.testing.assert_allclose(np.abs(layers.layer_norm(x)), 2**-0.5, rtol=1e-5)
    norm = layers.RMSNorm(2, ("embed",), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.abs(norm(x)), 2**-0.5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 16), (2, 5, 3, 16)])
def test_rms_norm_and_its_gradient_match_the_formula(shape):
    norm = layers.RMSNorm(16, ("embed",), rngs=nnx.Rngs(0))
    norm.scale[...] = normal(16, seed=1)
    x, weights = normal(*shape), normal(*shape, seed=2)
    x64 = np.asarray(x, np.float64)
    unscaled = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x), unscaled * np.asarray(norm.scale[...]), atol=2e-6)
    grads = jax.grad(lambda norm: jnp.sum(norm(x) * weights))(norm)
    expected = (unscaled * np.asarray(weights)).reshape(-1, 16).sum(0)
    np.testing.assert_allclose(grads.scale[...], expected, atol=1e-5)


def test_rms_norm_rounds_once():
    """The scale is applied before rounding to bfloat16."""
    norm = layers.RMSNorm(64, ("embed",), rngs=nnx.Rngs(0))
    norm.scale[...] = 1 + 0.1 * normal(64, seed=1)
    x = normal(8, 64).astype(jnp.bfloat16)
    exact = norm(x.astype(jnp.float32))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_and_its_gradients_match_the_formula(use_bias):
    make = lambda: layers.Linear(  # noqa: E731
        6, 4, ("embed", "mlp"), rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"), use_bias=use_bias
    )
    linear = make()
    if use_bias:
        linear.bias[...] = normal(4, seed=3)
    x, weights = normal(2, 5, 6), normal(2, 5, 4, seed=2)
    grads, x_grad = jax.grad(lambda m, x: jnp.sum(m(x) * weights), argnums=(0, 1))(linear, x)
    x64, w64 = np.asarray(x, np.float64).reshape(-1, 6), np.asarray(weights).reshape(-1, 4)
    kernel = np.asarray(linear.kernel[...], np.float64)
    expected = x64 @ kernel + (np.asarray(linear.bias[...]) if use_bias else 0)
    np.testing.assert_allclose(linear(x).reshape(-1, 4), expected, atol=1e-5)
    np.testing.assert_allclose(grads.kernel[...], x64.T @ w64, atol=1e-5)
    np.testing.assert_allclose(x_grad.reshape(-1, 6), w64 @ kernel.T, atol=1e-5)
    if use_bias:
        np.testing.assert_allclose(grads.bias[...], w64.sum(0), atol=1e-5)
    else:
        assert linear.bias is None


def test_linear_computes_in_its_dtype_with_float32_parameters():
    linear = layers.Linear(6, 4, ("embed", "mlp"), rngs=nnx.Rngs(0), dtype=jnp.dtype("bfloat16"))
    assert linear(normal(3, 6)).dtype == jnp.bfloat16
    assert linear.kernel[...].dtype == linear.bias[...].dtype == jnp.float32


def test_names_of_linear_parameters():
    """Checkpoints depend on these names; an absent adapter adds none."""
    linear = layers.Linear(6, 4, ("embed", "mlp"), rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"))
    shapes = {jax.tree_util.keystr(k): x.shape for k, x in jax.tree.leaves_with_path(linear)}
    assert shapes == {".bias.value": (4,), ".kernel.value": (6, 4)}
    assert linear.lora is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_adds_its_adapter(dtype, use_bias):
    linear = layers.Linear(
        6, 4, ("embed", "mlp"), rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), use_bias=use_bias
    )
    x = normal(2, 5, 6)
    plain = linear(x)
    linear.lora = layers.LowRank(6, 4, 2, ("embed", "mlp"), rngs=nnx.Rngs(1), scale=0.5)
    np.testing.assert_array_equal(linear(x), plain)  # b is zero
    linear.lora.b[...] = normal(2, 4, seed=3)
    assert linear(x).dtype == plain.dtype == jnp.dtype(dtype)
    assert linear.lora.a[...].dtype == linear.lora.b[...].dtype == jnp.float32
    x64, a, b = (np.asarray(v, np.float64) for v in (x, linear.lora.a[...], linear.lora.b[...]))
    expected = np.asarray(plain, np.float64) + 0.5 * x64 @ a @ b
    np.testing.assert_allclose(linear(x), expected, atol=1e-5 if dtype == "float32" else 0.1)


def test_initial_values_and_axes_of_an_adapter():
    lora = layers.LowRank(400, 6, 50, ("embed", "mlp"), rngs=nnx.Rngs(0), scale=2.0)
    np.testing.assert_allclose(np.std(lora.a[...]), 1 / 50, rtol=0.03)
    np.testing.assert_allclose(np.mean(lora.a[...]), 0, atol=1e-3)
    assert not np.any(lora.b[...])
    assert lora.a.get_metadata()["axes"] == ("embed", None)
    assert lora.b.get_metadata()["axes"] == (None, "mlp")


def test_stacked_blocks_differ_and_have_a_leading_axis():
    blocks = layers.stack(
        lambda rngs: layers.Linear(4, 4, ("embed", "mlp"), rngs=rngs, dtype=jnp.dtype("float32")),
        3,
        nnx.Rngs(0),
    )
    assert blocks.kernel.shape == (3, 4, 4)
    assert len(np.unique(blocks.kernel[...])) == 48
    assert blocks.kernel.get_metadata()["axes"] == ("embed", "mlp")


def test_each_token_gets_the_vector_of_its_example():
    vectors = normal(2, 3, 4)
    segments = jnp.array([[1, 1, 3, 0], [2, 3, 1, 2]])
    expected = np.zeros((2, 4, 4), np.float32)
    for row, row_segments in enumerate(np.asarray(segments)):
        for s, segment in enumerate(row_segments):
            if segment:
                expected[row, s] = vectors[row, segment - 1]
    np.testing.assert_array_equal(layers.per_token(vectors, segments), expected)


def test_vector_of_a_single_example_is_not_repeated():
    vectors = normal(2, 1, 4)
    segments = jnp.array([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(layers.per_token(vectors, segments), vectors)


def test_modulation_starts_at_zero_and_returns_triples():
    rngs = nnx.Rngs(0)
    modulation = layers.Modulation(4, 2, rngs=rngs, dtype=jnp.dtype("float32"))
    parts = modulation(normal(1, 2, 4), jnp.array([[1, 2, 0]]))
    assert [part.shape for part in parts] == [(1, 3, 4)] * 6
    assert not any(np.any(part) for part in parts)

    modulation.lin.bias[...] = jnp.repeat(jnp.arange(6.0), 4)
    parts = modulation(normal(1, 1, 4), jnp.array([[1, 1, 1]]))
    assert [float(part[0, 0, 0]) for part in parts] == [0, 1, 2, 3, 4, 5]
    x = normal(1, 3, 4)
    expected = 3 * np.asarray(layers.layer_norm(x)) + 1
    np.testing.assert_allclose(layers.modulate(x, *parts[1:3]), expected, rtol=1e-6)
