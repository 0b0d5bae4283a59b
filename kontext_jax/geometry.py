"""Image geometry: which size an image gets, how it is resized, and where its tokens sit.

Training, evaluation, sampling and export share this module. Most edits that come out shifted or
zoomed are due to two resize rules that differ.

Sizes are (width, height) in pixels, as in FLUX's list; grids are (rows, columns) in tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from kontext_jax.settings import Settings, check_choices

Size = tuple[int, int]

MAX_POSITION = 2048
"""Exclusive limit of positions, the length of rotary tables: 32,768 pixels at 16 per token."""

KONTEXT_SIZES: tuple[Size, ...] = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""FLUX.1 Kontext's preferred sizes, about one megapixel each (BFL ``util.py``)."""

POSITION_SCHEMES = ("offset", "index")


@dataclass(kw_only=True, unsafe_hash=True)
class GeometryConfig(Settings):
    """Settings of the geometry; stored in every checkpoint.

    Attributes:
      sizes: allowed sizes; every target and context is resized to its own nearest one.
      pixels_per_token: side of a token: the autoencoder's downsampling times the 2 x 2 patch.
      position_scheme: how contexts are positioned, see `position_ids`.
    """

    sizes: tuple[Size, ...] = KONTEXT_SIZES
    pixels_per_token: int = 16
    position_scheme: str = "offset"

    def __post_init__(self):
        self.sizes = tuple(tuple(size) for size in self.sizes)
        if not self.sizes:
            raise ValueError("geometry.sizes is empty; give at least one (width, height).")
        for width, height in self.sizes:
            if width % self.pixels_per_token or height % self.pixels_per_token:
                raise ValueError(
                    f"Size {width}x{height} is not a multiple of {self.pixels_per_token} pixels "
                    "(geometry.pixels_per_token)."
                )
        check_choices(self, position_scheme=POSITION_SCHEMES)


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size of nearest aspect ratio (BFL's rule); ties go to the nearest area, then width."""
    aspect, log_area = width / height, math.log(width * height)
    return min(
        sizes,
        key=lambda size: (
            abs(aspect - size[0] / size[1]),
            abs(log_area - math.log(size[0] * size[1])),
            size,
        ),
    )


def resize(image: UInt8[np.ndarray, "_ _ 3"], size: Size) -> UInt8[np.ndarray, "_ _ 3"]:
    """Resizes without cropping, by Lanczos (BFL's rule); returns an image of that size as it is."""
    if size_of(image) == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def size_of(image: UInt8[np.ndarray, "_ _ 3"]) -> Size:
    """(width, height) of an image."""
    return image.shape[1], image.shape[0]


def fit(image: UInt8[np.ndarray, "_ _ 3"], sizes: Sequence[Size]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Resizes an image to its nearest size; applied to every image before encoding."""
    return resize(image, nearest_size(*size_of(image), sizes))


def whole_cells(image: UInt8[np.ndarray, "_ _ 3"], side: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """Resizes an image to the nearest size whose sides are multiples of ``side`` pixels."""
    width, height = (side * max(1, round(length / side)) for length in size_of(image))
    return resize(image, (width, height))


def grid(size: Size, pixels_per_token: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens."""
    return size[1] // pixels_per_token, size[0] // pixels_per_token


def num_tokens(size: Size, pixels_per_token: int) -> int:
    """Number of tokens of an image."""
    return math.prod(grid(size, pixels_per_token))


def position_ids(
    target: Size, contexts: Sequence[Size], config: GeometryConfig
) -> Int[np.ndarray, "s 3"]:
    """(image index, row, column) of the target's tokens, then of each context's, in raster order.

    The target has image index 0. Contexts are placed by ``config.position_scheme``:
      offset: all contexts have index 1 and tile one plane. Each goes beside or below the previous
        ones, whichever keeps the plane closer to square. ComfyUI does this, and the released
        Kontext tolerates it.
      index: the i-th context has index i, and its rows and columns start at 0.

    Raises:
      ValueError: a position exceeds the rotary tables.
    """
    grids = [grid(size, config.pixels_per_token) for size in contexts]
    ids = [_raster(grid(target, config.pixels_per_token), (0, 0, 0))]
    plane_rows = plane_columns = 0
    for i, (rows, columns) in enumerate(grids, start=1):
        if config.position_scheme == "index":
            ids.append(_raster((rows, columns), (i, 0, 0)))
            continue
        beside = rows + plane_rows > columns + plane_columns
        row, column = (0, plane_columns) if beside else (plane_rows, 0)
        ids.append(_raster((rows, columns), (1, row, column)))
        plane_rows = max(plane_rows, row + rows)
        plane_columns = max(plane_columns, column + columns)
    positions = np.concatenate(ids)
    if positions.max() >= MAX_POSITION:
        raise ValueError(
            f"Position {positions.max()} is beyond {MAX_POSITION - 1}, the last entry of the "
            "rotary tables: use smaller or fewer images."
        )
    return positions


def _raster(shape: tuple[int, int], start: tuple[int, int, int]) -> Int[np.ndarray, "s 3"]:
    index, row, column = start
    rows, columns = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    ids = np.stack([np.full(shape, index), rows + row, columns + column], axis=-1)
    return ids.reshape(-1, 3).astype(np.int32)
