"""Attention within segments: a token attends to the tokens of its own example and to no other.

One function, several implementations: plain XLA, which is the reference, and one fused kernel for
each kind of accelerator, which never writes the logits to memory. All are exact on any mesh: heads
are split over its `tensor` axis and queries over its `context` axis, where keys and values are
gathered first (which costs little: in [dev] those of 8,704 tokens are 107 MB a layer).
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

KERNELS = ("auto", "xla", "splash", "cudnn")

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
    """Full attention between tokens of equal segment, softmax in float32.

    Padding (segment 0) attends to padding, so that no row of the softmax is empty; what it
    computes reaches no example.

    Args:
      q, k, v: queries, keys, values.
      segments: example of each token, 0 = padding.
      bias: added to the logits (T5's relative positions).
      scale: of the logits; ``K ** -0.5`` where left out.
      causal: a token attends to itself and those before it only.
      kernel: "xla", "splash" (TPU; interpreted elsewhere, slowly), "cudnn" (NVIDIA GPUs from
        Ampere on), or "auto": the fused one of the platform where it can do this, else "xla".
        None but "xla" knows bias and causal.

    Raises:
      ValueError: the kernel is not known or cannot do this.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_choice("attention", kernel, KERNELS)
    plain = bias is None and not causal
    if kernel == "auto":
        kernel = choose(q) if plain else "xla"
    elif kernel != "xla" and not plain:
        raise ValueError(f"attention {kernel!r} knows no bias and no causal mask; take 'xla'.")
    q = sharding.constrain(q, _QUERIES)
    k, v = (sharding.constrain(x, _KEYS) for x in (k, v))
    if kernel == "xla":
        return _xla(q, k, v, segments, bias, scale, causal)
    attend = functools.partial({"splash": _splash, "cudnn": _cudnn}[kernel], scale=scale)
    names = (_QUERIES, _KEYS, _KEYS, "batch seq", "batch act_kv_seq")
    return sharding.on_shards(attend, names)(q, k, v, segments, segments)


def choose(q: Float[Array, "B S H K"]) -> str:
    """The platform's kernel, if it takes so many tokens and heads of this size in this dtype."""
    platform, num_tokens, head_dim = sharding.platform(), q.shape[1], q.shape[-1]
    if platform == "tpu" and head_dim % LANES == 0:
        return "splash"
    takes = num_tokens % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128 and q.dtype.itemsize == 2
    return "cudnn" if platform == "gpu" and takes else "xla"


def _xla(q, k, v, segments, bias, scale, causal):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    visible = _visible(segments, segments)
    if causal:
        visible &= jnp.tri(segments.shape[1], dtype=bool)[None, None]
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    # Softmax whose sum divides after the product with the values: the backward pass then reads the
    # S x S weights less often. It needs the product undivided, so that is what gets the name.
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


def _splash(q, k, v, q_segments, kv_segments, scale):
    if q.shape[-1] % LANES:
        raise ValueError(
            f"attention 'splash' needs heads of a multiple of {LANES} channels, not {q.shape[-1]}."
        )
    interpret = sharding.platform() != "tpu"
    return splash_attention(
        q, k, v, q_segments, kv_segments, scale, checkpoint_name=ATTENTION, interpret=interpret
    )


def _cudnn(q, k, v, q_segments, kv_segments, scale):
    """cuDNN's kernel. It skips no blocks, but where a batch has one segment it reads no mask.

    What its backward pass needs has no name in here: `layers.remat` knows it by the operation's.
    """
    if sharding.platform() != "gpu":
        raise ValueError("attention 'cudnn' runs on GPUs only; take 'auto'.")
    attend = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return jax.lax.cond(
        jnp.all(q_segments == q_segments[0, 0]) & jnp.all(kv_segments == q_segments[0, 0]),
        attend,
        lambda q, k, v: attend(q, k, v, mask=_visible(q_segments, kv_segments)),
        q,
        k,
        v,
    )
