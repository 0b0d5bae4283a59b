"""Images of a fixed set of examples: what sheets show and what metrics are computed on."""

from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from kontext_jax.data.packing import Plan, Shape, size_key
from kontext_jax.data.pipeline import DataConfig, assemble, negatives, noise_id
from kontext_jax.data.text import Tokenizer
from kontext_jax.encoders import encode_images
from kontext_jax.geometry import num_tokens, size_of
from kontext_jax.models.autoencoder import Autoencoder, to_pixels, to_uint8, unpack_latents
from kontext_jax.objectives import Network
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.sharding import batch_sharding, num_batch_shards
from kontext_jax.types import Batch, Example, unprompted

Image = UInt8[np.ndarray, "_ _ 3"]

MAX_PIXELS = 2**21
"""Decoded at once: two images of a megapixel."""


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
        self._examples = [_blind(e) if sampler.strength == 1 else e for e in examples]
        self._batches, self._layout = _pack(self._examples, data, mesh, sampler.cfg_scale != 1.0)
        self._key = jax.random.key(seed)
        self._latents = jax.jit(
            lambda networks, batch, key: _sample(networks, batch, key, sampler, objective)
        )
        self._decode = jax.jit(_decode, static_argnames="size")

    def __call__(self, networks: dict[str, Network]) -> list[Image]:
        """An image for each example, in their order.

        Args:
          networks: all that the objective has, see ``flow_matching.networks_of``.
        """
        tokens: dict[int, np.ndarray] = {}
        with jax.set_mesh(self._mesh):
            for batch, layout in zip(self._batches, self._layout, strict=True):
                latents = self._sample(networks, batch)
                for row, segment, example in layout:
                    mine = (batch.segments[row] == segment) & batch.is_target[row]
                    tokens[example] = latents[row, mine]
            return self._images(tokens, networks["autoencoder"])

    def warm_up(self, networks: dict[str, Network]) -> None:
        """Compiles all that a call runs, on one batch, so that the next call can be timed."""
        with jax.set_mesh(self._mesh):
            latents = self._sample(networks, self._batches[0])
            side = networks["autoencoder"].config.pixels_per_token
            blanks = {}
            for i, example in enumerate(self._examples):
                shape = num_tokens(size_of(example.target), side), latents.shape[-1]
                blanks[i] = np.zeros(shape, latents.dtype)
            self._images(blanks, networks["autoencoder"])

    def _sample(self, networks: dict[str, Network], batch: Batch) -> Float[np.ndarray, "B S C"]:
        """The latents of a batch, under the mesh in use."""
        on_device = jax.device_put(batch, batch_sharding(self._mesh))
        latents = self._latents(networks, on_device, self._key)
        return np.asarray(multihost_utils.process_allgather(latents, tiled=True))

    def _images(self, tokens: dict[int, np.ndarray], autoencoder: Autoencoder) -> list[Image]:
        """Decodes images of equal size together, under the mesh in use."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, example in enumerate(self._examples):
            groups[example.target.shape[:2]].append(i)
        images: dict[int, Image] = {}
        for size, members in groups.items():
            stacked = np.stack([tokens[i] for i in members])
            # Equal chunks, the last one filled up, so that each size compiles once.
            chunk = min(len(members), 64, max(1, MAX_PIXELS // (size[0] * size[1])))
            padded = np.concatenate([stacked, np.repeat(stacked[-1:], -len(members) % chunk, 0)])
            for start in range(0, len(padded), chunk):
                part = self._decode(autoencoder, padded[start : start + chunk], size=size)
                part = multihost_utils.process_allgather(part, tiled=True)
                images.update(zip(members[start : start + chunk], part, strict=False))
        return [images[i] for i in range(len(self._examples))]


def _blind(example: Example) -> Example:
    return example._replace(target=np.zeros_like(example.target))


def _pack(
    examples: Sequence[Example], data: DataConfig, mesh: Mesh, with_negatives: bool
) -> tuple[list[Batch], list[list[tuple[int, int, int]]]]:
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

    batches, layouts = [], []
    for start in range(0, len(rows), size_of_batch):
        group = rows[start : start + size_of_batch]
        batches.append(jax.tree.map(lambda *leaves: np.stack(leaves), *map(assembled, group)))
        layouts.append(
            [(r, s, i) for r, row in enumerate(group) for s, i in enumerate(row, start=1)]
        )
    return batches, layouts


def _sample(networks, batch, key, sampler, objective) -> Float[Array, "B S C"]:
    latents = encode_images(networks["autoencoder"], batch)
    tokens, negative = objective.tokens(networks, batch, latents), None
    if batch.negative is not None:
        negative = objective.tokens(networks, unprompted(batch), latents)
    return sample(networks["transformer"], tokens, key, sampler, objective.time, negative)


def _decode(
    autoencoder: Autoencoder, tokens: Float[Array, "B S C"], size: tuple[int, int]
) -> UInt8[Array, "B h w 3"]:
    cell = autoencoder.config.downsample
    latents = unpack_latents(tokens, (size[0] // cell, size[1] // cell))
    return to_uint8(autoencoder.decode(latents))


@jax.jit
def _reconstruct(autoencoder: Autoencoder, images: UInt8[Array, "B h w 3"]) -> Array:
    return to_uint8(autoencoder.decode(autoencoder.encode(to_pixels(images))))


def reconstruct(autoencoder: Autoencoder, images: Sequence[Image]) -> list[Image]:
    """Each image through the autoencoder, by the mean of its latents, under the mesh in use."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        groups[size_key(size_of(image))].append(i)
    results: dict[int, Image] = {}
    for members in groups.values():
        out = _reconstruct(autoencoder, np.stack([images[i] for i in members]))
        out = multihost_utils.process_allgather(out, tiled=True)
        results.update(zip(members, out, strict=True))
    return [results[i] for i in range(len(images))]
