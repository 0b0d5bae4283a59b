"""Mean and variance of an autoencoder's latents, which the transformer's scale and shift undo.

FLUX.1's own scale and shift (0.3611, 0.1159) are these statistics of its autoencoder.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from kontext_jax.config import Config
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.data.sources import CorruptRecordError, TripleSource
from kontext_jax.geometry import size_of
from kontext_jax.models.autoencoder import Autoencoder, kl_divergence, to_pixels
from kontext_jax.sampling.generator import over_images
from kontext_jax.types import RGBImage

NUM_IMAGES = 256

LatentStatistics = dict[str, Any]


def make_latent_statistics(config: Config, mesh: Mesh) -> Callable[[Autoencoder], LatentStatistics]:
    """A function from an autoencoder to the statistics of its latents, before scale and shift.

    "mean" and "square" (the mean of squares) are those of all channels together; "channels" has for
    each channel its "mean", "std" and "kurtosis" (3 for a normal distribution), and "kl", the mean
    KL divergence of its posterior from N(0, 1). A channel with a KL near 0 carries no information.

    Discrete latents also have "codes": their "number", the share of them that is "used", and the
    "perplexity" of their distribution, which is the number of codes if all are equally frequent.

    They are measured on the targets of `NUM_IMAGES` training examples, spread evenly over the data
    set and the same throughout a run, on the means of the posteriors. Every latent value has the
    same weight. Unreadable records are left out.
    """
    source = TripleSource(config.data.path, config.data.split)
    triples = []
    for i in source.spread(NUM_IMAGES):
        with suppress(CorruptRecordError):
            triples.append(source[i])
    images = [example.target for example in prepare_all(triples, config.data)]
    areas = [math.prod(size_of(image)) for image in images]

    def statistics(autoencoder: Autoencoder) -> LatentStatistics:
        per_image = over_images(lambda batch: _moments(autoencoder, batch), images, mesh)
        moments = np.average(np.asarray(per_image, np.float64), axis=0, weights=areas)
        mean, square, cube, fourth, kl = moments
        variance = square - mean**2
        central = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        channels = {
            "mean": mean,
            "std": np.sqrt(variance),
            "kurtosis": central / np.maximum(variance, np.finfo(np.float32).tiny) ** 2,
            "kl": kl,
        }
        result: LatentStatistics = {
            "mean": float(mean.mean()),
            "square": float(square.mean()),
            "channels": {name: values.tolist() for name, values in channels.items()},
        }
        if autoencoder.config.is_discrete:
            result["codes"] = measure_codes(autoencoder, images, mesh)
        return result

    return statistics


def measure_codes(
    autoencoder: Autoencoder, images: Sequence[RGBImage], mesh: Mesh
) -> dict[str, int | float]:
    """The `code_usage` of discrete latents on images whose sides are multiples of a cell."""
    codes = over_images(lambda batch: _codes(autoencoder, batch), images, mesh)
    codes = np.concatenate([x.ravel() for x in codes])
    return code_usage(codes, autoencoder.config.num_codes)


def code_usage(codes: Int[np.ndarray, " N"], number: int) -> dict[str, int | float]:
    """The share of ``number`` codes that occur, and the perplexity of their distribution."""
    counts = np.bincount(codes, minlength=number)
    shares = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-np.sum(shares * np.log(shares)))
    return {"number": number, "used": len(shares) / number, "perplexity": float(perplexity)}


@jax.jit
def _codes(autoencoder: Autoencoder, images: UInt8[Array, "B h w 3"]) -> Int[Array, "B _ _"]:
    return autoencoder.codes(to_pixels(images))


@jax.jit
def _moments(autoencoder: Autoencoder, images: UInt8[Array, "B h w 3"]) -> Float[Array, "B 5 z"]:
    """The first four moments of each image's latents by channel, and their KL divergence."""
    mean, logvar = autoencoder.moments(to_pixels(images))
    terms = [*(mean**power for power in (1, 2, 3, 4)), kl_divergence(mean, logvar)]
    return jnp.stack([jnp.mean(x, axis=(1, 2)) for x in terms], axis=1)
