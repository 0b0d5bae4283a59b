"""CLIP's image encoder, and a pair of image and text encoders with a shared embedding space.

Follows ``transformers``' ``CLIPVisionModelWithProjection`` (OpenAI's ``clip/model.py``, arXiv
2103.00020): a patch embedding without bias, a class token, learned positions, a norm before the
first block, the text encoder's blocks without the causal mask, and a norm and projection of the
class token's vector. The vector is not normalised; `metrics/similarity.py` does that.
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
"""Statistics of OpenAI's training images, for colours in [0, 1]."""


@dataclass(kw_only=True, unsafe_hash=True)
class ClipVisionConfig(Settings):
    """Sizes of the image encoder; the defaults are those of CLIP ViT-B/32.

    Attributes:
      intermediate_size: width of the MLP.
      image_size: side of the network's input in pixels, a multiple of ``patch_size``.
      patch_size: side of a patch in pixels.
      projection_dim: channels of the embedding space that images and texts share.
      crop: whether to crop images to their central square, as in OpenAI's code and published
        results; else images are resized without preserving the aspect ratio
        (`features.standardise`).
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
        self.block()  # checks the other sizes

    def block(self) -> ClipConfig:
        """The sizes of a block as a config of the text encoder, which has the same blocks."""
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
        """openai/clip-vit-base-patch32, only the image encoder: 87,849,216 parameters."""
        return cls(**kwargs)

    @classmethod
    def vit_l14(cls, **kwargs) -> "ClipVisionConfig":
        """openai/clip-vit-large-patch14, only the image encoder: 303,966,208 parameters."""
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
    """Images to one vector per image. See the module's docstring."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, patch, dtype = config.hidden_size, config.patch_size, jnp.dtype(config.dtype)
        init, cells = initializers.normal(size**-0.5), (config.image_size // patch) ** 2
        class_token = init(rngs.params(), (size,), jnp.float32)
        self.class_embedding = nnx.Param(class_token, axes=("embed",))
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
        """Vectors of images of any size, without maps; pixels lie in [-1, 1].

        The vectors have the compute dtype and are not normalised.
        """
        config = self.config
        if config.crop:
            images = resize_and_crop(images, config.image_size)
        x = self.patch_embedding(standardise(images, config.image_size, MEAN, STD))
        x = x.reshape(len(x), -1, config.hidden_size)
        class_token = self.class_embedding[...].astype(x.dtype).reshape(1, 1, -1)
        class_token = jnp.broadcast_to(class_token, (len(x), 1, x.shape[-1]))
        positions = self.position_embedding[...].astype(x.dtype)[None]
        x = self.first_norm(jnp.concatenate([class_token, x], axis=1) + positions)

        def step(x, block):
            return block(x), None

        x = constrain(x, "batch seq act_embed")
        x, _ = jax.lax.scan(remat(step, config.remat), x, self.blocks)
        return Features((), self.projection(self.final_norm(x[:, 0])))


def resize_and_crop(images: Float[Array, "B h w 3"], size: int) -> Float[Array, "B s s 3"]:
    """Resizes the shorter side to ``size`` and crops to the central square, as in OpenAI's code.

    The resized longer side is rounded down to a whole number of pixels. If the margin is odd, its
    half is rounded to even, as in torchvision (transformers rounds down, which may be one pixel
    off). Resizing is bicubic with antialiasing, like Pillow's: the width, then the height. Values
    are clipped after each, as by Pillow's 8 bits, but not rounded to 8 bits.

    Args:
      images: pixels in [-1, 1].
      size: height and width of the result, in pixels.

    Returns:
      float32 images in [-1, 1].
    """
    before = np.array(images.shape[1:3])
    after = size * before // before.min()
    start = np.round((after - size) / 2)
    scale, shift = (x.astype(np.float32) for x in (after / before, -start))
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        shape, side = (*x.shape[:axis], size, *x.shape[axis + 1 :]), np.s_[axis - 1 : axis]
        x = jax.image.scale_and_translate(x, shape, (axis,), scale[side], shift[side], "cubic")
        x = jnp.clip(x, -1.0, 1.0)
    return x


@dataclass(kw_only=True, unsafe_hash=True)
class ClipPairConfig(Settings):
    """Sizes of both encoders; ``vision.projection_dim`` is for both projections."""

    text: ClipConfig
    vision: ClipVisionConfig


class ClipPair(nnx.Module):
    """Image and text encoders whose vectors of an image and its caption have similar directions."""

    def __init__(self, config: ClipPairConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text = ClipText(config.text, rngs=rngs)
        self.text_projection = _projection(config.text.hidden_size, config.vision, rngs)
        self.vision = ClipVision(config.vision, rngs=rngs)

    def encode_text(self, ids: Int[Array, "B Q"]) -> Float[Array, "B D"]:
        """The projected vector of each prompt, not normalised; see `ClipText` for ``ids``."""
        return self.text_projection(self.text(ids))


def _projection(size: int, config: ClipVisionConfig, rngs: nnx.Rngs) -> Linear:
    """Linear map from an encoder's width to the shared embedding space."""
    return Linear(
        size,
        config.projection_dim,
        ("embed", "channels"),
        rngs=rngs,
        dtype=jnp.dtype(config.dtype),
        init=initializers.normal(size**-0.5),
        use_bias=False,
    )
