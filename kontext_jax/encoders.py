"""Encoding of pixels and token ids into the transformer's inputs: `Batch` -> `Tokens`.

Used by training without cached latents, sampling and evaluation.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from kontext_jax.models import tiling
from kontext_jax.models.autoencoder import Autoencoder, pack_latents, to_pixels
from kontext_jax.models.clip import ClipText
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.types import Batch, Tokens


def encode_images(autoencoder: Autoencoder | None, batch: Batch) -> Float[Array, "B S C"]:
    """Clean latents of every image token; zero for padding.

    Images that are too large for a device are encoded in tiles (``models/tiling.py``). Batches with
    cached latents need no autoencoder.
    """
    if batch.latents is not None:
        return jnp.asarray(batch.latents, jnp.float32)
    latents = image_tokens(functools.partial(tiling.encode, autoencoder), batch)
    return jnp.where(batch.segments[:, :, None] > 0, latents, 0.0)


def image_tokens(
    encode: Callable[[Float[Array, "n h w 3"]], Float[Array, "n _ _ _"]], batch: Batch
) -> Float[Array, "B S C"]:
    """The tokens of ``encode(images)``, in the layout of the batch; arbitrary for padding.

    All images of one size are encoded as one dense array. Each token is then gathered from the
    encoded images of its row.
    """
    rows = batch.source.shape[0]
    encoded = []
    for key in sorted(batch.images):
        images = batch.images[key]
        flat = to_pixels(images.reshape(-1, *images.shape[2:]))
        tokens = pack_latents(encode(flat))
        encoded.append(tokens.reshape(rows, -1, tokens.shape[-1]))
    return jnp.take_along_axis(jnp.concatenate(encoded, axis=1), batch.source[:, :, None], axis=1)


def encode_text(text_encoder: T5Encoder, batch: Batch) -> Float[Array, "B L T"]:
    """Text tokens of the prompts."""
    return text_encoder(batch.text_ids, batch.text_segments)


def encode_clip(clip: ClipText, batch: Batch) -> Float[Array, "B N P"]:
    """CLIP's vector of each example's prompt, float32; zero for empty slots."""
    rows, examples, length = batch.clip_ids.shape
    pooled = clip(batch.clip_ids.reshape(rows * examples, length))
    pooled = pooled.astype(jnp.float32).reshape(rows, examples, -1)
    return jnp.where(batch.example_ids[:, :, None] >= 0, pooled, 0.0)


def to_tokens(
    batch: Batch,
    latents: Float[Array, "B S C"],
    text: Float[Array, "B L T"],
    pooled: Float[Array, "B N P"],
) -> Tokens:
    """Joins the encoders' outputs with the layout of the rows."""
    return Tokens(
        latents=latents,
        positions=batch.positions,
        segments=batch.segments,
        is_target=batch.is_target,
        offsets=batch.offsets,
        text=text,
        text_segments=batch.text_segments,
        pooled=pooled,
        example_ids=batch.example_ids,
    )
