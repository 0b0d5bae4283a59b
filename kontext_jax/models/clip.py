"""CLIP's text encoder, which computes the pooled prompt vector for FLUX's modulation.

Follows ``transformers``' ``CLIPTextModel`` (OpenAI's ``clip/model.py``, arXiv 2103.00020): pre-norm
blocks with biases, causal attention, learned positions, and OpenAI's approximate GELU,
``x * sigmoid(1.702 x)``. FLUX uses the vector of the end-of-text token after the last norm, without
CLIP's projection. The blocks are one stacked module, scanned, and rematerialised in the backward
pass.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kontext_jax.models.attention import attention
from kontext_jax.models.layers import REMAT_POLICIES, LayerNorm, Linear, remat, stack
from kontext_jax.settings import Settings, check_choices
from kontext_jax.sharding import constrain

EPSILON = 1e-5
"""Of the LayerNorms."""


@dataclass(kw_only=True, unsafe_hash=True)
class ClipConfig(Settings):
    """Sizes of the encoder; the defaults are those of CLIP ViT-L/14's text model, as in FLUX.

    Attributes:
      hidden_size: width, and channels of the pooled vector.
      intermediate_size: width of the MLP.
      max_positions: maximal number of tokens of a prompt, including the start and end tokens.
      eos_id: end-of-text token, which is also the padding token. Config files from before
        transformers' pull request 24773 say 2 and mean the last id of the vocabulary.
      dtype: compute dtype; parameters are float32.
      remat: what the backward pass recomputes, see `layers.remat`.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_positions: int = 77
    eos_id: int = 49407
    dtype: str = "bfloat16"
    remat: str = "full"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}."
            )
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} must be below vocab_size {self.vocab_size}.")
        check_choices(self, remat=REMAT_POLICIES)

    @classmethod
    def large(cls, **kwargs) -> "ClipConfig":
        """openai/clip-vit-large-patch14, only the text model: 123,060,480 parameters."""
        return cls(**kwargs)

    @classmethod
    def tiny(cls, **kwargs) -> "ClipConfig":
        """For laptops: a vocabulary of bytes, six merges, and the start and end tokens."""
        sizes = dict(
            vocab_size=520,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            eos_id=519,
            dtype="float32",
            remat="none",
        )
        return cls(**(sizes | kwargs))


class ClipAttention(nnx.Module):
    """Self-attention, causal for text. Initialised as in OpenAI's ``initialize_parameters``."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, causal: bool = True):
        size = config.hidden_size
        self.num_heads, self.causal = config.num_heads, causal
        make = functools.partial(Linear, size, size, rngs=rngs, dtype=jnp.dtype(config.dtype))
        init = initializers.normal(size**-0.5)
        self.q = make(("embed", "heads"), init=init)
        self.k = make(("embed", "heads"), init=init)
        self.v = make(("embed", "heads"), init=init)
        self.out_proj = make(("heads", "embed"), init=_output_init(config))

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        q, k, v = (
            project(x).reshape(*x.shape[:-1], self.num_heads, -1)
            for project in (self.q, self.k, self.v)
        )
        # Padding comes after the end-of-text token, so that the causal mask hides it.
        out = attention(q, k, v, jnp.ones(x.shape[:2], jnp.int32), causal=self.causal)
        return self.out_proj(out.reshape(*x.shape[:-1], -1))


class ClipMLP(nnx.Module):
    """``fc2(quick_gelu(fc1 x))``. Initialised as in OpenAI's ``initialize_parameters``."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        size, mlp_dim = config.hidden_size, config.intermediate_size
        make = functools.partial(Linear, rngs=rngs, dtype=jnp.dtype(config.dtype))
        init = initializers.normal((2 * size) ** -0.5)
        self.fc1 = make(size, mlp_dim, ("embed", "mlp"), init=init)
        self.fc2 = make(mlp_dim, size, ("mlp", "embed"), init=_output_init(config))

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        hidden = self.fc1(x)
        return self.fc2(hidden * jax.nn.sigmoid(1.702 * hidden))


class ClipBlock(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, causal: bool = True):
        self.norm1 = LayerNorm(config.hidden_size, ("embed",), rngs=rngs, epsilon=EPSILON)
        self.attention = ClipAttention(config, rngs=rngs, causal=causal)
        self.norm2 = LayerNorm(config.hidden_size, ("embed",), rngs=rngs, epsilon=EPSILON)
        self.mlp = ClipMLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return constrain(x, "batch seq act_embed")


class ClipText(nnx.Module):
    """Token ids to one vector per prompt. See the module's docstring."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.float32,
            embedding_init=initializers.normal(0.02),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        shape = (config.max_positions, config.hidden_size)
        positions = initializers.normal(0.01)(rngs.params(), shape, jnp.float32)
        self.position_embedding = nnx.Param(positions, axes=(None, "embed"))
        self.blocks = stack(lambda r: ClipBlock(config, rngs=r), config.num_layers, rngs)
        self.final_norm = LayerNorm(config.hidden_size, ("embed",), rngs=rngs, epsilon=EPSILON)

    def __call__(self, ids: Int[Array, "B Q"]) -> Float[Array, "B D"]:
        """The vector of each prompt's first end-of-text token, in the compute dtype.

        Args:
          ids: one prompt per row, with any padding after its end-of-text token. Without an
            end-of-text token the result is the first token's vector and meaningless.

        Raises:
          ValueError: the rows have no tokens, or more than ``max_positions``.
        """
        length = ids.shape[1]
        if not 0 < length <= self.config.max_positions:
            raise ValueError(
                f"CLIP needs 1 to {self.config.max_positions} tokens per prompt, not {length}: set "
                "text.clip_tokenizer and text.clip_max_tokens."
            )

        def step(x, block):
            return block(x), None

        positions = self.position_embedding[:length].astype(jnp.dtype(self.config.dtype))
        x = constrain(self.token_embedding(ids) + positions[None], "batch seq act_embed")
        x, _ = jax.lax.scan(remat(step, self.config.remat), x, self.blocks)
        end = jnp.argmax(ids == self.config.eos_id, axis=1)
        return self.final_norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


def _output_init(config: ClipConfig) -> initializers.Initializer:
    """Initialiser of the maps into the residual stream, two per layer."""
    return initializers.normal((2 * config.num_layers * config.hidden_size) ** -0.5)
