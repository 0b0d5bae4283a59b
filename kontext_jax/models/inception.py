"""FID's InceptionV3, whose pooled features FID compares.

Follows ``pytorch_fid/inception.py`` of mseitzer/pytorch-fid, which reproduces the TensorFlow graph
of 2015-12-05 that FID's authors used (arXiv 1706.08500; the network is from arXiv 1512.00567). It
differs from torchvision's InceptionV3 in that average pooling excludes padding, and the last block
has max pooling. Images are resized as in pytorch-fid, without antialiasing. This aliases images
that shrink a lot (arXiv 2104.11222), but published values have the same defect.

Inference only: batch norms are folded into the convolutions before them, and there are no
classifiers. Modules have PyTorch's names in lower case.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from kontext_jax.models.features import Features
from kontext_jax.settings import Settings

MIN_SIZE = 75
"""Minimal side of the input in pixels; with fewer, the last block's input would be empty."""


@dataclass(kw_only=True, unsafe_hash=True)
class InceptionConfig(Settings):
    """Sizes of the network; the defaults are FID's: 21,768,352 parameters with folded norms.

    Attributes:
      input_size: side of the network's input in pixels, 75 or more.
      thinning: divisor of all widths, including the pooled vector's 2,048: 1, 2, 4, 8 or 16.
      dtype: compute dtype; parameters are float32.
    """

    input_size: int = 299
    thinning: int = 1
    dtype: str = "float32"

    @property
    def num_features(self) -> int:
        """Channels of the pooled vector."""
        return 2048 // self.thinning

    def __post_init__(self):
        if self.input_size < MIN_SIZE:
            raise ValueError(f"input_size {self.input_size} must be {MIN_SIZE} pixels or more.")
        if self.thinning not in (1, 2, 4, 8, 16):
            raise ValueError(f"thinning {self.thinning} must be 1, 2, 4, 8 or 16.")

    @classmethod
    def tiny(cls, **kwargs) -> "InceptionConfig":
        """For tests: all layers, with 2 to 28 channels; the last map has 2 x 2 cells."""
        return cls(**(dict(input_size=107, thinning=16) | kwargs))


