"""Attention on TPUs: JAX's Pallas splash kernel, which never writes the logits to memory.

Its backward pass writes the queries' gradient once for every block of keys, and sums these: for
8,704 tokens of 24 heads, 0.9 GB a row and layer for a moment.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) masks by segment, and skips the
blocks of queries and keys that a table names. It makes that table from a mask that is known when
the program is compiled; here it is made from each row's segments, on the device, so that a packed
row does not pay for pairs of tokens of different examples.
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
"""Heads must be a multiple of it, and blocks are."""

MAX_BLOCK = 512
"""Tokens of a block at most: it divides the rows of 512, 4,608 and 8,704 tokens that FLUX has at
256 and 1024 pixels, and is small enough for packed rows to have blocks that can be skipped."""


def _products(count: int, shapes: list[tuple[int, ...]]) -> float:
    """FLOPs of so many products of all queries and keys, from the shapes of a kernel's operands."""
    (heads, queries, head_dim), (_, keys, _) = shapes[2:4]
    return 2.0 * count * heads * queries * keys * head_dim


KERNEL_FLOPS = {
    "splash_mha_fwd": functools.partial(_products, 2),
    "splash_mha_dkv": functools.partial(_products, 5),
}
"""What `hlo.analyse` cannot see: FLOPs of the kernels by name, as if no block were skipped.

Backward are five products, where a kernel that had kept the logits would have four.
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
    """Attention between tokens of equal segment; every query should have a key of its segment.

    Rows run one after the other, for each has its own blocks to skip. Lengths that no block divides
    are filled up with padding; what padding attends to has no meaning.

    Args:
      q, k, v: queries, and keys and values, whose number may differ.
      q_segments, kv_segments: example of each token, 0 = padding.
      scale: of the queries, before they are multiplied; rounded to their dtype unless it is 1.
      checkpoint_name: of what the backward pass needs of the forward's (`jax.ad_checkpoint`).
      interpret: runs the kernel as plain JAX, on any device.
    """
    num_queries = q.shape[1]
    block_q, block_kv = (block_size(x.shape[1]) for x in (q, k))
    q, k, v = (
        _fill(x, block).swapaxes(1, 2)
        for x, block in ((q * scale, block_q), (k, block_kv), (v, block_kv))
    )
    ids = SegmentIds(q=_fill(q_segments, block_q), kv=_fill(kv_segments, block_kv))
    row = functools.partial(_row, block_q, block_kv, checkpoint_name, interpret)
    out = jax.lax.map(lambda qkv_ids: row(*qkv_ids), (q, k, v, ids))
    return out.swapaxes(1, 2)[:, :num_queries]


def block_size(length: int) -> int:
    """Tokens of a block: as few are filled up as can be, in blocks as large as can be."""
    lanes = -(-length // LANES)
    if lanes * LANES <= MAX_BLOCK:
        return lanes * LANES
    sizes = range(MAX_BLOCK // LANES, MAX_BLOCK // LANES // 2, -1)
    return LANES * min(sizes, key=lambda size: -(-lanes // size) * size)


def _fill(x: Array, block: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _row(block_q, block_kv, checkpoint_name, interpret, q, k, v, ids: SegmentIds):
    """Of one row: q [H S K], k and v [H T K]."""
    overlap = overlapping_blocks(ids.q, ids.kv, block_q, block_kv)
    kernel = splash_attention_kernel.SplashAttentionKernel(
        _blocks_to_run(overlap, axis=1),
        None,  # the queries' gradient comes with that of keys and values
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
    """Which blocks of queries and keys may have a segment in common: all that do, and few others.

    Goes by the smallest and the largest segment of a block, for a row's segments come in order, and
    by whether it has padding (segment 0), which comes last.
    """

    def facts(segments, block):
        blocks = segments.reshape(-1, block)
        first = jnp.min(jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max), axis=1)
        return first, jnp.max(blocks, axis=1), jnp.any(blocks == 0, axis=1)

    q_first, q_last, q_padded = (x[:, None] for x in facts(q_segments, block_q))
    kv_first, kv_last, kv_padded = (x[None] for x in facts(kv_segments, block_kv))
    return ((q_first <= kv_last) & (kv_first <= q_last)) | (q_padded & kv_padded)


def _blocks_to_run(overlap: Bool[Array, "Q KV"], axis: int) -> splash_attention_mask_info.MaskInfo:
    """The kernel's table: which blocks to run, and which to fetch, the next to be run on ``axis``.

    After the last of them it keeps that one, so that nothing is fetched in vain.
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
