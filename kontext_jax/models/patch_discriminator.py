"""PatchGAN: judges an image patch by patch, at one or several scales.

The discriminator of pix2pix (Isola et al., arXiv 1611.07004), which Esser et al. (arXiv 2012.09841)
and Rombach et al. (arXiv 2112.10752) use for autoencoders: 4 x 4 convolutions with LeakyReLU 0.2,
the first ones with stride 2, and a logit per position whose receptive field is a patch. With
several scales, a separate discriminator sees the image at 1/2, 1/4, ... of its size (pix2pixHD,
arXiv 1711.11585).

GroupNorm replaces BatchNorm: statistics over the batch would make the logits of an image depend on
its neighbours, on the number of devices and on the split into microbatches.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from kontext_jax.models.autoencoder import GroupNorm
from kontext_jax.models.moving_average import MovingAverage
from kontext_jax.settings import Settings, check_least
from kontext_jax.sharding import constrain

SLOPE = 0.2
"""Slope of LeakyReLU below 0."""


@dataclass(kw_only=True, unsafe_hash=True)
class PatchConfig(Settings):
    """Sizes of the discriminator; the defaults are pix2pix's, 2,765,633 parameters.

    Attributes:
      channels: channels after the first convolution; doubled by each of the next, up to eightfold.
      num_layers: convolutions with stride 2; 3 judge patches of 70 x 70 pixels, 2 of 34 x 34.
      num_scales: number of image sizes, each half as large as the one before.
      num_groups: groups of every GroupNorm.
      dtype: compute dtype; parameters and logits are float32.
    """

    channels: int = 64
    num_layers: int = 3
    num_scales: int = 1
    num_groups: int = 32
    dtype: str = "float32"

    def __post_init__(self):
        check_least(self, "discriminator.", num_layers=1, num_scales=1)
        if self.channels % self.num_groups:
            raise ValueError(
                f"discriminator.channels {self.channels} must be a multiple of its num_groups "
                f"{self.num_groups}."
            )

    @classmethod
    def tiny(cls, **kwargs) -> "PatchConfig":
        """For images of 32 to 64 pixels: 42,961 parameters."""
        return cls(**(dict(channels=16, num_layers=2, num_groups=8) | kwargs))

    @property
    def smallest(self) -> int:
        """The smallest side of an image that has a logit at every scale, in pixels."""
        return 2 ** (self.num_layers + self.num_scales - 1) * 3


class Scale(nnx.Module):
    """The discriminator of one image size."""

    def __init__(self, config: PatchConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        strides = [2] * config.num_layers + [1]
        inputs = [3, *widths]
        self.convs = nnx.List(
            _conv(config, i, o, stride, bias=n == 0, rngs=rngs)
            for n, (i, o, stride) in enumerate(zip(inputs, widths, strides, strict=False))
        )
        self.norms = nnx.List(
            GroupNorm(config.num_groups, width, rngs=rngs) for width in widths[1:]
        )
        self.out = _conv(config, widths[-1], 1, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B _ _ 3"]) -> Float[Array, "B _ _"]:
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = jax.nn.leaky_relu(self.norms[i - 1](x) if i else x, SLOPE)
        return self.out(x)[..., 0].astype(jnp.float32)


class PatchDiscriminator(nnx.Module):
    """Logits of patches. See the module's docstring.

    Attributes:
      logits: moving averages of the mean logit of real and of generated images, or None.
    """

    def __init__(self, config: PatchConfig, average_logits: bool = False, *, rngs: nnx.Rngs):
        """``average_logits``: whether to keep the moving averages that LeCam needs."""
        self.config = config
        self.logits = MovingAverage(jnp.zeros((2,)), axes=(None,)) if average_logits else None
        self.scales = nnx.List(Scale(config, rngs=rngs) for _ in range(config.num_scales))

    def __call__(self, images: Float[Array, "B h w 3"]) -> tuple[Float[Array, "B _ _"], ...]:
        """Logits of every patch, one array per scale, the full size first; float32.

        Args:
          images: pixels in [-1, 1].

        Raises:
          ValueError: the images are too small.
        """
        (height, width), smallest = images.shape[1:3], self.config.smallest
        if min(height, width) < smallest:
            raise ValueError(
                f"Images of {height} x {width} pixels are too small for the discriminator, which "
                f"needs {smallest}: lower its num_layers or num_scales."
            )
        # The rows of its feature maps, 31 of 64 and so on, cannot be split (`sharding.split_rows`).
        images = constrain(images, "batch act_all_rows act_columns act_channels")
        logits, x = [], images.astype(self.config.dtype)
        for i, scale in enumerate(self.scales):
            x = _halved(x) if i else x
            logits.append(scale(x))
        return tuple(logits)


def _halved(x: Float[Array, "B _ _ c"]) -> Float[Array, "B _ _ c"]:
    """Means of 2 x 2 pixels."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4


def _conv(
    config: PatchConfig, inputs: int, outputs: int, stride: int, bias=True, *, rngs: nnx.Rngs
) -> nnx.Conv:
    """A 4 x 4 convolution with padding 1. Weights start as in pix2pix, with deviation 0.02."""
    return nnx.Conv(
        inputs,
        outputs,
        (4, 4),
        strides=stride,
        padding=1,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        kernel_init=initializers.normal(0.02),
        kernel_metadata={"axes": (None, None, "channels", "embed")},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )
