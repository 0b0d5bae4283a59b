"""Layers of FLUX: linear maps with named axes, norms, modulation, RoPE, time embedding.

Parameters carry the names of their axes as metadata (``axes=("embed", "mlp")``); ``sharding.py``
maps the names to mesh axes. Repeated blocks are stacked along a leading axis, which has no name and
is never sharded.

Operations that are sensitive to rounding run in float32 whatever the compute dtype: norms, time
embeddings, and rotary angles (on the host, in float64).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import checkpoint_policies
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kontext_jax.geometry import MAX_POSITION
from kontext_jax.sharding import platform

ATTENTION, LINEAR = "attention", "linear"
"""Names of activations that `remat` can save: outputs of attention and of each `Linear`."""

REMAT_POLICIES = ("full", "none", "save_attention", "save_named", "offload")


def _save(*names: str):
    """Policy that saves activations with these names, and cuDNN's attention, which has no name."""
    named = checkpoint_policies.save_only_these_names(*names)

    def policy(primitive, *args, **params):
        cudnn = primitive.name.startswith("dot_product_attention_fwd")
        return cudnn or named(primitive, *args, **params)

    return policy


_SAVED = {
    "full": None,
    "save_attention": _save(ATTENTION),
    "save_named": _save(ATTENTION, LINEAR),
    "offload": checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=(ATTENTION, LINEAR),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

xavier = initializers.xavier_uniform()
zeros = initializers.zeros
normal = initializers.normal(0.02)


class LowRank(nnx.Module):
    """Low-rank adapter of a linear map, ``scale * (x @ a) @ b`` (arXiv 2106.09685).

    ``a`` [in, rank] starts normal with standard deviation 1 / rank and ``b`` [rank, out] at zero,
    as in peft's ``LoraLayer`` with ``init_lora_weights="gaussian"``: a new adapter adds nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        axes: tuple[str, str],
        *,
        rngs: nnx.Rngs,
        scale: float,
    ):
        """``axes`` names the axes of the adapted kernel (in, out); the rank axis has no name."""
        a = initializers.normal(1 / rank)(rngs.params(), (in_features, rank), jnp.float32)
        self.a = nnx.Param(a, axes=(axes[0], None))
        self.b = nnx.Param(jnp.zeros((rank, out_features), jnp.float32), axes=(None, axes[1]))
        self.scale = scale

    def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
        """Computes in ``x``'s dtype."""
        return self.scale * (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype)


class Linear(nnx.Module):
    """``x @ kernel + bias`` over the last axis, in ``dtype``; parameters are float32.

    ``lora`` is None, or an adapter whose result is added (set by ``models/lora.py``).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        init: initializers.Initializer = xavier,
        use_bias: bool = True,
    ):
        """``axes`` names the kernel's axes (in, out)."""
        kernel = init(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=axes)
        bias = nnx.Param(jnp.zeros((out_features,), jnp.float32), axes=axes[1:])
        self.bias = bias if use_bias else nnx.data(None)
        self.lora = nnx.data(None)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
        kernel = self.kernel[...].astype(self.dtype)
        bias = None if self.bias is None else self.bias[...].astype(self.dtype)

        def affine(x):
            y = x @ kernel
            y = y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
            return y if self.lora is None else y + self.lora(x)

        def as_matrix(x):
            # XLA's CPU backend sums gradients over one leading axis several times faster than
            # over two. Elsewhere the axes are not merged, because they are sharded separately.
            return affine(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

        # Not platform_dependent: its gradient keeps both branches, with their collectives.
        apply = as_matrix if platform() == "cpu" else affine
        return checkpoint_name(apply(x.astype(self.dtype)), LINEAR)


def stack(make_block, num_blocks: int, rngs: nnx.Rngs):
    """``num_blocks`` new blocks as one module whose arrays have a leading layer axis."""
    keys = jax.random.split(rngs.params(), num_blocks)
    return jax.vmap(lambda key: make_block(nnx.Rngs(key)))(keys)


def remat(block, policy: str):
    """``block`` with gradient checkpointing: its backward pass recomputes what is not saved.

    "none" saves everything, "full" only the block's input. The others also save the input:

    - "save_attention" saves the result of attention. The backward pass then skips the product with
      the values, but not the softmax, whose weights the gradient needs.
    - "save_named" also saves the result of every linear map. The only matmul that is recomputed is
      queries times keys.
    - "offload" saves the same as "save_named" in the host's memory and fetches it block by block.
      XLA's CPU backend has one memory, so there it is "save_named".
    """
    return block if policy == "none" else jax.checkpoint(block, policy=_SAVED[policy])


def layer_norm(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """LayerNorm without affine parameters, eps 1e-6, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with scale and bias, in float32 and rounded once."""

    def __init__(self, features: int, axes: tuple[str], *, rngs: nnx.Rngs, epsilon: float):
        del rngs  # the initial values are constants
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (
            p[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
            for p in (self.scale, self.bias)
        )
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, eps 1e-6, scaled in float32 and rounded once.

    torch.nn.RMSNorm, and thus diffusers, rounds in the same way.
    """

    def __init__(self, features: int, axes: tuple[str], *, rngs: nnx.Rngs):
        del rngs  # the initial values are constants
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=axes)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return _scale(y, self.scale[...].astype(jnp.float32)).astype(x.dtype)


def _scale(x: Float[Array, "*b D"], scale: Float[Array, " D"]) -> Float[Array, "*b D"]:
    """``x * scale``; on CPUs in a form whose gradient with respect to ``scale`` is a matmul.

    A plain sum over all leading axes takes XLA's CPU backend a quarter of a training step.
    """

    def multiply(x, scale):
        return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))

    def multiply_on_cpu(x, scale):
        ones = jnp.ones((x.size // x.shape[-1], 1), scale.dtype)
        return x * (ones @ scale[None]).reshape(x.shape)

    return (multiply_on_cpu if platform() == "cpu" else multiply)(x, scale)


class QKNorm(nnx.Module):
    """RMSNorm of queries and keys over the channels of a head, before RoPE."""

    def __init__(self, head_dim: int, *, rngs: nnx.Rngs):
        self.query_norm = RMSNorm(head_dim, ("head_dim",), rngs=rngs)
        self.key_norm = RMSNorm(head_dim, ("head_dim",), rngs=rngs)

    def __call__(
        self, q: Float[Array, "B S H K"], k: Float[Array, "B S H K"]
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        return self.query_norm(q), self.key_norm(k)


def per_token(
    per_example: Float[Array, "B N D"], segments: Int[Array, "B S"]
) -> Float[Array, "B _ D"]:
    """The vector of each token's example; zero for padding, where it has no effect.

    With one example per row the result is [B 1 D], for broadcasting. Otherwise it is a product with
    one-hot rows, which is exact and whose gradient is a matmul instead of a scatter.
    """
    if per_example.shape[1] == 1:
        return per_example
    member = jax.nn.one_hot(segments - 1, per_example.shape[1], dtype=per_example.dtype)
    return jnp.einsum("bsn,bnd->bsd", member, per_example, precision="highest")


class Modulation(nnx.Module):
    """adaLN: ``num_triples`` (shift, scale, gate) per token from its example's conditioning vector.

    Initialised to zero, so that every block starts as the identity (adaLN-Zero, arXiv 2212.09748).
    """

    def __init__(self, hidden_size: int, num_triples: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.num = 3 * num_triples
        self.lin = Linear(
            hidden_size,
            self.num * hidden_size,
            ("embed", "mlp"),
            rngs=rngs,
            dtype=dtype,
            init=zeros,
        )

    def __call__(
        self, vec: Float[Array, "B N D"], segments: Int[Array, "B S"]
    ) -> list[Float[Array, "B _ D"]]:
        parts = jnp.split(self.lin(jax.nn.silu(vec)), self.num, axis=-1)
        return [per_token(part, segments) for part in parts]


def modulate(
    x: Float[Array, "B S D"], shift: Float[Array, "B _ D"], scale: Float[Array, "B _ D"]
) -> Float[Array, "B S D"]:
    """``(1 + scale) * LayerNorm(x) + shift``."""
    return (1 + scale) * layer_norm(x) + shift


class MLPEmbedder(nnx.Module):
    """``out_layer(silu(in_layer(x)))``: embeds time, guidance or pooled text in D channels."""

    def __init__(self, in_dim: int, hidden_size: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        make = functools.partial(Linear, rngs=rngs, dtype=dtype, init=normal)
        self.in_layer = make(in_dim, hidden_size, ("channels", "embed"))
        self.out_layer = make(hidden_size, hidden_size, ("embed", "mlp"))

    def __call__(self, x: Float[Array, "B N I"]) -> Float[Array, "B N D"]:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


def timestep_embedding(t: Float[Array, "B N"], dim: int = 256) -> Float[Array, "B N E"]:
    """Sinusoids of ``t``, cosines first, max period 10,000 (BFL ``layers.py``); float32.

    FLUX passes 1000 times its time or guidance.
    """
    # Exponents are rounded to float32 as in PyTorch: the difference shows at times of up to 1000,
    # and at guidance of some thousands.
    exponents = np.float32(-math.log(10000.0)) * np.arange(dim // 2, dtype=np.float32) / (dim // 2)
    freqs = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[..., None] * freqs[None, None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_tables(axes_dim: tuple[int, ...], theta: float) -> list[np.ndarray]:
    """cos and sin for every position and channel of each axis, computed in float64, as float32.

    Returns:
      One array [2, MAX_POSITION, axes_dim[i]] per axis; channels 2k and 2k + 1 are equal.
    """
    tables = []
    for dim in axes_dim:
        omega = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = np.arange(MAX_POSITION, dtype=np.float64)[:, None] * np.repeat(omega, 2)
        tables.append(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))
    return tables


def rope(
    positions: Int[Array, "B S A"], axes_dim: tuple[int, ...], theta: float
) -> Float[Array, "2 B S 1 K"]:
    """Rotation (cos, sin) of each token and channel; K = sum(axes_dim).

    ``positions`` must lie in [0, MAX_POSITION); ``geometry`` checks this on the host.
    """
    tables = rope_tables(axes_dim, theta)
    parts = [jnp.asarray(table)[:, positions[..., i]] for i, table in enumerate(tables)]
    return jnp.concatenate(parts, axis=-1)[:, :, :, None]


def apply_rope(
    x: Float[Array, "B S H K"], rotation: Float[Array, "2 B S 1 K"]
) -> Float[Array, "B S H K"]:
    """Rotates pairs of channels (2k, 2k + 1) in float32, then rounds to ``x``'s dtype."""
    cos, sin = rotation
    # (-x[2k + 1], x[2k]) as a matmul, which is exact. A separate axis of pairs would not fit the
    # tiles of a TPU, and would be copied many times in float32.
    quarter_turn = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
    turned = jnp.einsum(
        "bshk,kj->bshj",
        x,
        jnp.asarray(quarter_turn, x.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return (cos * x.astype(jnp.float32) + sin * turned).astype(x.dtype)
