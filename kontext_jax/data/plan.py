"""Decides on the host which examples share a row, from token counts alone, before pixels are read.

The plan is random access: row k of an endless run is a pure function of (seed, k) and the data set.
Any number of hosts can read it, and a run resumes from one integer.

All epochs have the same rows, but for the examples in them: `Layout` has their templates, which
list a class of exchangeable examples for each place. A keyed permutation per epoch shuffles the
rows, and one per epoch and class deals the examples of the class to its places. So each example
occurs exactly once per epoch, the number of images of a size in a row is bounded for the whole run,
and the first row takes no longer than the millionth.
"""

from collections.abc import Sequence

import numpy as np

from kontext_jax.data.layout import Cache, Layout
from kontext_jax.data.packing import PackingConfig, size_key
from kontext_jax.data.permutation import permuted
from kontext_jax.data.shapes import Shape, Shapes
from kontext_jax.files import short_digest
from kontext_jax.geometry import GeometryConfig


class Plan:
    """An endless, random-access sequence of packed rows.

    Attributes:
      num_rows: rows per epoch.
      num_examples: examples per epoch.
      fill: share of the rows' image tokens that examples use.
      text_fill: share of the rows' text tokens that examples use.
      slots: most images of each size, key "HxW", that any row can hold.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        names: Sequence[str],
        packing: PackingConfig,
        geometry: GeometryConfig,
        seed: int,
        cache: Cache | None = None,
    ):
        """Packs examples of the given ``shapes``; ``names`` appear in error messages.

        Raises:
          OSError: no folder of the cache can be written to.
          ValueError: there are no examples, one does not fit into an empty row, or a file of the
            cache is damaged.
        """
        if not len(shapes):
            raise ValueError("The data set is empty: add examples to it.")
        if not isinstance(shapes, Shapes):
            shapes = Shapes.of(shapes)
        layout = Layout.of(shapes, names, packing, geometry, cache)
        self._layout, self._seed = layout, seed
        self._row_ends = np.cumsum(layout.templates.repeats)
        self._first_places = _first_places(layout)

        self.num_rows = int(self._row_ends[-1])
        self.num_examples = len(shapes)
        capacity = np.array([packing.image_tokens, packing.text_tokens]) * self.num_rows
        self.fill, self.text_fill = (layout.used / capacity).tolist()
        slots = zip(map(size_key, shapes.sizes), layout.slots.tolist(), strict=True)
        self.slots = {key: count for key, count in sorted(slots) if count}

    def __getitem__(self, row: int) -> tuple[int, list[int]]:
        """The epoch of row ``row`` of the run, and the indices of the row's examples."""
        epoch, position = divmod(row, self.num_rows)
        number = permuted(position, self.num_rows, f"{self._seed} {epoch} rows")
        template = int(np.searchsorted(self._row_ends, number, side="right"))
        templates = self._layout.templates
        repetition = number - int(self._row_ends[template] - templates.repeats[template])
        end = int(templates.ends[template])
        start = int(templates.ends[template - 1]) if template else 0
        return epoch, [
            self._example(epoch, int(templates.classes[i]), int(self._first_places[i]) + repetition)
            for i in range(start, end)
        ]

    def fingerprint(self) -> str:
        """A hash of the rows; another version of this code may plan others."""
        layout = self._layout
        arrays = (*layout.templates, layout.class_ends[:, -1], *(self[i][1] for i in range(3)))
        return short_digest(b"".join(np.asarray(x, np.int64).tobytes() for x in arrays))

    def _example(self, epoch: int, class_: int, place: int) -> int:
        """The example that takes a place of its class."""
        count = int(self._layout.class_ends[class_, -1])
        rank = permuted(place, count, f"{self._seed} {epoch} {class_}")
        return self._layout.example(class_, rank)


def _first_places(layout: Layout) -> np.ndarray:
    """First place, among those of its class, of each entry of ``layout.templates.classes``."""
    templates = layout.templates
    repeats = np.repeat(templates.repeats, np.diff(templates.ends, prepend=0))
    by_class = np.argsort(templates.classes, kind="stable")
    before = np.cumsum(repeats[by_class]) - repeats[by_class]
    _, first, of = np.unique(templates.classes[by_class], return_index=True, return_inverse=True)
    places = np.empty_like(repeats)
    places[by_class] = before - before[first][of]
    return places
