"""Random weights and inputs drawn with NumPy, so that PyTorch's outputs can be stored and compared.

A tensor depends only on its name and shape, and not on the order of draws or the layout of files.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kontext_jax.geometry import GeometryConfig, Size, num_tokens, position_ids
from kontext_jax.models.flux import FluxConfig

PIXELS_PER_TOKEN = 8
TEXT_LENGTHS = (5, 9, 7)  # of the examples of a row
PADDING = 3  # tokens after the last example of a row

LAYOUTS: dict[str, tuple[tuple[Size, ...], ...]] = {
    "text_to_image": (((32, 24),),),
    "one_context": (((24, 32), (40, 24)),),
    "two_contexts": (((32, 24), (40, 16), (16, 48)),),
    "packed": (((24, 24), (16, 40), (32, 24)), ((32, 16),), ((16, 24), (24, 40))),
}
"""Sizes of the target and context images of every example of a row."""


def normal(name: str, *shape: int) -> np.ndarray:
    """Returns float32 normals that depend on the name and shape.

    RandomState gives the same numbers in every version of NumPy; a Generator may not.
    """
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return state.standard_normal(shape).astype(np.float32)


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns a tensor of a network in PyTorch's layout, without zeros and ones, which hide errors.

    Matrices and convolutions preserve variance, embedding tables have unit variance, and scales of
    norms are around one. The layers after the sinusoids of time and guidance have FLUX's initial
    deviation of 0.02, because PyTorch's exp does not round all frequencies to the nearest float32,
    and at a guidance of 2.5 an angle is 2,500 times the frequency.
    """
    x = normal(name, *shape)
    if name.endswith(("timestep_embedder.linear_1.weight", "guidance_embedder.linear_1.weight")):
        return np.float32(0.02) * x
    tables = ("shared.weight", "embedding.weight", "relative_attention_bias.weight")
    if name.endswith((*tables, "position_embeddings", "cls_token")):
        return x
    if len(shape) > 1:
        return (x * np.prod(shape[1:]) ** -0.5).astype(np.float32)
    return np.float32(name.endswith(".weight")) + np.float32(0.2) * x


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Returns all tensors of a network, given their shapes by name."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def checksum(name: str, gradient: np.ndarray) -> np.ndarray:
    """Returns the norm of a gradient, and its product with a direction drawn for its name."""
    exact = gradient.astype(np.float64)
    return np.array([np.linalg.norm(exact), np.sum(exact * normal(f"along/{name}", *exact.shape))])


class Example(NamedTuple):
    """One example's inputs to the transformer, and the target velocity of its loss.

    ``latents`` and ``positions`` are those of the target's tokens, then of the contexts' tokens.
    """

    latents: np.ndarray
    positions: np.ndarray
    text: np.ndarray
    pooled: np.ndarray
    t: np.float32
    guidance: np.float32
    velocity: np.ndarray


def examples(layout: str, config: FluxConfig) -> list[Example]:
    """Returns the examples of a row, see `LAYOUTS`."""
    geometry = GeometryConfig(
        sizes=tuple({size for sizes in LAYOUTS[layout] for size in sizes}),
        pixels_per_token=PIXELS_PER_TOKEN,
    )
    row = []
    for i, (target, *contexts) in enumerate(LAYOUTS[layout]):
        positions, name = position_ids(target, contexts, geometry), f"{layout}/{i}"
        num_target = num_tokens(target, PIXELS_PER_TOKEN)
        row.append(
            Example(
                latents=normal(f"{name}/latents", len(positions), config.in_channels),
                positions=positions,
                text=normal(f"{name}/text", TEXT_LENGTHS[i], config.context_in_dim),
                pooled=normal(f"{name}/pooled", config.vec_in_dim),
                t=np.float32([0.825821, 0.31, 0.0427][i]),
                guidance=np.float32([2.5, 3.5, 1.0][i]),
                velocity=normal(f"{name}/velocity", num_target, config.in_channels),
            )
        )
    return row


def pixels(name: str, *shape: int) -> np.ndarray:
    """Returns random numbers in (-1, 1)."""
    return np.tanh(normal(name, *shape))


def prompts(name: str, lengths: Sequence[int], size: int, vocab_size: int, end: int, pad: int):
    """Returns (ids, mask): one row of ids per prompt, and a mask that is False for padding.

    Args:
      name: seed of the ids.
      lengths: words of each prompt before its end.
      size: length of the rows.
      vocab_size, end, pad: size of the vocabulary, end id and padding id.
    """
    ids = np.full((len(lengths), size), pad, np.int32)
    words = (np.abs(normal(name, len(lengths), size)) * 1000).astype(np.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = 3 + words[row, :length] % (vocab_size - 5)
        ids[row, length] = end
    return ids, np.arange(size)[None] <= np.asarray(lengths)[:, None]
