"""The TPU kernel, interpreted on CPUs: its results, and which blocks it skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from kontext_jax import sharding
from kontext_jax.models import splash
from kontext_jax.models.attention import attention
from kontext_jax.models.layers import remat
from kontext_jax.sharding import MeshConfig, make_mesh
from tests.models.test_attention import expected_attention

ROWS = (
    [(1, 10), (2, 20), (3, 50), (0, 20), (1, 200), (2, 70), (3, 100), (0, 30)],  # text, then images
    [(1, 40), (0, 60), (1, 400)],
)
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS], np.int32)
VALID = (SEGMENTS > 0)[:, :, None, None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)


@pytest.fixture(scope="module")
def qkv():
    shape = (3, len(ROWS), 500, 2, 128)
    q, k, v = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def outputs_and_gradients(qkv, kernel, scale=None):
    """Output and gradients for the tokens of examples; the output of padding is masked."""

    def loss(q, k, v):
        out = attention(q, k, v, jnp.asarray(SEGMENTS), scale=scale, kernel=kernel)
        out = jnp.where(VALID, out, 0.0)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, *grads


@pytest.mark.parametrize("scale", [None, 0.02])
def test_matches_attention_within_segments(qkv, scale):
    out, *grads = outputs_and_gradients(qkv, "splash", scale)
    expected = np.where(VALID, expected_attention(*qkv, SEGMENTS, scale=scale), 0.0)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for grad, plain in zip(grads, outputs_and_gradients(qkv, "xla", scale)[1:], strict=True):
        np.testing.assert_allclose(grad, plain, atol=3e-6)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str
)
def test_results_do_not_depend_on_the_mesh(qkv, sizes):
    """Queries are split over context, heads over tensor; keys and values are gathered."""
    on_one_device = outputs_and_gradients(qkv, "splash")
    with jax.set_mesh(make_mesh(MeshConfig(**({"data": 1, "fsdp": 1} | sizes)))):
        on_mesh = outputs_and_gradients(qkv, "splash")
    for expected, actual in zip(on_one_device, on_mesh, strict=True):
        np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_blocks_of_other_examples_are_not_read(qkv):
    """A NaN among the values would show up even with a weight of zero."""
    q, k, v = (x[:1, :384] for x in qkv)
    segments = jnp.repeat(jnp.array([[1, 2, 3]]), 128, axis=1)
    v = jnp.where((segments == 2)[:, :, None, None], jnp.nan, v)
    for kernel, reads_all in (("xla", True), ("splash", False)):
        out = attention(q, k, v, segments, kernel=kernel)
        assert np.isnan(out[:, :128]).any() == reads_all and np.isnan(out[:, 128:256]).all()


@pytest.mark.parametrize(
    ("length", "block"),
    [(1, 128), (128, 128), (300, 384), (512, 512), (4608, 512), (8704, 512), (8832, 384)],
)
def test_block_size_minimises_padding(length, block):
    assert splash.block_size(length, 512) == block


def test_wide_heads_have_half_as_many_queries_in_a_block(monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK", 256)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 200, 1, 512)), jnp.float32)

    def loss(x, kernel="splash"):
        out = attention(x, x, x, jnp.ones((1, 200), jnp.int32), scale=0.01, kernel=kernel)
        return jnp.sum(jnp.sin(out))

    assert "grid=(1, 2, 1)" in str(jax.make_jaxpr(loss)(x))
    assert "grid=(1, 1, 1)" in str(jax.make_jaxpr(loss)(x[..., :256]))
    grads = [jax.jit(jax.grad(loss), static_argnums=1)(x, kernel) for kernel in ("splash", "xla")]
    np.testing.assert_allclose(*grads, atol=1e-5)


def test_the_table_has_all_overlapping_blocks_and_few_others():
    """Few others if segments ascend, as they do in text and in images."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        q, kv = (np.sort(rng.integers(1, 9, size)) for size in (256, 384))
        q[rng.integers(100, 256) :] = 0
        kv[rng.integers(150, 384) :] = 0
        overlap = splash.overlapping_blocks(jnp.asarray(q), jnp.asarray(kv), 32, 32)
        pairs = (q[:, None] == kv[None]).reshape(8, 32, 12, 32).any(axis=(1, 3))
        assert (np.asarray(overlap) >= pairs).all()
        # False positive: a block with queries of segments 3 and 5, and one with keys of 4 alone.
        assert np.asarray(overlap).sum() <= pairs.sum() + 8


def test_the_next_block_to_run_is_fetched_and_nothing_after_the_last():
    overlap = jnp.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]], bool)
    info = splash._blocks_to_run(overlap, axis=1)
    np.testing.assert_array_equal(info.block_mask[0], overlap)
    expected = [[1, 1, 3, 3, 3], [0, 0, 0, 0, 0], [0, 1, 2, 2, 2]]
    np.testing.assert_array_equal(info.data_next[0], expected)


@pytest.mark.parametrize(("policy", "calls"), [("none", 1), ("full", 2), ("save_attention", 1)])
def test_saved_attention_avoids_a_second_forward_kernel(qkv, policy, calls):
    def block(x, _):
        return attention(x, x, x, jnp.asarray(SEGMENTS), kernel="splash"), None

    def loss(x):
        return jnp.sum(lax.scan(remat(block, policy), x, None, length=3)[0])

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        text = str(jax.make_jaxpr(jax.grad(loss))(qkv[0]))
    assert text.count("name=splash_mha_fwd") == calls and text.count("name=splash_mha_dkv") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_tpus(qkv, dtype, monkeypatch):
    """Lowering runs Mosaic's checks of the kernels; it needs neither a TPU nor its compiler."""
    monkeypatch.setattr(splash, "MAX_BLOCK", 512)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")

    def loss(qkv):
        return jnp.sum(attention(*qkv, jnp.asarray(SEGMENTS)).astype(jnp.float32))

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))):
        program = export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(
            jax.tree.map(lambda x: x.astype(dtype), qkv)
        )
    text = program.mlir_module()
    assert all(f'kernel_name = "{name}' in text for name in splash.KERNEL_FLOPS)


def test_flops_of_the_kernels():
    shapes = [(1, 2, 3), (1, 2, 3), (24, 512, 128), (24, 1024, 128), (24, 1024, 128), (512, 128)]
    product = 2 * 24 * 512 * 1024 * 128
    assert splash.KERNEL_FLOPS["splash_mha_fwd"](shapes) == 2 * product
    assert splash.KERNEL_FLOPS["splash_mha_dkv"](shapes) == 5 * product


def test_kernel_names_match_the_program(qkv):
    text = str(jax.make_jaxpr(lambda *x: outputs_and_gradients(x, "splash"))(*qkv))
    for name in splash.KERNEL_FLOPS:
        assert f"name={name}" in text
