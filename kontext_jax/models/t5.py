"""T5 v1.1's encoder, FLUX's text encoder.

Follows ``transformers``' ``modeling_t5.py`` (arXiv 1910.10683 with the gated GELU of arXiv
2002.05202): pre-norm blocks without biases, norms without a mean, logits without the usual
``1 / sqrt(d)``, and one table of relative-position biases that all layers share. The blocks are one
stacked module, scanned, and rematerialised in the backward pass.

A row holds several prompts, distinguished by segments; each is encoded as if it were alone. FLUX
itself encodes one prompt per row, padded to 512 tokens *and attending to the padding*: for that,
pass segments of all ones.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int, Key

from kontext_jax.models.attention import attention
from kontext_jax.models.layers import REMAT_POLICIES, Linear, RMSNorm, remat, stack
from kontext_jax.settings import Settings, check_choices
from kontext_jax.sharding import constrain


@dataclass(kw_only=True, unsafe_hash=True)
class T5Config(Settings):
    """Sizes of the encoder; the defaults are T5 v1.1 XXL, FLUX's.

    Attributes:
      d_model: width, and channels of a text token.
      d_kv: channels of a head; num_heads * d_kv may differ from d_model.
      d_ff: width of the gated MLP.
      relative_attention_num_buckets: number of buckets, half of them for keys after the query.
      relative_attention_max_distance: distance from which all keys share the last bucket.
      dtype: compute dtype; parameters are float32.
      remat: what the backward pass recomputes, see `layers.remat`.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dtype: str = "bfloat16"
    remat: str = "full"

    def __post_init__(self):
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 4 or distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets {buckets} must be a multiple of 4, and "
                f"relative_attention_max_distance {distance} more than a quarter of it."
            )
        check_choices(self, remat=REMAT_POLICIES)

    @classmethod
    def xxl(cls, **kwargs) -> "T5Config":
        """google/t5-v1_1-xxl, only the encoder: 4,762,310,656 parameters."""
        return cls(**kwargs)

    @classmethod
    def tiny_bytes(cls, **kwargs) -> "T5Config":
        """For laptops: reads bytes (``ByT5Tokenizer``: id = byte + 3, pad 0, end 1)."""
        sizes = dict(
            vocab_size=384,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dtype="float32",
            remat="none",
        )
        return cls(**(sizes | kwargs))


class T5Attention(nnx.Module):
    """Self-attention with biased, unscaled logits; these start with unit variance."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        size, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        make = functools.partial(_linear, config, rngs=rngs)
        self.q = make(size, inner, ("embed", "heads"), std=(size * config.d_kv) ** -0.5)
        self.k = make(size, inner, ("embed", "heads"), std=size**-0.5)
        self.v = make(size, inner, ("embed", "heads"), std=size**-0.5)
        self.o = make(inner, size, ("heads", "embed"), std=inner**-0.5)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        bias: Float[Array, "1 H L L"],
        segments: Int[Array, "B L"],
    ) -> Float[Array, "B L D"]:
        q, k, v = (
            project(x).reshape(*x.shape[:-1], self.num_heads, -1)
            for project in (self.q, self.k, self.v)
        )
        # Broadcast inside the scan, so that no copies of the bias per row are stored.
        bias = jnp.broadcast_to(bias, (x.shape[0], *bias.shape[1:]))
        out = attention(q, k, v, segments, bias=bias, scale=1.0)
        return self.o(out.reshape(*x.shape[:-1], -1))


class T5GatedMLP(nnx.Module):
    """``wo(gelu(wi_0 x) * wi_1 x)``, with the tanh approximation of GELU."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        size, mlp_dim = config.d_model, config.d_ff
        make = functools.partial(_linear, config, rngs=rngs)
        self.wi_0 = make(size, mlp_dim, ("embed", "mlp"), std=size**-0.5)
        self.wi_1 = make(size, mlp_dim, ("embed", "mlp"), std=size**-0.5)
        self.wo = make(mlp_dim, size, ("mlp", "embed"), std=mlp_dim**-0.5)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class T5Block(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, ("embed",), rngs=rngs)
        self.attention = T5Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, ("embed",), rngs=rngs)
        self.mlp = T5GatedMLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        bias: Float[Array, "1 H L L"],
        segments: Int[Array, "B L"],
    ) -> Float[Array, "B L D"]:
        x = x + self.attention(self.attention_norm(x), bias, segments)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch seq act_embed")


