"""Attention within segments: a token attends to the tokens of its own example and to no other."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kontext_jax.models.layers import ATTENTION


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    segments: Int[Array, "B S"],
    bias: Float[Array, "_ H S S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
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
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    visible = segments[:, None, :, None] == segments[:, None, None, :]
    if causal:
        visible &= jnp.tri(segments.shape[1], dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(jnp.float32).min), axis=-1)
    out = jnp.einsum("bhqs,bhsk->bhqk", weights.astype(v.dtype), v)
    return checkpoint_name(jnp.swapaxes(out, 1, 2), ATTENTION)
