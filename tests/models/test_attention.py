import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import sharding
from kontext_jax.models import attention as attention_module
from kontext_jax.models.attention import attention, choose_kernel
from kontext_jax.models.layers import remat

SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [3, 0, 1, 3, 1, 1]])


@pytest.fixture(scope="module")
def qkv():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 2, 4)).astype(np.float32)
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def expected_attention(q, k, v, segments, bias=None, scale=None, causal=False):
    """Attention of each token to the tokens of its example, one token at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = np.full(q.shape, np.nan)
    for b, s, h in np.ndindex(q.shape[:3]):
        visible = np.flatnonzero(segments[b] == segments[b, s])
        visible = visible[visible <= s] if causal else visible
        logits = scale * k[b, visible, h] @ q[b, s, h]
        if bias is not None:
            logits = logits + np.asarray(bias, np.float64)[b, h, s, visible]
        weights = np.exp(logits - logits.max())
        out[b, s, h] = weights / weights.sum() @ v[b, visible, h]
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_matches_the_reference(qkv, with_bias, scale):
    bias = None
    if with_bias:
        bias = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 6, 6)), jnp.float32)
    out = attention(*qkv, jnp.asarray(SEGMENTS), bias=bias, scale=scale)
    expected = expected_attention(*qkv, SEGMENTS, bias, scale)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_causal_attention_matches_the_reference(qkv):
    out = attention(*qkv, jnp.asarray(SEGMENTS), causal=True)
    expected = expected_attention(*qkv, SEGMENTS, causal=True)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_blocks_of_queries_match_plain_attention(qkv, monkeypatch):
    """Five queries in blocks of two. No program has more than a block's logits."""
    monkeypatch.setattr(attention_module, "BLOCK", 2)
    qkv, segments = tuple(x[:, :5] for x in qkv), jnp.asarray(SEGMENTS[:, :5])

    def value_and_gradients(kernel):
        def loss(*x):
            return jnp.sum(jnp.sin(attention(*x, segments, kernel=kernel)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    blocked, plain = (value_and_gradients(kernel) for kernel in ("blocked", "xla"))
    for a, b in zip(jax.tree.leaves(blocked(*qkv)), jax.tree.leaves(plain(*qkv)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    programs = [str(jax.make_jaxpr(function)(*qkv)) for function in (blocked, plain)]
    assert ["f32[2,2,5,5]" in program for program in programs] == [False, True]


def test_tokens_of_other_segments_have_no_effect(qkv):
    q, k, v = qkv
    segments = jnp.asarray(SEGMENTS)
    other = (segments != 1)[:, :, None, None]
    out = attention(q, k, v, segments)
    changed = attention(q, jnp.where(other, 50.0, k), jnp.where(other, 1e6, v), segments)
    np.testing.assert_array_equal(
        np.asarray(out)[SEGMENTS == 1], np.asarray(changed)[SEGMENTS == 1]
    )


def test_padding_alone_has_finite_outputs_and_gradients(qkv):
    segments = jnp.zeros((2, 6), jnp.int32)
    assert np.isfinite(attention(*qkv, segments)).all()
    grads = jax.grad(lambda *x: jnp.sum(jnp.square(attention(*x, segments))), argnums=(0, 1, 2))
    assert all(np.isfinite(grad).all() for grad in grads(*qkv))


def test_softmax_of_bfloat16_inputs_is_float32(qkv):
    """The logits are large and close to one another: rounded to bfloat16 they would be equal."""
    key = jnp.zeros((1, 2, 1, 2)).at[0, :, 0, 0].set(jnp.array([16.0, 16.125]))
    query = jnp.full((1, 2, 1, 2), 16.0)
    value = jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 2))
    parts = (x.astype(jnp.bfloat16) for x in (query, key, value))
    out = attention(*parts, jnp.ones((1, 2), jnp.int32), scale=1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1 / (1 + np.exp(-2.0)), atol=4e-3)


@pytest.mark.parametrize("segments", [SEGMENTS, np.ones_like(SEGMENTS)], ids=["packed", "full"])
def test_cudnn_gets_the_right_mask(qkv, segments, monkeypatch):
    """Replaces cuDNN's kernel by XLA's; only a GPU could test the kernel itself."""
    plain = jax.nn.dot_product_attention

    def on_cpu(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return plain(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    with jax.numpy_rank_promotion("allow"):
        out = attention(*qkv, jnp.asarray(segments), kernel="cudnn", scale=0.3)
    expected = expected_attention(*qkv, segments, scale=0.3)
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(("policy", "calls"), [("full", 4), ("save_attention", 2)])
def test_saved_attention_avoids_a_second_cudnn_forward_pass(policy, calls, monkeypatch):
    """Traced as on a GPU; both the branch with a mask and the one without count."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{cudnn}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")

    def block(x, _):
        return attention(x, x, x, jnp.ones((2, 64), jnp.int32)), None

    def loss(x):
        return jnp.sum(jax.lax.scan(remat(block, policy), x, None, length=3)[0])

    x = jax.ShapeDtypeStruct((2, 64, 2, 128), jnp.bfloat16)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        program = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert len(re.findall("= dot_product_attention_fwd", program)) == calls


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "kernel"),
    [
        ("tpu", 128, "bfloat16", "splash"),
        ("tpu", 512, "float32", "splash"),
        ("tpu", 32, "bfloat16", "xla"),
        ("gpu", 128, "bfloat16", "cudnn"),
        ("gpu", 128, "float32", "xla"),
        ("gpu", 512, "bfloat16", "xla"),
        ("cpu", 128, "bfloat16", "xla"),
    ],
)
def test_auto_is_the_fused_kernel_if_it_supports_the_shape(
    platform, head_dim, dtype, kernel, monkeypatch
):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    assert choose_kernel(jnp.zeros((2, 4, 2, head_dim), dtype)) == kernel
    odd = choose_kernel(jnp.zeros((2, 5, 2, head_dim), dtype))
    assert odd == (kernel if kernel == "splash" else "xla")  # splash pads
    long = choose_kernel(jnp.zeros((1, 4098, 2, head_dim), dtype))
    assert long == ("blocked" if kernel == "xla" else kernel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "flash"}, "attention 'flash' is not one of auto, xla, blocked, splash, cudnn."),
        ({"kernel": "splash"}, "needs a multiple of 128 channels per head, not 4."),
        (
            {"kernel": "splash", "causal": True},
            "supports neither a bias nor a causal mask; use 'xla'.",
        ),
        ({"kernel": "cudnn"}, "attention 'cudnn' runs only on GPUs; use 'auto'."),
    ],
)
def test_unsupported_kernels_are_refused(qkv, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv, jnp.asarray(SEGMENTS), **arguments)
