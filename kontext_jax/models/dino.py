"""DINOv2: a self-supervised vision transformer, used for its features.

Follows ``transformers``' ``Dinov2Model`` (arXiv 2304.07193): patches of 14 pixels, class token,
learned positions, and pre-norm blocks with biases and per-channel scales of the residual branches
(LayerScale, arXiv 2103.17239). It is the feature network of ADD (arXiv 2311.17042), where the
discriminator's heads see the patches of some blocks and are conditioned on the class token. The
variants with register tokens and with a gated MLP (giant) are not supported.

The blocks are one stacked module, scanned from tap to tap, and rematerialised in the backward pass:
the network is frozen, but gradients flow through it to the images.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from kontext_jax.models.attention import attention
from kontext_jax.models.features import Features, check_taps, standardise
from kontext_jax.models.layers import REMAT_POLICIES, LayerNorm, Linear, remat, stack
from kontext_jax.settings import Settings, check_choices
from kontext_jax.sharding import constrain

PATCH = 14
"""Side of a patch in pixels."""

EPSILON = 1e-6
"""Of the LayerNorms."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Statistics of ImageNet, for colours in [0, 1]."""

init = initializers.truncated_normal(0.02)


@dataclass(kw_only=True, unsafe_hash=True)
class DinoConfig(Settings):
    """Sizes of the network; the defaults are ViT-S/14's.

    Attributes:
      hidden_size: width, and channels of the maps and of the pooled vector.
      mlp_ratio: width of the MLP divided by ``hidden_size``.
      trained_size: side in pixels of the images for which the positions were learned.
      input_size: side of the network's input in pixels, a multiple of 14. ADD and StyleGAN-T
        (arXiv 2301.09515) use 224.
      taps: ascending indices of the blocks whose outputs are the maps.
      dtype: compute dtype; parameters are float32.
      remat: what the backward pass recomputes, see `layers.remat`.
    """

    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_ratio: int = 4
    trained_size: int = 518
    input_size: int = 224
    taps: tuple[int, ...] = (2, 5, 8, 11)
    dtype: str = "bfloat16"
    remat: str = "full"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}."
            )
        for name in ("trained_size", "input_size"):
            size = getattr(self, name)
            if size < PATCH or size % PATCH:
                raise ValueError(f"{name} {size} must be a multiple of {PATCH}, the patch size.")
        check_taps(self.taps, self.num_layers)
        check_choices(self, remat=REMAT_POLICIES)

    @classmethod
    def vits14(cls, **kwargs) -> "DinoConfig":
        """facebook/dinov2-small: 22,056,192 parameters."""
        return cls(**kwargs)

    @classmethod
    def vitb14(cls, **kwargs) -> "DinoConfig":
        """facebook/dinov2-base: 86,579,712 parameters."""
        return cls(**(dict(hidden_size=768, num_heads=12) | kwargs))

    @classmethod
    def vitl14(cls, **kwargs) -> "DinoConfig":
        """facebook/dinov2-large: 304,367,616 parameters; a map after each quarter of the blocks."""
        sizes = dict(hidden_size=1024, num_layers=24, num_heads=16, taps=(5, 11, 17, 23))
        return cls(**(sizes | kwargs))

    @classmethod
    def tiny(cls, **kwargs) -> "DinoConfig":
        """For tests: 2 x 2 patches, with learned positions for 3 x 3."""
        sizes = dict(
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            mlp_ratio=2,
            trained_size=42,
            input_size=28,
            taps=(0, 2),
            dtype="float32",
            remat="none",
        )
        return cls(**(sizes | kwargs))


