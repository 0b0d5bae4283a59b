"""The T5 encoder against a reference in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models import t5
from kontext_jax.models.layers import REMAT_POLICIES
from kontext_jax.sharding import RULES

TINY = t5.T5Config.tiny_bytes()


@pytest.fixture(scope="module")
def fresh():
    return t5.T5Encoder(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model(fresh):
    """The tiny encoder with random norm scales and larger position biases, so that both matter."""
    model = nnx.clone(fresh)
    rng = np.random.default_rng(0)
    for norm in (model.blocks.attention_norm, model.blocks.mlp_norm, model.final_layer_norm):
        norm.scale[...] = jnp.asarray(rng.uniform(0.5, 1.5, norm.scale.shape), jnp.float32)
    model.relative_attention_bias[...] = 8 * model.relative_attention_bias[...]
    return model


def with_config(model, **kwargs) -> t5.T5Encoder:
    """The same weights under another config."""
    config = t5.T5Config.tiny_bytes(**kwargs)
    other = jax.eval_shape(lambda: t5.T5Encoder(config, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@jax.jit
def encode(model, text_ids, segments):
    return model(text_ids, segments)


def random_ids(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 384, shape), jnp.int32)


def float64(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def expected_bucket(distance: int) -> int:
    """Bucket of 32, up to a distance of 128, by integers: far ones start at 8 * 2 ** (j / 2)."""
    half, size = (16 if distance > 0 else 0), abs(distance)
    far = 8 + sum(size**2 >= 64 * 2**j for j in range(1, 8))
    return half + (size if size < 8 else far)


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(model, ids: np.ndarray) -> np.ndarray:
    """The encoding of one prompt by the published formulas, head by head."""
    x = float64(model.shared.embedding)[ids]
    length, blocks = len(ids), model.blocks
    table = float64(model.relative_attention_bias)
    buckets = [[expected_bucket(key - query) for key in range(length)] for query in range(length)]
    bias = table[np.array(buckets)]
    for layer in range(TINY.num_layers):
        q, k, v, o = (float64(getattr(blocks.attention, name).kernel)[layer] for name in "qkvo")
        h = rms_norm(x, float64(blocks.attention_norm.scale)[layer])
        heads = []
        for head in range(TINY.num_heads):
            at = slice(head * TINY.d_kv, (head + 1) * TINY.d_kv)
            weights = np.exp((h @ q[:, at]) @ (h @ k[:, at]).T + bias[:, :, head])
            weights /= weights.sum(axis=-1, keepdims=True)
            heads.append(weights @ (h @ v[:, at]))
        x = x + np.concatenate(heads, axis=-1) @ o
        h = rms_norm(x, float64(blocks.mlp_norm.scale)[layer])
        wi_0, wi_1, wo = (
            float64(getattr(blocks.mlp, name).kernel)[layer] for name in ("wi_0", "wi_1", "wo")
        )
        x = x + (gelu(h @ wi_0) * (h @ wi_1)) @ wo
    return rms_norm(x, float64(model.final_layer_norm.scale))


def test_xxl_has_4_762_310_656_parameters():
    abstract = jax.eval_shape(lambda: t5.T5Encoder(t5.T5Config.xxl(), rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    layer = 4 * 4096 * 64 * 64 + 3 * 4096 * 10240 + 2 * 4096
    assert count == 32128 * 4096 + 32 * 64 + 24 * layer + 4096 == 4_762_310_656


def test_every_parameter_names_its_axes(model):
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert {axis for axis in axes if axis is not None} <= set(RULES)


def test_initial_scales_match_transformers(fresh):
    width, d_kv, inner, d_ff = TINY.d_model, TINY.d_kv, TINY.num_heads * TINY.d_kv, TINY.d_ff
    attention, mlp = fresh.blocks.attention, fresh.blocks.mlp
    for param, std in (
        (fresh.shared.embedding, 1.0),
        (attention.q.kernel, (width * d_kv) ** -0.5),
        (attention.k.kernel, width**-0.5),
        (attention.v.kernel, width**-0.5),
        (attention.o.kernel, inner**-0.5),
        (mlp.wi_0.kernel, width**-0.5),
        (mlp.wi_1.kernel, width**-0.5),
        (mlp.wo.kernel, d_ff**-0.5),
    ):
        assert float(jnp.std(param[...])) == pytest.approx(std, rel=0.12)


def test_initial_position_biases_decrease_with_distance(fresh):
    """By 2^(-4 h / 4) per token in both directions, at least -8, plus T5's noise."""
    bias = np.asarray(fresh.relative_attention_bias[...])
    for head, slope in enumerate((1.0, 0.5, 0.25, 0.125)):
        for distance in (1, 3, 7):
            for bucket in (distance, 16 + distance):  # before and after the query
                assert bias[bucket, head] == pytest.approx(-slope * distance, abs=0.6)
        assert bias[15, head] == pytest.approx(-8.0, abs=0.6)  # 87 tokens and more


