"""Generates the images of a fixed set of examples, for sheets and metrics."""

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, assemble, empty_prompts, noise_id
from kontext_jax.data.plan import Plan
from kontext_jax.data.shapes import Shape
from kontext_jax.data.text import Tokenizer
from kontext_jax.encoders import encode_images
from kontext_jax.geometry import Size, num_tokens, size_of
from kontext_jax.models import tiling
from kontext_jax.models.autoencoder import Autoencoder, to_pixels, to_uint8, unpack_latents
from kontext_jax.objectives import Network
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.sharding import batch_sharding, num_batch_shards, over_batches
from kontext_jax.types import Batch, Example, RGBImage, unprompted


class GeneratedBatch(NamedTuple):
    """The images of one batch.

    Attributes:
      number: index of the batch.
      indices: indices of its examples.
      images: one image per example.
      seconds: time from the batch on the host to the images on the host.
      finite: whether all latents are finite; if not, the images are meaningless.
    """

    number: int
    indices: list[int]
    images: list[RGBImage]
    seconds: float
    finite: bool


class Generator:
    """Samples the targets of given examples: packed, sharded over the mesh, with fixed noise.

    An example's image does not depend on the other examples, the packing or the devices.
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

        Only the sizes of their targets are used, unless ``sampler.strength`` is below 1: then
        sampling starts from the targets.
        """
        self._mesh = mesh
        self._examples = list(examples) if sampler.strength < 1 else _blank_targets(examples)
        self._batches, self._layouts = pack(self._examples, data, mesh, sampler.cfg_scale != 1.0)
        self._key = jax.random.key(seed)
        self._sampler, self._objective = sampler, objective
        # Module-level functions, so that generators with equal settings share compiled programs.
        self._latents, self._decode = _sample, _decode
        most: Counter = Counter()  # images of each size in any one batch
        for layout in self._layouts:
            most |= Counter(size_of(self._examples[i].target) for _, _, i in layout)
        shards = num_batch_shards(mesh)
        self._decode_batch_sizes = {
            size: min(number, shards * _max_images(size)) for size, number in most.items()
        }

    def __call__(self, networks: dict[str, Network]) -> list[RGBImage]:
        """Returns one image per example, in order.

        Args:
          networks: all networks of the objective, see ``flow_matching.networks_of``.
        """
        images: dict[int, RGBImage] = {}
        for batch in self.batches(networks):
            images.update(zip(batch.indices, batch.images, strict=True))
        return [images[i] for i in range(len(self._examples))]

    def batches(
        self, networks: dict[str, Network], done: Container[int] = frozenset()
    ) -> Iterator[GeneratedBatch]:
        """Generates batch by batch, and skips batches whose examples are all ``done``.

        Batches hold the same examples whatever is done, so a resumed caller gets the same images
        to the last bit.
        """
        for number, layout in enumerate(self._layouts):
            indices = [example for _, _, example in layout]
            if all(example in done for example in indices):
                continue
            batch = self._batches[number]
            start = time.perf_counter()
            latents = self._sample(networks, batch)
            tokens = [
                latents[row, (batch.segments[row] == segment) & batch.is_target[row]]
                for row, segment, _ in layout
            ]
            images = self._images(tokens, indices, networks["autoencoder"])
            seconds = time.perf_counter() - start
            finite = all(bool(np.isfinite(x).all()) for x in tokens)
            yield GeneratedBatch(number, indices, images, seconds, finite)

    def warm_up(self, networks: dict[str, Network]) -> float:
        """Compiles every program of a call by running one batch; returns the seconds it took."""
        start = time.perf_counter()
        latents = self._sample(networks, self._batches[0])
        autoencoder = networks["autoencoder"]
        side = autoencoder.config.pixels_per_token
        for size in self._decode_batch_sizes:
            first = next(i for i, e in enumerate(self._examples) if size_of(e.target) == size)
            blank = np.zeros((num_tokens(size, side), latents.shape[-1]), latents.dtype)
            self._images([blank], [first], autoencoder)
        return time.perf_counter() - start

    def _sample(self, networks: dict[str, Network], batch: Batch) -> Float[np.ndarray, "B S C"]:
        """Returns the sampled latents of a batch, on the host."""
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
        """Decodes the target tokens of the examples at ``indices``."""
        sizes = [size_of(self._examples[i].target) for i in indices]
        return over_batches(
            lambda size, batch: self._decode(autoencoder, batch, size=size[::-1]),
            tokens,
            sizes,
            self._decode_batch_sizes,
            self._mesh,
        )