class BlockA(nnx.Module):
    """At 1/8 of the resolution: branches of 1 x 1, 5 x 5, twice 3 x 3, and pooling."""

    def __init__(self, config: InceptionConfig, inputs: int, pooled: int, *, rngs: nnx.Rngs):
        """``pooled``: channels of the pooling branch."""
        make = functools.partial(_conv, config, rngs=rngs)
        self.branch1x1 = make(inputs, 64)
        self.branch5x5_1 = make(inputs, 48)
        self.branch5x5_2 = make(48, 64, (5, 5))
        self.branch3x3dbl_1 = make(inputs, 64)
        self.branch3x3dbl_2 = make(64, 96, (3, 3))
        self.branch3x3dbl_3 = make(96, 96, (3, 3))
        self.branch_pool = make(inputs, pooled)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        branches = [
            _chain(x, self.branch1x1),
            _chain(x, self.branch5x5_1, self.branch5x5_2),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            _chain(_mean_pool(x), self.branch_pool),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nnx.Module):
    """From 1/8 to 1/16 of the resolution."""

    def __init__(self, config: InceptionConfig, inputs: int, *, rngs: nnx.Rngs):
        make = functools.partial(_conv, config, rngs=rngs)
        self.branch3x3 = make(inputs, 384, (3, 3), 2)
        self.branch3x3dbl_1 = make(inputs, 64)
        self.branch3x3dbl_2 = make(64, 96, (3, 3))
        self.branch3x3dbl_3 = make(96, 96, (3, 3), 2)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B _ _ o"]:
        branches = [
            _chain(x, self.branch3x3),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nnx.Module):
    """At 1/16 of the resolution: 7 x 7, once and twice, each factored into 1 x 7 and 7 x 1."""

    def __init__(self, config: InceptionConfig, inputs: int, inner: int, *, rngs: nnx.Rngs):
        """``inner``: channels between the factored convolutions."""
        make = functools.partial(_conv, config, rngs=rngs)
        self.branch1x1 = make(inputs, 192)
        self.branch7x7_1 = make(inputs, inner)
        self.branch7x7_2 = make(inner, inner, (1, 7))
        self.branch7x7_3 = make(inner, 192, (7, 1))
        self.branch7x7dbl_1 = make(inputs, inner)
        self.branch7x7dbl_2 = make(inner, inner, (7, 1))
        self.branch7x7dbl_3 = make(inner, inner, (1, 7))
        self.branch7x7dbl_4 = make(inner, inner, (7, 1))
        self.branch7x7dbl_5 = make(inner, 192, (1, 7))
        self.branch_pool = make(inputs, 192)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        twice = _chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        branches = [
            _chain(x, self.branch1x1),
            _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            _chain(twice, self.branch7x7dbl_4, self.branch7x7dbl_5),
            _chain(_mean_pool(x), self.branch_pool),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nnx.Module):
    """From 1/16 to 1/32 of the resolution."""

    def __init__(self, config: InceptionConfig, inputs: int, *, rngs: nnx.Rngs):
        make = functools.partial(_conv, config, rngs=rngs)
        self.branch3x3_1 = make(inputs, 192)
        self.branch3x3_2 = make(192, 320, (3, 3), 2)
        self.branch7x7x3_1 = make(inputs, 192)
        self.branch7x7x3_2 = make(192, 192, (1, 7))
        self.branch7x7x3_3 = make(192, 192, (7, 1))
        self.branch7x7x3_4 = make(192, 192, (3, 3), 2)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B _ _ o"]:
        wide = _chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3)
        branches = [
            _chain(x, self.branch3x3_1, self.branch3x3_2),
            _chain(wide, self.branch7x7x3_4),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nnx.Module):
    """At 1/32 of the resolution: branches that end in parallel 1 x 3 and 3 x 1 convolutions."""

    def __init__(self, config: InceptionConfig, inputs: int, max_pool: bool, *, rngs: nnx.Rngs):
        """``max_pool``: whether the pooling branch uses the maximum instead of the mean."""
        make = functools.partial(_conv, config, rngs=rngs)
        self.branch1x1 = make(inputs, 320)
        self.branch3x3_1 = make(inputs, 384)
        self.branch3x3_2a = make(384, 384, (1, 3))
        self.branch3x3_2b = make(384, 384, (3, 1))
        self.branch3x3dbl_1 = make(inputs, 448)
        self.branch3x3dbl_2 = make(448, 384, (3, 3))
        self.branch3x3dbl_3a = make(384, 384, (1, 3))
        self.branch3x3dbl_3b = make(384, 384, (3, 1))
        self.branch_pool = make(inputs, 192)
        self.max_pool = max_pool

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        once = _chain(x, self.branch3x3_1)
        twice = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = _max_pool(x) if self.max_pool else _mean_pool(x)
        branches = [
            _chain(x, self.branch1x1),
            _chain(once, self.branch3x3_2a),
            _chain(once, self.branch3x3_2b),
            _chain(twice, self.branch3x3dbl_3a),
            _chain(twice, self.branch3x3dbl_3b),
            _chain(pooled, self.branch_pool),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """Images to the vectors that FID compares. See the module's docstring."""

    def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs):
        self.config = config
        make = functools.partial(_conv, config, rngs=rngs)
        self.conv2d_1a_3x3 = make(3, 32, (3, 3), 2, "VALID")
        self.conv2d_2a_3x3 = make(32, 32, (3, 3), 1, "VALID")
        self.conv2d_2b_3x3 = make(32, 64, (3, 3))
        self.conv2d_3b_1x1 = make(64, 80)
        self.conv2d_4a_3x3 = make(80, 192, (3, 3), 1, "VALID")
        self.mixed_5b = BlockA(config, 192, 32, rngs=rngs)
        self.mixed_5c = BlockA(config, 256, 64, rngs=rngs)
        self.mixed_5d = BlockA(config, 288, 64, rngs=rngs)
        self.mixed_6a = BlockB(config, 288, rngs=rngs)
        self.mixed_6b = BlockC(config, 768, 128, rngs=rngs)
        self.mixed_6c = BlockC(config, 768, 160, rngs=rngs)
        self.mixed_6d = BlockC(config, 768, 160, rngs=rngs)
        self.mixed_6e = BlockC(config, 768, 192, rngs=rngs)
        self.mixed_7a = BlockD(config, 768, rngs=rngs)
        self.mixed_7b = BlockE(config, 1280, max_pool=False, rngs=rngs)
        self.mixed_7c = BlockE(config, 2048, max_pool=True, rngs=rngs)

    def __call__(self, images: Float[Array, "B h w 3"]) -> Features:
        """Pooled features of images of any size; pixels lie in [-1, 1].

        Returns:
          No maps, and the last block's output averaged over the image: 2,048 channels in FID's
          network.
        """
        size = self.config.input_size
        square = (images.shape[0], size, size, 3)
        x = jax.image.resize(images.astype(jnp.float32), square, "linear", antialias=False)
        x = _chain(x, self.conv2d_1a_3x3, self.conv2d_2a_3x3, self.conv2d_2b_3x3)
        x = _chain(_halve(x), self.conv2d_3b_1x1, self.conv2d_4a_3x3)
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(_halve(x))))
        x = self.mixed_6c(self.mixed_6b(self.mixed_6a(x)))
        x = self.mixed_6e(self.mixed_6d(x))
        x = self.mixed_7c(self.mixed_7b(self.mixed_7a(x)))
        return Features((), jnp.mean(x, axis=(1, 2)))


def _conv(
    config: InceptionConfig,
    inputs: int,
    outputs: int,
    size: tuple[int, int] = (1, 1),
    stride: int = 1,
    padding: str | None = None,
    *,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution whose widths are those of FID's network before ``thinning``.

    The default padding preserves the size with stride 1, and is none with a larger stride.
    """
    return nnx.Conv(
        inputs if inputs == 3 else inputs // config.thinning,  # colours are not thinned
        outputs // config.thinning,
        size,
        strides=stride,
        padding=padding or ("SAME" if stride == 1 else "VALID"),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        kernel_init=initializers.he_normal(),
        kernel_metadata={"axes": (None, None, "channels", "embed")},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )


def _chain(x: Float[Array, "B _ _ i"], *convolutions: nnx.Conv) -> Float[Array, "B _ _ o"]:
    """Applies convolutions, each followed by a ReLU."""
    for convolution in convolutions:
        x = jax.nn.relu(convolution(x))
    return x


def _mean_pool(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """3 x 3 average pooling that excludes padding, in float32 and rounded once."""
    mean = functools.partial(nnx.avg_pool, padding="SAME", count_include_pad=False)
    return mean(x.astype(jnp.float32), (3, 3), strides=(1, 1)).astype(x.dtype)


def _max_pool(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def _halve(x: Float[Array, "B _ _ C"]) -> Float[Array, "B _ _ C"]:
    """3 x 3 max pooling with stride 2."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
