"""Attention on TPUs: JAX's Pallas splash kernel, which never writes the logits to memory.

Its backward pass writes the queries' gradient once per block of keys and sums them: for 8,704
tokens of 24 heads, a temporary of 0.9 GB per row and layer.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) masks by segment, and skips blocks
of queries and keys according to a table. JAX builds that table from a mask known at compile time.
This module builds it on the device from the segments of each row, so that a packed row does not pay
for pairs of tokens of different examples.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    SegmentIds,
    splash_attention_kernel,
    splash_attention_mask_info,
)
from jaxtyping import Array, Bool, Float, Int

LANES = 128
"""The number of channels per head must be a multiple of this, and so is the size of a block."""

MAX_BLOCK = 512
"""Maximal number of tokens in a block. It divides the rows of 512, 4,608 and 8,704 tokens that FLUX
has at 256 and 1024 pixels, and is small enough for packed rows to have blocks to skip."""

WIDE = 1024
"""Heads of more bytes per token, as the autoencoder's 512 channels of float32, have half as many
queries in a block: with more, the backward pass does not fit the 16 MB of a v5p's vector memory."""


def _matmul_flops(count: int, shapes: list[tuple[int, ...]]) -> float:
    """FLOPs of ``count`` products of all queries and keys, given the kernel's operand shapes."""
    (heads, queries, head_dim), (_, keys, _) = shapes[2:4]
    return 2.0 * count * heads * queries * keys * head_dim


KERNEL_FLOPS = {
    "splash_mha_fwd": functools.partial(_matmul_flops, 2),
    "splash_mha_dkv": functools.partial(_matmul_flops, 5),
}
"""FLOPs of the kernels by name, as if no block were skipped; `hlo.analyse` cannot see them.

The backward pass has five products, one more than a kernel that saves the logits.
"""


def splash_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    scale: float,
    *,
    checkpoint_name: str,
    interpret: bool = False,
) -> Float[Array, "B S H K"]:
    """Attention between tokens of the same segment; each query needs a key of its segment.

    Rows run one after the other, because each has its own blocks to skip. Rows are padded to a
    multiple of the block; the outputs of padding are meaningless.

    Args:
      q, k, v: queries, keys and values; the number of queries may differ from that of keys.
      q_segments, kv_segments: example of each token; 0 = padding.
      scale: factor applied to the queries first, rounded to their dtype unless it is 1.
      checkpoint_name: name of the residuals of the backward pass (`jax.ad_checkpoint`).
      interpret: whether to run the kernel as plain JAX, on any device.
    """
    num_queries = q.shape[1]
    is_wide = q.shape[-1] * q.dtype.itemsize > WIDE
    block_q = block_size(num_queries, MAX_BLOCK // 2 if is_wide else MAX_BLOCK)
    block_kv = block_size(k.shape[1], MAX_BLOCK)
    q, k, v = (
        _pad(x, block).swapaxes(1, 2)
        for x, block in ((q * scale, block_q), (k, block_kv), (v, block_kv))
    )
    ids = SegmentIds(q=_pad(q_segments, block_q), kv=_pad(kv_segments, block_kv))
    row = functools.partial(_row, block_q, block_kv, checkpoint_name, interpret)
    out = jax.lax.map(lambda qkv_ids: row(*qkv_ids), (q, k, v, ids))
    return out.swapaxes(1, 2)[:, :num_queries]


def block_size(length: int, limit: int) -> int:
    """At most ``limit`` tokens per block: the size with the least padding, the largest of those."""
    lanes = -(-length // LANES)
    if lanes * LANES <= limit:
        return lanes * LANES
    sizes = range(limit // LANES, limit // LANES // 2, -1)
    return LANES * min(sizes, key=lambda size: -(-lanes // size) * size)


def _pad(x: Array, block: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _row(block_q, block_kv, checkpoint_name, interpret, q, k, v, ids: SegmentIds):
    """Attention of one row: q [H S K], k and v [H T K]."""
    overlap = overlapping_blocks(ids.q, ids.kv, block_q, block_kv)
    kernel = splash_attention_kernel.SplashAttentionKernel(
        _blocks_to_run(overlap, axis=1),
        None,  # the fused backward kernel computes the queries' gradient with the others
        _blocks_to_run(overlap, axis=0),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        block_sizes=BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=checkpoint_name,
        mask_function=None,
        interpret=interpret,
    )
    return kernel(q, k, v, segment_ids=ids)


def overlapping_blocks(
    q_segments: Int[Array, " S"], kv_segments: Int[Array, " T"], block_q: int, block_kv: int
) -> Bool[Array, "Q KV"]:
    """Whether blocks of queries and keys may share a segment: true if they do, and rarely if not.

    The segments of a row ascend and padding (segment 0) comes last, so blocks are compared by their
    smallest and largest segment and by whether they have padding.
    """

    def summarise(segments, block):
        blocks = segments.reshape(-1, block)
        first = jnp.min(jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max), axis=1)
        return first, jnp.max(blocks, axis=1), jnp.any(blocks == 0, axis=1)

    q_first, q_last, q_padded = (x[:, None] for x in summarise(q_segments, block_q))
    kv_first, kv_last, kv_padded = (x[None] for x in summarise(kv_segments, block_kv))
    return ((q_first <= kv_last) & (kv_first <= q_last)) | (q_padded & kv_padded)


def _blocks_to_run(overlap: Bool[Array, "Q KV"], axis: int) -> splash_attention_mask_info.MaskInfo:
    """The kernel's table: which blocks to run, and which one to fetch next along ``axis``.

    After the last block to run, the table repeats it, so that nothing is fetched needlessly.
    """
    size = overlap.shape[axis]
    index = jnp.where(overlap, jax.lax.broadcasted_iota(jnp.int32, overlap.shape, axis), size)
    following = jax.lax.cummin(index, axis=axis, reverse=True)
    last = jnp.max(jnp.where(overlap, index, 0), axis=axis, keepdims=True)
    return splash_attention_mask_info.MaskInfo(
        data_next=jnp.where(following < size, following, last)[None],
        mask_next=None,
        block_mask=overlap.astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=None,
    )
