"""What packing needs to know of examples: sizes of images and lengths of texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int, Integer

from kontext_jax.geometry import GeometryConfig, Size, num_tokens


@dataclass(frozen=True)
class Shape:
    """The sizes of an example that packing depends on."""

    target: Size
    contexts: tuple[Size, ...]
    text_tokens: int

    def image_tokens(self, geometry: GeometryConfig) -> int:
        """Number of tokens of the target and all contexts."""
        return sum(num_tokens(s, geometry.pixels_per_token) for s in (self.target, *self.contexts))


@dataclass(frozen=True)
class Shapes(Sequence):  # of Shape
    """The shapes of n examples, as columns that may be memory-mapped.

    Examples with the same images refer to one entry of a table.

    Attributes:
      sizes: every size that occurs, and maybe others.
      images: size of each image of the table, as an index to ``sizes``; an entry begins with its
        target.
      ends: end of each of the table's k entries in ``images``.
      entries: entry of each example.
      lengths: length of each example's text, in any unit.
      text_tokens: converts an array of lengths to numbers of text tokens.
    """

    sizes: tuple[Size, ...]
    images: Int[np.ndarray, " m"]
    ends: Integer[np.ndarray, " k"]
    entries: Integer[np.ndarray, " n"]
    lengths: Integer[np.ndarray, " n"]
    text_tokens: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, shapes: Sequence[Shape]) -> "Shapes":
        """Gathers shapes into columns."""
        images = [(shape.target, *shape.contexts) for shape in shapes]
        table = {entry: i for i, entry in enumerate(dict.fromkeys(images))}
        code = {size: i for i, size in enumerate(sorted({s for entry in table for s in entry}))}
        return cls(
            sizes=tuple(code),
            images=np.array([code[size] for entry in table for size in entry], np.int64),
            ends=np.cumsum([len(entry) for entry in table]),
            entries=np.array([table[entry] for entry in images], np.int64),
            lengths=np.array([shape.text_tokens for shape in shapes], np.int64),
            text_tokens=np.asarray,
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: SupportsIndex) -> Shape:
        entry = int(self.entries[index])
        start = int(self.ends[entry - 1]) if entry else 0
        target, *contexts = (self.sizes[i] for i in self.images[start : int(self.ends[entry])])
        [tokens] = self.text_tokens(np.asarray(self.lengths[index])[None])
        return Shape(target, tuple(contexts), int(tokens))
