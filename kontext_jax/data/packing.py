"""Decides on the host which examples share a row, from token counts alone, before pixels are read.

The plan is random access: row k of an endless run is a pure function of (seed, k). Any number of
hosts can read it, and a run resumes from one integer.

Examples of equal shape (same sizes, same text length) form a class. Packing runs once, on classes,
and yields *templates*: rows that list the classes of their examples. Every epoch assigns the
examples of each class at random to the places of that class, and shuffles the rows. So all epochs
have the same number of rows, each example occurs exactly once per epoch, the largest number of
images of a size in any row is known for the whole run, and an epoch costs a few permutations.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from kontext_jax.files import short_digest
from kontext_jax.geometry import GeometryConfig, Size, num_tokens
from kontext_jax.settings import Settings

OPEN_ROWS = 256  # candidates for best fit; more gain nothing measurable
SLOT_SLACK = 1.25  # limit on the images of one size in a row, as a multiple of the mean
WINDOW = 64  # examples sorted by size at a time; sorting helps, but sorting all of them hurts


@dataclass(kw_only=True, unsafe_hash=True)
class PackingConfig(Settings):
    """Capacity of a row.

    Attributes:
      image_tokens: S, targets and contexts together.
      text_tokens: L, all prompts together.
      max_examples: N.
    """

    image_tokens: int = 8704
    text_tokens: int = 512
    max_examples: int = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of an example that packing depends on; examples of equal shape are exchangeable."""

    target: Size
    contexts: tuple[Size, ...]
    text_tokens: int

    def image_tokens(self, geometry: GeometryConfig) -> int:
        """Number of tokens of the target and all contexts."""
        return sum(num_tokens(s, geometry.pixels_per_token) for s in (self.target, *self.contexts))


