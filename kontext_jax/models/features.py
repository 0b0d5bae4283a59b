"""What frozen networks see in images: maps for discriminators, and a vector for statistics.

A feature network (`models/dino.py`, `models/efficientnet.py`) is called with images of any size and
gives `Features`. It brings them to its own size and scale itself, differentiably, so that whoever
trains through it or measures with it has nothing to prepare.
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
    """What a feature network gives for a batch of images.

    Attributes:
      maps: feature maps, from the first layers to the last, each of its own size and width.
      pooled: one vector an image.
    """

    maps: tuple[Float[Array, "B _ _ _"], ...]
    pooled: Float[Array, "B D"]


def check_taps(taps: Sequence[int], num_blocks: int) -> None:
    """Refuses maps of blocks that there are not.

    Raises:
      ValueError: they are none, or not in rising order.
    """
    if list(taps) != sorted(set(taps) & set(range(num_blocks))):
        raise ValueError(
            f"taps {tuple(taps)} must be numbers of blocks, 0 to {num_blocks - 1}, in rising order."
        )


def standardise(
    images: Float[Array, "B h w 3"], size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "B s s 3"]:
    """Images as a network was trained on them: ``size`` pixels square, of this mean and deviation.

    The proportions of images that are not square are lost, as usual in Frechet distances. Resizing
    is bicubic and smooths before it shrinks, as Pillow does (arXiv 2104.11222 tells why).

    Args:
      images: pixels in [-1, 1].
      size: in pixels.
      mean, std: of the colours of the images that it was trained on, in [0, 1].

    Returns:
      float32.
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
    """The pooled vector of each image, in their order; products of matrices are exact.

    Args:
      network: a feature network on the mesh.
      images: of any sizes; each size compiles once.
      mesh: over which batches are split.
      batch_size: images computed at once; more, if the mesh has more parts.

    Raises:
      ValueError: there are no images.
    """
    if not images:
        raise ValueError("There are no images to compute features of.")
    shapes = [image.shape for image in images]
    sizes = {shape: min(batch_size, number) for shape, number in Counter(shapes).items()}
    found = over_batches(lambda _, batch: _pooled(network, batch), images, shapes, sizes, mesh)
    return np.stack(found)


@jax.jit
def _pooled(network, images: UInt8[Array, "B h w 3"]) -> Float32[Array, "B D"]:
    with jax.default_matmul_precision("highest"):
        return network(to_pixels(images)).pooled.astype(jnp.float32)
