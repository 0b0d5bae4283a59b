"""Images of a fixed set of examples: what sheets show and what metrics are computed on."""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from kontext_jax.data.packing import PackingConfig, Plan, Shape
from kontext_jax.data.pipeline import DataConfig, assemble, negatives, noise_id
from kontext_jax.data.text import Tokenizer
from kontext_jax.encoders import encode_images
from kontext_jax.geometry import num_tokens, size_of
from kontext_jax.models.autoencoder import Autoencoder, to_pixels, to_uint8, unpack_latents
from kontext_jax.objectives import Network
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.sharding import batch_sharding, num_batch_shards, over_batches
from kontext_jax.types import Batch, Example, RGBImage, unprompted

MAX_PIXELS = 2**21
"""Decoded at once by one part of the mesh: two images of a megapixel."""


class GeneratedBatch(NamedTuple):
    """What became of one batch.

    Attributes:
      number: of the batch.
      indices: of the examples in it.
      images: theirs.
      seconds: from the batch on the host to the images on the host.
      finite: whether all latents are numbers; of others the images show nothing.
    """

    number: int
    indices: list[int]
    images: list[RGBImage]
    seconds: float
    finite: bool


class Generator:
    """Samples the targets of given examples: packed, sharded over the mesh, with fixed noise.

    An example's image does not depend on the others, on the packing, or on the devices.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        data: DataConfig,
        objective: NetworksConfig,
        sampler: SamplerConfig,
        mesh: Mesh,
        seed: int = 0,
    ):
        """Packs the examples.

        Their targets' pixels are left out and only the sizes used, unless ``sampler.strength`` is
        below 1: then they are the images that sampling starts from.
        """
        self._mesh = mesh
        self._examples = list(examples) if sampler.strength < 1 else _blind(examples)
        self._batches, self._layouts = pack(self._examples, data, mesh, sampler.cfg_scale != 1.0)
        self._key = jax.random.key(seed)
        self._sampler, self._objective = sampler, objective
        # Of the module, so that generators of the same settings share what is compiled.
        self._latents, self._decode = _sample, _decode
        # A batch of the decoder holds the most images of its size that any batch of rows has.
        self._decoded_at_once: Counter = Counter()
        for layout in self._layouts:
            sizes = Counter(size_of(self._examples[i].target) for _, _, i in layout)
            self._decoded_at_once |= sizes
        for width, height in self._decoded_at_once:
            limit = max(1, MAX_PIXELS // (width * height)) * num_batch_shards(mesh)
            self._decoded_at_once[width, height] = min(self._decoded_at_once[width, height], limit)

    def __call__(self, networks: dict[str, Network]) -> list[RGBImage]:
        """An image for each example, in their order.

        Args:
          networks: all that the objective has, see ``flow_matching.networks_of``.
        """
        images: dict[int, RGBImage] = {}
        for made in self.batches(networks):
            images.update(zip(made.indices, made.images, strict=True))
        return [images[i] for i in range(len(self._examples))]

    def batches(
        self, networks: dict[str, Network], done: Container[int] = frozenset()
    ) -> Iterator[GeneratedBatch]:
        """Batch by batch, without those of which all examples are ``done``.

        Batches hold the same examples whatever is done, so that whoever stops and goes on gets the
        same images to the last bit.
        """
        for number, layout in enumerate(self._layouts):
            indices = [example for _, _, example in layout]
            if all(example in done for example in indices):
                continue
            batch = self._batches[number]
            began = time.perf_counter()
            latents = self._sample(networks, batch)
            tokens = [
                latents[row, (batch.segments[row] == segment) & batch.is_target[row]]
                for row, segment, _ in layout
            ]
            images = self._images(tokens, indices, networks["autoencoder"])
            seconds = time.perf_counter() - began
            finite = all(bool(np.isfinite(each).all()) for each in tokens)
            yield GeneratedBatch(number, indices, images, seconds, finite)

    def warm_up(self, networks: dict[str, Network]) -> float:
        """Compiles all that a call runs, on one batch; the seconds that took, its run included."""
        began = time.perf_counter()
        latents = self._sample(networks, self._batches[0])
        autoencoder = networks["autoencoder"]
        side = autoencoder.config.pixels_per_token
        for size in self._decoded_at_once:
            (first, *_) = (i for i, e in enumerate(self._examples) if size_of(e.target) == size)
            blank = np.zeros((num_tokens(size, side), latents.shape[-1]), latents.dtype)
            self._images([blank], [first], autoencoder)
        return time.perf_counter() - began

    def _sample(self, networks: dict[str, Network], batch: Batch) -> Float[np.ndarray, "B S C"]:
        """The latents of a batch."""
        with jax.set_mesh(self._mesh):
            on_device = jax.device_put(batch, batch_sharding(self._mesh))
            latents = self._latents(
                networks, on_device, self._key, sampler=self._sampler, objective=self._objective
            )
            return np.asarray(multihost_utils.process_allgather(latents, tiled=True))

    def _images(
        self,
        tokens: Sequence[Float[np.ndarray, "_ _"]],
        indices: Sequence[int],
        autoencoder: Autoencoder,
    ) -> list[RGBImage]:
        """Decodes the tokens of some examples."""
        sizes = [size_of(self._examples[i].target) for i in indices]
        return over_batches(
            lambda size, batch: self._decode(autoencoder, batch, size=size[::-1]),
            tokens,
            sizes,
            self._decoded_at_once,
            self._mesh,
        )


def _blind(examples: Sequence[Example]) -> list[Example]:
    """With empty targets, one of each size for all."""
    blanks = {example.target.shape: np.zeros_like(example.target) for example in examples}
    return [example._replace(target=blanks[example.target.shape]) for example in examples]


class Batches(Sequence):
    """The batches of some examples, each assembled when it is asked for."""

    def __init__(self, rows: Sequence[Sequence[int]], size: int, assembled):
        """``size`` rows are a batch; ``assembled(row)`` is one of them, without its row axis."""
        self._rows, self._size, self._assembled = rows, size, assembled

    def __len__(self) -> int:
        return len(self._rows) // self._size

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"There is no batch {number} of {len(self)}.")
        rows = self._rows[number * self._size :][: self._size]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *map(self._assembled, rows))

    def layout(self, number: int) -> list[tuple[int, int, int]]:
        """The (row, segment, example) of everything in a batch."""
        rows = self._rows[number * self._size :][: self._size]
        return [(r, s, i) for r, row in enumerate(rows) for s, i in enumerate(row, start=1)]


def with_room(data: DataConfig, examples: Sequence[Example]) -> DataConfig:
    """The settings, with rows as long as the largest of the examples, or longer.

    Rows of several examples keep the length they have, if that is enough.
    """
    side, packing = data.geometry.pixels_per_token, data.packing
    least = packing if packing.max_examples > 1 else PackingConfig(image_tokens=0, text_tokens=0)
    images = [(example.target, *example.contexts) for example in examples]
    sizes = [sum(num_tokens(size_of(image), side) for image in each) for each in images]
    texts = [len(example.text_ids) for example in examples]
    return dataclasses.replace(
        data,
        packing=dataclasses.replace(
            packing,
            image_tokens=max(least.image_tokens, *sizes),
            text_tokens=max(least.text_tokens, *texts),
        ),
    )


def pack(
    examples: Sequence[Example], data: DataConfig, mesh: Mesh, with_negatives: bool
) -> tuple[Batches, list[list[tuple[int, int, int]]]]:
    """Batches of full size, and for each the (row, segment, example) of everything in it.

    ``with_negatives`` puts empty prompts beside the examples' own.
    """
    shapes = [
        Shape(size_of(e.target), tuple(map(size_of, e.contexts)), len(e.text_ids)) for e in examples
    ]
    plan = Plan(shapes, [e.id for e in examples], data.packing, data.geometry, seed=0)
    rows = [plan[i][1] for i in range(plan.num_rows)]
    shards = num_batch_shards(mesh)
    size_of_batch = -(-min(data.batch_size, len(rows)) // shards) * shards
    rows += [[]] * (-len(rows) % size_of_batch)
    if with_negatives:
        tokenizer = Tokenizer(data.text)
        empty = dict(text_ids=tokenizer(""), clip_ids=tokenizer.clip(""))

    def assembled(row: list[int]) -> Batch:
        mine = [examples[i] for i in row]
        made = assemble(mine, [noise_id(e.id) for e in mine], plan.slots, data)
        return made.replace(negative=negatives(made, **empty)) if with_negatives else made

    batches = Batches(rows, size_of_batch, assembled)
    return batches, [batches.layout(i) for i in range(len(batches))]


@functools.partial(jax.jit, static_argnames=("sampler", "objective"))
def _sample(networks, batch, key, sampler, objective) -> Float[Array, "B S C"]:
    latents = encode_images(networks["autoencoder"], batch)
    tokens, negative = objective.tokens(networks, batch, latents), None
    if batch.negative is not None:
        negative = objective.tokens(networks, unprompted(batch), latents)
    return sample(networks["transformer"], tokens, key, sampler, objective.time, negative)


@functools.partial(jax.jit, static_argnames="size")
def _decode(
    autoencoder: Autoencoder, tokens: Float[Array, "B S C"], size: tuple[int, int]
) -> UInt8[Array, "B h w 3"]:
    cell = autoencoder.config.downsample
    latents = unpack_latents(tokens, (size[0] // cell, size[1] // cell))
    return to_uint8(autoencoder.decode(latents))


@jax.jit
def _reconstruct(autoencoder: Autoencoder, images: UInt8[Array, "B h w 3"]) -> Array:
    return to_uint8(autoencoder.decode(autoencoder.encode(to_pixels(images))))


def reconstruct(autoencoder: Autoencoder, images: Sequence[RGBImage], mesh: Mesh) -> list[RGBImage]:
    """Each image through the autoencoder, by the mean of its latents."""
    sizes = [size_of(image) for image in images]
    at_once = {
        (width, height): min(number, max(1, MAX_PIXELS // (width * height)))
        for (width, height), number in Counter(sizes).items()
    }
    return over_batches(
        lambda _, batch: _reconstruct(autoencoder, batch), images, sizes, at_once, mesh
    )