class Plan:
    """An endless, random-access sequence of packed rows.

    Attributes:
      num_rows: rows per epoch.
      num_examples: examples per epoch.
      fill: share of the rows' image tokens that examples use.
      text_fill: share of the rows' text tokens that examples use.
      slots: largest number of images of each size, key "HxW", in any row.
    """

    _computing_epoch = threading.Lock()  # on the class, shared by all plans: plans are pickled

    def __init__(
        self,
        shapes: Sequence[Shape],
        names: Sequence[str],
        packing: PackingConfig,
        geometry: GeometryConfig,
        seed: int,
    ):
        """Packs examples of the given ``shapes``; ``names`` appear in error messages.

        Raises:
          ValueError: there are no examples, or one does not fit into an empty row.
        """
        if not shapes:
            raise ValueError("The data set is empty: add examples to it.")
        classes = list(dict.fromkeys(shapes))
        class_of = {shape: i for i, shape in enumerate(classes)}
        self._class = np.array([class_of[shape] for shape in shapes])
        costs = np.array([(s.image_tokens(geometry), s.text_tokens, 1) for s in classes])
        capacity = np.array([packing.image_tokens, packing.text_tokens, packing.max_examples])
        too_large = (costs > capacity).any(axis=1)
        if too_large.any():
            first = int(np.argmax(too_large[self._class]))
            i = self._class[first]
            raise ValueError(_too_large(names[first], classes[i], costs[i], packing))
        images, limits = _image_limits(classes, self._class, packing, geometry)
        costs, capacity = np.hstack([costs, images]), np.append(capacity, limits)

        self._seed = seed
        rng = np.random.default_rng(seed)
        templates = _best_fit(costs[self._class], capacity, rng)
        # A place is (row, position in the row); it takes any example of its class.
        self._row_starts = np.cumsum([0, *(len(row) for row in templates)])
        places = np.concatenate(templates)
        self._place_class = self._class[places]
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

        self.num_rows = len(templates)
        self.num_examples = len(shapes)
        used = costs[self._class].sum(axis=0)
        self.fill = float(used[0] / (self.num_rows * packing.image_tokens))
        self.text_fill = float(used[1] / (self.num_rows * packing.text_tokens))
        self.slots = self._most_images(classes)

    def __getitem__(self, row: int) -> tuple[int, list[int]]:
        """The epoch of row ``row`` of the run, and the indices of the row's examples."""
        epoch, position = divmod(row, self.num_rows)
        order, examples = self._epoch(epoch)
        row = order[position]
        return epoch, examples[self._row_starts[row] : self._row_starts[row + 1]].tolist()

    def fingerprint(self) -> str:
        """A hash of the first epoch; another version of this code or NumPy may plan other rows."""
        arrays = (self._row_starts, *self._epoch(0))
        return short_digest(b"".join(array.astype(np.int64).tobytes() for array in arrays))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the rows, and the example in each place; the last two epochs are cached."""
        with self._computing_epoch:  # threads read rows
            if epoch not in self._epochs:
                rng = np.random.default_rng((self._seed, epoch))
                shuffled = rng.permutation(self.num_examples)
                examples = np.empty(self.num_examples, np.int64)
                # Stable sorts align the shuffled examples of each class with the class's places.
                places = np.argsort(self._place_class, kind="stable")
                examples[places] = shuffled[np.argsort(self._class[shuffled], kind="stable")]
                latest = list(self._epochs.items())[-1:]
                self._epochs = dict(latest) | {epoch: (rng.permutation(self.num_rows), examples)}
            return self._epochs[epoch]

    def _most_images(self, classes: list[Shape]) -> dict[str, int]:
        most: Counter[str] = Counter()
        for start, end in zip(self._row_starts[:-1], self._row_starts[1:], strict=True):
            row: Counter[str] = Counter()
            for i in self._place_class[start:end]:
                row.update(size_key(size) for size in (classes[i].target, *classes[i].contexts))
            most |= row
        return dict(sorted(most.items()))


def size_key(size: Size) -> str:
    """Key of a size in `Batch.images`: "HxW"."""
    return f"{size[1]}x{size[0]}"


def _image_limits(
    classes: Sequence[Shape],
    example_classes: Int[np.ndarray, " n"],
    packing: PackingConfig,
    geometry: GeometryConfig,
) -> tuple[Int[np.ndarray, "k sizes"], Int[np.ndarray, " sizes"]]:
    """(images of each size in each class, the most that a row may hold).

    Encoders see one dense array per size, with as many images per row as the fullest row holds. So
    no row may hold many more images of a size than rows hold on average.
    """
    sizes = sorted({size for shape in classes for size in (shape.target, *shape.contexts)})
    images = np.array(
        [[(shape.target, *shape.contexts).count(size) for size in sizes] for shape in classes]
    )
    tokens = np.array([num_tokens(size, geometry.pixels_per_token) for size in sizes])
    totals = images[example_classes].sum(axis=0)
    mean = totals * packing.image_tokens / (totals @ tokens)
    limits = np.maximum(np.ceil(SLOT_SLACK * mean).astype(int), images.max(axis=0))
    return images, limits


def _best_fit(
    costs: Int[np.ndarray, "n c"], capacity: Int[np.ndarray, " c"], rng: np.random.Generator
) -> list[list[int]]:
    """Best-fit packing: puts each item into the row that it leaves the fewest free image tokens in.

    Columns: image tokens, text tokens, examples, then images of each size.
    """
    order = rng.permutation(len(costs))
    share = (costs[:, :2] / capacity[:2]).sum(axis=1)  # of a row
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        order[start : start + WINDOW] = window[np.argsort(-share[window], kind="stable")]
    rows: list[list[int]] = []
    open_rows = np.empty(0, np.int64)
    free = np.empty((0, len(capacity)), np.int64)
    for item in order:
        fits = (free >= costs[item]).all(axis=1)
        if fits.any():
            best = int(np.argmin(np.where(fits, free[:, 0], np.iinfo(np.int64).max)))
        else:
            if len(open_rows) == OPEN_ROWS:  # close the fullest row
                fullest = int(np.argmin(free[:, 0]))
                open_rows, free = np.delete(open_rows, fullest), np.delete(free, fullest, axis=0)
            open_rows = np.append(open_rows, len(rows))
            free = np.concatenate([free, capacity[None]])
            rows.append([])
            best = len(open_rows) - 1
        rows[open_rows[best]].append(int(item))
        free[best] -= costs[item]
        if (free[best] == 0)[[0, 2]].any():
            open_rows, free = np.delete(open_rows, best), np.delete(free, best, axis=0)
    return rows


def _too_large(name: str, shape: Shape, cost: np.ndarray, packing: PackingConfig) -> str:
    images = " + ".join(size_key(size) for size in (shape.target, *shape.contexts))
    if cost[0] > packing.image_tokens:
        return (
            f"Example {name} ({images}) needs {cost[0]} image tokens, but a row holds "
            f"{packing.image_tokens}: raise packing.image_tokens or use smaller geometry.sizes."
        )
    return (
        f"The prompt of example {name} needs {cost[1]} text tokens, but a row holds "
        f"{packing.text_tokens}: raise packing.text_tokens or lower text.max_tokens."
    )