def _max_images(size: Size) -> int:
    return max(1, tiling.MAX_PIXELS // math.prod(size))


def _blank_targets(examples: Sequence[Example]) -> list[Example]:
    """Returns the examples with black targets, which share one array per size."""
    blanks = {example.target.shape: np.zeros_like(example.target) for example in examples}
    return [example._replace(target=blanks[example.target.shape]) for example in examples]


class Batches(Sequence):
    """Batches of packed rows, assembled on access."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],  # indices of examples
        batch_size: int,
        assemble_row: Callable[[Sequence[int]], Batch],  # a row, without its row axis
    ):
        self._rows, self._batch_size, self._assemble_row = rows, batch_size, assemble_row

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"There is no batch {number} of {len(self)}.")
        rows = map(self._assemble_row, self._rows_of(number))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def layout(self, number: int) -> list[tuple[int, int, int]]:
        """Returns the (row, segment, example) of every example in a batch."""
        rows = enumerate(self._rows_of(number))
        return [(r, s, i) for r, row in rows for s, i in enumerate(row, start=1)]

    def _rows_of(self, number: int) -> Sequence[Sequence[int]]:
        return self._rows[number * self._batch_size :][: self._batch_size]


def _shape_of(example: Example) -> Shape:
    contexts = tuple(map(size_of, example.contexts))
    return Shape(size_of(example.target), contexts, len(example.text_ids))


def with_room(data: DataConfig, examples: Sequence[Example]) -> DataConfig:
    """Returns the settings with rows long enough for every example.

    Rows of one example are exactly as long as the longest example. Rows of several examples never
    get shorter.
    """
    packing, shapes = data.packing, [_shape_of(example) for example in examples]
    least = packing if packing.max_examples > 1 else PackingConfig(image_tokens=0, text_tokens=0)
    packing = dataclasses.replace(
        packing,
        image_tokens=max(least.image_tokens, *(x.image_tokens(data.geometry) for x in shapes)),
        text_tokens=max(least.text_tokens, *(x.text_tokens for x in shapes)),
    )
    return dataclasses.replace(data, packing=packing)


def pack(
    examples: Sequence[Example], data: DataConfig, mesh: Mesh, with_negatives: bool
) -> tuple[Batches, list[list[tuple[int, int, int]]]]:
    """Packs examples into batches of one shape.

    ``with_negatives`` adds empty prompts to the batches.

    Returns:
      The batches, and for each batch the (row, segment, example) of every example in it.
    """
    names = [example.id for example in examples]
    plan = Plan(list(map(_shape_of, examples)), names, data.packing, data.geometry, seed=0)
    rows = [plan[i][1] for i in range(plan.num_rows)]
    shards = num_batch_shards(mesh)
    batch_size = -(-min(data.batch_size, len(rows)) // shards) * shards
    rows += [[]] * (-len(rows) % batch_size)
    if with_negatives:
        tokenizer = Tokenizer(data.text)
        empty = dict(text_ids=tokenizer(""), clip_ids=tokenizer.clip(""))

    def assemble_row(indices: Sequence[int]) -> Batch:
        chosen = [examples[i] for i in indices]
        row = assemble(chosen, [noise_id(example.id) for example in chosen], plan.slots, data)
        return row.replace(negative=empty_prompts(row, **empty)) if with_negatives else row

    batches = Batches(rows, batch_size, assemble_row)
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
    return to_uint8(tiling.decode(autoencoder, latents))


@jax.jit
def _reconstruct(autoencoder: Autoencoder, images: UInt8[Array, "B h w 3"]) -> Array:
    latents = tiling.encode(autoencoder, to_pixels(images))
    return to_uint8(tiling.decode(autoencoder, latents))


def reconstruct(autoencoder: Autoencoder, images: Sequence[RGBImage], mesh: Mesh) -> list[RGBImage]:
    """Returns each image encoded and decoded, with the mean of its latents."""
    return over_images(lambda batch: _reconstruct(autoencoder, batch), images, mesh)


def over_images(
    function: Callable[[UInt8[Array, "B h w 3"]], Array], images: Sequence[RGBImage], mesh: Mesh
) -> list[np.ndarray]:
    """Maps a compiled function over images, in batches of one size that fit the autoencoder."""
    sizes = [size_of(image) for image in images]
    batch_sizes = {size: min(number, _max_images(size)) for size, number in Counter(sizes).items()}
    return over_batches(lambda _, batch: function(batch), images, sizes, batch_sizes, mesh)