def test_buckets_match_the_integer_formula():
    distance = np.arange(-600, 601)[None]
    buckets = t5.relative_position_buckets(distance, 32, 128)
    np.testing.assert_array_equal(buckets[0], [expected_bucket(int(d)) for d in distance[0]])
    assert set(buckets[0]) == set(range(32)) - {16}


def test_encoder_matches_the_numpy_reference(model):
    ids = random_ids(2, 40)
    out = encode(model, ids, jnp.ones_like(ids))
    assert out.shape == (2, 40, 64) and out.dtype == jnp.float32
    for row in range(2):
        np.testing.assert_allclose(out[row], reference(model, np.asarray(ids[row])), atol=2e-5)


LENGTHS = (9, 3, 17)


def packed_row(pad: int):
    """Three prompts in one row of 32 tokens, padded with ``pad``."""
    prompts = [random_ids(1, length, seed=length) for length in LENGTHS]
    rest = 32 - sum(LENGTHS)
    ids = jnp.concatenate([*prompts, jnp.full((1, rest), pad, jnp.int32)], axis=1)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [*LENGTHS, rest])[None], jnp.int32)
    return prompts, ids, segments


def test_packed_prompts_are_encoded_as_if_alone(model):
    prompts, ids, segments = packed_row(pad=0)
    out = encode(model, ids, segments)
    alone = [encode(model, prompt, jnp.ones_like(prompt)) for prompt in prompts]
    np.testing.assert_allclose(out[:, : sum(LENGTHS)], jnp.concatenate(alone, 1), atol=2e-5)

    _, other_pads, _ = packed_row(pad=5)
    other = encode(model, other_pads, segments)
    np.testing.assert_array_equal(out[:, : sum(LENGTHS)], other[:, : sum(LENGTHS)])


def test_gradients_of_a_packed_row_are_the_sum_over_its_prompts(model):
    prompts, ids, segments = packed_row(pad=0)
    weight = np.random.default_rng(3).normal(size=(1, 32, 64)).astype(np.float32)

    @jax.jit
    @jax.grad
    def grad(model, ids, segments, weight):
        mask = (segments > 0).astype(jnp.float32)[..., None]
        return jnp.sum(model(ids, segments) * weight * mask)

    packed = grad(model, ids, segments, weight)
    separate, start = jax.tree.map(jnp.zeros_like, packed), 0
    for prompt in prompts:
        pads = ((0, 0), (0, 32 - prompt.shape[1]))
        alone = jnp.pad(jnp.ones_like(prompt), pads)
        one = grad(model, jnp.pad(prompt, pads), alone, np.roll(weight, -start, axis=1))
        separate = jax.tree.map(jnp.add, separate, one)
        start += prompt.shape[1]
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(separate), strict=True):
        assert float(jnp.max(jnp.abs(b))) > 0
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.max(jnp.abs(b))))


def test_padding_matters_if_it_belongs_to_the_segment(model):
    ids = random_ids(1, 12).at[:, 8:].set(0)
    ignored = encode(model, ids, (jnp.arange(12) < 8).astype(jnp.int32)[None])
    counted = encode(model, ids, jnp.ones((1, 12), jnp.int32))
    assert float(jnp.max(jnp.abs(counted - ignored)[:, :8])) > 0.01


def test_gradients_do_not_depend_on_remat(fresh):
    ids = random_ids(1, 8)
    grad = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(ids, jnp.ones_like(ids))))))
    grads = [grad(with_config(fresh, remat=remat)) for remat in REMAT_POLICIES]
    for a, *others in zip(*map(jax.tree.leaves, grads), strict=True):
        for b in others:
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_keeps_float32_parameters(fresh):
    half = with_config(fresh, dtype="bfloat16")
    abstract = jax.eval_shape(lambda: t5.T5Encoder(half.config, rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    ids = random_ids(1, 16)
    out, exact = (encode(m, ids, jnp.ones_like(ids)) for m in (half, fresh))
    assert out.dtype == jnp.bfloat16
    error = jnp.sqrt(jnp.mean(jnp.square(out.astype(jnp.float32) - exact)))
    assert 0 < float(error) < 0.03


def test_pool_is_the_mean_of_each_example():
    text = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [2, 2, 3, 3, 3, 3, 0]], np.int32)
    pooled = t5.pool(jnp.asarray(text), jnp.asarray(segments), 4)
    expected = np.zeros((2, 4, 5), np.float32)
    expected[0, 0], expected[0, 1] = text[0, :3].mean(0), text[0, 3:5].mean(0)
    expected[1, 1], expected[1, 2] = text[1, :2].mean(0), text[1, 2:6].mean(0)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    assert t5.pool(jnp.asarray(text, jnp.bfloat16), jnp.asarray(segments), 4).dtype == jnp.float32


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"relative_attention_num_buckets": 30}, "num_buckets 30 must be a multiple of 4"),
        ({"relative_attention_max_distance": 8}, "max_distance 8 more than a quarter"),
        ({"remat": "some"}, "remat 'some' is not one of full, none"),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        t5.T5Config.tiny_bytes(**wrong)
