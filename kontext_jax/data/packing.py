"""Which examples share a row: decided on the host, from token counts alone, before pixels are read.

The plan is random access: row k of an endless run is a pure function of (seed, k). Any number of
hosts can read it, and it resumes from one integer.

Examples of equal shape (same sizes, same text length) form a class. Packing is done once, on
classes: it yields *templates*, rows that say which classes they hold. Every epoch then deals the
examples of each class anew over the places of that class, and shuffles the rows. So every epoch
has the same number of rows, every example occurs in it exactly once, the largest number of images
of a size in a row is known for the whole run, and an epoch costs a few permutations.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from kontext_jax.geometry import GeometryConfig, Size, num_tokens
from kontext_jax.settings import Settings

OPEN_ROWS = 256  # candidates for best fit; more gains nothing measurable
SLOT_SLACK = 1.25  # room for images of a size in a row, as a multiple of the mean
WINDOW = 64  # examples sorted by size at a time: large ones first pack better, all at once worse


@dataclass(kw_only=True, unsafe_hash=True)
class PackingConfig(Settings):
    """Capacity of a row.

    Attributes:
      image_tokens: S, targets and contexts together.
      text_tokens: L.
      max_examples: N.
    """

    image_tokens: int = 8704
    text_tokens: int = 512
    max_examples: int = 1


@dataclass(frozen=True)
class Shape:
    """All that packing needs to know of an example; examples of equal shape are exchangeable."""

    target: Size
    contexts: tuple[Size, ...]
    text_tokens: int

    def image_tokens(self, geometry: GeometryConfig) -> int:
        """Tokens of the target and all contexts."""
        return sum(num_tokens(s, geometry.pixels_per_token) for s in (self.target, *self.contexts))


class Plan:
    """An endless, random-access sequence of packed rows.

    Attributes:
      num_rows: rows an epoch.
      fill: share of the rows' image tokens that examples use.
      text_fill: the same of text tokens.
      slots: the most images of each size, key "HxW", that any row holds.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        names: Sequence[str],
        packing: PackingConfig,
        geometry: GeometryConfig,
        seed: int,
    ):
        """Packs examples of the given ``shapes``; ``names`` are for error messages.

        Raises:
          ValueError: there are no examples, or one does not fit into an empty row.
        """
        if not shapes:
            raise ValueError("The data set is empty: there is nothing to pack.")
        kinds = list(dict.fromkeys(shapes))
        index_of = {shape: i for i, shape in enumerate(kinds)}
        self._class = np.array([index_of[shape] for shape in shapes])
        costs = np.array([(s.image_tokens(geometry), s.text_tokens, 1) for s in kinds])
        capacity = np.array([packing.image_tokens, packing.text_tokens, packing.max_examples])
        too_large = (costs > capacity).any(axis=1)
        if too_large.any():
            first = int(np.argmax(too_large[self._class]))
            i = self._class[first]
            raise ValueError(_too_large(names[first], kinds[i], costs[i], packing))
        images, room = _slots(kinds, self._class, packing, geometry)
        costs, capacity = np.hstack([costs, images]), np.append(capacity, room)

        self._seed = seed
        rng = np.random.default_rng(seed)
        templates = _best_fit(costs[self._class], capacity, rng)
        # A place is (row, position in the row); places of one class are dealt to its examples.
        self._row_starts = np.cumsum([0, *(len(row) for row in templates)])
        places = np.concatenate(templates)
        self._place_class = self._class[places]
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

        self.num_rows = len(templates)
        self.num_examples = len(shapes)
        used = costs[self._class].sum(axis=0)
        self.fill = float(used[0] / (self.num_rows * packing.image_tokens))
        self.text_fill = float(used[1] / (self.num_rows * packing.text_tokens))
        self.slots = self._most_images(kinds)

    def __getitem__(self, row: int) -> tuple[int, list[int]]:
        """The epoch that row ``row`` of the run belongs to, and its examples' indices."""
        epoch, place = divmod(row, self.num_rows)
        order, dealt = self._epoch(epoch)
        row = order[place]
        return epoch, dealt[self._row_starts[row] : self._row_starts[row + 1]].tolist()

    def fingerprint(self) -> str:
        """A hash of the first epoch; other code or another NumPy may plan other rows."""
        order, dealt = self._epoch(0)
        digest = hashlib.sha256()
        for array in (self._row_starts, order, dealt):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the rows, and the example in every place; the last two epochs are kept."""
        found = self._epochs.get(epoch)
        if found is None:
            rng = np.random.default_rng((self._seed, epoch))
            shuffled = rng.permutation(self.num_examples)
            dealt = np.empty(self.num_examples, np.int64)
            # Stable sorts line the shuffled examples of a class up with the class's places.
            places = np.argsort(self._place_class, kind="stable")
            dealt[places] = shuffled[np.argsort(self._class[shuffled], kind="stable")]
            found = rng.permutation(self.num_rows), dealt
            # Threads read rows: what one of them has in hand, another may drop from here.
            self._epochs = dict(list(self._epochs.items())[-1:]) | {epoch: found}
        return found

    def _most_images(self, kinds: list[Shape]) -> dict[str, int]:
        most: Counter[str] = Counter()
        for start, end in zip(self._row_starts[:-1], self._row_starts[1:], strict=True):
            row: Counter[str] = Counter()
            for i in self._place_class[start:end]:
                row.update(size_key(size) for size in (kinds[i].target, *kinds[i].contexts))
            most |= row
        return dict(sorted(most.items()))


def size_key(size: Size) -> str:
    """The name of a size in `Batch.images`: "HxW"."""
    return f"{size[1]}x{size[0]}"


def _slots(
    kinds: Sequence[Shape],
    classes: Int[np.ndarray, " n"],
    packing: PackingConfig,
    geometry: GeometryConfig,
) -> tuple[Int[np.ndarray, "k sizes"], Int[np.ndarray, " sizes"]]:
    """(images of each size in each kind, room for them in a row).

    Encoders see a dense array of every size, as many images a row as the fullest row holds. Rows
    are therefore kept from holding many more of a size than they do on average.
    """
    sizes = sorted({size for kind in kinds for size in (kind.target, *kind.contexts)})
    images = np.array(
        [[(kind.target, *kind.contexts).count(size) for size in sizes] for kind in kinds]
    )
    tokens = np.array([num_tokens(size, geometry.pixels_per_token) for size in sizes])
    totals = images[classes].sum(axis=0)
    mean = totals * packing.image_tokens / (totals @ tokens)
    room = np.maximum(np.ceil(SLOT_SLACK * mean).astype(int), images.max(axis=0))
    return images, room


def _best_fit(
    costs: Int[np.ndarray, "n c"], capacity: Int[np.ndarray, " c"], rng: np.random.Generator
) -> list[list[int]]:
    """Puts each item where it leaves the fewest image tokens free, of the rows that can take it.

    Columns: image tokens, text tokens, examples, then images of each size.
    """
    order = rng.permutation(len(costs))
    share = (costs[:, :2] / capacity[:2]).sum(axis=1)  # of a row, images and text together
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
            if len(open_rows) == OPEN_ROWS:  # the fullest row is closed for good
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
            f"Example {name} ({images}) needs {cost[0]} image tokens, a row holds "
            f"{packing.image_tokens}: raise packing.image_tokens or use smaller geometry.sizes."
        )
    return (
        f"The prompt of example {name} needs {cost[1]} text tokens, a row holds "
        f"{packing.text_tokens}: raise packing.text_tokens or lower text.max_tokens."
    )
