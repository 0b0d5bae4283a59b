"""LPIPS: perceptual distance of two images by the features of a classifier (arXiv 1801.03924).

Version 0.1 of the package ``lpips`` (richzhang/PerceptualSimilarity) with its linear heads. With
``f`` and ``g`` the features of the two images after a layer, normalised to unit length at each
pixel, and ``w`` the layer's head,

    distance = sum over layers of the mean over pixels of  w . (f - g)^2

The layers are those of torchvision's AlexNet or VGG16, after the ReLUs. Distances are comparable
only between images of the same size. AlexNet is the usual choice for a metric, VGG for a loss.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from kontext_jax.settings import Settings, check_choices

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Rounded statistics of ImageNet, for colours in [-1, 1]."""

EPSILON = 1e-10
"""Added to the length of a vector before dividing by it."""


class Stage(NamedTuple):
    """A sequence of convolutions of one width; the output of the last one is compared.

    Attributes:
      pool: window of the max pooling with stride 2 before the convolutions; 0 = no pooling.
      channels: output channels.
      kernel_size: size of the convolutions, in pixels.
      num_convs: number of convolutions.
      stride, padding: stride and padding of the convolutions, in pixels.
    """

    pool: int
    channels: int
    kernel_size: int = 3
    num_convs: int = 1
    stride: int = 1
    padding: int = 1


class Trunk(NamedTuple):
    """The stages of a classifier, and the smallest side of an image that it supports."""

    stages: tuple[Stage, ...]
    smallest: int


TRUNKS = {
    "alex": Trunk(
        (
            Stage(0, 64, kernel_size=11, stride=4, padding=2),
            Stage(3, 192, kernel_size=5, padding=2),
            Stage(3, 384),
            Stage(0, 256),
            Stage(0, 256),
        ),
        smallest=31,
    ),
    "vgg": Trunk(
        (
            Stage(0, 64, num_convs=2),
            Stage(2, 128, num_convs=2),
            Stage(2, 256, num_convs=3),
            Stage(2, 512, num_convs=3),
            Stage(2, 512, num_convs=3),
        ),
        smallest=16,
    ),
}


@dataclass(kw_only=True, unsafe_hash=True)
class LpipsConfig(Settings):
    """The network.

    Attributes:
      net: "alex" (2,469,696 parameters and 1,152 in heads) or "vgg" (14,714,688 and 1,472).
      dtype: compute dtype of the convolutions; parameters and distances are float32.
    """

    net: str = "alex"
    dtype: str = "float32"

    def __post_init__(self):
        check_choices(self, net=TRUNKS)


class Lpips(nnx.Module):
    """Distance of two images. See the module's docstring.

    New heads weigh all channels equally.
    """

    def __init__(self, config: LpipsConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stages, self.heads = nnx.List(), nnx.List()
        width = 3
        for stage in TRUNKS[config.net].stages:
            widths = [width] + [stage.channels] * stage.num_convs
            self.stages.append(
                nnx.List(
                    nnx.Conv(
                        inputs,
                        outputs,
                        (stage.kernel_size, stage.kernel_size),
                        strides=stage.stride,
                        padding=stage.padding,
                        dtype=jnp.dtype(config.dtype),
                        param_dtype=jnp.float32,
                        kernel_init=initializers.he_normal(),
                        kernel_metadata={"axes": (None, None, "channels", "embed")},
                        bias_metadata={"axes": ("embed",)},
                        rngs=rngs,
                    )
                    for inputs, outputs in itertools.pairwise(widths)
                )
            )
            width = stage.channels
            self.heads.append(nnx.Param(jnp.full((width,), 1 / width), axes=("embed",)))

    def __call__(
        self, first: Float[Array, "B h w 3"], second: Float[Array, "B h w 3"]
    ) -> Float[Array, " B"]:
        """The distance of each pair of images: 0 for equal images, and rarely above 1.

        Its precision is that of matmuls (`jax.default_matmul_precision`).

        Args:
          first, second: pixels in [-1, 1]; gradients flow to both.

        Returns:
          float32 distances.

        Raises:
          ValueError: the images are too small for the network.
        """
        total = jnp.zeros(len(first), jnp.float32)
        for f, g, head in zip(self.maps(first), self.maps(second), self.heads, strict=True):
            difference = jnp.sum(jnp.square(f - g), axis=(1, 2)) / (f.shape[1] * f.shape[2])
            total += jnp.sum(difference * head[...][None], axis=-1)
        return total

    def maps(self, images: Float[Array, "B h w 3"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """The features to compare: for each layer, a vector of unit length per pixel, float32.

        Zero vectors remain zero.

        Args:
          images: pixels in [-1, 1].

        Raises:
          ValueError: the images are too small for the network.
        """
        trunk, (height, width) = TRUNKS[self.config.net], images.shape[1:3]
        if min(height, width) < trunk.smallest:
            raise ValueError(
                f"Images of {height} x {width} pixels are too small for LPIPS on "
                f"{self.config.net}; enlarge both sides to {trunk.smallest} or more."
            )
        mean, std = (np.asarray(colour, np.float32).reshape(1, 1, 1, 3) for colour in (MEAN, STD))
        x, maps = (images.astype(jnp.float32) - mean) / std, []
        for stage, convs in zip(trunk.stages, self.stages, strict=True):
            if stage.pool:
                x = nnx.max_pool(x, (stage.pool, stage.pool), strides=(2, 2), padding="VALID")
            for conv in convs:
                x = jax.nn.relu(conv(x))
            maps.append(unit_vectors(x))
        return tuple(maps)


def unit_vectors(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Vectors of unit length, float32; zero vectors remain zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The square root has an infinite slope at zero, which makes gradients NaN. Use 1 instead.
    return x / (jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) + EPSILON)
