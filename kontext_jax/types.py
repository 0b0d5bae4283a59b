"""The types that pass from stage to stage, and the letters used in every shape annotation.

Path of the data::

    Triple -> Example -> Batch (packed) -> Tokens -> loss(player) -> TrainState
     host      host      host -> device    device     objective      sharded step

Shape legend: B rows, S image tokens per row, L text tokens per row, N examples per row, M image
slots per row, Q CLIP tokens of a prompt (77 in FLUX; 0 without CLIP), C channels of a token (64 in
FLUX), T channels of a text token, P channels of the pooled text vector, D width, H heads, K
channels of a head, A position axes (3: image index, row, column), h w pixels.

A *row* is one sequence of the transformer. It holds up to N examples, told apart by *segments*:
token s belongs to example ``segments[s] - 1`` of its row, and 0 marks padding. A batch of
unpacked images is the case N = 1, not another code path.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

RGBImage = UInt8[np.ndarray, "_ _ 3"]
"""An image on the host: height, width, RGB."""

CATEGORIES = ("local", "global", "text", "character", "style", "text_to_image")
"""KontextBench's five kinds of edit, and images made from text alone."""


class Triple(NamedTuple):
    """One relational example: make ``target`` from ``contexts`` by following ``prompt``.

    Attributes:
      id: stable and unique within the data set; everything cached is keyed by it.
      target: the image to make.
      contexts: images to start from, each of its own size; empty for text-to-image.
      prompt: the instruction, or the caption of the image where there is no context.
      category: one of ``CATEGORIES``.
      details: JSON of what the builder knows of the truth; its own checker reads it.
    """

    id: str
    target: UInt8[np.ndarray, "h w 3"]
    contexts: tuple[UInt8[np.ndarray, "_ _ 3"], ...]
    prompt: str
    category: str
    details: str = "{}"


class Task(NamedTuple):
    """One picture that an evaluation asks for, and what it is judged by.

    Attributes:
      id: stable and unique within its set.
      contexts: images to start from, as they are stored; empty for text-to-image.
      prompt: the instruction or caption.
      category: one of ``CATEGORIES``.
      size: (width, height) of the picture that is asked for; a model makes the nearest it can.
      truth: the right picture, where one is known.
      group: tasks of one group share an image or a session, and are not independent: intervals of
        confidence draw groups.
      turn: 1, or the place of the task in a session of several turns.
      follows: id of the task of the turn before, whose *made* picture then takes the place of
        ``contexts[0]``; what is stored there is the session's first image, to compare with. Empty
        where the stored context is used.
      source_caption, target_caption: what the first context and the right picture show.
      words: what the picture should have written on it.
      details: JSON of what the data set's own checker reads.
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
    """What an autoencoder makes of an image of ``size``, (width, height) in pixels: its tokens."""

    size: tuple[int, int]
    tokens: Float[np.ndarray, "s C"]


class Example(NamedTuple):
    """A triple brought to its bucket's sizes, with its prompt as token ids: ready to be packed.

    Its images are pixels, or all of them latents. ``text_ids`` are T5's, ``clip_ids`` CLIP's;
    these are empty where no network reads them.
    """

    id: str
    target: UInt8[np.ndarray, "h w 3"] | Latents
    contexts: tuple[UInt8[np.ndarray, "_ _ 3"] | Latents, ...]
    text_ids: Int[np.ndarray, " l"]
    clip_ids: Int[np.ndarray, " q"] = np.zeros(0, np.int32)


@no_type_check  # see `Batch`
@struct.dataclass
class Prompts:
    """The text of a batch, without its images: the fields of `Batch` of the same names."""

    text_ids: Int[Array | np.ndarray, "B L"]
    text_segments: Int[Array | np.ndarray, "B L"]
    clip_ids: Int[Array | np.ndarray, "B N Q"]


@no_type_check  # trees of its structure also hold shapes, shardings, microbatches
@struct.dataclass
class Batch:
    """What the loader yields. Every shape is static; every leaf has the row axis first.

    Its images are pixels, which an autoencoder has yet to encode, or ``latents``: then ``images``
    and ``image_segments`` are empty, and ``source`` is 0.

    Attributes:
      images: pixels grouped by size, key "HxW", so that encoders see dense arrays.
      image_segments: for each slot of ``images``, the segment it belongs to; 0 = empty slot.
      source: which encoded token fills each place of the row, counting through all slots of all
        sizes, sizes in sorted order of their keys; 0 where ``segments`` is 0.
      positions: (image index, row, column) of each token, see ``geometry``.
      segments: example of each token, counted from 1; 0 = padding.
      is_target: tokens of the image to make; noise and loss apply to these only.
      offsets: index of the token within its example; with ``example_ids`` it keys the noise.
      text_ids: the prompts of the row, one after the other.
      text_segments: example of each text token, counted from 1; 0 = padding.
      clip_ids: each example's prompt once more, as CLIP's ids; 0 = no example in this place.
      example_ids: global index of each example, below 2**31; -1 = no example in this place.
      skipped: examples of the row left out because their record could not be read.
      latents: clean latents of every image token, 0 at padding; None where there are pixels.
      negative: the same rows with every prompt empty; None unless asked for. See `unprompted`.
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
    """The batch with every prompt empty: what classifier-free guidance moves away from.

    Raises:
      ValueError: the batch carries no empty prompts.
    """
    if batch.negative is None:
        raise ValueError("The batch carries no empty prompts: set data.negatives=true.")
    return batch.replace(
        text_ids=batch.negative.text_ids,
        text_segments=batch.negative.text_segments,
        clip_ids=batch.negative.clip_ids,
        negative=None,
    )


@no_type_check  # as of `Batch`
@struct.dataclass
class Tokens:
    """What the transformer, the objectives and the sampler consume.

    ``latents`` are clean; ``text`` is the encoder's sequence and ``pooled`` one vector an example.
    The other fields are those of `Batch`.
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
