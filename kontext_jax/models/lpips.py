"""LPIPS: how different two images look, by the features of a classifier (arXiv 1801.03924).

Version 0.1 of the package ``lpips`` (richzhang/PerceptualSimilarity) with its linear heads. With
``f`` and ``g`` the features of the two images after a layer, each pixel's vector of length one, and
``w`` that layer's head,

    distance = sum over layers of the mean over pixels of  w . (f - g)^2

The layers are those of AlexNet or of VGG16 as torchvision has them, after their ReLUs. Means are
over whole images: distances of images of one size compare. AlexNet's is the usual measure, VGG's
the usual loss.
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
"""ImageNet's, rounded, of colours in [-1, 1]."""

EPSILON = 1e-10
"""Added to the length of a vector that is divided by it."""


class Stage(NamedTuple):
    """Convolutions of one width, one after the other; the last one's output is compared.

    Attributes:
      pool: pixels a side of what is pooled before them, every second pixel; 0, nothing is.
      channels: of their outputs.
      kernel_size: in pixels.
      num_convs: how many there are.
      stride, padding: in pixels.
    """

    pool: int
    channels: int
    kernel_size: int = 3
    num_convs: int = 1
    stride: int = 1
    padding: int = 1


class Trunk(NamedTuple):
    """The stages of a classifier, and the fewest pixels a side that leave any of the last."""

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
      net: "alex" (2,469,696 parameters and 1,152 of heads) or "vgg" (14,714,688 and 1,472).
      dtype: compute dtype of the convolutions; parameters and distances are float32.
    """

    net: str = "alex"
    dtype: str = "float32"

    def __post_init__(self):
        check_choices(self, net=TRUNKS)


class Lpips(nnx.Module):
    """Two images to their distance. See the module's docstring.

    New heads give every channel the same weight.
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
        """The distance of each image from its pair: 0 for equal ones, and rarely above 1.

        It is as exact as products of matrices are (`jax.default_matmul_precision`).

        Args:
          first, second: pixels in [-1, 1]; gradients flow to both.

        Returns:
          float32.

        Raises:
          ValueError: the images are too small for the network.
        """
        total = jnp.zeros(len(first), jnp.float32)
        for f, g, head in zip(self.maps(first), self.maps(second), self.heads, strict=True):
            apart = jnp.sum(jnp.square(f - g), axis=(1, 2)) / (f.shape[1] * f.shape[2])
            total += jnp.sum(apart * head[...][None], axis=-1)
        return total

    def maps(self, images: Float[Array, "B h w 3"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """What is compared: of each layer, a vector of length one for each pixel, float32.

        A vector of zeros stays one.

        Args:
          images: pixels in [-1, 1].

        Raises:
          ValueError: the images are too small for the network.
        """
        trunk, (height, width) = TRUNKS[self.config.net], images.shape[1:3]
        if min(height, width) < trunk.smallest:
            raise ValueError(
                f"Images of {height} x {width} pixels are too small for LPIPS on "
                f"{self.config.net}: enlarge them to {trunk.smallest} a side or more."
            )
        mean, std = (np.asarray(colour, np.float32).reshape(1, 1, 1, 3) for colour in (MEAN, STD))
        x, maps = (images.astype(jnp.float32) - mean) / std, []
        for stage, convs in zip(trunk.stages, self.stages, strict=True):
            if stage.pool:
                x = nnx.max_pool(x, (stage.pool, stage.pool), strides=(2, 2), padding="VALID")
            for conv in convs:
                x = jax.nn.relu(conv(x))
            maps.append(_unit(x.astype(jnp.float32)))
        return tuple(maps)


def _unit(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Vectors of length one, or zero."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The root's slope at zero is infinite, and makes gradients NaN. One divides zeros just as well.
    return x / (jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) + EPSILON)
