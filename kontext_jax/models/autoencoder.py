"""FLUX.1's autoencoder: images to latents at an eighth of their resolution, and back.

Follows Black Forest Labs' ``flux/modules/autoencoder.py``, with the same names; ``diffusers`` calls
it ``AutoencoderKL``. The encoder predicts mean and log-variance of each latent cell; latents are
shifted and scaled to about unit variance. A token of the transformer is 2 x 2 latent cells
(`pack_latents`).

Images and latents are NHWC; pixels lie in [-1, 1]. Levels differ in shape, so nothing is stacked.
Images that do not fit a device are split by rows over a mesh (`sharding.split_rows`), exactly, or
computed in tiles (``models/tiling.py``), approximately.
"""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int, Key, UInt8

from kontext_jax.models import fsq
from kontext_jax.models.attention import attention
from kontext_jax.models.convolution import convolve, convolve_repeated, is_faster_here
from kontext_jax.models.layers import Linear, remat
from kontext_jax.models.vq import Codebook
from kontext_jax.settings import Settings, check_choices, check_least
from kontext_jax.sharding import split_rows

PATCH = 2  # a token is PATCH x PATCH latent cells

MIN_LOGVAR = -30.0

# Preserves the unit variance of a GroupNorm's output, so that all blocks start alike. PyTorch's
# default, which BFL trained from, has a third of that variance; the next norm removes the factor.
lecun = initializers.lecun_normal()


@dataclass(kw_only=True, unsafe_hash=True)
class AutoencoderConfig(Settings):
    """Sizes of the autoencoder; the defaults are FLUX.1's.

    Attributes:
      channels, channel_multipliers: their product is the width of each level, finest first; each
        level has half the resolution of the one before.
      num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
      latent_channels: channels of a latent cell.
      num_groups: groups of every GroupNorm.
      fsq_levels: number of levels of each latent channel, for discrete latents (``models/fsq.py``);
        empty for continuous ones.
      codebook_size: number of vectors of a learned codebook, for discrete latents of the other kind
        (``models/vq.py``); 0 for none.
      quant_conv: whether 1 x 1 convolutions follow the encoder and precede the decoder, as in
        Stable Diffusion's autoencoders; FLUX.1's has none.
      scale_factor, shift_factor: ``latents = scale_factor * (z - shift_factor)``.
      dtype: compute dtype; parameters are float32.
      remat: what the backward pass recomputes: "full" saves only the inputs of the levels' residual
        blocks, "none" saves everything.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    num_groups: int = 32
    fsq_levels: tuple[int, ...] = ()
    codebook_size: int = 0
    quant_conv: bool = False
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    dtype: str = "float32"
    remat: str = "full"

    def __post_init__(self):
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers {self.channel_multipliers} must be one or more numbers >= 1."
            )
        if self.channels % self.num_groups:
            raise ValueError(
                f"channels {self.channels} must be a multiple of num_groups {self.num_groups}."
            )
        if self.fsq_levels and len(self.fsq_levels) != self.latent_channels:
            raise ValueError(
                f"fsq_levels {self.fsq_levels} must have a number for each of the latent_channels "
                f"{self.latent_channels}."
            )
        if min(self.fsq_levels, default=2) < 2:
            raise ValueError(f"fsq_levels {self.fsq_levels} must be 2 or more.")
        check_least(self, codebook_size=0)
        if self.fsq_levels and self.codebook_size:
            raise ValueError("fsq_levels and codebook_size exclude each other: latents have one.")
        check_choices(self, remat=("full", "none"))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * multiple for multiple in self.channel_multipliers)

    @property
    def is_discrete(self) -> bool:
        return bool(self.fsq_levels or self.codebook_size)

    @property
    def num_codes(self) -> int:
        """The number of codes of a discrete latent cell."""
        return fsq.num_codes(self.fsq_levels) if self.fsq_levels else self.codebook_size

    @property
    def encoder_channels(self) -> int:
        """Channels of the encoder's output: the latents', and their log-variances if continuous."""
        return self.latent_channels * (1 if self.is_discrete else 2)

    @property
    def downsample(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def token_channels(self) -> int:
        return PATCH**2 * self.latent_channels

    @property
    def pixels_per_token(self) -> int:
        """Pixels per token, along one side."""
        return PATCH * self.downsample

    def check_size(self, height: int, width: int) -> None:
        """Checks that an image consists of whole latent cells.

        Raises:
          ValueError: it does not.
        """
        cell = self.downsample
        if height % cell or width % cell:
            raise ValueError(f"Images of {height} x {width} pixels need sides divisible by {cell}.")

    @classmethod
    def flux(cls, **kwargs) -> "AutoencoderConfig":
        """FLUX.1 [dev], [schnell] and Kontext: 83,819,683 parameters, 16 pixels per token."""
        return cls(**kwargs)

    @classmethod
    def tiny(cls, **kwargs) -> "AutoencoderConfig":
        """For laptops: 24 channels and 8 pixels per token; trains on two CPU cores in minutes."""
        sizes = dict(
            channels=16,
            channel_multipliers=(1, 2, 4),
            num_res_blocks=1,
            latent_channels=6,
            num_groups=8,
            remat="none",
        )
        return cls(**(sizes | kwargs))


class GroupNorm(nnx.Module):
    """GroupNorm, eps 1e-6, in float32 and rounded once.

    The variance is the mean square of centred values, not a difference of large numbers. Means are
    taken over space, then over a group's channels, so that channels stay the innermost axis.
    """

    def __init__(self, num_groups: int, width: int, *, rngs: nnx.Rngs):
        del rngs  # the initial values are constants
        self.num_groups = num_groups
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32), axes=("embed",))

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        y = y * jax.lax.rsqrt(self._mean(jnp.square(y)) + 1e-6)
        scale, bias = (
            p[...].astype(jnp.float32).reshape(1, 1, 1, -1) for p in (self.scale, self.bias)
        )
        return (y * scale + bias).astype(x.dtype)

    def _mean(self, x: Float[Array, "B h w c"]) -> Float[Array, "B 1 1 c"]:
        """The mean of each group, repeated for each of its channels."""
        per_channel = jnp.mean(x, axis=(1, 2)).reshape(x.shape[0], self.num_groups, -1)
        per_group = jnp.mean(per_channel, axis=-1, keepdims=True)
        return jnp.broadcast_to(per_group, per_channel.shape).reshape(x.shape[0], 1, 1, -1)


def conv(
    config: AutoencoderConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs, size=3, **kwargs
) -> nnx.Conv:
    """A square convolution; with the default ``padding`` and stride it preserves the size."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        **({"padding": size // 2} | kwargs),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        kernel_init=lecun,
        kernel_metadata={"axes": (None, None, "channels", "embed")},
        bias_metadata={"axes": ("embed",)},
        conv_general_dilated=convolve,
        rngs=rngs,
    )


