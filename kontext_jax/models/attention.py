"""Attention within segments: a token attends only to the tokens of its own example.

One function, several implementations: plain XLA, which is the reference; a fused kernel for each
kind of accelerator, which never writes the logits to memory; and XLA in blocks of queries, for long
rows that no fused kernel supports. All are exact on any mesh: heads are split over the `tensor`
axis and queries over the `context` axis. Keys and values are gathered over `context` first, which
is cheap: in [dev], 8,704 tokens have 107 MB of them per layer.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kontext_jax import sharding
from kontext_jax.models.layers import ATTENTION
from kontext_jax.models.splash import LANES, splash_attention
from kontext_jax.settings import check_choice

KERNELS = ("auto", "xla", "blocked", "splash", "cudnn")

MAX_TOKENS = 4096
"""Most tokens of a row for which "auto" is plain XLA: one head's logits are 67 MB of float32."""

BLOCK = 1024
"""Most queries of a block of "blocked"."""

_QUERIES, _KEYS = "batch seq act_heads act_head_dim", "batch act_kv_seq act_heads act_head_dim"


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    segments: Int[Array, "B S"],
    bias: Float[Array, "_ H S S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    kernel: str = "auto",
) -> Float[Array, "B S H K"]:
    """Full attention between tokens of the same segment, with the softmax in float32.

    Padding (segment 0) attends to padding, so that no row of the softmax is empty; its result does
    not reach any example.

    Args:
      q, k, v: queries, keys, values.
      segments: example of each token; 0 = padding.
      bias: added to the logits (T5's relative positions).
      scale: factor of the logits; default ``K ** -0.5``.
      causal: whether a token attends only to itself and the tokens before it.
      kernel: "xla", "blocked" (XLA, with the logits of one row and block of queries at a time),
        "splash" (TPU; interpreted elsewhere, slowly), "cudnn" (NVIDIA GPUs, Ampere or newer), or
        "auto": the platform's fused kernel if it supports the arguments, else "blocked" for more
        than `MAX_TOKENS` tokens, else "xla". Only "xla" supports ``bias`` and ``causal``.

    Raises:
      ValueError: the kernel is unknown or does not support the arguments.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_choice("attention", kernel, KERNELS)
    is_fusible = bias is None and not causal
    if kernel == "auto":
        kernel = choose_kernel(q) if is_fusible else "xla"
    elif kernel != "xla" and not is_fusible:
        raise ValueError(
            f"attention {kernel!r} supports neither a bias nor a causal mask; use 'xla'."
        )
    q = sharding.constrain(q, _QUERIES)
    k, v = (sharding.constrain(x, _KEYS) for x in (k, v))
    if kernel == "xla":
        return _xla(q, k, v, segments, segments, scale, bias, causal)
    kernels = {"blocked": _blocked, "splash": _splash, "cudnn": _cudnn}
    attend = functools.partial(kernels[kernel], scale=scale)
    names = (_QUERIES, _KEYS, _KEYS, "batch seq", "batch act_kv_seq")
    return sharding.on_shards(attend, names)(q, k, v, segments, segments)


def choose_kernel(q: Float[Array, "B S H K"]) -> str:
    """The platform's fused kernel if it supports queries of this shape and dtype, else XLA."""
    platform, num_tokens, head_dim = sharding.platform(), q.shape[1], q.shape[-1]
    if platform == "tpu" and head_dim % LANES == 0:
        return "splash"
    fits = num_tokens % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128 and q.dtype.itemsize == 2
    if platform == "gpu" and fits:
        return "cudnn"
    return "blocked" if num_tokens > MAX_TOKENS else "xla"


def _xla(q, k, v, q_segments, kv_segments, scale, bias=None, causal=False):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    visible = _visible(q_segments, kv_segments)
    if causal:
        visible &= jnp.tri(q.shape[2], dtype=bool)[None, None]
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    # The softmax is normalised after the product with the values, so that the backward pass reads
    # the S x S weights less often. It needs the unnormalised product, so this one gets the name.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    product = jnp.einsum(
        "bhqs,bhsk->bhqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = checkpoint_name(product, ATTENTION) / total
    return jnp.swapaxes(out.astype(v.dtype), 1, 2)


def _visible(
    q_segments: Int[Array, "B S"], kv_segments: Int[Array, "B T"]
) -> Bool[Array, "B 1 S T"]:
    return q_segments[:, None, :, None] == kv_segments[:, None, None, :]


def _blocked(q, k, v, q_segments, kv_segments, scale):
    """`_xla` for one row and block of queries after the other.

    The backward pass computes a block's logits again, so that it has no more of them in memory.
    """
    num_queries = q.shape[1]
    num_blocks = -(-num_queries // BLOCK)
    block = -(-num_queries // num_blocks)
    padding = num_blocks * block - num_queries

    def row(q, k, v, q_ids, kv_ids):
        def attend(q, q_ids):
            return _xla(q[None], k[None], v[None], q_ids[None], kv_ids[None], scale)[0]

        blocks = (
            jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, block, *x.shape[1:])
            for x in (q, q_ids)
        )
        out = jax.lax.map(lambda xs: jax.checkpoint(attend, prevent_cse=False)(*xs), tuple(blocks))
        return out.reshape(-1, *q.shape[1:])[:num_queries]

    rows = (q, k, v, q_segments, kv_segments)
    return checkpoint_name(jax.lax.map(lambda xs: row(*xs), rows), ATTENTION)


def _splash(q, k, v, q_segments, kv_segments, scale):
    if q.shape[-1] % LANES:
        raise ValueError(
            f"attention 'splash' needs a multiple of {LANES} channels per head, not {q.shape[-1]}."
        )
    interpret = sharding.platform() != "tpu"
    return splash_attention(
        q, k, v, q_segments, kv_segments, scale, checkpoint_name=ATTENTION, interpret=interpret
    )


def _cudnn(q, k, v, q_segments, kv_segments, scale):
    """cuDNN's kernel. It skips no blocks, but reads no mask if the batch has a single segment.

    The residuals of its backward pass have no checkpoint name; `layers.remat` recognises them by
    the name of the operation.
    """
    if sharding.platform() != "gpu":
        raise ValueError("attention 'cudnn' runs only on GPUs; use 'auto'.")
    attend = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return jax.lax.cond(
        jnp.all(q_segments == q_segments[0, 0]) & jnp.all(kv_segments == q_segments[0, 0]),
        attend,
        lambda q, k, v: attend(q, k, v, mask=_visible(q_segments, kv_segments)),
        q,
        k,
        v,
    )
