"""CLIP's text encoder: the vector of the whole prompt that FLUX's modulation reads.

Follows ``transformers``' ``CLIPTextModel`` (and so OpenAI's ``clip/model.py``, arXiv 2103.00020):
pre-norm blocks with biases, causal attention, learned positions, and the GELU that OpenAI
approximated as ``x * sigmoid(1.702 x)``. FLUX takes the vector of the end-of-text token after the
last norm; CLIP's projection into the space of its images is no part of it. The blocks are one
stacked module, scanned, and rematerialised in the backward pass.
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
"""Of the norms."""


@dataclass(kw_only=True, unsafe_hash=True)
class ClipConfig(Settings):
    """Sizes of the encoder; the defaults are those of CLIP ViT-L/14's text model, FLUX's.

    Attributes:
      hidden_size: width, and channels of the pooled vector.
      intermediate_size: width of the MLP.
      max_positions: the most tokens of a prompt, both its ends included.
      eos_id: the end-of-text token, which is also what the tokenizer pads with. Files of the time
        before transformers' pull request 24773 say 2 and mean the vocabulary's last id.
      dtype: compute dtype; parameters are float32.
      remat: what the backward pass recomputes: "full" keeps only each block's input, "none" all;
        see `layers.remat` for what lies between.
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
                f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}."
            )
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} is not below vocab_size {self.vocab_size}.")
        check_choices(self, remat=REMAT_POLICIES)

    @classmethod
    def large(cls, **kwargs) -> "ClipConfig":
        """openai/clip-vit-large-patch14, the text model alone: 123,060,480 parameters."""
        return cls(**kwargs)

    @classmethod
    def tiny(cls, **kwargs) -> "ClipConfig":
        """For laptops: a vocabulary of bytes, six merges of them, and the two ends."""
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
    """Self-attention, causal in text. Initialised as OpenAI's ``initialize_parameters`` does."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, causal: bool = True):
        size = config.hidden_size
        self.num_heads, self.causal = config.num_heads, causal
        make = functools.partial(Linear, size, size, rngs=rngs, dtype=jnp.dtype(config.dtype))
        read = initializers.normal(size**-0.5)
        self.q = make(("embed", "heads"), init=read)
        self.k = make(("embed", "heads"), init=read)
        self.v = make(("embed", "heads"), init=read)
        self.out_proj = make(("heads", "embed"), init=_write(config))

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        q, k, v = (
            project(x).reshape(*x.shape[:-1], self.num_heads, -1)
            for project in (self.q, self.k, self.v)
        )
        # Pads come after the end-of-text token that is read, so that they need no mask.
        out = attention(q, k, v, jnp.ones(x.shape[:2], jnp.int32), causal=self.causal)
        return self.out_proj(out.reshape(*x.shape[:-1], -1))


class ClipMLP(nnx.Module):
    """``fc2(quick_gelu(fc1 x))``. Initialised as OpenAI's ``initialize_parameters`` does."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        size, mlp_dim = config.hidden_size, config.intermediate_size
        make = functools.partial(Linear, rngs=rngs, dtype=jnp.dtype(config.dtype))
        read = initializers.normal((2 * size) ** -0.5)
        self.fc1 = make(size, mlp_dim, ("embed", "mlp"), init=read)
        self.fc2 = make(mlp_dim, size, ("mlp", "embed"), init=_write(config))

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        hidden = self.fc1(x)
        return self.fc2(hidden * jax.nn.sigmoid(1.702 * hidden))


class ClipBlock(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input."""

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
    """Prompts' ids to one vector a prompt. See the module's docstring."""

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
          ids: one prompt each, padded with anything behind its end-of-text token. Without that
            token the vector is the first token's and means nothing.

        Raises:
          ValueError: there are no tokens, or more than there are positions.
        """
        length = ids.shape[1]
        if not 0 < length <= self.config.max_positions:
            raise ValueError(
                f"CLIP reads 1 to {self.config.max_positions} tokens a prompt, not {length}: see "
                "text.clip_tokenizer and text.clip_max_tokens."
            )

        def step(x, block):
            return block(x), None

        positions = self.position_embedding[:length].astype(jnp.dtype(self.config.dtype))
        x = constrain(self.token_embedding(ids) + positions[None], "batch seq act_embed")
        x, _ = jax.lax.scan(remat(step, self.config.remat), x, self.blocks)
        end = jnp.argmax(ids == self.config.eos_id, axis=1)
        return self.final_norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


def _write(config: ClipConfig) -> initializers.Initializer:
    """For what is added to the residual stream, twice a layer."""
    return initializers.normal((2 * config.num_layers * config.hidden_size) ** -0.5)
