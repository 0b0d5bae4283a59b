"""Encoding and decoding in overlapping tiles, for images that are too large for a device.

All tiles of an image have one size, so the network is compiled once; memory grows with the image
only by its pixels. Where tiles overlap, their outputs are blended linearly, as in diffusers'
``AutoencoderKL.enable_tiling``. The last tile of each row and column ends with the image and
overlaps its neighbour more; diffusers' is smaller instead.

The result is an approximation: a tile has its own statistics of GroupNorm and its own attention,
and its borders are padded with zeros. The difference depends on the weights: with random ones, the
tiny autoencoder's images of 256 pixels have a PSNR of 31 dB between tiles of half the side and
none, relative to their range.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kontext_jax.models.autoencoder import Autoencoder
from kontext_jax.settings import Settings, check_least
from kontext_jax.sharding import row_parts

MAX_PIXELS = 2**21
"""Most pixels that a device encodes or decodes at once: two images of a megapixel.

On meshes that split the rows of an image, this is a device's part of it.
"""


@dataclass(kw_only=True, unsafe_hash=True)
class TilingConfig(Settings):
    """Sizes of the tiles.

    Attributes:
      tile: side of a tile, in latent cells; the default is 1024 pixels of FLUX.1's autoencoder.
      overlap: cells that neighbouring tiles share, and over which they are blended.
    """

    tile: int = 128
    overlap: int = 32

    def __post_init__(self):
        check_least(self, overlap=1)
        if self.overlap >= self.tile:
            raise ValueError(f"overlap {self.overlap} must be smaller than tile {self.tile}.")


def encode(autoencoder: Autoencoder, images: Float[Array, "B _ _ 3"]) -> Float[Array, "B h w z"]:
    """`Autoencoder.encode`, in tiles if a device has more than `MAX_PIXELS` of an image."""
    if _is_large(images.shape):
        return tiled_encode(autoencoder, images, TilingConfig())
    return autoencoder.encode(images)


def decode(autoencoder: Autoencoder, latents: Float[Array, "B h w z"]) -> Float[Array, "B _ _ 3"]:
    """`Autoencoder.decode`, in tiles if a device has more than `MAX_PIXELS` of an image."""
    (batch, height, width, _), cell = latents.shape, autoencoder.config.downsample
    if _is_large((batch, cell * height, cell * width, 3)):
        return tiled_decode(autoencoder, latents, TilingConfig())
    return autoencoder.decode(latents)


def _is_large(shape: tuple[int, ...]) -> bool:
    return math.prod(shape[1:3]) > MAX_PIXELS * row_parts(shape)


def tiled_encode(
    autoencoder: Autoencoder, images: Float[Array, "B _ _ 3"], config: TilingConfig
) -> Float[Array, "B h w z"]:
    """Scaled latents, float32: the blended means of the tiles.

    Raises:
      ValueError: the sides of the images are not multiples of `downsample`, or the latents are
        discrete, which cannot be blended.
    """
    if autoencoder.config.is_discrete:
        raise ValueError(
            f"Images of more than {MAX_PIXELS} pixels are encoded in tiles, whose discrete latents "
            "cannot be blended: use smaller images."
        )
    autoencoder.config.check_size(*images.shape[1:3])
    return _blended(autoencoder.encode, images, config, autoencoder.config.downsample, 1)


def tiled_decode(
    autoencoder: Autoencoder, latents: Float[Array, "B h w z"], config: TilingConfig
) -> Float[Array, "B _ _ 3"]:
    """Float32 images of scaled latents; pixels may lie slightly outside [-1, 1]."""
    return _blended(autoencoder.decode, latents, config, 1, autoencoder.config.downsample)


def _blended(
    function: Callable[[Float[Array, "B _ _ i"]], Float[Array, "B _ _ o"]],
    x: Float[Array, "B _ _ i"],
    config: TilingConfig,
    inputs: int,
    outputs: int,
) -> Float[Array, "B _ _ o"]:
    """``function`` of ``x``, tile by tile; a cell has ``inputs`` rows of x, ``outputs`` of it."""
    cells = [side // inputs for side in x.shape[1:3]]
    height, width = (min(config.tile, side) for side in cells)
    top, row_weights = tiles(cells[0], height, config.overlap, outputs)
    left, column_weights = tiles(cells[1], width, config.overlap, outputs)
    tile_shape = (len(x), inputs * height, inputs * width, x.shape[3])
    channels = jax.eval_shape(function, jax.ShapeDtypeStruct(tile_shape, x.dtype)).shape[3]

    def add(canvas, tile):
        top, left, row_weights, column_weights = tile
        cut = jax.lax.dynamic_slice(x, (0, inputs * top, inputs * left, 0), tile_shape)
        weighted = row_weights[None, :, None, None] * column_weights[None, None, :, None]
        weighted = weighted * function(cut)
        corner = (0, outputs * top, outputs * left, 0)
        below = jax.lax.dynamic_slice(canvas, corner, weighted.shape)
        return jax.lax.dynamic_update_slice(canvas, below + weighted, corner), None

    pairs = np.indices((len(top), len(left))).reshape(2, -1)
    grid = (top[pairs[0]], left[pairs[1]], row_weights[pairs[0]], column_weights[pairs[1]])
    canvas = jnp.zeros((len(x), outputs * cells[0], outputs * cells[1], channels), jnp.float32)
    return jax.lax.scan(add, canvas, jax.tree.map(jnp.asarray, grid))[0]


def tiles(length: int, tile: int, overlap: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles along an axis of ``length`` cells: (first cell of each, weights of its outputs).

    A tile's weights rise linearly from 0 over the overlap with the tile before, and fall over that
    with the next. At every place the weights of all tiles add up to 1.

    Returns:
      Integers [n] and float32 weights [n, outputs * tile].
    """
    stride = max(1, tile - overlap)
    number = 1 + -(-(length - tile) // stride)
    first = np.minimum(stride * np.arange(number), length - tile).astype(np.int32)
    size, fade = outputs * tile, outputs * overlap
    rise = np.minimum(1.0, np.arange(size) / fade)
    weights = np.ones((number, size))
    weights[1:] *= rise
    weights[:-1] *= np.minimum(1.0, np.arange(size, 0, -1) / fade)
    places = outputs * first[:, None] + np.arange(size)
    total = np.bincount(places.ravel(), weights.ravel())
    return first, (weights / total[places]).astype(np.float32)
