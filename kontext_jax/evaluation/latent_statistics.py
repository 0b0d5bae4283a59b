"""Mean and variance of an autoencoder's latents, which the transformer's scale and shift undo.

FLUX.1's own scale and shift (0.3611, 0.1159) are these statistics of its autoencoder.
"""

import math
from collections.abc import Callable
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from kontext_jax.config import Config
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.data.sources import CorruptRecordError, TripleSource
from kontext_jax.geometry import size_of
from kontext_jax.models.autoencoder import Autoencoder, to_pixels
from kontext_jax.sampling.generator import over_images

NUM_IMAGES = 256


def make_latent_statistics(config: Config, mesh: Mesh) -> Callable[[Autoencoder], dict[str, float]]:
    """A function from an autoencoder to the "mean" and "square" (mean of squares) of its latents.

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

    def statistics(autoencoder: Autoencoder) -> dict[str, float]:
        moments = over_images(lambda batch: _moments(autoencoder, batch), images, mesh)
        mean, square = np.average(np.asarray(moments, np.float64), axis=0, weights=areas)
        return {"mean": float(mean), "square": float(square)}

    return statistics


@jax.jit
def _moments(autoencoder: Autoencoder, images: UInt8[Array, "B h w 3"]) -> Float[Array, "B 2"]:
    """The mean and the mean square of each image's latents."""
    mean, _ = autoencoder.moments(to_pixels(images))
    values = mean.astype(jnp.float32).reshape(len(images), -1)
    return jnp.stack([jnp.mean(values, axis=1), jnp.mean(jnp.square(values), axis=1)], axis=1)