class DinoAttention(nnx.Module):
    """Self-attention over the patches and the class token."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.dtype)
        self.num_heads = config.num_heads
        make = functools.partial(Linear, size, size, rngs=rngs, dtype=dtype, init=init)
        self.q, self.k, self.v = (make(("embed", "heads")) for _ in range(3))
        self.out_proj = make(("heads", "embed"))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        q, k, v = (
            project(x).reshape(*x.shape[:-1], self.num_heads, -1)
            for project in (self.q, self.k, self.v)
        )
        out = attention(q, k, v, jnp.ones(x.shape[:2], jnp.int32))
        return self.out_proj(out.reshape(*x.shape[:-1], -1))


class DinoMLP(nnx.Module):
    """``fc2(gelu(fc1 x))`` with the exact GELU."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        size, mlp_dim = config.hidden_size, config.mlp_ratio * config.hidden_size
        make = functools.partial(Linear, rngs=rngs, dtype=jnp.dtype(config.dtype), init=init)
        self.fc1 = make(size, mlp_dim, ("embed", "mlp"))
        self.fc2 = make(mlp_dim, size, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class DinoBlock(nnx.Module):
    """Pre-norm residual block with LayerScale: attention, then MLP."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.norm1 = LayerNorm(size, ("embed",), rngs=rngs, epsilon=EPSILON)
        self.attention = DinoAttention(config, rngs=rngs)
        self.layer_scale1 = nnx.Param(jnp.ones((size,), jnp.float32), axes=("embed",))
        self.norm2 = LayerNorm(size, ("embed",), rngs=rngs, epsilon=EPSILON)
        self.mlp = DinoMLP(config, rngs=rngs)
        self.layer_scale2 = nnx.Param(jnp.ones((size,), jnp.float32), axes=("embed",))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        scale1, scale2 = (
            p[...].astype(x.dtype).reshape(1, 1, -1) for p in (self.layer_scale1, self.layer_scale2)
        )
        x = x + scale1 * self.attention(self.norm1(x))
        x = x + scale2 * self.mlp(self.norm2(x))
        return constrain(x, "batch seq act_embed")


class Dino(nnx.Module):
    """Images to features. See the module's docstring."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, cells = config.hidden_size, (config.trained_size // PATCH) ** 2
        self.cls_token = _vectors(1, size, rngs=rngs)
        self.position_embeddings = _vectors(1 + cells, size, rngs=rngs)
        self.patch_embedding = nnx.Conv(
            3,
            size,
            (PATCH, PATCH),
            strides=PATCH,
            padding="VALID",
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.float32,
            kernel_init=init,
            kernel_metadata={"axes": (None, None, "channels", "embed")},
            bias_metadata={"axes": ("embed",)},
            rngs=rngs,
        )
        self.blocks = stack(lambda r: DinoBlock(config, rngs=r), config.num_layers, rngs)
        self.final_norm = LayerNorm(size, ("embed",), rngs=rngs, epsilon=EPSILON)

    def __call__(self, images: Float[Array, "B h w 3"]) -> Features:
        """Features of images of any size, in the compute dtype; pixels lie in [-1, 1].

        Returns:
          Vectors of the patches after each tap, one cell per patch, and the vector of the class
          token after the last norm.
        """
        config = self.config
        cells = config.input_size // PATCH
        x = self.patch_embedding(standardise(images, config.input_size, MEAN, STD))
        x = x.reshape(len(images), cells**2, -1)
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls_token, x], axis=1) + self._positions(cells).astype(x.dtype)
        x = constrain(x, "batch seq act_embed")

        def step(x, block):
            return block(x), None

        def run(x, start, stop):
            blocks = jax.tree.map(lambda leaf: leaf[start:stop], self.blocks)
            return jax.lax.scan(remat(step, config.remat), x, blocks)[0]

        maps, done = [], 0
        for tap in config.taps:
            x, done = run(x, done, tap + 1), tap + 1
            maps.append(x[:, 1:].reshape(len(x), cells, cells, -1))
        x = run(x, done, config.num_layers)
        return Features(tuple(maps), self.final_norm(x[:, 0]))

    def _positions(self, cells: int) -> Float[Array, "1 S D"]:
        """Position embeddings of the class token and of a grid of ``cells`` x ``cells`` patches."""
        table = self.position_embeddings[...].astype(jnp.float32)
        trained = self.config.trained_size // PATCH
        if cells == trained:
            return table
        weights = bicubic_weights(trained, cells)
        grid = table[0, 1:].reshape(trained, trained, -1)
        grid = jnp.einsum("ir,jc,rcd->ijd", weights, weights, grid, precision="highest")
        return jnp.concatenate([table[:, :1], grid.reshape(1, cells**2, -1)], axis=1)


def bicubic_weights(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """Weights of PyTorch's bicubic ``interpolate`` along one axis, float32.

    Cubic convolution with a = -0.75, repeating the samples at the ends, without antialiasing.
    `jax.image.resize` has a = -0.5, and drops samples beyond the ends.
    """
    a = -0.75
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    weights = np.zeros((after, before))
    for offset in range(-1, 3):
        sample = np.floor(centres).astype(int) + offset
        x = np.abs(centres - sample)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        column = np.clip(sample, 0, before - 1)
        weights[np.arange(after), column] += np.where(x <= 1, near, far)
    return weights.astype(np.float32)


def _vectors(number: int, size: int, *, rngs: nnx.Rngs) -> nnx.Param:
    vectors = init(rngs.params(), (1, number, size), jnp.float32)
    return nnx.Param(vectors, axes=(None, None, "embed"))