class ResnetBlock(nnx.Module):
    """Residual block: (GroupNorm, swish, 3 x 3 convolution) twice, and a 1 x 1 shortcut if needed.

    The shortcut is the identity if the number of channels does not change.
    """

    def __init__(self, config: AutoencoderConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(config.num_groups, inputs, rngs=rngs)
        self.conv1 = conv(config, inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(config.num_groups, outputs, rngs=rngs)
        self.conv2 = conv(config, outputs, outputs, rngs=rngs)
        needs_conv = inputs != outputs
        self.nin_shortcut = conv(config, inputs, outputs, size=1, rngs=rngs) if needs_conv else None

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nnx.Module):
    """Self-attention over all cells of an image, with one head of the full width."""

    def __init__(self, config: AutoencoderConfig, width: int, *, rngs: nnx.Rngs):
        axes, dtype = ("channels", "embed"), jnp.dtype(config.dtype)
        make = functools.partial(Linear, width, width, axes, rngs=rngs, dtype=dtype, init=lecun)
        self.norm = GroupNorm(config.num_groups, width, rngs=rngs)
        self.q, self.k, self.v, self.proj_out = make(), make(), make(), make()

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        x = split_rows(x)
        cells = self.norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        segments = jnp.ones(cells.shape[:2], jnp.int32)
        out = attention(self.q(cells), self.k(cells), self.v(cells), segments)
        return split_rows(x + self.proj_out(out.reshape(x.shape)))


class Downsample(nnx.Module):
    """Halves the resolution. Pads only below and to the right, unlike "SAME"."""

    def __init__(self, config: AutoencoderConfig, width: int, *, rngs: nnx.Rngs):
        self.conv = conv(config, width, width, strides=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles the resolution by repeating pixels, then applies a convolution."""

    def __init__(self, config: AutoencoderConfig, width: int, *, rngs: nnx.Rngs):
        self.conv = conv(config, width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ c"]:
        if is_faster_here(x):
            kernel, bias = self.conv.kernel[...], self.conv.bias[...].astype(x.dtype)
            return convolve_repeated(x, kernel) + bias.reshape(1, 1, 1, -1)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Level(nnx.Module):
    """Residual blocks of one resolution, then optionally `Downsample` or `Upsample`."""

    def __init__(self, config: AutoencoderConfig, widths: list[int], step=None, *, rngs: nnx.Rngs):
        """``widths``: channels before the first block and after each block."""
        pairs = itertools.pairwise(widths)
        self.block = nnx.List(ResnetBlock(config, i, o, rngs=rngs) for i, o in pairs)
        self.downsample = step(config, widths[-1], rngs=rngs) if step is Downsample else None
        self.upsample = step(config, widths[-1], rngs=rngs) if step is Upsample else None
        self.remat = config.remat

    def __call__(self, x: Float[Array, "B _ _ i"]) -> Float[Array, "B _ _ o"]:
        run = remat(ResnetBlock.__call__, self.remat)
        for block in self.block:
            x = split_rows(run(block, x))
        step = self.downsample or self.upsample
        return x if step is None else split_rows(step(x))


class Mid(nnx.Module):
    """The coarsest resolution, with attention over the whole image."""

    def __init__(self, config: AutoencoderConfig, width: int, *, rngs: nnx.Rngs):
        self.block_1 = ResnetBlock(config, width, width, rngs=rngs)
        self.attn_1 = AttnBlock(config, width, rngs=rngs)
        self.block_2 = ResnetBlock(config, width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        return split_rows(self.block_2(self.attn_1(self.block_1(x))))


class Encoder(nnx.Module):
    """Pixels to mean and log-variance of each latent cell, concatenated along the channels."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = conv(config, 3, widths[0], rngs=rngs)
        self.down = nnx.List()
        for i, width in enumerate(widths):
            chain = [widths[max(i - 1, 0)]] + [width] * config.num_res_blocks
            self.down.append(Level(config, chain, Downsample if i < last else None, rngs=rngs))
        self.mid = Mid(config, widths[-1], rngs=rngs)
        self.norm_out = GroupNorm(config.num_groups, widths[-1], rngs=rngs)
        self.conv_out = conv(config, widths[-1], config.encoder_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B _ _ 3"]) -> Float[Array, "B _ _ z"]:
        x = split_rows(self.conv_in(split_rows(x)))
        for level in self.down:
            x = level(x)
        return split_rows(self.conv_out(jax.nn.silu(self.norm_out(self.mid(x)))))


class Decoder(nnx.Module):
    """Latents to pixels. As in BFL's code, ``up[0]`` is the finest level and is applied last."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = conv(config, config.latent_channels, widths[-1], rngs=rngs)
        self.mid = Mid(config, widths[-1], rngs=rngs)
        self.up = nnx.List()
        for i, width in enumerate(widths):
            chain = [widths[min(i + 1, last)]] + [width] * (config.num_res_blocks + 1)
            self.up.append(Level(config, chain, Upsample if i > 0 else None, rngs=rngs))
        self.norm_out = GroupNorm(config.num_groups, widths[0], rngs=rngs)
        self.conv_out = conv(config, widths[0], 3, rngs=rngs)

    def __call__(self, z: Float[Array, "B _ _ z"]) -> Float[Array, "B _ _ 3"]:
        return self.conv_out(self.features(z))

    def features(self, z: Float[Array, "B _ _ z"]) -> Float[Array, "B _ _ c"]:
        """The input of the last layer, ``conv_out``."""
        x = self.mid(split_rows(self.conv_in(split_rows(z))))
        for level in reversed(self.up):
            x = level(x)
        return jax.nn.silu(self.norm_out(x))


class Autoencoder(nnx.Module):
    """Images to scaled latents and back. See the module's docstring."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        make, z = functools.partial(conv, config, size=1, rngs=rngs), config.latent_channels
        inner = config.encoder_channels
        self.quant_conv = make(inner, inner) if config.quant_conv else None
        self.post_quant_conv = make(z, z) if config.quant_conv else None
        size = config.codebook_size
        self.codebook = Codebook(size, z, rngs=rngs) if size else None

    def cells(self, images: Float[Array, "B _ _ 3"]) -> Float[Array, "B h w e"]:
        """The encoder's output: mean and log-variance, or what is quantised to discrete latents.

        Raises:
          ValueError: the sides of the images are not multiples of `downsample`.
        """
        self.config.check_size(*images.shape[1:3])
        cells = self.encoder(images.astype(self.config.dtype))
        return cells if self.quant_conv is None else self.quant_conv(cells)

    def moments(
        self, images: Float[Array, "B _ _ 3"]
    ) -> tuple[Float[Array, "B h w z"], Float[Array, "B h w z"]]:
        """Mean and log-variance of unscaled latents, float32.

        The log-variance is clipped to [-30, 20], as in diffusers. Discrete latents are the mean of
        a posterior with the smallest variance.

        Raises:
          ValueError: the sides of the images are not multiples of `downsample`.
        """
        cells = self.cells(images)
        if self.config.is_discrete:
            mean = self.quantize(cells)
            return mean, jnp.full_like(mean, MIN_LOGVAR)
        mean, logvar = jnp.split(cells, 2, axis=-1)
        return mean.astype(jnp.float32), jnp.clip(logvar.astype(jnp.float32), MIN_LOGVAR, 20.0)

    def quantize(self, cells: Float[Array, "B h w z"]) -> Float[Array, "B h w z"]:
        """Discrete latents of the encoder's cells, float32, with straight-through gradients."""
        if self.codebook is not None:
            return self.codebook(cells)
        return fsq.quantize(cells, self.config.fsq_levels)

    def codes(self, images: Float[Array, "B _ _ 3"]) -> Int[Array, "B h w"]:
        """The code of each cell of discrete latents."""
        cells = self.cells(images)
        if self.codebook is not None:
            return self.codebook.codes(cells)
        return fsq.codes(fsq.quantize(cells, self.config.fsq_levels), self.config.fsq_levels)

    def encode(
        self, images: Float[Array, "B _ _ 3"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B h w z"]:
        """Scaled latents, float32: the mean, as in FLUX, or a sample if ``key`` is given."""
        z, logvar = self.moments(images)
        if key is not None and not self.config.is_discrete:
            z = z + jnp.exp(0.5 * logvar) * jax.random.normal(key, z.shape, z.dtype)
        return self.scaled(z)

    def scaled(self, z: Float[Array, "B h w z"]) -> Float[Array, "B h w z"]:
        """Scaled latents of unscaled ones."""
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Float[Array, "B h w z"]) -> Float[Array, "B _ _ 3"]:
        """Decodes scaled latents to float32 images; pixels may lie slightly outside [-1, 1]."""
        return self.decoder.conv_out(self.decode_features(latents)).astype(jnp.float32)

    def decode_features(self, latents: Float[Array, "B h w z"]) -> Float[Array, "B _ _ c"]:
        """The input of the decoder's last layer, ``decoder.conv_out``, for scaled latents."""
        z = latents.astype(jnp.float32) / self.config.scale_factor + self.config.shift_factor
        z = z.astype(self.config.dtype)
        return self.decoder.features(z if self.post_quant_conv is None else self.post_quant_conv(z))


def kl_divergence(mean: Float[Array, "*b z"], logvar: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
    """The KL divergence of each latent value's posterior from N(0, 1), in nats."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def pack_latents(latents: Float[Array, "B h w z"]) -> Float[Array, "B S C"]:
    """Latents to tokens of 2 x 2 cells in raster order; feature ``z * 4 + row * 2 + column``."""
    batch, height, width, channels = latents.shape
    grid = (height // PATCH, width // PATCH)
    x = latents.reshape(batch, grid[0], PATCH, grid[1], PATCH, channels)
    x = jnp.transpose(x, (0, 1, 3, 5, 2, 4))
    return x.reshape(batch, grid[0] * grid[1], channels * PATCH**2)


def unpack_latents(tokens: Float[Array, "B S C"], size: tuple[int, int]) -> Float[Array, "B h w z"]:
    """Inverse of `pack_latents`; ``size`` is (height, width) in latent cells."""
    (batch, _, features), (height, width) = tokens.shape, size
    x = tokens.reshape(batch, height // PATCH, width // PATCH, features // PATCH**2, PATCH, PATCH)
    return jnp.transpose(x, (0, 1, 4, 2, 5, 3)).reshape(batch, height, width, -1)


def to_pixels(images: UInt8[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
    """Bytes to float32 pixels in [-1, 1]: ``x / 127.5 - 1``."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(pixels: Float[Array, "*b h w 3"]) -> UInt8[Array, "*b h w 3"]:
    """Pixels to bytes, clipped and rounded as in diffusers' image processor."""
    clipped = jnp.clip(pixels.astype(jnp.float32), -1.0, 1.0)
    return jnp.round(127.5 * (clipped + 1.0)).astype(jnp.uint8)