class T5Encoder(nnx.Module):
    """Token ids to one vector per token. See the module's docstring."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = nnx.Embed(
            config.vocab_size,
            config.d_model,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.float32,
            embedding_init=initializers.normal(1.0),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        self.relative_attention_bias = nnx.Param(
            _initial_position_bias(config, rngs.params()), axes=("buckets", "heads")
        )
        self.blocks = stack(lambda r: T5Block(config, rngs=r), config.num_layers, rngs)
        self.final_layer_norm = RMSNorm(config.d_model, ("embed",), rngs=rngs)

    def __call__(
        self, text_ids: Int[Array, "B L"], segments: Int[Array, "B L"]
    ) -> Float[Array, "B L T"]:
        """Encodes the prompts of each row, in the compute dtype.

        Args:
          text_ids: token ids of the prompts, one prompt after the other.
          segments: prompt of each token; the tokens of a prompt are contiguous. 0 = padding, whose
            outputs are meaningless. All ones if padding is part of the prompt, as in FLUX.
        """
        bias = self._position_bias(text_ids.shape[1])

        def step(x, block):
            return block(x, bias, segments), None

        x = constrain(self.shared(text_ids), "batch seq act_embed")
        x, _ = jax.lax.scan(remat(step, self.config.remat), x, self.blocks)
        return self.final_layer_norm(x)

    def _position_bias(self, length: int) -> Float[Array, "1 H L L"]:
        """Bias for each head, query and key. Distances of row indices hold within a segment."""
        index = np.arange(length)
        buckets = relative_position_buckets(
            index[None, :] - index[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        bias = self.relative_attention_bias[buckets].astype(jnp.float32)
        return jnp.transpose(bias, (2, 0, 1))[None]


def _initial_position_bias(config: T5Config, key: Key[Array, ""]) -> Float[Array, "buckets H"]:
    """Initial position biases: in head h they decrease by 2^(-4 h / H) per token, as in ALiBi.

    T5 initialises them with noise only (arXiv 1910.10683), so that its heads start as means over
    the whole prompt. An encoder of bytes learns words much sooner if its heads start out local.
    The form of the slopes is from arXiv 2108.12409. Imported weights overwrite these biases.
    """
    num_buckets, num_heads = config.relative_attention_num_buckets, config.num_heads
    distances = np.arange(-config.relative_attention_max_distance + 1, 1)
    buckets = relative_position_buckets(
        distances, num_buckets, config.relative_attention_max_distance
    )
    nearest = np.zeros(num_buckets // 2)  # smallest distance of each bucket; both halves agree
    nearest[buckets] = -distances  # ordered from far to near, so that the nearest remains
    slopes = 2.0 ** (-4.0 * np.arange(num_heads) / num_heads)
    bias = -np.outer(np.tile(nearest, 2), slopes).astype(np.float32)
    noise = jax.random.normal(key, bias.shape) * config.d_model**-0.5
    return jnp.maximum(bias, -8.0) + noise


def relative_position_buckets(
    distance: Int[np.ndarray, "*d"], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*d"]:
    """The bucket of each ``distance`` = key index - query index, computed on the host.

    Keys at or before the query use the first half of the buckets, keys after it the second half.
    Within a half, the first half of the buckets have one distance each; the sizes of the others
    grow geometrically up to ``max_distance``, and the last one includes all that is beyond.
    Computed in float32 as in PyTorch, because the edges of buckets depend on it.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, far)


def pool(
    text: Float[Array, "B L T"], text_segments: Int[Array, "B L"], num_examples: int
) -> Float[Array, "B N T"]:
    """The mean vector of each example's tokens, float32; zeros for an example without tokens.

    Replaces CLIP's pooled vector in runs without CLIP.
    """
    examples = jnp.arange(1, num_examples + 1)
    member = (text_segments[:, None, :] == examples[None, :, None]).astype(jnp.float32)
    count = jnp.sum(member, axis=-1, keepdims=True)
    weights = member / jnp.maximum(count, 1.0)
    return jnp.einsum(
        "bnl,blt->bnt", weights, text.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def _linear(
    config: T5Config,
    in_features: int,
    out_features: int,
    axes: tuple[str, str],
    *,
    std: float,
    rngs: nnx.Rngs,
) -> Linear:
    return Linear(
        in_features,
        out_features,
        axes,
        rngs=rngs,
        dtype=jnp.dtype(config.dtype),
        init=initializers.normal(std),
        use_bias=False,
    )
