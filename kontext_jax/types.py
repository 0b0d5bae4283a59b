"""Types that pass between stages, and the legend of the letters in shape annotations.

Data flow::

    Triple -> Example -> Batch (packed) -> Tokens -> loss(player) -> TrainState
     host      host      host -> device    device     objective      sharded step

Shape legend: B rows, S image tokens per row, L text tokens per row, N examples per row, M image
slots per row, Q CLIP tokens of a prompt (77 in FLUX; 0 without CLIP), C channels of a token (64 in
FLUX), T channels of a text token, P channels of the pooled text vector, D width, H heads, K
channels of a head, A position axes (3: image index, row, column), h w pixels.

A *row* is one sequence of the transformer. It holds up to N examples, separated by *segments*:
token s belongs to example ``segments[s] - 1`` of its row, and 0 marks padding. A batch of
unpacked images is the case N = 1, not a separate code path.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

RGBImage = UInt8[np.ndarray, "_ _ 3"]
"""An image on the host: height, width, RGB."""

CATEGORIES = ("local", "global", "text", "character", "style", "text_to_image")
"""The five edit categories of KontextBench, and text-to-image."""


class Triple(NamedTuple):
    """One example: ``target`` results from applying ``prompt`` to ``contexts``.

    Attributes:
      id: unique in the data set and stable; keys all caches.
      target: the image to generate.
      contexts: input images, possibly of different sizes; empty for text-to-image.
      prompt: the instruction; without contexts, the caption of the target.
      category: one of ``CATEGORIES``.
      details: JSON facts about the target, written by the data set's builder for its checker.
    """

    id: str
    target: UInt8[np.ndarray, "h w 3"]
    contexts: tuple[UInt8[np.ndarray, "_ _ 3"], ...]
    prompt: str
    category: str
    details: str = "{}"


class Task(NamedTuple):
    """One image for an evaluation to generate, and the information it is judged by.

    Attributes:
      id: unique in the evaluation set and stable.
      contexts: input images at their stored sizes; empty for text-to-image.
      prompt: the instruction or caption.
      category: one of ``CATEGORIES``.
      size: requested (width, height); a model generates the nearest size it supports.
      truth: the reference image, if there is one.
      group: label shared by tasks that use the same image or session and so are not independent;
        confidence intervals resample groups.
      turn: position in a multi-turn session, from 1.
      follows: id of the task of the previous turn. Its *generated* image replaces ``contexts[0]``,
        and the stored ``contexts[0]`` is the session's first image, for comparison. Empty if the
        stored context is used.
      source_caption: caption of the first context.
      target_caption: caption of the reference image.
      words: text that should be written in the image.
      details: JSON for the data set's checker.
    """

    id: str
    contexts: tuple[UInt8[np.ndarray, "_ _ 3"], ...]
    prompt: str
    category: str
    size: tuple[int, int]
    truth: UInt8[np.ndarray, "_ _ 3"] | None = None
    group: str = ""
    turn: int = 1
    follows: str = ""
    source_caption: str = ""
    target_caption: str = ""
    words: str = ""
    details: str = "{}"


class Latents(NamedTuple):
    """Latent tokens of one image; ``size`` is (width, height) in pixels."""

    size: tuple[int, int]
    tokens: Float[np.ndarray, "s C"]


class Example(NamedTuple):
    """A triple ready for packing: images at their bucket's sizes and a tokenised prompt.

    The images are either all pixels or all latents. ``text_ids`` are for T5, ``clip_ids`` for CLIP;
    ``clip_ids`` is empty if no network reads it.
    """

    id: str
    target: UInt8[np.ndarray, "h w 3"] | Latents
    contexts: tuple[UInt8[np.ndarray, "_ _ 3"] | Latents, ...]
    text_ids: Int[np.ndarray, " l"]
    clip_ids: Int[np.ndarray, " q"] = np.zeros(0, np.int32)


@no_type_check  # see `Batch`
@struct.dataclass
class Prompts:
    """The prompts of a batch; fields as in `Batch`."""

    text_ids: Int[Array | np.ndarray, "B L"]
    text_segments: Int[Array | np.ndarray, "B L"]
    clip_ids: Int[Array | np.ndarray, "B N Q"]


@no_type_check  # the same tree structure also holds shapes, shardings and microbatches
@struct.dataclass
class Batch:
    """What the loader yields. Every shape is static; the row axis is first in every leaf.

    Images are either pixels, encoded later by the autoencoder, or ``latents``. With latents,
    ``images`` and ``image_segments`` are empty and ``source`` is 0.

    Attributes:
      images: pixels grouped by size, key "HxW", so that encoders see dense arrays.
      image_segments: segment of each slot of ``images``; 0 = empty slot.
      source: index of each token among the row's encoded tokens, which are numbered through all
        slots of all sizes, sizes in sorted order of their keys; 0 where ``segments`` is 0.
      positions: (image index, row, column) of each token, see ``geometry``.
      segments: example of each token, counted from 1; 0 = padding.
      is_target: True for tokens of the target; only these get noise and loss.
      offsets: index of each token within its example; keys the noise together with
        ``example_ids``.
      text_ids: T5 token ids of the row's prompts, concatenated.
      text_segments: example of each text token, counted from 1; 0 = padding.
      clip_ids: CLIP token ids of each example's prompt; 0 = no example in this place.
      example_ids: global index of each example, below 2**31; -1 = no example in this place.
      skipped: number of examples left out of the row because their record could not be read.
      latents: clean latents of all image tokens, 0 at padding; None if the images are pixels.
      negative: the same rows with every prompt empty; None unless requested. See `unprompted`.
    """

    images: dict[str, UInt8[Array | np.ndarray, "B M _ _ 3"]]
    image_segments: dict[str, Int[Array | np.ndarray, "B M"]]
    source: Int[Array | np.ndarray, "B S"]
    positions: Int[Array | np.ndarray, "B S A"]
    segments: Int[Array | np.ndarray, "B S"]
    is_target: Bool[Array | np.ndarray, "B S"]
    offsets: Int[Array | np.ndarray, "B S"]
    text_ids: Int[Array | np.ndarray, "B L"]
    text_segments: Int[Array | np.ndarray, "B L"]
    clip_ids: Int[Array | np.ndarray, "B N Q"]
    example_ids: Int[Array | np.ndarray, "B N"]
    skipped: Int[Array | np.ndarray, " B"]
    latents: Float[Array | np.ndarray, "B S C"] | None = None
    negative: Prompts | None = None


def unprompted(batch: Batch) -> Batch:
    """The batch with every prompt empty, as classifier-free guidance needs it.

    Raises:
      ValueError: the batch has no ``negative``.
    """
    if batch.negative is None:
        raise ValueError("The batch carries no empty prompts: set data.negatives=true.")
    return batch.replace(
        text_ids=batch.negative.text_ids,
        text_segments=batch.negative.text_segments,
        clip_ids=batch.negative.clip_ids,
        negative=None,
    )


@no_type_check  # see `Batch`
@struct.dataclass
class Tokens:
    """Input of the transformer, the objectives and the sampler.

    ``latents`` are clean, ``text`` is the text encoder's output sequence, and ``pooled`` is one
    vector per example. The other fields are those of `Batch`.
    """

    latents: Float[Array, "B S C"]
    positions: Int[Array, "B S A"]
    segments: Int[Array, "B S"]
    is_target: Bool[Array, "B S"]
    offsets: Int[Array, "B S"]
    text: Float[Array, "B L T"]
    text_segments: Int[Array, "B L"]
    pooled: Float[Array, "B N P"]
    example_ids: Int[Array, "B N"]


Metrics = dict[str, Shaped[Array, ""]]
"""Scalars to log, by name."""
