"""Features of images from frozen networks: maps for discriminators, and a vector for metrics.

A feature network (`models/dino.py`, `models/efficientnet.py`) maps images of any size to
`Features`. It resizes and standardises them itself, differentiably, so that training through it or
measuring with it needs no preprocessing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, UInt8

from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.sharding import over_batches


class Features(NamedTuple):
    """Features of a batch of images.

    Attributes:
      maps: feature maps from the first layers to the last; sizes and channels may differ.
      pooled: one vector per image.
    """

    maps: tuple[Float[Array, "B _ _ _"], ...]
    pooled: Float[Array, "B D"]


def check_taps(taps: Sequence[int], num_blocks: int) -> None:
    """Checks the indices of the blocks whose outputs are feature maps.

    Raises:
      ValueError: an index is out of range, or they do not ascend.
    """
    if list(taps) != sorted(set(taps) & set(range(num_blocks))):
        raise ValueError(
            f"taps {tuple(taps)} must be ascending indices of blocks, from 0 to {num_blocks - 1}."
        )


def standardise(
    images: Float[Array, "B h w 3"], size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "B s s 3"]:
    """Resizes images to ``size`` x ``size`` pixels and standardises their colours.

    The aspect ratio is not preserved, as usual for Frechet distances. Resizing is bicubic with
    antialiasing, like Pillow's (arXiv 2104.11222 explains why).

    Args:
      images: pixels in [-1, 1].
      size: height and width of the result, in pixels.
      mean, std: statistics of the network's training images, for colours in [0, 1].

    Returns:
      float32 images.
    """
    square = (images.shape[0], size, size, 3)
    x = jax.image.resize(images.astype(jnp.float32), square, "cubic")
    mean, std = (np.asarray(colour, np.float32).reshape(1, 1, 1, 3) for colour in (mean, std))
    return (0.5 * (x + 1.0) - mean) / std


def pooled_features(
    network: Callable[[Float[Array, "B h w 3"]], Features],
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    mesh: Mesh,
    batch_size: int = 64,
) -> Float32[np.ndarray, "N D"]:
    """The pooled vector of each image, in order, with matmuls in full float32 precision.

    Args:
      network: a feature network on the mesh.
      images: images of any sizes; each size compiles once.
      mesh: mesh over which batches are split.
      batch_size: images per batch; more if the mesh has more shards.

    Raises:
      ValueError: there are no images.
    """
    if not images:
        raise ValueError("There are no images to compute features of.")
    shapes = [image.shape for image in images]
    sizes = {shape: min(batch_size, count) for shape, count in Counter(shapes).items()}
    vectors = over_batches(lambda _, batch: _pooled(network, batch), images, shapes, sizes, mesh)
    return np.stack(vectors)


@jax.jit
def _pooled(network, images: UInt8[Array, "B h w 3"]) -> Float32[Array, "B D"]:
    with jax.default_matmul_precision("highest"):
        return network(to_pixels(images)).pooled.astype(jnp.float32)
