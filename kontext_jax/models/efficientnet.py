"""EfficientNet-Lite: a small ImageNet classifier, used for its features.

Follows ``models/official/efficientnet/lite`` of tensorflow/tpu: EfficientNet (arXiv 1905.11946)
without squeeze and excitation, and with ReLU6 instead of swish. Its ImageNet weights are available
as a Python package (`weights/efficientnet.py`). The maps are those of Projected GAN (arXiv
2111.01007); the pooled vector is the classifier's input.

Inference only: batch norms are folded into the convolutions before them, and there is no dropout.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from kontext_jax.models.features import Features, check_taps, standardise
from kontext_jax.models.layers import Linear
from kontext_jax.settings import Settings

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Normalisation of the Lite networks, for colours in [0, 1]; other EfficientNets differ."""


class Stage(NamedTuple):
    """A sequence of blocks of one width.

    Attributes:
      kernel_size: size of the depthwise convolutions, in pixels.
      stride: stride of the first block; the others have stride 1.
      expansion: inner width of a block divided by the width of its input.
      channels: output channels.
      num_blocks: number of blocks.
    """

    kernel_size: int
    stride: int
    expansion: int
    channels: int
    num_blocks: int


@dataclass(kw_only=True, unsafe_hash=True)
class EfficientNetConfig(Settings):
    """Sizes of the network; the defaults are EfficientNet-Lite0's.

    Attributes:
      stem_channels: channels of the first convolution, which halves the resolution.
      stages: the stages of blocks after it.
      head_channels: channels of the last convolution and of the pooled vector.
      num_classes: number of classes of the classifier.
      input_size: side of the network's input in pixels; Lite0 was trained with 224.
      taps: ascending indices of the blocks whose outputs are the maps; for Lite0 the last blocks at
        1/4, 1/8, 1/16 and 1/32 of the resolution.
      dtype: compute dtype; parameters are float32.
    """

    stem_channels: int = 32
    stages: tuple[Stage, ...] = (
        Stage(3, 1, 1, 16, 1),
        Stage(3, 2, 6, 24, 2),
        Stage(5, 2, 6, 40, 2),
        Stage(3, 2, 6, 80, 3),
        Stage(5, 1, 6, 112, 3),
        Stage(5, 2, 6, 192, 4),
        Stage(3, 1, 6, 320, 1),
    )
    head_channels: int = 1280
    num_classes: int = 1000
    input_size: int = 224
    taps: tuple[int, ...] = (2, 4, 10, 15)
    dtype: str = "float32"

    def __post_init__(self):
        check_taps(self.taps, sum(stage.num_blocks for stage in self.stages))

    @classmethod
    def lite0(cls, **kwargs) -> "EfficientNetConfig":
        """EfficientNet-Lite0: 4,631,000 parameters with folded norms."""
        return cls(**kwargs)

    @classmethod
    def tiny(cls, **kwargs) -> "EfficientNetConfig":
        """For tests: every kind of block, on 16 pixels."""
        sizes = dict(
            stem_channels=8,
            stages=(Stage(3, 1, 1, 8, 1), Stage(5, 2, 3, 12, 2), Stage(3, 2, 2, 16, 1)),
            head_channels=24,
            num_classes=10,
            input_size=16,
            taps=(0, 2, 3),
        )
        return cls(**(sizes | kwargs))


class Block(nnx.Module):
    """Inverted bottleneck (arXiv 1801.04381): expansion, depthwise convolution, projection.

    The input is added if the block preserves its shape. There is no ReLU after the projection.
    """

    def __init__(
        self, config: EfficientNetConfig, inputs: int, stage: Stage, stride: int, *, rngs: nnx.Rngs
    ):
        width, make = inputs * stage.expansion, functools.partial(_conv, config, rngs=rngs)
        self.expand = None if stage.expansion == 1 else make(inputs, width, 1)
        self.depthwise = make(width, width, stage.kernel_size, stride, groups=width)
        self.project = make(width, stage.channels, 1)
        self.is_residual = stride == 1 and inputs == stage.channels

    def __call__(self, x: Float[Array, "B _ _ i"]) -> Float[Array, "B _ _ o"]:
        h = x if self.expand is None else jax.nn.relu6(self.expand(x))
        h = self.project(jax.nn.relu6(_depthwise(self.depthwise, h)))
        return x + h if self.is_residual else h


class EfficientNet(nnx.Module):
    """Images to features or class logits. See the module's docstring."""

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = _conv(config, 3, config.stem_channels, 3, 2, rngs=rngs)
        self.blocks, width = nnx.List(), config.stem_channels
        for stage in config.stages:
            for i in range(stage.num_blocks):
                stride = stage.stride if i == 0 else 1
                self.blocks.append(Block(config, width, stage, stride, rngs=rngs))
                width = stage.channels
        self.head = _conv(config, width, config.head_channels, 1, rngs=rngs)
        self.classifier = Linear(
            config.head_channels,
            config.num_classes,
            ("channels", "embed"),
            rngs=rngs,
            dtype=jnp.dtype(config.dtype),
        )

    def __call__(self, images: Float[Array, "B h w 3"]) -> Features:
        """Features of images of any size; pixels lie in [-1, 1].

        Returns:
          Outputs of the taps, and the last convolution's output averaged over the image. For Lite0
          at 224 pixels these are maps of 56, 28, 14 and 7 cells per side with 24, 40, 112 and 320
          channels, and vectors of 1,280 channels.
        """
        x = standardise(images, self.config.input_size, MEAN, STD)
        x = jax.nn.relu6(self.stem(x))
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.config.taps:
                maps.append(x)
        return Features(tuple(maps), jnp.mean(jax.nn.relu6(self.head(x)), axis=(1, 2)))

    def logits(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B N"]:
        """Logits of the ImageNet classes in the usual order; ``images`` as in `__call__`."""
        return self.classifier(self(images).pooled)


def _depthwise(conv: nnx.Conv, x: Float[Array, "B _ _ c"]) -> Float[Array, "B _ _ c"]:
    """``conv(x)`` for a depthwise ``conv``, as a sum of shifted and weighted images.

    XLA fuses it into one loop. With XLA's grouped convolutions the network takes five times as long
    on two CPU cores: 23.7 instead of 4.6 ms per image (Lite0 at 128 pixels, batches of 64).
    """
    x, kernel = x.astype(conv.dtype), conv.kernel[...].astype(conv.dtype)
    (size, _), stride = conv.kernel_size, conv.strides
    cells = [-(-side // stride) for side in x.shape[1:3]]
    extent = [(n - 1) * stride + 1 for n in cells]
    padding = [max(e + size - 1 - side, 0) for e, side in zip(extent, x.shape[1:3], strict=True)]
    # TensorFlow's padding, as in `_conv`.
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in padding), (0, 0)))
    total = jnp.broadcast_to(conv.bias[...].astype(conv.dtype), (len(x), *cells, x.shape[-1]))
    for row in range(size):
        for column in range(size):
            part = x[:, row : row + extent[0] : stride, column : column + extent[1] : stride]
            total = total + part * kernel[row, column].reshape(1, 1, 1, -1)
    return total


def _conv(
    config: EfficientNetConfig,
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    *,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution with TensorFlow's padding: odd padding has more below and right."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding="SAME",
        feature_group_count=groups,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        kernel_init=initializers.he_normal(),
        kernel_metadata={"axes": (None, None, "channels", "embed")},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )
