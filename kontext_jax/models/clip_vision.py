"""CLIP's image encoder, and both encoders side by side: pictures and texts in one space.

Follows ``transformers``' ``CLIPVisionModelWithProjection`` (and so OpenAI's ``clip/model.py``,
arXiv 2103.00020): patches without bias and a class token, learned positions, a norm before the
first block, the text encoder's blocks with attention of all to all, and the class token's vector
behind a last norm and a projection. The vector is not normalised; cosines (`metrics/similarity.py`)
do that.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kontext_jax.models.clip import EPSILON, ClipBlock, ClipConfig, ClipText
from kontext_jax.models.features import Features, standardise
from kontext_jax.models.layers import LayerNorm, Linear, remat, stack
from kontext_jax.settings import Settings
from kontext_jax.sharding import constrain

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that OpenAI trained on, of colours in [0, 1]."""


@dataclass(kw_only=True, unsafe_hash=True)
class ClipVisionConfig(Settings):
    """Sizes of the image encoder; the defaults are those of CLIP ViT-B/32.

    Attributes:
      intermediate_size: width of the MLP.
      image_size: to which images are brought, in pixels: a multiple of ``patch_size``.
      patch_size: pixels of a patch, along one side.
      projection_dim: channels of the space that pictures and texts share.
      crop: what is seen of an image is its middle square, as in OpenAI's own code and in the
        numbers published of it; else all of it, its proportions lost (`features.standardise`).
      dtype: compute dtype; parameters are float32.
      remat: what the backward pass recomputes, see `layers.remat`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512
    crop: bool = True
    dtype: str = "bfloat16"
    remat: str = "full"

    def __post_init__(self):
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}."
            )
        self.block()  # which checks the other sizes

    def block(self) -> ClipConfig:
        """What the blocks read of it, in the words of the text encoder, whose they are."""
        return ClipConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            dtype=self.dtype,
            remat=self.remat,
        )

    @classmethod
    def vit_b32(cls, **kwargs) -> "ClipVisionConfig":
        """openai/clip-vit-base-patch32, the image encoder alone: 87,849,216 parameters."""
        return cls(**kwargs)

    @classmethod
    def vit_l14(cls, **kwargs) -> "ClipVisionConfig":
        """openai/clip-vit-large-patch14, the image encoder alone: 303,966,208 parameters."""
        sizes = dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_layers=24,
            num_heads=16,
            patch_size=14,
            projection_dim=768,
        )
        return cls(**(sizes | kwargs))

    @classmethod
    def tiny(cls, **kwargs) -> "ClipVisionConfig":
        """For tests: 2 x 2 patches."""
        sizes = dict(
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            image_size=16,
            patch_size=8,
            projection_dim=24,
            dtype="float32",
            remat="none",
        )
        return cls(**(sizes | kwargs))


class ClipVision(nnx.Module):
    """Images to one vector an image. See the module's docstring."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, patch, dtype = config.hidden_size, config.patch_size, jnp.dtype(config.dtype)
        init, cells = initializers.normal(size**-0.5), (config.image_size // patch) ** 2
        first = init(rngs.params(), (size,), jnp.float32)
        self.class_embedding = nnx.Param(first, axes=("embed",))
        positions = init(rngs.params(), (1 + cells, size), jnp.float32)
        self.position_embedding = nnx.Param(positions, axes=(None, "embed"))
        self.patch_embedding = nnx.Conv(
            3,
            size,
            (patch, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            param_dtype=jnp.float32,
            kernel_init=initializers.normal(0.02),
            kernel_metadata={"axes": (None, None, "channels", "embed")},
            rngs=rngs,
        )
        self.first_norm = LayerNorm(size, ("embed",), rngs=rngs, epsilon=EPSILON)
        self.blocks = stack(
            lambda r: ClipBlock(config.block(), rngs=r, causal=False), config.num_layers, rngs
        )
        self.final_norm = LayerNorm(size, ("embed",), rngs=rngs, epsilon=EPSILON)
        self.projection = _projection(size, config, rngs)

    def __call__(self, images: Float[Array, "B h w 3"]) -> Features:
        """The vectors of images of any size, and no maps; pixels lie in [-1, 1].

        They have the compute dtype, and are not normalised.
        """
        config = self.config
        if config.crop:
            images = middle_square(images, config.image_size)
        x = self.patch_embedding(standardise(images, config.image_size, MEAN, STD))
        x = x.reshape(len(x), -1, config.hidden_size)
        first = self.class_embedding[...].astype(x.dtype).reshape(1, 1, -1)
        first = jnp.broadcast_to(first, (len(x), 1, x.shape[-1]))
        positions = self.position_embedding[...].astype(x.dtype)[None]
        x = self.first_norm(jnp.concatenate([first, x], axis=1) + positions)

        def step(x, block):
            return block(x), None

        x = constrain(x, "batch seq act_embed")
        x, _ = jax.lax.scan(remat(step, config.remat), x, self.blocks)
        return Features((), self.projection(self.final_norm(x[:, 0])))


def middle_square(images: Float[Array, "B h w 3"], size: int) -> Float[Array, "B s s 3"]:
    """The middle of images, as OpenAI's code cuts it out after resizing the shorter side to it.

    The longer side then has a whole number of pixels, rounded down; of an odd number too many, the
    cut takes half to even, as torchvision does (transformers: half down, which may be a pixel off).
    Resizing is bicubic and smooths before it shrinks, as Pillow does: the width, then the height.
    What overshoots is cut off after each, as by Pillow's 8 bits, but not rounded to them.

    Args:
      images: pixels in [-1, 1].
      size: of the square, in pixels.

    Returns:
      float32, in [-1, 1].
    """
    before = np.array(images.shape[1:3])
    after = size * before // before.min()
    start = np.round((after - size) / 2)
    scale, shift = (x.astype(np.float32) for x in (after / before, -start))
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        shape, at = (*x.shape[:axis], size, *x.shape[axis + 1 :]), np.s_[axis - 1 : axis]
        x = jax.image.scale_and_translate(x, shape, (axis,), scale[at], shift[at], "cubic")
        x = jnp.clip(x, -1.0, 1.0)
    return x


@dataclass(kw_only=True, unsafe_hash=True)
class ClipPairConfig(Settings):
    """Sizes of a whole CLIP; the projections of both encoders are as wide as ``vision`` says."""

    text: ClipConfig
    vision: ClipVisionConfig


class ClipPair(nnx.Module):
    """Both encoders, trained such that a picture and its caption have vectors of one direction."""

    def __init__(self, config: ClipPairConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text = ClipText(config.text, rngs=rngs)
        self.text_projection = _projection(config.text.hidden_size, config.vision, rngs)
        self.vision = ClipVision(config.vision, rngs=rngs)

    def read(self, ids: Int[Array, "B Q"]) -> Float[Array, "B D"]:
        """The projected vector of each prompt, not normalised; see `ClipText` for ``ids``."""
        return self.text_projection(self.text(ids))


def _projection(size: int, config: ClipVisionConfig, rngs: nnx.Rngs) -> Linear:
    """From an encoder's width to the space that both share."""
    return Linear(
        size,
        config.projection_dim,
        ("embed", "channels"),
        rngs=rngs,
        dtype=jnp.dtype(config.dtype),
        init=initializers.normal(size**-0.5),
        use_bias=False,
    )
